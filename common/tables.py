# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Tables as CSV: those that users give, and those that are written for people to open in a spreadsheet.

A spreadsheet computes a cell that begins like a formula, whoever wrote it: a case called ``=1+1``, a class called
``@home``. Such a text is written with an apostrophe before it, which tells a spreadsheet that a text follows, and read
without it. Numbers stay numbers.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import DataError
from .files import replace_file
from .paths import as_path

__all__ = ["UNKNOWN", "is_missing", "read_table", "table_rows", "write_table"]

UNKNOWN = "unknown"  # what is said where a table says nothing

_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four are the wide forms of the first
_NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf|nan)", re.ASCII)
_MISSING = {"", "na", "n/a", "nan", "null", "?"}


def is_missing(value: Any) -> bool:
    """Return whether a cell says nothing; ``none`` may be a class: none, mild, severe.

    Example:
        >>> [is_missing(cell) for cell in (None, " ", "n/a", "NaN", "none", 0)]
        [True, True, True, True, False, False]
    """
    return value is None or str(value).strip().lower() in _MISSING


def write_table(
    path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Sequence[Any]], *, digits: int | None = None
) -> None:
    """Write a CSV whole or not at all, in UTF-8, with cells that no spreadsheet computes.

    Args:
        path: to write.
        columns: their names.
        rows: texts, numbers, and None for an empty cell.
        digits: of floating-point numbers, those that are not finite becoming empty; all that are needed unless given.
    """
    text = "".join(",".join(_cell(value, digits) for value in row) + "\n" for row in (columns, *rows))
    content = text.encode("utf-8", "surrogateescape")  # names of files that are no text
    replace_file(as_path(path), lambda temporary: Path(temporary).write_bytes(content))


def _cell(value: Any, digits: int | None) -> str:
    if value is None or (digits is not None and isinstance(value, float) and not math.isfinite(value)):
        return ""
    if digits is not None and isinstance(value, float):
        return f"{value:.{digits}g}"
    text = str(value)
    if _FORMULA.match(text) and not _NUMBER.fullmatch(text):
        text = f"'{text}"
    # also what separates cells where a comma stands in numbers, since the rest would be a cell of its own there
    return '"{}"'.format(text.replace('"', '""')) if re.search(r'[",;\t\r\n]|^ | $', text) else text


def _text(cell: str) -> str:
    """Return what a cell says."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def read_table(table: str | Path, *, exact: bool = False) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV with the lines they are on.

    Args:
        table: with a first line of column names, ``case`` among them.
        exact: of a table that :func:`write_table` wrote: what cells hold, with spaces at their ends.

    Raises:
        DataError: naming the file, the line and the remedy.
    """
    rows = []
    for line, row in table_rows(table, ("case",), exact=exact):
        if not row["case"]:
            raise DataError(f"{table}, line {line}: the column case is empty; name the image")
        rows.append((line, row))
    if not rows:
        raise DataError(f"{table} has no rows below its first line; add one for each case")
    return rows


def table_rows(
    table: str | Path, columns: Sequence[str], *, exact: bool = False
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV, one after the other, with the lines they are on; empty lines are left out.

    Commas, semicolons or tabs may separate; a mark that spreadsheets put before the first letter is no letter.

    Args:
        table: with a first line of column names.
        columns: that it must have.
        exact: as in :func:`read_table`.

    Raises:
        DataError: naming the file, the line and the remedy.
    """
    try:
        with open(as_path(table), encoding="utf-8-sig", newline="") as stream:
            first = stream.readline(2**20)
            stream.seek(0)
            delimiter = "," if exact else max((",", ";", "\t"), key=re.sub('"[^"]*"', "", first).count)
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [_text(name if exact else name.strip()) for name in next(reader, [])]
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
                values = [_text(value if exact else value.strip()) for value in values]
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
