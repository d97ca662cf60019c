# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Tables that say something about cases."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import DataError

__all__ = ["read_table", "table_rows"]


def read_table(table: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV with the lines they are on.

    Args:
        table: with a first line of column names, ``case`` among them.

    Raises:
        DataError: naming the file, the line and the remedy.
    """
    rows = []
    for line, row in table_rows(table, ("case",)):
        if not row["case"]:
            raise DataError(f"{table}, line {line}: the column case is empty; name the image")
        rows.append((line, row))
    if not rows:
        raise DataError(f"{table} has no rows below its first line; add one for each case")
    return rows


def table_rows(table: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV, one after the other, with the lines they are on; empty lines are left out.

    Commas, semicolons or tabs may separate; a mark that spreadsheets put before the first letter is no letter.

    Args:
        table: with a first line of column names.
        columns: that it must have.

    Raises:
        DataError: naming the file, the line and the remedy.
    """
    try:
        with open(Path(table).expanduser(), encoding="utf-8-sig", newline="") as stream:
            first = stream.readline(2**20)
            stream.seek(0)
            delimiter = max((",", ";", "\t"), key=first.count)
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            twice = [name for name, count in Counter(header).items() if count > 1]
            for column in columns:
                if column not in header:
                    raise DataError(
                        f"{table} has no column {column}; its first line must name the columns, and reads "
                        f"{first.strip()[:80]!r}"
                    )
            if twice:
                raise DataError(f"{table} has two columns called {twice[0]!r}; rename one")
            for values in reader:
                values = [value.strip() for value in values]
                if not any(values):
                    continue
                if len(values) > len(header):
                    raise DataError(
                        f"{table}, line {reader.line_num}: {len(values)} values for {len(header)} columns; put texts "
                        f"that hold a {delimiter!r} in quotes"
                    )
                yield reader.line_num, dict(zip(header, values + [""] * (len(header) - len(values)), strict=True))
    except OSError as error:
        raise DataError(f"the table {table} cannot be read: {error.strerror}; correct the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the table {table} is not text in UTF-8 ({error.reason}); save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError(f"the table {table} is no CSV: {error}; save it again") from error
