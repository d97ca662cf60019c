# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The report of a study, from whatever runs are finished: one HTML file, Markdown with pictures, and CSVs.

| file in report/ | holds |
|---|---|
| report.html | all, pictures and volumes to look through inside |
| report.md, *.png | the same as Markdown |
| cases.csv | every score of every case, class and run |
| table.csv | every cell of the main tables with its intervals |
| tests.csv | paired tests of all pairs of arms |
| ranks.csv | mean ranks |
| groups.csv | scores in each centre, scanner or other group |
| gaps.csv | how far the worst group is from the best |
| plain.csv | each arm against a frozen random encoder, a small plain CNN and the mean of the training cases |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from common.document import Heading, Part, Strong, Table, Text, write_html, write_markdown
from common.tables import write_table
from common.terminal import near

from ..studies.results import METRICS, Block, Results, blocks_of, read_results
from .cells import Cell, all_cells, case_rows, gap_rows, group_rows
from .examples import curves_part, predictions_part
from .outcome import budget_words, caveats, headline, main_budget
from .pictures import looks
from .plain import against_plain
from .provenance import counts_sentence, provenance_part
from .published_numbers import published_part
from .sections import all_ranks, groups_part, ranks_part, scores_part
from .significance import Ranks, pair_tests
from .tables import TITLES, main_table

__all__ = ["write_report"]

_COLUMNS = {
    "cases": ("data_set", "arm", "budget", "fold", "seed", "case", "group", "class", "score", "value"),
    "tests": (
        *("data_set", "budget", "metric", "arm", "other", "difference", "low", "high", "cases", "arm_better_on"),
        *("runs_of_each", "test", "p", "p_holm", "better"),
    ),
    "ranks": ("task", "budget", "metric", "over", "count", "arm", "mean_rank", "friedman_p", "critical_difference"),
    "groups": (
        *("data_set", "budget", "column", "group", "arm", "metric", "cases", "value", "low", "high", "complete", "few"),
    ),
    "gaps": ("data_set", "budget", "column", "arm", "best", "worst", "gap", "low", "high", "by_chance"),
    "plain": ("task", "budget", "column", "arm", "row", "difference", "low", "high", "outcome", "seeds"),
}


def write_report(folder: str | Path) -> Path:
    """Read a study's folder, write its report into ``report/`` there, and print the main table.

    Args:
        folder: with study.json and runs/.

    Returns:
        path of report.html.

    Raises:
        DataError: if there is no study in the folder.
    """
    results = read_results(folder)
    blocks = blocks_of(results)
    cells = all_cells(results, blocks)
    tests = pair_tests(blocks)
    ranks = all_ranks(results, blocks)
    groups, gaps = group_rows(blocks), gap_rows(blocks)
    plain = against_plain(results, blocks)
    outcome = headline(results, blocks, tests, plain)
    own = looks(results.about["arms"])
    title = f"Study: {results.about['name']}"
    parts: list[Part] = [
        Heading("Outcome"),
        *(Text(sentence, "lead") for sentence in outcome),
        Text(counts_sentence(results)),
        *(Text(sentence, "note") for sentence in caveats(results, blocks, tests)),
        *scores_part(results, blocks, cells, own, plain),
        *ranks_part(results, ranks, tests, own),
        *groups_part(blocks, groups, gaps),
        *curves_part(results, own),
        *predictions_part(results, blocks),
        *published_part(results.about, cells),
        *provenance_part(results),
    ]
    target = results.folder / "report"
    for name, rows in {
        "cases": case_rows(results),
        "table": [asdict(cell) for cell in cells],
        "tests": tests,
        "ranks": _rank_rows(ranks),
        "groups": groups,
        "gaps": gaps,
        "plain": plain,
    }.items():
        columns = _COLUMNS.get(name) or tuple(field.name for field in fields(Cell))
        cells_of = ([row[column] for column in columns] for row in rows)
        write_table(target / f"{name}.csv", columns, cells_of, digits=6)
    write_markdown(title, parts, target / "report.md")
    write_html(title, parts, target / "report.html")
    _print(results, blocks, cells, outcome)
    tables = ", ".join(f"{name}.csv" for name in ("cases", "table", "tests", "ranks", "groups", "gaps", "plain"))
    print(f"written: {near(target)}/report.html, report.md, {tables}")
    return target / "report.html"


def _rank_rows(ranks: Sequence[tuple[str, str, str, Ranks]]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "budget": budget,
            "metric": metric,
            "over": each.over,
            "count": each.count,
            "arm": arm,
            "mean_rank": float(each.mean[index]),
            "friedman_p": each.p,
            "critical_difference": each.cd,
        }
        for task, budget, metric, each in ranks
        for index, arm in enumerate(each.arms)
    ]


def _print(results: Results, blocks: Sequence[Block], cells: Sequence[Cell], outcome: Sequence[str]) -> None:
    """Print the main table of each task with the budget that has most cases, and the outcome."""
    for task, metrics in METRICS.items():
        own = [block for block in blocks if block.task == task]
        if not own:
            continue
        budget = main_budget(own)
        here = [cell for cell in cells if (cell.task, cell.budget, cell.metric) == (task, budget, metrics[0])]
        print(f"\n{TITLES[metrics[0]]}, %, {budget_words(budget)}; ± over seeds, * the best of a column")
        print(_as_text(main_table(results, here, "")))
    for sentence in outcome:
        print(f"\n{sentence}")
    print(f"\n{counts_sentence(results)}")
    for name, why in results.failed.items():
        print(f"failed: {name}: {why}")


def _as_text(table: Table) -> str:
    rows = [list(table.heads)] + [
        [f"{cell.text}*" if isinstance(cell, Strong) else cell for cell in row] for row in table.rows
    ]
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[column]) for row in full) for column in range(len(table.heads))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
