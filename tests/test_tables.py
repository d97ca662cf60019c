# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Tables that are written for people and read by programs."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from common.tables import read_table, table_rows, write_table

FORMULAS = ["=1+1", "+x", "-y", "@home", "\tz", "\rz", "\n=1", "＝1", "'=1", "''@x", '=HYPERLINK("x", "y")', "-1+2"]
PLAIN = ["a", "'a", "it's", "a;=1", " padded ", 'say "x"', "a,b", "line\nbreak", "1.5", "x@y", "", "naïve 脳", "--"[:0]]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_computed_and_every_cell_is_read_back(text: str, tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ["case", text], [[text, text], ["x", None]])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert cells[1:4] == [f"'{text}"] * 3, "an apostrophe tells a spreadsheet that a text follows"
    (_, first), (_, second) = read_table(tmp_path / "t.csv", exact=True)
    assert first == {"case": text, text: text}
    assert second[text] == ""
    assert next(iter(table_rows(tmp_path / "t.csv", ("case",))))[1]["case"] == text, "as a table of a user too"


def test_other_texts_and_numbers_stay_as_they_are(tmp_path: Path) -> None:
    rows = [[f"case {index}", text] for index, text in enumerate(PLAIN)]
    write_table(tmp_path / "t.csv", ["case", "a;b;c"], rows)
    assert [list(row.values()) for _, row in read_table(tmp_path / "t.csv", exact=True)] == rows
    assert next(iter(table_rows(tmp_path / "t.csv", ("case",))))[1].keys() == {"case", "a;b;c"}
    assert '"a;=1"' in (tmp_path / "t.csv").read_text("utf-8"), "where a semicolon separates, it would begin a cell"
    numbers = [-1.5, +2, "-3", "+4.5e-3", "-inf", np.float32(0.1), float("nan"), None, True]
    write_table(tmp_path / "n.csv", list("abcdefghi"), [numbers])
    assert (tmp_path / "n.csv").read_text().splitlines()[1] == "-1.5,2,-3,+4.5e-3,-inf,0.1,nan,,True"
    write_table(tmp_path / "n.csv", list("abc"), [[1 / 3, float("inf"), 12345678]], digits=6)
    assert (tmp_path / "n.csv").read_text().splitlines()[1] == "0.333333,,12345678"


def test_a_table_is_whole_or_not_there(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ["case"], [["a"]])

    def cut() -> object:
        yield ["b"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path / "t.csv", ["case"], cut())  # type: ignore[arg-type]
    assert (tmp_path / "t.csv").read_text() == "case\na\n"
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
