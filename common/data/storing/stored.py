# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One prepared volume of the store, read by chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..cases import ANATOMY
from .checksums import checksums_beside

__all__ = ["StoredVolume", "mask_file", "voxel_file"]


@dataclass(frozen=True)
class StoredVolume:
    """One prepared volume.

    Attributes:
        path: of the array, ``(D, H, W)`` for one channel and ``(C, D, H, W)`` for several.
        shape: ``(D, H, W)``.
        source: file it was made from.
        masks: names of the masks that are stored with it; a ``label`` map is one of them.
        values: of the label map, with their number of voxels.
        places: for each of these values, which rows of the table of voxels are of it.
        outside: voxels of each value that the label map marks outside of what was kept of the image.
        slant_degrees: by which the angle between two axes of the file differs from a right one.
        nearly_zero: share of the image's voxels that are nearly but not exactly 0.
    """

    path: str
    shape: tuple[int, int, int]
    source: str
    masks: tuple[str, ...] = ()
    values: Mapping[int, int] = field(default_factory=dict)
    places: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    outside: Mapping[int, int] = field(default_factory=dict)
    slant_degrees: float = 0.0
    nearly_zero: float = 0.0

    def read(self, start: Sequence[int], stop: Sequence[int], *, mask: str | None = None) -> np.ndarray:
        """Return the region from ``start`` to ``stop`` of the volume or one of its masks.

        Only the chunks it touches are read, and compared with their checksums. A mask that the volume does not have is
        0 everywhere.

        Raises:
            DataError: if they are damaged.
        """
        if mask is not None and mask not in self.masks:
            return np.zeros([b - a for a, b in zip(start, stop, strict=True)], np.uint8)
        region = [slice(a, b) for a, b in zip(start, stop, strict=True)]
        file = Path(self.path) if mask is None else mask_file(Path(self.path), mask)
        return checksums_beside(self.path).array(file, region)

    def voxel(self, values: Sequence[int], rng: np.random.Generator) -> tuple[int, int, int] | None:
        """Draw one of the kept voxels of any of these label values, None if there are none; reads that one only."""
        spans = [self.places[value] for value in values if value in self.places]
        if not spans:
            return None
        rank = int(rng.integers(sum(stop - start for start, stop in spans)))
        table = checksums_beside(self.path).table(voxel_file(Path(self.path)))
        for start, stop in spans:
            if rank < stop - start:
                d, h, w = table[start + rank].tolist()
                return d, h, w
            rank -= stop - start
        raise AssertionError("a rank lies in one of the spans")

    def anatomy_voxel(self, rng: np.random.Generator) -> tuple[int, int, int] | None:
        """Draw one of the kept voxels of the anatomy mask, None if the volume has no such mask or it is empty."""
        if ANATOMY not in self.masks:
            return None
        file = voxel_file(Path(self.path), ANATOMY)
        # stores of the first layout kept no such voxels: the whole mask is looked through
        table = (
            checksums_beside(self.path).table(file)
            if file.is_file()
            else np.argwhere(self.read((0,) * 3, self.shape, mask=ANATOMY))
        )
        if not len(table):
            return None
        d, h, w = table[int(rng.integers(len(table)))].tolist()
        return d, h, w


def mask_file(path: Path, mask: str) -> Path:
    """Return where the mask of the volume at ``path`` is stored."""
    return path.with_suffix(f".{mask}.b2nd")


def voxel_file(path: Path, mask: str | None = None) -> Path:
    """Return where the table of labelled voxels of the volume at ``path`` is stored, or that of a mask's voxels."""
    return path.with_suffix(f".{mask}.voxels.npy" if mask else ".voxels.npy")
