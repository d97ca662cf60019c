# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Of which groups and patients cases are: columns of a table or keys of a datalist, with bands for quantities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DataError, SettingsError
from ...tables import UNKNOWN, is_missing

__all__ = ["GroupColumn", "Members", "group_columns", "members_of", "wanted_columns"]

_MANY = 10  # different numbers; more may be a quantity that needs bands


@dataclass(frozen=True)
class GroupColumn:
    """A column by whose values scores are told, and where the bands of a quantity end.

    Attributes:
        name: of the column.
        cuts: ends of the bands, ascending; none, and every value is a group.
    """

    name: str
    cuts: tuple[float, ...] = ()

    def group_of(self, value: Any, case: str) -> str:
        """Return the group of a value, "" where there is none.

        Raises:
            DataError: if a value of a quantity is no number.

        Example:
            >>> age = GroupColumn("age", (40, 60))
            >>> [age.group_of(value, "case_0") for value in ("39.5", 40, "60", "n/a")]
            ['below 40', '40 to below 60', '60 and above', '']
        """
        if is_missing(value) or str(value).strip().lower() == UNKNOWN:
            return ""
        if not self.cuts:
            return str(value).strip()
        number = _number(value)
        if number is None:
            raise DataError(f"the {self.name} of {case} is {value!r}, not a number; correct it, or name no bands")
        place = sum(number >= cut for cut in self.cuts)
        if place == 0:
            return f"below {self.cuts[0]:g}"
        low = self.cuts[place - 1]
        return f"{low:g} and above" if place == len(self.cuts) else f"{low:g} to below {self.cuts[place]:g}"


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def group_columns(told: str | Sequence[str] | None) -> list[GroupColumn]:
    """Return the columns that a setting names, with the ends of bands after a colon.

    Raises:
        SettingsError: if that is no list of columns.

    Example:
        >>> [(column.name, column.cuts) for column in group_columns("site,age:40,60,sex")]
        [('site', ()), ('age', (40.0, 60.0)), ('sex', ())]
    """
    parts = [told] if isinstance(told, str) else list(told or ())
    found: list[tuple[str, list[float]]] = []
    for token in (token.strip() for part in parts for token in str(part).split(",")):
        name, colon, cut = token.partition(":")
        number = _number(cut if colon else token)
        if (colon and number is None) or not name:
            raise SettingsError(f"group is {told!r}; name columns, with ends of bands after a colon: site,age:40,60")
        if number is None:
            found.append((name, []))
        elif colon:
            found.append((name.strip(), [number]))
        elif found and found[-1][1]:
            found[-1][1].append(number)
        else:
            found.append((token, []))  # a column that is called by a number
    names = [name for name, _ in found]
    for name, cuts in found:
        if names.count(name) > 1:
            raise SettingsError(f"group names {name} twice; name each column once")
        if cuts != sorted(set(cuts)):
            raise SettingsError(f"the bands of {name} end at {', '.join(f'{cut:g}' for cut in cuts)}; let them ascend")
    return [GroupColumn(name, tuple(cuts)) for name, cuts in found]


@dataclass(frozen=True)
class Members:
    """Of which groups and patients cases are.

    Attributes:
        groups: of each column the group of every case, "" where it has none.
        patients: whose scan each case is; None where nobody tells.
    """

    groups: dict[str, list[str]]
    patients: list[str] | None = None

    def part(self, rows: Sequence[int]) -> Members:
        """Return those of some of the cases."""
        groups = {column: [values[row] for row in rows] for column, values in self.groups.items()}
        return Members(groups, None if self.patients is None else [self.patients[row] for row in rows])

    def named(self) -> dict[str, list[str]]:
        """Return the groups with a name for those of cases that have none."""
        return {column: [value or UNKNOWN for value in values] for column, values in self.groups.items()}

    def row(self, index: int) -> dict[str, Any]:
        """Return what is written of a case: its ``group``, or its groups by column where there are several."""
        own = {column: values[index] for column, values in self.named().items()}
        patient = {} if self.patients is None else {"patient": self.patients[index]}
        return {"group": own if len(own) > 1 else next(iter(own.values()), None), **patient}


def members_of(
    cases: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    group: str | Sequence[str] | None = None,
    patient: str | None = None,
) -> Members:
    """Return of which groups and patients cases are.

    Args:
        cases: their names.
        rows: what is known of each, by column.
        group: columns to group by, as :func:`group_columns` reads them.
        patient: column of the patients.

    Raises:
        DataError: if no case has a group of a column, a quantity has no bands, or a case has no patient.
    """
    groups = {
        column.name: [column.group_of(row.get(column.name), case) for case, row in zip(cases, rows, strict=True)]
        for column in group_columns(group)
    }
    for column, values in groups.items():
        _check_groups(column, values, cases)
    if not patient:
        return Members(groups)
    lacking = [case for case, row in zip(cases, rows, strict=True) if is_missing(row.get(patient))]
    if lacking:
        raise DataError(f"{lacking[0]} has no {patient!r}; add it to the table or the datalist, or drop --patient")
    return Members(groups, [str(row[patient]).strip() for row in rows])


def _check_groups(column: str, values: Sequence[str], cases: Sequence[str]) -> None:
    """Refuse a column of which no case has a value, and a quantity without bands."""
    known = [value for value in values if value]
    if cases and not known:
        raise DataError(
            f"no case has a {column}: the cases are called {', '.join(cases[:3])}, ...; name them so in the table of "
            "groups, or drop --group"
        )
    numbers = [number for value in known if (number := _number(value)) is not None]
    different = len({*numbers})
    if len(numbers) == len(known) and different > _MANY and different > len(known) / 3:
        low, high = np.quantile(numbers, [1 / 3, 2 / 3])
        raise DataError(
            f"{column} has {different} different numbers in {len(known)} cases; name ends of bands, such as --group "
            f"{column}:{low:.3g},{high:.3g}, or --patient {column} if it tells whose scans they are"
        )


def wanted_columns(group: str | Sequence[str] | None, patient: str | None) -> list[str]:
    """Return the names of the columns that are read of a table."""
    return [*(column.name for column in group_columns(group)), *([patient] if patient else [])]
