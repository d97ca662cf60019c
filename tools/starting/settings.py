# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the quick start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..commanding.settings import Bundle, From, Reads, RefusalError, read, settings

__all__ = ["Quickstart"]


def _data(value: Any) -> Path:
    folder: Path = read(Path, value)
    if not folder.is_dir():
        raise RefusalError(f"there is no folder {folder}; give --data a folder with NIfTI files")
    return folder.absolute()


@settings
class Quickstart:
    """What ``quickstart`` is told."""

    bundle: Bundle = "mae_resenc_l"
    """Any of the folders in bundles/."""
    data: Annotated[Path, Reads(_data, "a folder")] | None = None
    """Folder of your own NIfTI; with images/ and labels/ inside, segmentation is learned too."""
    output: Path | None = None
    """Where everything goes; default quickstart/<bundle>."""
    seed: Annotated[int, From(0)] = 0
    """Of data, draws and networks."""
    scale: Annotated[float, From(0, above=True)] = 1.0
    """Factor on the number of training steps."""
