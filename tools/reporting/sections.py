# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The parts of a study's report that compare: scores, ranks and tests, groups of cases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from common.document import Heading, Part, Picture, Text
from common.metrics import group_sentences
from common.metrics.groups import groups_figure

from ..studies.definition import plain_name
from ..studies.results import METRICS, Block, Results, groups_sentence, patients_sentence
from .cells import MEANS, Cell, case_ranks, data_set_ranks, group_cells
from .comparison import RESAMPLES, score
from .outcome import budget_words, of_planned
from .pictures import Look, draw_budgets, draw_ranks, draw_scores, png
from .plain import ALL
from .significance import Ranks
from .tables import (
    FEWER,
    NOT_ALL,
    TITLES,
    covers,
    difference_table,
    gap_table,
    group_table,
    interval_table,
    main_table,
    pairs_table,
    plain_table,
    rank_table,
)

__all__ = ["all_ranks", "groups_part", "ranks_part", "scores_part"]

_MOST_TESTS = 120  # in the report; tests.csv has all


def scores_part(
    results: Results,
    blocks: Sequence[Block],
    cells: Sequence[Cell],
    own: Mapping[str, Look],
    plain: Sequence[Mapping[str, Any]] = (),
) -> list[Part]:
    """Return the main tables and charts, a block for each task and budget."""
    parts: list[Part] = [Heading("Scores")]
    parts.append(
        Text(
            "In percent, with the standard deviation over seeds; the best of each column in bold. Segmentation: DSC "
            f"and NSD (surface Dice at {_tolerances(results)} mm), averaged for each case over seeds, for each class "
            "over the cases in which it is defined, then over classes. Classification: average precision (AP) and "
            "balanced accuracy of each run on its unseen cases, averaged over runs. ID, OOD and All are means "
            'over data sets, given where all that have a result are complete; a head such as "All mean (2 of 3)" says '
            f"that a planned data set has none, whose column is empty. {NOT_ALL} not all unseen cases are scored, so "
            f"the value is compared with no other; {FEWER} fewer runs than planned.",
            "note",
        )
    )
    several = len({cell.budget for cell in cells}) > 1
    for task in METRICS:
        for budget in _largest_first(cell.budget for cell in cells if cell.task == task):
            parts.append(Heading(f"{task.capitalize()}, {budget_words(budget)}", 3))
            here = [cell for cell in cells if (cell.task, cell.budget) == (task, budget)]
            for metric in METRICS[task]:
                parts.append(main_table(results, [c for c in here if c.metric == metric], f"{TITLES[metric]}, %"))
            first = [cell for cell in here if cell.metric == METRICS[task][0]]
            title = TITLES[METRICS[task][0]]
            name = f"scores_{task}_{budget}.png"
            alt = f"{title} with 95 % intervals, {budget_words(budget)}; hollow: not all unseen cases are scored"
            titled = [replace(cell, column=f"{cell.column}{covers(cell)}") for cell in first]
            parts.append(Picture(name, draw_scores(titled, own), alt))
            for metric in METRICS[task]:
                own_cells = [c for c in here if c.metric == metric]
                parts.append(interval_table(results, own_cells, f"{TITLES[metric]} with 95 % intervals"))
                if any(cell.scratch for cell in own_cells):
                    caption = f"{TITLES[metric]} minus that of the arm from scratch of the same backbone, points"
                    parts.append(difference_table(results, own_cells, caption))
            parts += _plain_tables([row for row in plain if (row["task"], row["budget"]) == (task, budget)], title)
        counts = _counts(results, task, blocks)
        if several and counts:
            curve = [c for c in cells if c.task == task and c.metric == METRICS[task][0] and c.column not in MEANS]
            parts.append(Heading(f"{task.capitalize()}: over the number of labelled cases", 3))
            alt = "scores over the number of labelled training cases, with 95 % intervals; tables have the numbers"
            parts.append(Picture(f"budgets_{task}.png", draw_budgets(curve, counts, own), alt))
    if not cells:
        parts.append(Text("No run is finished yet."))
    else:
        parts.append(
            Text(
                f"Intervals hold the middle 95 % of {RESAMPLES} bootstrap resamples of the unseen cases (patients, "
                "where groups of cases are read as such, as told below), spread as Student's t asks for so few, to "
                "which comes what differs between the seeds of a fold, likewise; with one seed that part is missing. "
                "All arms share their draws. Differences are taken from the folds and seeds that both arms have; in "
                "bold, 0 lies outside the interval, before any correction for many comparisons.",
                "note",
            )
        )
    return parts


def _plain_tables(rows: Sequence[Mapping[str, Any]], title: str) -> list[Part]:
    """Return how far the arms are above what they have to beat, a table for each data set and one of the mean."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    parts: list[Part] = []
    for column in columns:
        where = "mean of the data sets" if column == ALL else column
        caption = f"{title} minus that of the plain rows, points, {where}"
        parts.append(plain_table([row for row in rows if row["column"] == column], caption))
    if parts:
        parts.append(
            Text(
                "Plain rows are what any pre-trained or larger network has to beat: the same network as it was drawn, "
                "with its encoder frozen; a U-Net of less than a million parameters, from scratch; of a number, the "
                "mean of the training cases. They are in no test and no rank. An arm beats one where the interval "
                "leaves out 0.",
                "note",
            )
        )
    return parts


def _largest_first(budgets: Iterable[str]) -> list[str]:
    return sorted(set(budgets), key=lambda name: -math.inf if name == "all" else -float(name))


def _tolerances(results: Results) -> str:
    found = {f"{r['tolerance_mm']:g}" for r in results.finished.values() if r.get("tolerance_mm") is not None}
    return " or ".join(sorted(found)) or "1"


def _counts(results: Results, task: str, blocks: Sequence[Block]) -> dict[tuple[str, str], float]:
    """Return the number of training cases by data set and budget, its mean over folds."""
    found = {}
    for block in blocks:
        if block.task == task:
            runs = results.planned(data_set=block.data_set, budget=block.budget)
            found[block.data_set, block.budget] = float(np.mean([run["cases"] for run in runs]))
    return found if len(set(found)) > len({data_set for data_set, _ in found}) else {}


def all_ranks(results: Results, blocks: Sequence[Block]) -> list[tuple[str, str, str, Ranks]]:
    """Return task, budget, metric and ranks: over data sets, where there are three, else over the cases of each."""
    found = []
    for task, budget in (
        (task, budget)
        for task in dict.fromkeys(block.task for block in blocks)
        for budget in _largest_first(block.budget for block in blocks if block.task == task)
    ):
        own = [block for block in blocks if (block.task, block.budget) == (task, budget)]
        for index, metric in enumerate(METRICS[task]):
            ranks = data_set_ranks(results, own, index) if len(own) > 1 else None
            if ranks is not None:
                found.append((task, budget, metric, ranks))
            if len(own) < 3:
                each = [case_ranks(block, index) for block in own]
                found += [(task, budget, metric, ranks) for ranks in each if ranks is not None]
    return found


def ranks_part(
    results: Results,
    ranks: Sequence[tuple[str, str, str, Ranks]],
    tests: Sequence[Mapping[str, Any]],
    own: Mapping[str, Look],
) -> list[Part]:
    """Return mean ranks, with the critical difference where it can be tested, and the paired tests."""
    parts: list[Part] = [Heading("Ranks and tests")]
    for index, (task, budget, over) in enumerate(dict.fromkeys((t, b, each.over) for t, b, _, each in ranks)):
        here = {TITLES[m]: each for t, b, m, each in ranks if (t, b, each.over) == (task, budget, over)}
        first = next(iter(here.values()))
        what = f"the {first.count} cases of {over} alone"
        if over == "data sets":
            what = of_planned(first.count, len(results.data_sets(task, budget)))
        parts.append(Heading(f"{task.capitalize()}, {budget_words(budget)}: ranks over {what}", 3))
        parts += _ranks(first, over)
        parts.append(rank_table(here))
        if first.pairs is not None:
            alt = f"mean ranks over {what}; bars join arms that Nemenyi's test cannot tell apart at 0.05"
            parts.append(Picture(f"ranks_{index}.png", draw_ranks(first, own, next(iter(here))), alt))
    if not ranks:
        parts.append(Text("Fewer than two arms are complete on the same data sets, so there are no ranks."))
    parts.append(Heading("Paired tests", 3))
    if not tests:
        return [*parts, Text("No two arms have a run in common, so there is nothing to test.")]
    known = [test for test in tests if not math.isnan(test["p"])]
    parts.append(
        Text(
            f"Each pair of arms on each data set and budget, {len(known)} tests in all, whose p values are corrected "
            "together after Holm. Segmentation: Wilcoxon's signed-rank test of the cases' DSC, averaged over classes "
            "and seeds. Scores leave out a class that is neither there nor predicted; in these tests and in ranks "
            "over cases, leaving it empty counts as 1 where another arm predicts it and gets 0. Classification: a "
            "permutation test of AP, in which the probabilities of the two arms are exchanged case by case. A "
            "difference counts as shown if the corrected p is below 0.05, the interval leaves out 0 and both point "
            "the same way: many small gains can decide the test while a few large losses decide the mean. The tests "
            "take the trained networks as they are; only the intervals hold what differs between seeds.",
            "note",
        )
    )
    if len(tests) > _MOST_TESTS:
        parts.append(Text(f"The {_MOST_TESTS} clearest are shown; tests.csv has all.", "note"))
        clearest = sorted(known, key=lambda test: test["p"])[:_MOST_TESTS]
        tests = [test for test in tests if test in clearest]
    return [*parts, pairs_table(tests)]


def _ranks(ranks: Ranks, over: str) -> list[Part]:
    """Say what can be tested of ranks."""
    if over != "data sets":
        told = (
            f"Fewer than three data sets: ranks over data sets cannot be tested. These are over the cases of {over}; "
            "they tell how sure the order of these trained networks is there, not what to expect of other data."
        )
        if ranks.pairs is not None:
            return [Text(told, "note")]
        return [Text(f"{told} With fewer than three arms or cases, Friedman's test cannot be made.", "note")]
    if ranks.count < 3:
        return [Text("Ranks over fewer than three data sets cannot be tested.", "note")]
    if ranks.pairs is None:
        return [Text("Friedman's test needs three arms; the paired tests below compare two.", "note")]
    few = ranks.count < 10
    return [Text("With so few data sets the test finds only large differences.", "note")] if few else []


def groups_part(
    blocks: Sequence[Block], rows: Sequence[Mapping[str, Any]], gaps: Sequence[Mapping[str, Any]]
) -> list[Part]:
    """Return the scores in each centre, scanner or other group of cases, and how far the worst is from the best."""
    parts: list[Part] = [Heading("Groups of cases", short="Groups")]
    read: dict[str, dict[str, str]] = {}  # of each data set what is said of its groups, and with which budget
    for block in blocks:
        if told := patients_sentence(block) or groups_sentence(block.groups, block.data_set):
            read.setdefault(block.data_set, {}).setdefault(told, block.budget)
    if not read and not rows:
        return [*parts, Text("No data set tells of groups of cases, such as centres or scanners.")]
    for texts in read.values():
        several = len(texts) > 1  # not all cases are scored with each budget
        parts += [Text(f"With {budget_words(b)}, {t}" if several else t, "note") for t, b in texts.items()]
    if not rows:
        return parts
    parts.append(
        Text(
            "Of all runs of an arm, with 95 % intervals; the number of unseen cases is in brackets. Between groups the "
            "cases differ too, so that a lower score need not be the scanner's fault.",
            "note",
        )
    )
    for block in blocks:
        here = [r for r in rows if (r["data_set"], r["budget"]) == (block.data_set, block.budget)]
        where = f"{block.data_set}, {budget_words(block.budget)}"
        for column in dict.fromkeys(row["column"] for row in here):
            for metric in block.metrics:
                own = [row for row in here if (row["column"], row["metric"]) == (column, metric)]
                parts.append(group_table(own, f"{where}, {TITLES[metric]} by {column}"))
        if here:
            parts += _apart(
                block, where, [r for r in gaps if (r["data_set"], r["budget"]) == (block.data_set, block.budget)]
            )
    return parts


def _apart(block: Block, where: str, gaps: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Return what groups say and do not say, the gaps of all arms, and a picture of the best arm."""
    best = max(block.arms, key=lambda arm: (block.has(arm), np.nan_to_num(score(block, arm)[0], nan=-1.0)))
    found = group_cells(block, best)
    title = TITLES[block.metrics[0]]
    parts: list[Part] = [Text(f"{where}, {title} of {best}. {sentence}", "note") for sentence in group_sentences(found)]
    if gaps:
        parts.append(gap_table(gaps, f"{where}, {title}, from the best group to the worst"))
    name = f"groups_{plain_name(block.data_set)}_{block.budget}.png"
    whole = float(score(block, best)[0])
    figure = groups_figure(found, score=f"{title} of {best}", whole=None if math.isnan(whole) else whole)
    return [*parts, Picture(name, png(figure), f"{title} of {best} in each group, {where}", large=False)]
