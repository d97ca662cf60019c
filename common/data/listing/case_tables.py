# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What tables say of cases: CSV or TSV with a column ``case``, or the ``participants.tsv`` of a BIDS data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from ...tables import read_table, table_rows
from ...transforms import without_ending
from ..cases import subject_of

__all__ = ["CaseTable"]

_PARTICIPANT = "participant_id"


class CaseTable:
    """The rows of a table by case.

    A table without a column ``case`` but with one ``participant_id`` describes subjects, which cases name as BIDS does:
    ``sub-01_T1w`` is of ``sub-01``.

    Args:
        path: with commas, semicolons or tabs.
        columns: that are wanted.

    Raises:
        DataError: if file or columns are missing, or two rows of a case differ in one of them.
    """

    def __init__(self, path: str | Path, *, columns: Sequence[str] = ()) -> None:
        rows = list(table_rows(path, ()))
        self.of_subjects = bool(rows) and "case" not in rows[0][1] and _PARTICIPANT in rows[0][1]
        if not self.of_subjects:
            rows = read_table(path)
        self.columns = list(rows[0][1])
        for column in columns:
            if column not in self.columns:
                raise DataError(f"{path} has no column {column!r}; its columns are {', '.join(self.columns)}")
        self._rows: dict[str, dict[str, str]] = {}
        for _, row in rows:
            name = row[_PARTICIPANT] if self.of_subjects else without_ending(row["case"])
            known = self._rows.setdefault(name, row)
            for column in columns:
                if row[column] and known[column] and row[column] != known[column]:
                    raise DataError(
                        f"{path} puts the {'subject' if self.of_subjects else 'case'} {name} into {known[column]!r} "
                        f"and {row[column]!r}; keep one row of it"
                    )
            self._rows[name] = {**row, **{key: value for key, value in known.items() if value}}

    def of(self, case: str) -> dict[str, str]:
        """Return what is told of a case, nothing if the table does not name it."""
        return self._rows.get(subject_of(case)[1] if self.of_subjects else case, {})
