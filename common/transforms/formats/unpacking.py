# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Bytes of files that may be compressed: no more than asked for, and checked to the end.

The checksum of a compressed stream comes after its last byte, so what is wanted is read first and the rest after it, of
gzip all members. isal unpacks and checks at once, faster than zlib.
"""

from __future__ import annotations

import bz2
import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError

__all__ = ["first_bytes", "growth", "packed_with", "read_bytes"]

# bytes that one compressed byte can become at most: by deflate, and a block of bzip2 that holds 46 MB of one value
_GROWTH = {"": 1, "gzip": 1032, "bzip2": 1_300_000}
_STARTS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}
_PIECE = 2**18  # bytes that are unpacked at once
_MOST_BEHIND = 2**26  # bytes behind the voxels that are always allowed: tags, and what other programs leave there


def packed_with(path: str) -> str:
    """Return what a file is packed with, by its first bytes: gzip, bzip2 or nothing.

    Raises:
        DataError: if it is packed with something else.
    """
    with open(path, "rb") as stream:
        start = stream.read(6)
    packed = next((name for sign, name in _STARTS.items() if start.startswith(sign)), "")
    if packed not in _GROWTH:
        raise DataError(f"{path} is packed with {packed}; unpack it first: {packed} -d {Path(path).name}")
    return packed


def growth(packed: str) -> int:
    """Return how many bytes one byte of a packed file can become at most."""
    return _GROWTH[packed]


@contextmanager
def _unpacked(path: str, packed: str, start: int = 0) -> Iterator[Any]:
    """Open what begins at a byte of a file; what is damaged ends in a sentence."""
    from isal import igzip, isal_zlib

    damaged: Any = (EOFError, gzip.BadGzipFile, isal_zlib.error)
    with open(path, "rb") as file:
        file.seek(start)
        try:
            if packed == "gzip":
                yield igzip.IGzipFile(fileobj=file)
            else:
                yield bz2.BZ2File(file) if packed else file
        except damaged as error:
            raise _damaged(path, str(error)) from error
        except OSError as error:
            if packed != "bzip2" or error.errno is not None:  # bz2 has no error of its own
                raise
            raise _damaged(path, str(error)) from error


def _damaged(path: str, text: str) -> DataError:
    size = os.path.getsize(path)
    return DataError(f"{path} ({size:,} bytes) is cut short or damaged ({text}); copy it again from its source")


def first_bytes(path: str, count: int, packed: str) -> bytes:
    """Return the first bytes of a file, unpacked; fewer if it holds no more.

    Raises:
        DataError: if it is damaged there.
    """
    with _unpacked(path, packed) as stream:
        return bytes(stream.read(count))


def read_bytes(path: str, count: int, packed: str, *, before: int = 0, start: int = 0) -> np.ndarray:
    """Return bytes of a file, unpacked, once all of it has been found whole.

    Args:
        path: of the file.
        count: bytes wanted.
        packed: ``gzip``, ``bzip2`` or nothing.
        before: unpacked bytes in front of them.
        start: byte of the file where it begins.

    Returns:
        ``(count,)``, uint8.

    Raises:
        DataError: if it is damaged, cut short, or holds far more than that behind.
    """
    wanted = np.empty(count, np.uint8)
    with _unpacked(path, packed, start) as stream:
        skipped, held = _rest(stream, before), 0
        view = wanted.data
        while held < count and (got := stream.readinto(view[held : held + _PIECE])):
            held += got
        if skipped < before or held < count:
            raise _damaged(path, f"it holds {skipped + held:,} of {before + count:,} bytes")
        limit = max(count, _MOST_BEHIND)
        if packed and _rest(stream, limit + 1) > limit:  # reading to the end compares the checksums
            raise DataError(
                f"{path} holds more than {limit:,} bytes behind the {count:,} that its header claims; write it again "
                "with the header of what it holds"
            )
    return wanted


def _rest(stream: Any, count: int) -> int:
    """Read past so many bytes, or all that are left, and return how many they were."""
    passed = 0
    while passed < count and (piece := stream.read(min(count - passed, _PIECE))):
        passed += len(piece)
    return passed
