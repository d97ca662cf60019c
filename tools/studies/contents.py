# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the files of cases hold, by which a result is told from one of other images of the same names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common.data.cases import Case, case_name
from common.data.identity import content_of, stamp_of
from common.files import write_json

from .definition import digest
from .results import read_json

__all__ = ["contents_of", "size_of", "sizes_of"]

_FILE = "contents.json"


def contents_of(cases: Sequence[Case], folder: Path) -> str:
    """Return a digest of what is said of cases and of what their files hold, wherever these are.

    Args:
        cases: with their files.
        folder: where digests of single files are kept, so that each is read once.
    """
    known, new = _known(folder), dict[str, Any]()
    found = _digest_of(cases, lambda path: _content(path, known, new))
    if new and folder.is_dir():
        write_json((read_json(folder / _FILE) or {}) | new, folder / _FILE)
    return found


@cache
def _known(folder: Path) -> dict[str, Any]:
    return read_json(folder / _FILE) or {}


def _content(path: str, known: dict[str, Any], new: dict[str, Any]) -> str:
    """Return a digest of a file, or the text itself if there is no such file."""
    try:
        stamp = stamp_of(path)
        if known.get(path, [None])[0] != stamp:
            known[path] = new[path] = [stamp, content_of(path)]
    except OSError:
        return path
    return str(known[path][1])


def sizes_of(cases: Sequence[Case]) -> str:
    """Return a digest of what is said of cases and of the sizes of their files, which is all that was kept once."""
    return _digest_of(cases, size_of)


@cache
def size_of(path: str) -> int | str:
    """Return the size of a file in bytes, or the text itself if there is no such file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return path


def _digest_of(cases: Sequence[Case], told: Callable[[str], Any]) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return told(value) if isinstance(value, str) and os.sep in value else value

    return digest(sorted([case_name(case), *((name, plain(case[name])) for name in sorted(case))] for case in cases))
