# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the preparation of volumes will take of memory and disk, by their headers."""

from __future__ import annotations

import itertools
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...errors import DataError
from ...terminal import near
from ...transforms import read_header
from ..cases import LABEL, MASKS, Case, images_of
from .settings import BLOCK, StoreSettings

__all__ = ["DiskEstimate", "are_few", "memory_needed"]

_PROCESS = 300 * 2**20  # bytes of a preparing process without a volume
# bytes for each voxel of a file and of what it becomes; measured: 15 to 29 and 9, docs/data.md
_PER_VOXEL_READ, _PER_VOXEL_MADE, _PER_VOXEL_OF_A_MASK = 26, 10, 8
_FEW_VOXELS = 3e7  # read and made, of all cases together; measured: some 0.2 s for each million, 6 s for a process
_BESIDE = 3 * 1024  # bytes of a volume's JSON and checksums, however small it is
_BESIDE_A_LABEL = 2 * 60_000  # bytes of the places of its voxels, of two values
_MEASURED, _SAMPLED = 8, 200  # volumes that tell how well they compress, headers that tell how large they are
# bytes for each voxel: the least compressible and the most compressible volumes of docs/benchmark.md
_WORST, _BEST = {"float16": 0.43 * 4, "float32": 0.83 * 4}, {"float16": 0.22 * 4, "float32": 0.45 * 4}


def memory_needed(case: Case, settings: StoreSettings) -> int:
    """Return about how many bytes the preparation of a case takes, by its header; a process of its own included."""
    read, made = _voxels(case, settings)
    masks = sum(name in case for name in (*MASKS, LABEL))
    of_masks = masks * _PER_VOXEL_OF_A_MASK * (read + made)
    return int(_PROCESS + _PER_VOXEL_READ * read + _PER_VOXEL_MADE * made + of_masks)


def are_few(cases: Sequence[Case], settings: StoreSettings) -> bool:
    """Return whether preparing these cases takes less than starting processes, which import PyTorch, by their headers.

    Twenty crops took 38 s in twenty processes on two cores, 250 s where these were busy, and 1.7 s without.
    """
    if len(cases) > _SAMPLED:
        return False
    left = _FEW_VOXELS
    for case in cases:
        left -= sum(_voxels(case, settings))
        if left < 0:
            return False
    return True


def _voxels(case: Case, settings: StoreSettings) -> tuple[float, float]:
    """Return how many voxels an image has and will have, before it is cropped."""
    files = images_of(case)
    try:
        header = read_header(files[0])
    except Exception:  # what is wrong with it is said where it is prepared
        return 0.0, 0.0
    read = float(math.prod(header.shape) * len(files))
    spacing = np.linalg.norm(header.affine[:3, :3], axis=0)
    if settings.size is not None:
        return read, float(math.prod(settings.size) * settings.channels)
    if settings.spacing_mm is None:
        return read, read
    return read, read * float(np.prod(spacing)) / math.prod(settings.spacing_mm)  # type: ignore[arg-type]


class DiskEstimate:
    """Say what a preparation will take on the disk: by the headers at once, better when the first volumes are done.

    Before anything is prepared it is refused if the disk is too small even for volumes that compress as well as any
    that were measured; in between, the first eight decide.

    Args:
        cases: to prepare.
        settings: of the store.
        root: of the store.
        shares: into how many parts the work is split, of which these cases are one.
        refuse: raise if the disk is too small, not only say so.

    Raises:
        DataError: if the disk is too small.
    """

    def __init__(
        self, cases: Sequence[Case], settings: StoreSettings, root: Path, *, shares: int = 1, refuse: bool = True
    ) -> None:
        self.cases, self.settings, self.root, self.shares, self.refuse = cases, settings, root, shares, refuse
        self.free = shutil.disk_usage(root).free
        self.voxels = self.bytes = 0.0
        self.count = 0
        few = random.Random(0).sample(list(cases), min(_SAMPLED, len(cases)))
        made = [(case, self._made(case)) for case in few]
        self.mean = sum(voxels for _, voxels in made) / max(len(few), 1)
        least = (_BEST[settings.dtype] * self.mean + _BESIDE) * len(cases) * shares
        if self.mean:
            most = sum(itertools.starmap(self._most, made)) / len(few) * len(cases) * shares
            told = f"{self._of()} will take up to about {_readable(most)} in {near(root)} by their headers"
            self._tell(f"{told}, where {_readable(self.free)} are free", least)

    def add(self, case: Case, written: Callable[[Case], int]) -> None:
        """Take note of a case that is done; at the eighth, print a better estimate if there are many more.

        Raises:
            DataError: if the disk is too small.
        """
        if self.count == _MEASURED:
            return
        self.count += 1
        self.voxels += self._made(case)
        self.bytes += written(case)
        if self.count < _MEASURED or len(self.cases) == _MEASURED:
            return
        needed = self.bytes / max(self.voxels, 1) * self.mean * len(self.cases) * self.shares
        each = f"{_readable(self.bytes / self.count)} each for the first {self.count}"
        told = f"{self._of()} will take about {_readable(needed)} in {near(self.root)} ({each})"
        self._tell(f"{told}, where {_readable(self.free)} are free", needed)

    def _of(self) -> str:
        count = f"{len(self.cases):,} volume{'s' if len(self.cases) > 1 else ''}"
        return f"the {self.shares} shares of about {count}" if self.shares > 1 else f"the {count}"

    def _tell(self, told: str, needed: float) -> None:
        if needed > self.free and self.refuse:
            raise DataError(
                f"{told}; give another --store_dir or a coarser --spacing_mm, or prepare with --check_disk false"
            )
        tqdm.write(told)

    def _made(self, case: Case) -> float:
        return _voxels(case, self.settings)[1]

    def _most(self, case: Case, voxels: float) -> float:
        """Return the bytes of a case of so many voxels that compresses badly; it is stored in whole blocks."""
        side = (voxels / self.settings.channels) ** (1 / 3)
        whole = self.settings.channels * math.prod(math.ceil(side / block) * block for block in BLOCK)
        label = min(_BESIDE_A_LABEL, 6 * voxels) if LABEL in case else 0
        return _WORST[self.settings.dtype] * whole + _BESIDE + label


def _readable(count: Any) -> str:
    """Return a number of bytes in words.

    Example:
        >>> _readable(3 * 2**30)
        '3.0 GiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
