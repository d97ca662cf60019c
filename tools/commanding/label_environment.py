# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The environment in which the tests start a MONAI Label server: .venv-label, apart from the project's own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from .environment import ROOT, _check, alone, install, make, python_of
from .locks import LABEL, read_lock

__all__ = ["label_python"]

_STANDIN = ROOT / "tests" / "ecosystem" / "torchvision_standin"
_LAST = ("sam2", "torchvision")  # is built with the torch that is installed; is stood in for


def label_python() -> Path:
    """Return the interpreter of ``.venv-label``, making and filling it first if needed.

    Raises:
        SystemExit: if the installation fails.
    """
    folder = ROOT / ".venv-label"
    python = python_of(folder)
    if python.exists() and not _check(python, (LABEL,)):
        return python
    with alone(folder):
        if not python.exists() or _check(python, (LABEL,)):  # nobody else has done it meanwhile
            _fill(folder)
    return python


def _fill(folder: Path) -> None:
    """Make the environment and install what its lock has."""
    python = python_of(folder)
    make(folder, again=True)
    print(f"installing {LABEL} into it (once; a few minutes)", flush=True)
    os.environ["SAM2_BUILD_CUDA"] = "0"
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / LABEL
        entries = (package.text() for package in read_lock(ROOT / "locks" / LABEL) if package.name not in _LAST)
        first.write_text("".join(entries), "utf-8")
        install(python, str(first))
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", str(_STANDIN)]
    if subprocess.run(command).returncode:
        raise SystemExit(f"Stopped: pip could not install {_STANDIN}; see its message above")
    install(python, LABEL, options=("--no-build-isolation",))
