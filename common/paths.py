# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings that are paths, and the files that belong to the names of cases.

The name of a case comes from a file, a datalist or a table. What is written for it lies below the output folder, in the
folders that the name holds, under a file name that no other case can have: ``siteA/scan`` becomes
``siteA/scan.nii.gz``. Letters that some file system does not know are written as ``%`` and two hexadecimal digits.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from .errors import DataError, SettingsError

__all__ = ["as_path", "check_names", "file_name", "output_file"]

_MOST_BYTES = 200  # of a part of a name; files can have 255, with endings and the letters of temporary ones
_MOST_BYTES_TOGETHER = 1000
_RENAME = 'rename it, or give it another "name" in a datalist'
_FOREIGN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]|%(?=[0-9A-Fa-f]{2})|^\.')
_AT_THE_END = re.compile(r"[. ]$")  # of a folder
_RESERVED = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9\u00b9\u00b2\u00b3])(?:\..*)?", re.I | re.S)


def as_path(value: str | os.PathLike[str], what: str = "a path") -> Path:
    """Return a setting as a path, ``~`` being the user's folder.

    Args:
        value: of the setting. A number is taken for the folder of that name.
        what: the setting is, for the message.

    Raises:
        SettingsError: if it can be no path.

    Example:
        >>> as_path("2024/my scans").as_posix(), as_path("~/x").is_absolute()
        ('2024/my scans', True)
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float, os.PathLike)) or "\0" in str(value):
        raise SettingsError(f"{what} is {value!r}; it must be a path")
    try:
        return Path(str(value)).expanduser()
    except RuntimeError as error:
        raise SettingsError(
            f"{what} is {value!r}, and this machine knows no such user; write the whole path"
        ) from error


def file_name(name: str) -> str:
    """Return the path without ending of what is written for a case, below an output folder; no two names share one.

    Args:
        name: of the case, with ``/`` between folders.

    Raises:
        DataError: if no file below a folder can be called so.

    Example:
        >>> file_name("siteA/scan"), file_name("12:30"), file_name("aux")
        ('siteA/scan', '12%3A30', '%61ux')
    """
    parts = str(name).split("/")
    if any(part in ("", ".", "..") for part in parts):
        why = "it would lie outside the folder" if ".." in parts else "it begins with /, or a part of it is empty"
        raise DataError(f"no file can be called after the case {name!r}: {why}; {_RENAME}")
    written = [_FOREIGN.sub(_code, part) for part in parts]
    written[:-1] = [_AT_THE_END.sub(_code, part) for part in written[:-1]]
    written = [re.sub("^.", _code, part) if _RESERVED.fullmatch(part) else part for part in written]
    try:
        sizes = [len(os.fsencode(part)) for part in written]
    except UnicodeEncodeError as error:
        raise DataError(f"no file can be called after the case {name!r}: it is no text; {_RENAME}") from error
    if max(sizes) > _MOST_BYTES or sum(sizes) > _MOST_BYTES_TOGETHER:
        raise DataError(
            f"no file can be called after the case {name[:40]!r}...: it has {sum(sizes)} bytes, {max(sizes)} in one "
            f"part, where {_MOST_BYTES_TOGETHER} and {_MOST_BYTES} can be written everywhere; {_RENAME}"
        )
    return "/".join(written)


def _code(letter: re.Match[str]) -> str:
    return f"%{ord(letter[0]):02X}"


def output_file(folder: str | os.PathLike[str], name: str, ending: str) -> Path:
    """Return the file that is written for a case.

    Args:
        folder: that it lies below.
        name: of the case.
        ending: with its dot.

    Raises:
        DataError: as :func:`file_name`.
    """
    return as_path(folder) / f"{file_name(name)}{ending}"


def check_names(names: Iterable[str]) -> None:
    """Refuse cases that would share a file, also where capital letters or ways to write an accent do not count.

    Args:
        names: of all cases.

    Raises:
        DataError: naming them, or as :func:`file_name`.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFD", file_name(name)).casefold())
        if (other := seen.get(key)) == name:
            raise DataError(f"several cases are called {name}, and what is written for them would be lost; {_RENAME}")
        if other is not None:
            raise DataError(
                f"the cases {other} and {name} would share one file where capital letters do not count; {_RENAME}"
            )
        seen[key] = name
