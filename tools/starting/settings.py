# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the quick start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from common.errors import SettingsError

from ..commanding.settings import Bundle, From, Labels, Reads, RefusalError, read, settings

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
    labels: Labels | None = None
    """Names of the label values of your data 0, 1, 2, ..., background first; the value of each name; or a
    dataset.json. By default they are called class 1, class 2, ..."""
    output: Path | None = None
    """Where everything goes; default quickstart/<bundle>."""
    seed: Annotated[int, From(0)] = 0
    """Of data, draws and networks."""
    scale: Annotated[float, From(0, above=True)] = 1.0
    """Factor on the number of training steps: 0.2 for a first try, 4 for a better look, at four times the time."""
    repeats: Annotated[int, From(1)] = 3
    """Fine-tunings of each kind, which differ in their seed; with one, no difference can be told from chance."""

    def __post_init__(self) -> None:
        if self.labels is not None and self.data is None:
            raise SettingsError("--labels names the classes of your own data; give --data FOLDER too")
