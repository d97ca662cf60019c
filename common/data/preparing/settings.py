# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How volumes are prepared: what the voxels of the store depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ...errors import DataError, SettingsError

__all__ = ["BLOCK", "StoreSettings", "volume_settings"]

BLOCK = (16, 16, 32)  # voxels that are compressed together
_FITS = ("resize", "crop")


@dataclass(frozen=True)
class StoreSettings:
    """What the stored voxels depend on.

    Attributes:
        spacing_mm: target spacing, None to keep each file's own.
        reorient: canonical axes, or the file's own.
        dtype: ``float16`` or ``float32``.
        normalization: scheme of ``NormalizeChannelsd``, one for all channels or one for each.
        channels: of an image.
        size: voxels (slice, row, column) that every volume is resized to at the end; None for none.

    Raises:
        SettingsError: if the spacing or the size is not positive.
        DataError: if there is no such ``dtype``.
    """

    spacing_mm: float | Sequence[float] | None = 1.0
    reorient: bool = True
    dtype: str = "float16"
    normalization: str | Sequence[Any] = "zscore"
    channels: int = 1
    size: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.spacing_mm is not None:  # one spelling for one meaning: it becomes part of the files' names
            try:
                sides = [self.spacing_mm] * 3 if isinstance(self.spacing_mm, (int, float)) else list(self.spacing_mm)
                spacing = tuple(float(side) for side in sides)
            except (TypeError, ValueError):
                spacing = ()
            if len(spacing) != 3 or not all(0 < side < math.inf for side in spacing):
                raise SettingsError(
                    f"spacing_mm is {self.spacing_mm!r}; write one positive number, three, or null for each file's own"
                )
            object.__setattr__(self, "spacing_mm", spacing)
        if isinstance(self.normalization, str):
            object.__setattr__(self, "normalization", [self.normalization])
        if self.size is not None:
            object.__setattr__(self, "size", tuple(int(side) for side in self.size))
            if len(self.size) != 3 or min(self.size) < 1:
                raise SettingsError(f"size is {self.size!r}; it must be three numbers of voxels")
        if self.dtype not in ("float16", "float32"):
            raise DataError(f"store_dtype is {self.dtype!r}; it must be float16 or float32")


def volume_settings(
    *,
    fit: str,
    input_size: Sequence[int],
    spacing_mm: float | Sequence[float] | None,
    normalization: str | Sequence[Any] = "zscore",
    channels: int = 1,
    reorient: bool = True,
) -> dict[str, Any]:
    """Return the preprocessing of whole volumes, as arguments of ``StoreSettings``.

    Args:
        fit: ``resize`` brings the cropped volume to ``input_size``, whatever spacing that gives, as published for the
            benchmark's tasks; ``crop`` brings it to ``spacing_mm``, and the middle is cut out or zeros are put around.
        input_size: voxels (slice, row, column) that the network sees.
        spacing_mm: for ``crop``.
        normalization: scheme of ``NormalizeChannelsd``, one for all channels or one for each.
        channels: images of a case.
        reorient: canonical axes, or each file's own.

    Raises:
        SettingsError: if a value is not one of these.
    """
    if fit not in _FITS:
        raise SettingsError(f"fit is {fit!r}; it must be resize (whole volume) or crop (fixed spacing, its middle)")
    if isinstance(input_size, (str, int)) or len(input_size) != 3 or min(input_size) < 1:
        raise SettingsError(f"input_size is {input_size!r}; it must be three sides in voxels: slice, row, column")
    shared = {"normalization": normalization, "channels": channels, "reorient": reorient}
    if fit == "resize":
        return {"spacing_mm": None, "size": list(input_size), **shared}
    if spacing_mm is None:
        tqdm.write("note: fit crop with spacing_mm null cuts the same number of voxels from files of any spacing")
    return {"spacing_mm": spacing_mm, **shared}
