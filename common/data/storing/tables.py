# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A table of any number of prepared volumes that processes share, and the tables that a store keeps of its lists.

A :class:`VolumeTable` is one file, mapped into memory: ``VOLUMES1``, the number of rows ``n`` and ``n + 1`` offsets, as
64-bit integers; then a JSON list of what was wrong with other volumes, then a JSON list for each volume. A process
parses the rows that it draws and nothing else; the pages are the system's, there once for all loader processes; a
pickle of the table is its path.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from tqdm import tqdm

from ...errors import DataError
from ...files import replace_file
from .stored import StoredVolume

__all__ = ["Catalogues", "VolumeTable", "pack", "volume_of"]

_UNUSED_SECONDS = 30 * 24 * 3600
_MAGIC = b"VOLUMES1"


class VolumeTable(Sequence[StoredVolume]):
    """Prepared volumes in the order of a list, read from a file that all processes share.

    Args:
        path: of the file.
        root: folder of the store, if it is not the one above the file's own.
        digest: start of the file's SHA-256, if it is to be compared.
        remove: take the file away when this object goes, for a store that cannot be written.

    Attributes:
        problems: sentences about the volumes of the list that could not be used.

    Raises:
        DataError: if the file is not a whole table.
    """

    def __init__(self, path: Path, *, root: Path | None = None, digest: str = "", remove: bool = False) -> None:
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
        whole = whole and hashlib.sha256(self._bytes.data).hexdigest().startswith(digest)
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
    """Return the volume that a row of a table describes.

    A row is a list of name, shape, source, sizes, label values and their places; and, of few volumes, what is odd.
    """
    name, shape, source, sizes, values, places, *odd = json.loads(row)
    more = odd[0] if odd else {}
    return StoredVolume(
        os.path.join(root, name),
        (shape[0], shape[1], shape[2]),
        source,
        tuple(key for key in sizes if key),  # the array's own size is under no name
        {int(value): count for value, count in values.items()},
        {int(value): (span[0], span[1]) for value, span in places.items()},
        {int(value): count for value, count in more.get("outside", {}).items()},
        float(more.get("slant_degrees", 0)),
        float(more.get("nearly_zero", 0)),
    )


def pack(rows: Sequence[bytes], problems: Sequence[str]) -> bytes:
    """Return the file of a :class:`VolumeTable`."""
    about = json.dumps(list(problems)).encode()
    lengths = np.array([24 + 8 * len(rows) + len(about), *map(len, rows)], "<u8")
    return b"".join(
        [_MAGIC, np.array([len(rows)], "<u8").tobytes(), np.cumsum(lengths).astype("<u8").tobytes(), about, *rows]
    )


class Catalogues:
    """The tables of the lists that were opened in a store.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self, key: str) -> VolumeTable | None:
        """Return the table in which a list was opened last."""
        found = self.folder.glob(f"{key}-*.table")
        for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                return VolumeTable(path, digest=_digest_in(path))
            except DataError:
                tqdm.write(f"the catalogue {path} is damaged; it is made again from the volumes")
                with contextlib.suppress(OSError):  # of a store that is only read
                    path.unlink()
        return None

    def write(self, key: str, rows: Sequence[bytes], problems: Sequence[DataError]) -> VolumeTable:
        """Write the table of a list, whose name says what it holds, and open it."""
        content = pack(rows, [str(problem) for problem in problems])
        path = self.folder / f"{key}-{hashlib.sha256(content).hexdigest()[:20]}.table"
        try:
            if path.is_file() and path.read_bytes() == content:
                os.utime(path)
            else:
                replace_file(path, lambda temporary: Path(temporary).write_bytes(content))
            for other in self.folder.glob(f"{key}-*.table"):
                if other != path and time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    other.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            handle, name = tempfile.mkstemp(suffix=".table")
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            return VolumeTable(Path(name), root=self.folder.parent, remove=True)
        return VolumeTable(path, digest=_digest_in(path))


def _digest_in(path: Path) -> str:
    """Return the part of the SHA-256 of a catalogue that its name holds."""
    return path.stem.rpartition("-")[2]


def _open_table(path: Path, root: Path) -> VolumeTable:
    return VolumeTable(path, root=root)


def _remove_own(path: Path, process: int) -> None:
    if os.getpid() == process:
        path.unlink(missing_ok=True)
