# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Reading prepared volumes: one volume by chunks, and a table of any number of them that processes share.

A :class:`VolumeTable` is one file, mapped into memory: ``VOLUMES1``, the number of rows ``n`` and ``n + 1`` offsets, as
64-bit integers; then a JSON list of what was wrong with other volumes, then a JSON list for each volume. A process
parses the rows that it draws and nothing else; the pages are the system's, there once for all loader processes; a
pickle of the table is its path.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import blosc2
import numpy as np

from ..errors import DataError
from .datalists import ANATOMY

__all__ = ["StoredVolume", "VolumeTable", "mask_file", "pack", "volume_of", "voxel_file"]

_MAGIC = b"VOLUMES1"


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
    """

    path: str
    shape: tuple[int, int, int]
    source: str
    masks: tuple[str, ...] = ()
    values: Mapping[int, int] = field(default_factory=dict)
    places: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def read(self, start: Sequence[int], stop: Sequence[int], *, mask: str | None = None) -> np.ndarray:
        """Return the region from ``start`` to ``stop`` of the volume or one of its masks.

        Only the chunks it touches are read. A mask that the volume does not have is 0 everywhere.
        """
        region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        if mask is None:
            array = blosc2.open(self.path, mode="r")
            return array[region] if array.ndim == 3 else array[(slice(None), *region)]
        if mask not in self.masks:
            return np.zeros([b - a for a, b in zip(start, stop, strict=True)], np.uint8)
        return blosc2.open(str(mask_file(Path(self.path), mask)), mode="r")[region]

    def voxel(self, values: Sequence[int], rng: np.random.Generator) -> tuple[int, int, int] | None:
        """Draw one of the kept voxels of any of these label values, None if there are none; reads that one only."""
        spans = [self.places[value] for value in values if value in self.places]
        if not spans:
            return None
        rank = int(rng.integers(sum(stop - start for start, stop in spans)))
        table = np.load(voxel_file(Path(self.path)), mmap_mode="r")
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
            np.load(file, mmap_mode="r")
            if file.is_file()
            else np.argwhere(self.read((0,) * 3, self.shape, mask=ANATOMY))
        )
        if not len(table):
            return None
        d, h, w = table[int(rng.integers(len(table)))].tolist()
        return d, h, w


class VolumeTable(Sequence[StoredVolume]):
    """Prepared volumes in the order of a list, read from a file that all processes share.

    Args:
        path: of the file.
        root: folder of the store, if it is not the one above the file's own.
        remove: take the file away when this object goes, for a store that cannot be written.

    Attributes:
        problems: sentences about the volumes of the list that could not be used.

    Raises:
        DataError: if the file is not a whole table.
    """

    def __init__(self, path: Path, *, root: Path | None = None, remove: bool = False) -> None:
        self.path, self.root = Path(path), Path(root or Path(path).parent.parent)
        try:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise DataError(f"the catalogue {path} cannot be read ({error}); remove it and run again") from error
        count = int(self._bytes[8:16].view("<u8")[0]) if len(self._bytes) >= 16 else 0
        self._offsets = self._bytes[16 : 24 + 8 * count]
        whole = self._bytes[:8].tobytes() == _MAGIC and len(self._offsets) == 8 * (count + 1)
        if whole:
            self._offsets = self._offsets.view("<u8")
        if not whole or int(self._offsets[-1]) != len(self._bytes):
            raise DataError(f"the catalogue {path} is no whole table of volumes; remove it and run again")
        self.problems: list[str] = json.loads(self._bytes[24 + 8 * count : int(self._offsets[0])].tobytes())
        if remove:
            weakref.finalize(self, _remove_own, self.path, os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_table, (self.path, self.root)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> StoredVolume: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredVolume]: ...
    def __getitem__(self, index: int | slice) -> StoredVolume | list[StoredVolume]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return volume_of(self.row(index), self.root)

    def row(self, index: int) -> bytes:
        """Return the row of a volume as it is in the file."""
        index %= len(self)
        return self._bytes[int(self._offsets[index]) : int(self._offsets[index + 1])].tobytes()

    def rows(self) -> Iterator[bytes]:
        """Yield all rows."""
        return map(self.row, range(len(self)))


def volume_of(row: bytes, root: Path) -> StoredVolume:
    """Return the volume that a row of a table describes: name, shape, source, sizes, label values and their places."""
    name, shape, source, sizes, values, places = json.loads(row)
    return StoredVolume(
        os.path.join(root, name),
        (shape[0], shape[1], shape[2]),
        source,
        tuple(key for key in sizes if key),  # the array's own size is under no name
        {int(value): count for value, count in values.items()},
        {int(value): (span[0], span[1]) for value, span in places.items()},
    )


def pack(rows: Sequence[bytes], problems: Sequence[str]) -> bytes:
    """Return the file of a :class:`VolumeTable`."""
    about = json.dumps(list(problems)).encode()
    lengths = np.array([24 + 8 * len(rows) + len(about), *map(len, rows)], "<u8")
    return b"".join(
        [_MAGIC, np.array([len(rows)], "<u8").tobytes(), np.cumsum(lengths).astype("<u8").tobytes(), about, *rows]
    )


def mask_file(path: Path, mask: str) -> Path:
    """Return where the mask of the volume at ``path`` is stored."""
    return path.with_suffix(f".{mask}.b2nd")


def voxel_file(path: Path, mask: str | None = None) -> Path:
    """Return where the table of labelled voxels of the volume at ``path`` is stored, or that of a mask's voxels."""
    return path.with_suffix(f".{mask}.voxels.npy" if mask else ".voxels.npy")


def _open_table(path: Path, root: Path) -> VolumeTable:
    return VolumeTable(path, root=root)


def _remove_own(path: Path, process: int) -> None:
    if os.getpid() == process:
        path.unlink(missing_ok=True)
