# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which images an output was made of, so that one image's result is never taken for another's of the same name.

An image is the same one if its files are where they were and none was touched since, by sizes and times; or if what
they hold is the same, wherever they are now. A folder of outputs keeps what each was made of in ``made_of.jsonl``: a
line of JSON for each, added when it is there; the last line of an output counts. Lines are only ever added, so that
several runs may write into one folder and a killed one spoils nothing: before an output is made, a line says that it is
made of nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import sha256
from ..paths import as_path
from ..transforms import files_behind
from .cases import Case, images_of
from .listing.folders import behind

__all__ = ["Origins", "content_of", "identity_of", "same_images", "stamp_of"]

_FILE = "made_of.jsonl"


def stamp_of(file: str, seen: dict[str, str] | None = None) -> list[Any]:
    """Return what changes when a file is replaced or written to: its size and times, and those of files behind it.

    Args:
        file: of a volume.
        seen: as in :func:`behind`.

    Raises:
        OSError: if it is not there.
    """
    status = os.stat(file)
    # the time of the last change of any kind cannot be set, as that of the content is by a copy which keeps it
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, behind(file, {} if seen is None else seen)]


def content_of(file: str) -> str:
    """Return a digest of what a file, and those behind it, hold, wherever they are and whatever they are called.

    Raises:
        OSError: if it cannot be read.
    """
    parts = [sha256(each) for each in [file, *files_behind(file)] if not os.path.isdir(each)]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()


def identity_of(case: Case) -> list[dict[str, Any]]:
    """Return what tells the images of a case from all others, in plain values: path, stamp and content of each file.

    Raises:
        OSError: if one cannot be read.
    """
    return [
        {"path": os.path.abspath(file), "stamp": stamp_of(file), "sha256": content_of(file)} for file in images_of(case)
    ]


def same_images(noted: Any, case: Case, seen: dict[str, str] | None = None) -> bool:
    """Return whether an identity is that of the images of a case; only what was moved or touched is read.

    Args:
        noted: what :func:`identity_of` gave.
        case: with its images.
        seen: as in :func:`stamp_of`.

    Raises:
        OSError: if an image cannot be read.
    """
    files = images_of(case)
    if not isinstance(noted, list) or len(noted) != len(files):
        return False
    return all(
        isinstance(entry, dict)
        and (
            [entry.get("path"), entry.get("stamp")] == [os.path.abspath(file), stamp_of(file, seen)]
            or entry.get("sha256") == content_of(file)
        )
        for entry, file in zip(noted, files, strict=True)
    )


class Origins:
    """What each output of a folder was made of, and how.

    Args:
        folder: of the outputs, which are called by their paths below it, with ``/``.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.file = as_path(folder) / _FILE

    def read(self) -> dict[str, dict[str, Any]]:
        """Return ``images`` (None where an output was begun and not finished) and ``settings`` by output."""
        found: dict[str, dict[str, Any]] = {}
        try:
            lines = self.file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return found
        for line in lines:
            try:
                entry = json.loads(line)
                found[entry["output"]] = {"images": entry["images"], "settings": entry["settings"]}
            except (ValueError, KeyError, TypeError):
                continue  # cut by a kill, so that nothing is known of its output
        return found

    def begin(self, outputs: Sequence[str]) -> None:
        """Note that outputs are about to be made: what is there under their names is of something else."""
        self._add(outputs, None, {})

    def note(self, outputs: Sequence[str], images: list[dict[str, Any]], settings: Mapping[str, Any]) -> None:
        """Note that outputs are there.

        Args:
            outputs: that were made.
            images: what :func:`identity_of` gave before they were.
            settings: that they depend on.
        """
        self._add(outputs, images, settings)

    def _add(self, outputs: Sequence[str], images: Any, settings: Mapping[str, Any]) -> None:
        about = {"images": images, "settings": dict(settings)}
        lines = "".join(json.dumps({"output": output, **about}) + "\n" for output in outputs)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab+") as stream:
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                lines = lines if stream.read(1) == b"\n" else f"\n{lines}"  # after one that was cut
            stream.write(lines.encode())
            stream.flush()
            os.fsync(stream.fileno())
