# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What to do about weights that are not there: fetch what the bundle leaves out, or make them.

A bundle may leave its weights to a server; ``large_files.yml`` beside its ``models`` then says which files are missing.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..paths import as_path
from ..terminal import openmind

__all__ = ["encoder_remedy", "fetch_command", "import_tool"]

_TOOL = "tools/import_checkpoint.py"


def fetch_command(path: str | Path) -> str | None:
    """Return what to run for a file that the ``large_files.yml`` of its bundle names, None for any other file.

    Args:
        path: of a file that is missing, ``models/<name>`` in the folder of a bundle.
    """
    folder = as_path(path).parent.parent
    listing = folder / "large_files.yml"
    if not listing.is_file():
        return None
    listed = re.findall(r"^[\s-]*path: *(.+?) *$", listing.read_text("utf-8"), re.M)  # PyYAML need not be there
    if not any(folder / name.strip("'\"") == as_path(path) for name in listed):
        return None
    return f"fetch it: python -m monai.bundle download_large_files --bundle_path {folder}"


def import_tool() -> str:
    """Return the tool that imports published weights, as it is to be called from where this code runs."""
    if (command := openmind()) is not None:
        return f"{command} import"
    there = (Path(__file__).resolve().parents[2] / _TOOL).is_file()
    return _TOOL if there else f"{_TOOL} of the OpenMind bundle collection"


def encoder_remedy(path: str | Path) -> str:
    """Return what to do about a pre-trained encoder that is missing, as the first parts of a list of choices."""
    if fetch := fetch_command(path):
        return f"{fetch}, name another file with --pretrained"
    choices = ["run this bundle's pretrain config first", "name another file with --pretrained"]
    if "of the" not in (tool := import_tool()):
        choices.insert(1, f"import the published weights with {tool}")
    return ", ".join(choices)
