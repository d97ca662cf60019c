# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checksums of a stored volume, by which damage is found before a voxel of it is used.

Beside its arrays a volume has a file ``.crc``: of each array the type, the shape and the CRC-32 of every
compressed chunk, of each table of voxels the CRC-32 of its bytes. A process checks a chunk when it first reads it. A
volume of an earlier version has no such file: it is compared as a whole, once, with the SHA-256 in its JSON, and gets
one then.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from ...errors import DataError
from ...files import replace_file

__all__ = ["ENDING", "Checksums", "checksums_beside", "checksums_of"]

ENDING = ".crc"
_ARRAY, _TABLE = ".b2nd", ".voxels.npy"
_KEPT = 4096  # volumes whose checksums a process keeps
_kept = threading.local()


def _crc(data: bytes | memoryview) -> int:
    from isal import isal_zlib

    return int(isal_zlib.crc32(data))


def checksums_of(content: Mapping[str, bytes]) -> bytes:
    """Return the file of checksums of a volume.

    Args:
        content: of its arrays and tables, by what follows the volume's name: ``.b2nd``, ``.label.b2nd``,
            ``.voxels.npy``.
    """
    about: dict[str, Any] = {}
    for ending, data in content.items():
        if ending.endswith(_ARRAY):
            array = blosc2.ndarray_from_cframe(data)
            chunks = [_crc(array.schunk.get_chunk(number)) for number in range(array.schunk.nchunks)]
            about[ending] = {**_form(array), "crc32": chunks}
        elif ending.endswith(_TABLE):
            about[ending] = _crc(data)
    return json.dumps({"files": about, "digest": _digest(about)}, separators=(",", ":")).encode()


def _form(array: Any) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "chunks": list(array.chunks)}


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class Checksums:
    """What the files of one volume are compared with, and which parts of them this process has compared.

    Args:
        path: of the volume's array.

    Raises:
        DataError: if the file of checksums is damaged, or a volume without one is not as it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = self._read()
        self._checked: set[tuple[str, int]] = set()

    def array(self, file: Path, region: Sequence[slice]) -> np.ndarray:
        """Return a region of an array, of all channels if it has several.

        Raises:
            DataError: if a chunk is not as it was written.
        """
        ending = self._ending(file)
        wanted = self.about.get(ending)
        try:
            # one thread: more of them take a tenth more time of processors, which other readers want
            array = blosc2.open(str(file), mode="r", dparams={"nthreads": 1})
            inner = [slice(None)] * (array.ndim - 3) + list(region)
            new = [n for n in _touched(inner, array.shape, array.chunks) if (ending, n) not in self._checked]
            if new and (
                wanted is None
                or _form(array) != {name: wanted[name] for name in ("dtype", "shape", "chunks")}
                or list(_crcs(file, array, new)) != [wanted["crc32"][number] for number in new]
            ):
                raise self._damaged(file)
            self._checked.update((ending, number) for number in new)
            return np.asarray(array[tuple(inner)])
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise self._damaged(file) from error

    def table(self, file: Path) -> np.ndarray:
        """Return a table of voxels, mapped.

        Raises:
            DataError: if it is not as it was written.
        """
        ending = self._ending(file)
        if (ending, 0) not in self._checked:
            if _crc(file.read_bytes()) != self.about.get(ending):
                raise self._damaged(file)
            self._checked.add((ending, 0))
        return np.asarray(np.load(file, mmap_mode="r"))

    def _ending(self, file: Path) -> str:
        return file.name[len(self.path.stem) :]

    def _read(self) -> dict[str, Any]:
        file = self.path.with_suffix(ENDING)
        try:
            content = json.loads(file.read_bytes())
            if content["digest"] != _digest(content["files"]):
                raise self._damaged(file)
        except FileNotFoundError:
            return self._compared_whole(file)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise self._damaged(file) from error
        return dict(content["files"])

    def _compared_whole(self, file: Path) -> dict[str, Any]:
        """Compare a volume of an earlier version with the SHA-256 in its JSON, and write its checksums."""
        try:
            meta = json.loads(self.path.with_suffix(".json").read_text("utf-8"))
            return self._compared_with(meta, file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            raise self._damaged(self.path) from error

    def _compared_with(self, meta: Mapping[str, Any], file: Path) -> dict[str, Any]:
        names = [_ARRAY, *(f".{mask}{_ARRAY}" for mask in meta.get("masks", {}))]
        content = {name: self.path.with_name(self.path.stem + name).read_bytes() for name in names}
        for table in self.path.parent.glob(f"{self.path.stem}*{_TABLE}"):
            content[self._ending(table)] = table.read_bytes()
        for ending, wanted in meta.get("sha256", {}).items():  # the first layout had none: it is taken as it is
            if ending in content and hashlib.sha256(content[ending]).hexdigest() != wanted:
                raise self._damaged(self.path.with_name(self.path.stem + ending))
        written = checksums_of(content)
        with contextlib.suppress(PermissionError, OSError):  # a store that is only read is compared in each process
            replace_file(file, lambda temporary: Path(temporary).write_bytes(written))
        return dict(json.loads(written)["files"])

    def _damaged(self, file: Path) -> DataError:
        return DataError(
            f"{file} is damaged: it is not what was written there; remove {self.path.stem}.* from {self.path.parent} "
            "and run again, the volume is prepared anew"
        )


def _crcs(file: Path, array: Any, numbers: Sequence[int]) -> Iterator[int]:
    """Yield the CRC-32 of compressed chunks, read from the file itself: blosc2 would copy each once more.

    A frame of blosc2 is its header, with the sizes of header and data, the chunks, and their places after the header,
    compressed as a chunk is. A chunk of one value has no place but a negative number.
    """
    with open(file, "rb", buffering=0) as stream:
        header = stream.read(64)
        first = int.from_bytes(header[11:15])
        end = first + int.from_bytes(header[39:47])
        stream.seek(end)
        places = np.frombuffer(blosc2.decompress2(stream.read()), "<i8").tolist()
        starts = sorted(place for place in places if place >= 0)
        sizes = {start: stop - start for start, stop in itertools.pairwise([*starts, end - first])}
        room = _room(max(sizes.values(), default=0))
        for number in numbers:
            start = places[number]
            if start < 0:
                yield _crc(array.schunk.get_chunk(number))
            else:
                stream.seek(first + start)
                yield _crc(room[: stream.readinto(room[: sizes[start]])])


def _room(size: int) -> memoryview:
    """Return memory of this thread to read a chunk into, which it keeps: new memory takes longer than reading."""
    if len(getattr(_kept, "room", b"")) < size:
        _kept.room = bytearray(size)
    return memoryview(_kept.room)


def _touched(region: Sequence[slice], shape: Sequence[int], chunks: Sequence[int]) -> list[int]:
    """Return the numbers of the chunks that a region touches.

    Example:
        >>> _touched([slice(0, 3), slice(4, 5)], (8, 8), (4, 4)), _touched([slice(2, 8), slice(0, 4)], (8, 8), (4, 4))
        ([1], [0, 2])
    """
    grid = [-(-side // chunk) for side, chunk in zip(shape, chunks, strict=True)]
    spans = []
    for part, side, chunk in zip(region, shape, chunks, strict=True):
        start, stop, _ = part.indices(side)
        spans.append(range(start // chunk, -(-stop // chunk)))
    return [int(np.ravel_multi_index(place, grid)) for place in itertools.product(*spans)]


@lru_cache(_KEPT)
def checksums_beside(path: str) -> Checksums:
    """Return the checksums of the volume whose array is at ``path``, read once in a process.

    Raises:
        DataError: as :class:`Checksums`.
    """
    return Checksums(Path(path))
