# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the tools for weights need to know of a bundle: its networks, from its own pretrain config, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from torch import nn

from common.bundles import read_config
from common.errors import SettingsError
from common.files import replace_file
from common.settings import unknown_settings
from common.weights import Cell

from ..commanding.environment import ROOT, kept

__all__ = ["bundle_cell", "published_file", "record_digest"]


def bundle_cell(bundle: str, settings: dict[str, Any], *, with_method: bool = False) -> tuple[Cell, nn.Module | None]:
    """Build the networks of a bundle without their numbers.

    Args:
        bundle: name.
        settings: of its pretrain config to change, for networks of another size.
        with_method: build the whole pre-training method too.

    Raises:
        SettingsError: if there is no such setting.
    """
    config = read_config(ROOT / "bundles" / bundle / "configs" / "pretrain.yaml")
    if told := unknown_settings(settings, config):
        raise SettingsError(told)
    parser = ConfigParser(config)
    parser.update(settings)
    with torch.device("meta"):
        backbone = parser.get_parsed_content("backbone")
        method = parser.get_parsed_content("method") if with_method else None
    side = parser.get_parsed_content("crop_size" if "crop_size" in config else "patch_size")
    return (
        Cell(
            bundle,
            backbone,
            patch_size=[side] * 3 if isinstance(side, int) else list(side),
            num_heads=parser.get_parsed_content("num_heads") if "num_heads" in config else None,
            spacing_mm=parser.get_parsed_content("spacing_mm"),
        ),
        method,
    )


def published_file(bundle: str) -> tuple[str, Path, str | None] | None:
    """Return address, place and sha256 (if certain) of a bundle's published checkpoint, None if it has none."""
    folder = ROOT / "bundles" / bundle
    files = yaml.safe_load((folder / "large_files.yml").read_text("utf-8"))["large_files"]
    if not files:
        return None
    return files[0]["url"], kept(bundle) / files[0]["path"], files[0].get("hash_val")


def record_digest(bundle: str, digest: str) -> str:
    """Write the SHA-256 of a published checkpoint that was seen first into the bundle's catalogue, large_files.yml.

    From then on the tool, and MONAI's ``download_large_files``, refuse another file.

    Returns:
        what to tell the user.
    """
    path = ROOT / "bundles" / bundle / "large_files.yml"
    lines = path.read_text("utf-8").splitlines()
    after = 1 + next(number for number, line in enumerate(lines) if line.lstrip("- ").startswith("url:"))
    lines[after:after] = [f"  hash_val: {digest}  # of the file that came first", "  hash_type: sha256"]
    try:
        replace_file(path, lambda temporary: Path(temporary).write_text("\n".join(lines) + "\n", "utf-8"))
    except OSError as error:
        return f"note: the sha256 {digest} could not be kept in {path} ({error.strerror}), so it is not compared"
    return f"kept in {path}: sha256 {digest}; another file is refused from now on"
