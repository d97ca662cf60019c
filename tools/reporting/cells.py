# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The numbers of a study's report: scores with intervals, means over data sets, ranks, groups and cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.metrics import equal_units, gap_between, ordered_groups
from common.metrics.groups import FEWEST

from ..studies.results import METRICS, Block, Results, every_run
from .comparison import baseline, bounded, case_scores, compare, interval, paired_case_scores, resampled, score
from .significance import Ranks, by_unit, rank

__all__ = [
    "MEANS",
    "Cell",
    "all_cells",
    "best_and_worst",
    "case_ranks",
    "case_rows",
    "data_set_ranks",
    "gap_rows",
    "group_cells",
    "group_rows",
    "kind_of",
    "mean_score",
]

MEANS = ("ID", "OOD", "All")


@dataclass
class Cell:
    """A score of an arm on a data set, or its mean over data sets, as a share of 1.

    Attributes:
        budget: of labelled cases.
        column: data set, ID, OOD or All.
        task: segmentation, classification or regression.
        metric: which score.
        arm: which row.
        value: the score.
        low: lower bound of its interval.
        high: upper bound.
        seed_sd: standard deviation over seeds; NaN with fewer than two seeds that are complete.
        runs: finished.
        planned: by the study; of a mean, on all planned data sets.
        complete: whether all unseen cases that any arm has are in it; only such cells are compared with each other.
        scratch: the arm from scratch of its backbone, if another one.
        minus_scratch: the difference, from the runs that both have.
        minus_low: lower bound of its interval.
        minus_high: upper bound.
        data_sets: number that is in it.
        data_sets_planned: number that would be if each had a finished run.
    """

    budget: str
    column: str
    task: str
    metric: str
    arm: str
    value: float
    low: float
    high: float
    seed_sd: float
    runs: int
    planned: int
    complete: bool
    scratch: str | None = None
    minus_scratch: float = math.nan
    minus_low: float = math.nan
    minus_high: float = math.nan
    data_sets: int = 1
    data_sets_planned: int = 1


def all_cells(results: Results, blocks: Sequence[Block]) -> list[Cell]:
    """Return every cell of the main tables: data sets, and means over data sets where there are several.

    A mean is over the data sets that have a finished run; how many were planned is told with it.
    """
    arms = results.about["arms"]
    cells = []
    for budget, task in dict.fromkeys((block.budget, block.task) for block in blocks):
        own = [block for block in blocks if (block.budget, block.task) == (budget, task)]
        planned = results.data_sets(task, budget)
        kinds = {name: kind_of(results.about["data_sets"][name]) for name in planned}
        columns: dict[str, list[Block]] = {block.data_set: [block] for block in own}
        if len(own) > 1:
            for kind in ("ID", "OOD"):
                members = [block for block in own if kinds[block.data_set] == kind]
                if members:
                    columns[kind] = members
            columns["All"] = own
        for column, members in columns.items():
            present = {block.data_set for block in members}
            wanted = present if column not in MEANS else {n for n in planned if column in ("All", kinds[n])}
            for arm in arms:
                if len(members) > 1 or column in MEANS:
                    if not all(block.has(arm) for block in members):
                        continue
                elif arm not in members[0].arms:
                    continue
                against = baseline(arms, arm)
                absent = sum(len(results.planned(arm=arm, data_set=n, budget=budget)) for n in wanted - present)
                for index in range(len(METRICS[task])):
                    cell = _cell(members, column, arm, against, index)
                    cell.planned += absent
                    cell.data_sets, cell.data_sets_planned = len(present), len(wanted)
                    cells.append(cell)
    return cells


def kind_of(data_set: Mapping[str, Any]) -> str:
    """Return what a data set is for the study: ID or OOD, or "" if the card does not say."""
    told = str(data_set.get("card", {}).get("group") or "").upper()
    return told if told in MEANS else ""


def _cell(members: Sequence[Block], column: str, arm: str, against: str | None, metric: int) -> Cell:
    first = members[0]
    samples = np.mean([resampled(block, arm)[:, metric] for block in members], axis=0)
    low, high = interval(bounded(first, samples))
    cell = Cell(
        *(first.budget, column, first.task, first.metrics[metric], arm),
        float(np.mean([score(block, arm)[metric] for block in members])),
        *(low, high, _seed_sd(members, arm, metric)),
        sum(int(every_run(block, arm).sum()) for block in members),
        sum(block.planned[arm] for block in members),
        all(block.has(arm) for block in members),
    )
    found = [compare(block, arm, against) if against else None for block in members]
    known = [each for each in found if each is not None]
    if against and len(known) == len(members) and (len(members) == 1 or all(block.has(against) for block in members)):
        cell.scratch = against
        cell.minus_scratch = float(np.mean([each["difference"][metric] for each in known]))
        cell.minus_low, cell.minus_high = interval(np.mean([each["samples"][:, metric] for each in known], axis=0))
    return cell


def _seed_sd(members: Sequence[Block], arm: str, metric: int) -> float:
    """Return the standard deviation over the seeds with which every fold of every data set was run."""
    found = []
    for seed in sorted(set.intersection(*(set(block.seeds) for block in members))):
        runs = [every_run(block, arm) & (np.array(block.seeds) == seed) for block in members]
        if all((own.any(1) == every_run(block, arm).any(1)).all() for own, block in zip(runs, members, strict=True)):
            found.append(np.mean([score(block, arm, own)[metric] for own, block in zip(runs, members, strict=True)]))
    return float(np.std(found, ddof=1)) if len(found) > 1 else math.nan


def data_set_ranks(results: Results, blocks: Sequence[Block], metric: int = 0) -> Ranks | None:
    """Rank the arms that are complete on all data sets of these blocks over the data sets; plain rows have no rank."""
    arms = [arm for arm in results.about["arms"] if all(block.has(arm) for block in blocks)]
    arms = [arm for arm in arms if all(arm not in block.plain for block in blocks)]
    if len(arms) < 2:
        return None
    values = np.array([[score(block, arm)[metric] for arm in arms] for block in blocks])
    return rank(values, arms, "data sets")


def case_ranks(block: Block, metric: int = 0) -> Ranks | None:
    """Rank the arms that are complete over the unseen cases of one data set; segmentation only.

    A class that some arms rightly leave empty and others do not counts as 1 for the former.
    """
    arms = [arm for arm in block.compared if block.has(arm)]
    if block.task != "segmentation" or len(arms) < 2:
        return None
    values = np.stack([by_unit(block, own) for own in paired_case_scores(block, arms, metric=metric)], axis=1)
    return rank(values, arms, block.data_set)


def group_cells(block: Block, arm: str, metric: int = 0) -> dict[str, Any]:
    """Return the scores of an arm in each group of cases, by column, as :func:`common.metrics.group_scores` does.

    Samples of groups are put together as if each had runs of its own: that their luck is shared is not used, so that
    gaps are rather a little less sure than more. The bootstrap of the groups is made once for each arm and score.
    """
    key = ("groups", arm, metric)
    if key not in block.cache:
        block.cache[key] = {} if block.patients else _group_cells(block, arm, metric)
    found: dict[str, Any] = block.cache[key]
    return found


def _group_cells(block: Block, arm: str, metric: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column, values in block.columns.items():
        groups: dict[str, Any] = {}
        large: dict[str, tuple[float, np.ndarray, float]] = {}
        ran = np.asarray(every_run(block, arm).any(1))[block.fold]
        for name in ordered_groups(value for value in values if value is not None):
            inside = np.array([own == name for own in values])
            mine = block.unit[inside & ran]
            if not len(mine):
                continue
            value = float(score(block, arm, rows=inside)[metric])
            samples = resampled(block, arm, rows=inside, wide=False)[:, metric]  # the gap widens by itself
            count = len(np.unique(mine))
            bounds = interval(bounded(block, resampled(block, arm, rows=inside)[:, metric]))
            groups[name] = {
                "cases": len(mine),
                "patients": count,
                "score": value,
                "interval": None if math.isnan(bounds[0]) else list(bounds),
                "few": count < FEWEST,
            }
            if count >= FEWEST and not math.isnan(bounds[0]):
                large[name] = (value, samples, equal_units(mine))
        if len(groups) > 1:
            gap = gap_between(large) if len(large) > 1 else None
            missing = sum(value is None for value in values)
            found[column] = {"groups": groups, "missing": missing, "gap": gap, "fewest": FEWEST}
    return found


def group_rows(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Return the scores of each arm in each group of cases (centre, scanner, sex, band of age), with intervals."""
    return [
        {
            "data_set": block.data_set,
            "budget": block.budget,
            "column": column,
            "group": name,
            "arm": arm,
            "metric": metric,
            "cases": each["patients"],
            "value": each["score"],
            "low": math.nan if each["interval"] is None else each["interval"][0],
            "high": math.nan if each["interval"] is None else each["interval"][1],
            "complete": block.has(arm),
            "few": each["few"],
        }
        for block in blocks
        for arm in block.arms
        for index, metric in enumerate(block.metrics)
        for column, one in group_cells(block, arm, index).items()
        for name, each in one["groups"].items()
    ]


def gap_rows(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Return how far the worst group of cases is from the best for each arm, in the first score."""
    return [
        {
            "data_set": block.data_set,
            "budget": block.budget,
            "column": column,
            "arm": arm,
            "low": one["gap"]["interval"][0],
            "high": one["gap"]["interval"][1],
            **one["gap"],
        }
        for block in blocks
        for arm in block.arms
        for column, one in group_cells(block, arm).items()
        if one["gap"]
    ]


def case_rows(results: Results) -> list[dict[str, Any]]:
    """Return every score of every case and class of every run, or every probability, or every predicted number."""
    rows = []
    for run in results.about["runs"]:
        result = results.finished.get(run["name"])
        if result is None:
            continue
        same = {key: run[key] for key in ("data_set", "arm", "budget", "fold", "seed")}
        for case, entry in sorted(result["cases"].items()):
            here = {**same, "case": case, "group": entry.get("group") or ""}
            for name, scores in entry.get("scores", {}).items():
                rows += [{**here, "class": name, "score": key, "value": value} for key, value in scores.items()]
            for name, value in zip(result.get("classes", ()), entry.get("probabilities", ()), strict=False):
                rows.append({**here, "class": name, "score": "probability", "value": value})
            for value in entry.get("predicted", ()):
                rows.append({**here, "class": "", "score": "predicted", "value": value})
            if "truth" in entry:
                rows.append({**here, "class": "", "score": "truth", "value": entry["truth"]})
    return rows


def best_and_worst(block: Block, arm: str, count: int = 3) -> list[tuple[str, int, float]]:
    """Return place, row and score of an arm's best and worst cases, best first, none twice (segmentation)."""
    values = case_scores(block, arm)
    order = [int(i) for i in np.argsort(-values, kind="stable") if not math.isnan(values[i])]
    best = order[: min(count, (len(order) + 1) // 2)]
    worst = [i for i in order[-count:] if i not in best]
    return [("best", i, float(values[i])) for i in best] + [("worst", i, float(values[i])) for i in worst]


def mean_score(blocks: Sequence[Block], arm: str) -> float:
    """Return an arm's mean of the first score over these blocks; NaN if it is not complete on one."""
    if not all(block.has(arm) for block in blocks):
        return math.nan
    return float(np.mean([score(block, arm)[0] for block in blocks]))
