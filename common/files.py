# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and what tells one from another."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["replace_file", "sha256", "write_json"]

_STALE_SECONDS = 24 * 3600


def replace_file(path: Path, write: Callable[[str], object]) -> None:
    """Write beside ``path``, flush and rename, so that ``path`` is the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.part"):  # by a killed run
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            left.unlink(missing_ok=True)
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


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
