# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The tables of a study's report, to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from common.document import Strong, Table

from ..studies.results import Results
from .cells import MEANS, Cell, kind_of
from .significance import Ranks

__all__ = [
    "BACKBONES",
    "FEWER",
    "NOT_ALL",
    "TITLES",
    "bounds",
    "covers",
    "difference_table",
    "gap_table",
    "group_table",
    "interval_table",
    "main_table",
    "number",
    "p_value",
    "pairs_table",
    "plain_table",
    "rank_table",
]

TITLES = {
    "dice": "DSC",
    "nsd": "NSD",
    "ap": "AP",
    "balanced_accuracy": "balanced accuracy",
    "r2": "R2",
    "pearson": "Pearson correlation",
}
BACKBONES = {"resenc_l": "ResEnc-L", "primus_m": "Primus-M", "plain": "Plain"}
NOT_ALL, FEWER = "†", "‡"  # marks of cells of which not all unseen cases, or not all runs, are in


def number(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """Return a share in percent, or a dash if it is not defined.

    Example:
        >>> number(0.7123), number(float("nan")), number(-0.00001, sign=True)
        ('71.2', '–', '+0.0')
    """
    if not math.isfinite(value):
        return "–"
    shown = round(100 * value, digits) + 0.0
    return f"{shown:+.{digits}f}" if sign else f"{shown:.{digits}f}"


def bounds(low: float, high: float, *, sign: bool = False) -> str:
    """Return an interval in percent, nothing if it is not defined."""
    return "" if math.isnan(low) else f"[{number(low, sign=sign)}, {number(high, sign=sign)}]"


def _rows(results: Results, arms: Sequence[str]) -> list[str]:
    """Return arms with a title, "= ResEnc-L", before those of each backbone where there are several."""
    of = {arm: str(results.about["arms"][arm].get("backbone")) for arm in arms}
    kinds = list(dict.fromkeys(of.values()))
    if len(kinds) < 2:
        return list(arms)
    return [row for kind in kinds for row in [f"= {BACKBONES.get(kind, kind)}", *(a for a in arms if of[a] == kind)]]


def _grid(results: Results, cells: Sequence[Cell]) -> tuple[list[str], list[str], dict[tuple[str, str], Cell]]:
    """Return columns, rows and cells; a planned data set without a result has a column too."""
    columns = results.data_sets(cells[0].task, cells[0].budget) if cells else []
    columns += [name for name in MEANS if any(cell.column == name for cell in cells)]
    rows = _rows(results, list(results.about["arms"]))
    return columns, rows, {(cell.arm, cell.column): cell for cell in cells}


def covers(cell: Cell) -> str:
    """Return how many of the planned data sets are in a mean, " (2 of 3)"; nothing if all are."""
    return f" ({cell.data_sets} of {cell.data_sets_planned})" if cell.data_sets < cell.data_sets_planned else ""


def _heads(results: Results, columns: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    parts = {cell.column: covers(cell) for cell in cells}
    found = []
    for column in columns:
        kind = kind_of(results.about["data_sets"].get(column, {}))
        found.append(f"{column} ({kind})" if kind else f"{column} mean{parts[column]}" if column in MEANS else column)
    return ["", *found]


def main_table(results: Results, cells: Sequence[Cell], caption: str) -> Table:
    """Return scores of one metric and budget in percent, ± their standard deviation over seeds, the best in bold."""
    columns, rows, by = _grid(results, cells)
    best = {
        column: max(
            (round(c.value, 6) for c in cells if c.column == column and c.complete and not math.isnan(c.value)),
            default=math.nan,
        )
        for column in columns
    }
    alone = {column: sum(c.column == column and c.complete for c in cells) < 2 for column in columns}
    lines: list[list[str | Strong]] = []
    for row in rows:
        if row.startswith("= "):
            lines.append([row[2:]])
            continue
        line: list[str | Strong] = [row]
        for column in columns:
            cell = by.get((row, column))
            if cell is None:
                line.append("–")
                continue
            text = number(cell.value) + ("" if math.isnan(cell.seed_sd) else f" ± {number(cell.seed_sd)}")
            text += NOT_ALL if not cell.complete else FEWER if cell.runs < cell.planned else ""
            strong = cell.complete and round(cell.value, 6) == best[column] and not alone[column]
            line.append(Strong(text) if strong else text)
        lines.append(line)
    return Table(_heads(results, columns, cells), lines, caption)


def interval_table(results: Results, cells: Sequence[Cell], caption: str) -> Table:
    """Return scores of one metric and budget with their intervals."""
    return _second_table(results, cells, caption, lambda c: (number(c.value), bounds(c.low, c.high)))


def difference_table(results: Results, cells: Sequence[Cell], caption: str) -> Table:
    """Return each arm minus the arm from scratch of its backbone, with intervals; bold where 0 is outside."""
    own = [cell for cell in cells if cell.scratch]
    table = _second_table(
        results,
        own,
        caption,
        lambda c: (number(c.minus_scratch, sign=True), bounds(c.minus_low, c.minus_high, sign=True)),
        lambda c: c.minus_low > 0 or c.minus_high < 0,
    )
    keep = {cell.arm for cell in own}
    rows = [row for row in table.rows if len(row) == 1 or row[0] in keep]
    table.rows = [row for i, row in enumerate(rows) if len(row) > 1 or (i + 1 < len(rows) and len(rows[i + 1]) > 1)]
    return table


def _second_table(
    results: Results,
    cells: Sequence[Cell],
    caption: str,
    show: Callable[[Cell], tuple[str, str]],
    bold: Callable[[Cell], bool] = lambda cell: False,
) -> Table:
    columns, rows, by = _grid(results, cells)
    lines: list[list[str | Strong]] = []
    for row in rows:
        if row.startswith("= "):
            lines.append([row[2:]])
            continue
        found = [by.get((row, column)) for column in columns]
        lines.append([row, *("–" if c is None else Strong(*show(c), bold=bool(bold(c))) for c in found)])
    return Table(_heads(results, columns, cells), lines, caption)


def rank_table(ranks: Mapping[str, Ranks]) -> Table:
    """Return mean ranks, a column for each score, best first by the first one, and Friedman's p below."""
    first = next(iter(ranks.values()))
    lines: list[list[str | Strong]] = []
    for index in np.argsort(first.mean, kind="stable"):
        arm = first.arms[index]
        places = [each.mean[each.arms.index(arm)] if arm in each.arms else math.nan for each in ranks.values()]
        lines.append([arm, *("–" if math.isnan(place) else f"{place:.2f}" for place in places)])
    if any(each.p is not None for each in ranks.values()):
        lines.append(["Friedman's test, p", *("–" if e.p is None else p_value(e.p) for e in ranks.values())])
        cds = ("–" if each.cd is None else f"{each.cd:.2f}" for each in ranks.values())
        lines.append(["critical difference (Nemenyi, 0.05)", *cds])
    return Table(["mean rank, 1 is best", *ranks], lines)


def plain_table(rows: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """Return each arm minus each of its plain rows, with intervals; bold where 0 is outside."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    by = {(row["arm"], row["row"]): row for row in rows}

    def cell(row: Mapping[str, Any]) -> Strong:
        told = number(row["difference"], sign=True), bounds(row["low"], row["high"], sign=True)
        return Strong(*told, bold=bool(row["outcome"]))

    lines: list[list[str | Strong]] = [
        [arm, *(cell(by[arm, name]) if (arm, name) in by else "–" for name in names)]
        for arm in dict.fromkeys(row["arm"] for row in rows)
    ]
    return Table(["", *(f"minus {name}" for name in names)], lines, caption)


def p_value(value: float) -> str:
    """Return a p value to read."""
    return "–" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def pairs_table(tests: Sequence[Mapping[str, Any]]) -> Table:
    """Return the paired tests."""
    several = len({row["budget"] for row in tests}) > 1
    return Table(
        [
            "data set",
            *(["budget"] if several else []),
            "arm",
            "minus",
            "difference",
            "cases",
            "p",
            "p, Holm",
            "shown better",
        ],
        [
            [
                row["data_set"],
                *([row["budget"]] if several else []),
                row["arm"],
                row["other"],
                f"{number(row['difference'], sign=True)} {bounds(row['low'], row['high'], sign=True)}",
                str(row["cases"]),
                p_value(row["p"]),
                p_value(row["p_holm"]),
                Strong(row["better"]) if row["better"] else "no difference shown",
            ]
            for row in tests
        ],
    )


def group_table(rows: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """Return one data set's groups as columns, with the scores of one metric."""
    groups = {row["group"]: max(r["cases"] for r in rows if r["group"] == row["group"]) for row in rows}
    by = {(row["arm"], row["group"]): row for row in rows}
    lines: list[list[str | Strong]] = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [by.get((arm, group)) for group in groups]
        lines.append(
            [
                arm,
                *(
                    "–" if r is None else Strong(number(r["value"]), bounds(r["low"], r["high"]), bold=False)
                    for r in found
                ),
            ]
        )
    return Table(["", *(f"{group} ({count})" for group, count in groups.items())], lines, caption)


def gap_table(rows: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """Return how far the worst group is from the best, for each arm and column."""
    lines = [
        [
            row["arm"],
            row["column"],
            row["best"],
            row["worst"],
            f"{number(row['gap'])} {bounds(*row['interval'])}",
            number(row["by_chance"]),
        ]
        for row in rows
    ]
    heads = ["arm", "groups", "best", "worst", "gap [95 %, all pairs]", "if they did not differ"]
    return Table(heads, lines, caption, words=True)
