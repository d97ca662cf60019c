# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Tables that say something about cases."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from ..errors import DataError

__all__ = ["read_table"]


def read_table(table: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV with the lines they are on.

    Commas, semicolons or tabs may separate; a mark that spreadsheets put before the first letter is no letter.

    Args:
        table: with a first line of column names, ``case`` among them.

    Raises:
        DataError: naming the file, the line and the remedy.
    """
    try:
        text = Path(table).expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"the table {table} cannot be read: {error.strerror}; correct --table") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the table {table} is not text in UTF-8 ({error.reason}); save it as CSV in UTF-8") from error
    first = text.split("\n", 1)[0]
    delimiter = max((",", ";", "\t"), key=first.count)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        twice = [name for name, count in Counter(header).items() if count > 1]
        if "case" not in header:
            raise DataError(
                f"{table} has no column case; its first line must name the columns, and reads {first.strip()[:80]!r}"
            )
        if twice:
            raise DataError(f"{table} has two columns called {twice[0]!r}; rename one")
        for values in reader:
            values = [value.strip() for value in values]
            if not any(values):
                continue
            if len(values) > len(header):
                raise DataError(
                    f"{table}, line {reader.line_num}: {len(values)} values for {len(header)} columns; put texts that "
                    f"hold a {delimiter!r} in quotes"
                )
            row = dict(zip(header, values + [""] * (len(header) - len(values)), strict=True))
            if not row["case"]:
                raise DataError(f"{table}, line {reader.line_num}: the column case is empty; name the image")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise DataError(f"the table {table} is no CSV: {error}; save it again") from error
    if not rows:
        raise DataError(f"{table} has no rows below its first line; add one for each case")
    return rows
