# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and what tells one from another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError

__all__ = [
    "CHECKSUM",
    "checksum",
    "is_as_recorded",
    "read_content",
    "read_record",
    "replace_file",
    "sha256",
    "write_json",
    "write_record",
]

CHECKSUM = "checksum"  # of a record: SHA-256 of all else in it

_STALE_SECONDS = 24 * 3600


def replace_file(path: Path, write: Callable[[str], object]) -> None:
    """Write beside ``path``, flush and rename, so that ``path`` is the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.part"):  # by a killed run
        with contextlib.suppress(FileNotFoundError):  # another process writes the same file, and is done by now
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own mode would hide the file from the user's group
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(content: Any, path: str | Path) -> None:
    """Save ``content`` as JSON atomically."""
    replace_file(
        Path(path), lambda temporary: Path(temporary).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    )


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a record holds; the order of its names and white space say nothing."""
    plain = json.loads(json.dumps({name: value for name, value in content.items() if name != CHECKSUM}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(content: Mapping[str, Any], path: str | Path) -> None:
    """Save what a later run relies on as JSON, atomically, with a checksum that :func:`read_record` compares."""
    write_json({**content, CHECKSUM: checksum(content)}, path)


def read_content(path: str | Path, *, error: type[Exception] = DataError) -> Any:
    """Return what a JSON file holds that was written here.

    Args:
        path: of the file.
        error: what to raise.

    Raises:
        DataError: or ``error``, if it is no JSON.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as wrong:
        reason = str(wrong).split(": ")[0]
        raise error(f"{path} is not the JSON that was written ({reason}); restore it or move it away") from wrong


def read_record(path: str | Path, *, error: type[Exception] = DataError) -> dict[str, Any]:
    """Return what :func:`write_record` wrote; a record without a checksum, of before there were any, as it is.

    Args:
        path: of the JSON file.
        error: what to raise.

    Raises:
        DataError: or ``error``, if the file is no JSON object, or its checksum is not that of what it holds.
    """
    content = read_content(path, error=error)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise error(f"{path} is not the JSON that was written (it holds a {kind}); restore it or move it away")
    if content.pop(CHECKSUM, None) not in (None, checksum(content)):
        raise error(
            f"{path} is not as it was written: its checksum is that of something else. Restore it; if you changed it "
            f'yourself, remove its line "{CHECKSUM}"'
        )
    return content


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_as_recorded(path: Path) -> bool:
    """Return whether a file is there, and the one whose SHA-256 is in the record beside it."""
    try:
        return path.is_file() and read_record(path.with_suffix(".json")).get("sha256") == sha256(path)
    except (OSError, DataError):
        return False
