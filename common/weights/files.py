# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoint files: tensors only in, whole files only out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError

__all__ = ["read_checkpoint", "replace_file", "sha256", "write_checkpoint", "write_json"]

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


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Save ``content`` atomically: a kill or a full disk leaves the earlier file as it was.

    Raises:
        OSError: with ``ENOSPC`` and the path if the disk is full.
    """

    def write(temporary: str) -> None:
        with open(temporary, "wb") as stream:
            torch.save(content, stream)

    path = Path(path)
    try:
        replace_file(path, write)
    except RuntimeError as error:  # torch turns a short write into a RuntimeError of its own
        if shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(28, "No space left on device", str(path)) from error
        raise


def write_json(content: Any, path: str | Path) -> None:
    """Save ``content`` as JSON atomically."""
    replace_file(
        Path(path), lambda temporary: Path(temporary).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU, refusing anything but tensors and plain values.

    Raises:
        WeightsError: if the file is missing, cut short, not a checkpoint, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no checkpoint {path}; check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete checkpoint of tensors: {reason}; "
            "fetch or write it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
