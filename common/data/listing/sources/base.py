# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a source of cases returns, and the rules that all sources share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ....errors import DataError, SettingsError
from ...cases import MASKS, Case
from ...problems import LeftOut

__all__ = ["Found", "Polarity", "below", "inverted", "plain"]

Polarity = str | Mapping[str, str]  # as_named or inverted, for all masks or for each
_EMPTY = {"", "nan", "none", "null", "n/a"}


@dataclass
class Found:
    """Cases of a source, and what is left out."""

    cases: list[Case] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    _listed: set[str] = field(default_factory=set)

    def add(self, case: Case, where: str, entry: str) -> None:
        """Take a case of an index, or note that its image, ``entry`` there, was listed before."""
        if case["image"] in self._listed:
            self.left_out.note(f"{where}: {entry} is listed twice; the first counts")
            return
        self._listed.add(case["image"])
        self.cases.append(case)


def plain(value: Any) -> str:
    """Return a cell of a table as text, empty where it holds nothing."""
    text = "" if value is None else str(value).strip()
    return "" if text.lower() in _EMPTY else text


def inverted(mask_polarity: Polarity) -> list[str]:
    """Return the masks whose files mean the opposite of their names.

    Raises:
        SettingsError: if a polarity or a mask is unknown.

    Example:
        >>> inverted("as_named"), inverted({"anatomy_mask": "inverted"})
        ([], ['anatomy_mask'])
    """
    known = isinstance(mask_polarity, (str, Mapping))
    each = dict(mask_polarity) if isinstance(mask_polarity, Mapping) else dict.fromkeys(MASKS, mask_polarity)
    if not known or set(each) - set(MASKS) or any(value not in ("as_named", "inverted") for value in each.values()):
        raise SettingsError(
            f"mask_polarity is {mask_polarity!r}; it is as_named or inverted, or one of them for each of "
            f"{', '.join(MASKS)}"
        )
    return [mask for mask in MASKS if each.get(mask) == "inverted"]


def below(entry: str) -> str:
    """Return a relative path that an index names, in plain form.

    Raises:
        DataError: if it leads out of the folder that it starts in.

    Example:
        >>> below("./ds000001//sub-01/a.nii.gz")
        'ds000001/sub-01/a.nii.gz'
    """
    path = PurePosixPath(entry.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in entry or (path.parts and path.parts[0].endswith(":")):
        raise DataError(f"{entry!r} leads out of the data set's folder; entries must lie below it")
    return path.as_posix()
