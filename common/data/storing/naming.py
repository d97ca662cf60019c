# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The name of a stored volume: a digest of its files and of how it is prepared, so that a changed file is new."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...transforms import explain
from ..cases import ANATOMY, LABEL, MASKS, Case, case_name, images_of, inverted_of, masks_of
from ..listing.folders import behind
from ..preparing.settings import StoreSettings

__all__ = ["Naming", "Seen", "meta_digest", "stored_file"]

_NAMING = 1  # of files; raise when the same settings begin to give other voxels
_LABELS = 2  # the same of label maps: 1 had holes between classes
_FILE = re.compile(
    rf"(.*-[0-9a-f]{{20}})(\.json|\.crc|(?:\.(?:{'|'.join((*MASKS, LABEL))}))?\.b2nd|(?:\.{ANATOMY})?\.voxels\.npy)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Seen:
    """What folders were resolved to and what they hold, while a list is looked at."""

    folders: dict[str, str] = field(default_factory=dict)
    behind: dict[str, str] = field(default_factory=dict)


class Naming:
    """Names for what is prepared with given settings.

    Args:
        settings: what the voxels depend on.
    """

    def __init__(self, settings: StoreSettings) -> None:
        described = asdict(settings)
        self._described = {key: value for key, value in described.items() if (key, value) != ("size", None)}

    def name(self, case: Case, seen: Seen | None = None) -> str:
        """Return the name of a case's array.

        Args:
            case: an image with its masks.
            seen: what other cases of the same list have shown.

        Raises:
            DataError: if a source file is missing.
        """
        seen = seen or Seen()
        identity: list[object] = [_NAMING]
        for key in ("image", *masks_of(case)):
            for file in images_of(case) if key == "image" else [case[key]]:
                try:
                    source, status = _resolved(file, seen.folders)
                    others = behind(file, seen.behind)  # by the name that it is given, not that of what a link leads to
                except (OSError, ValueError) as error:  # ValueError: no name that a file could have
                    raise explain(file, error) from error
                identity += [source, status.st_size, status.st_mtime_ns] + ([key] if key != "image" else [])
                identity += [_LABELS] if key == LABEL else []
                identity += [{"files": others}] if others else []
        inverted = inverted_of(case)
        identity += [{"inverted": inverted}] if inverted else []
        identity.append(self._described)
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
        return f"{_readable(case_name(case))}-{digest}.b2nd"

    def key(self, cases: Sequence[Case]) -> str:
        """Return a digest of a list of cases, whatever their files hold."""
        labelled = [_LABELS] if any(LABEL in case for case in cases) else []
        digest = hashlib.sha256(json.dumps([_NAMING, *labelled, self._described]).encode())
        for case in cases:
            parts = [*images_of(case), *(f"{name}\0{case[name]}" for name in masks_of(case)), *inverted_of(case), ""]
            digest.update("\0\0".join(parts).encode(errors="surrogatepass"))
        return digest.hexdigest()[:20]


def stored_file(name: str) -> tuple[str, str] | None:
    """Return the name of a volume and the ending, of a file name that a store writes; None for any other.

    Example:
        >>> stored_file("a-0123456789abcdef0123.label.b2nd"), stored_file("sub-01_T1w.nii.gz")
        (('a-0123456789abcdef0123', '.label.b2nd'), None)
    """
    found = _FILE.fullmatch(name)
    return None if found is None else (found[1], found[2])


def meta_digest(meta: Mapping[str, Any]) -> str:
    """Return a digest of the JSON of a volume, which is noted in it, without that note."""
    plain = json.loads(json.dumps({key: value for key, value in meta.items() if key != "digest"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _resolved(file: str, folders: dict[str, str]) -> tuple[str, os.stat_result]:
    """Return a file's path without links and its status; each folder is resolved once."""
    folder, name = os.path.split(file)
    if name in ("", "..", "."):
        return os.path.realpath(file), os.stat(file)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    path = os.path.join(folders[folder], name)
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        path = os.path.realpath(path)
        status = os.stat(path)
    return path, status


def _readable(name: str) -> str:
    """Return as much of a case's name as a file name may hold; of surrogates, those that stand for single bytes."""
    return (
        re.sub(r"[/\\\0\ud800-\udc7f\udd00-\udfff]|^\.", "_", name[:80])
        .encode(errors="surrogateescape")[:80]
        .decode(errors="ignore")
    )
