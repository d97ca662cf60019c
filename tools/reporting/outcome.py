# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The outcome of a study in sentences: who leads, what is shown, and what the numbers do not say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..studies.definition import PLAIN_ROWS
from ..studies.results import METRICS, Block, Results
from .cells import mean_score
from .comparison import baseline, compare_over
from .plain import ALL, by_arm, plain_sentence
from .tables import TITLES, bounds, number

__all__ = ["Verdict", "budget_words", "caveats", "headline", "judge", "main_budget", "of_planned", "order_of_arms"]


@dataclass
class Verdict:
    """How an arm compares with another over some data sets.

    Attributes:
        difference: mean over data sets of the first score.
        low: lower bound of its interval.
        high: upper bound.
        better: data sets on which the arm is shown to be better.
        worse: data sets on which it is shown to be worse.
        count: data sets.
        seeds: fewest seeds of a fold that both have.
    """

    difference: float
    low: float
    high: float
    better: int
    worse: int
    count: int
    seeds: int

    @property
    def shown(self) -> str:
        """Better or worse if the interval leaves out 0, a test agrees and none objects, with two seeds or more."""
        if self.seeds < 2:
            return ""
        if self.low > 0 and self.better and not self.worse:
            return "better"
        return "worse" if self.high < 0 and self.worse and not self.better else ""


def judge(blocks: Sequence[Block], tests: Sequence[Mapping[str, Any]], arm: str, other: str) -> Verdict | None:
    """Compare two arms over these blocks; None if there is one on which they cannot be compared."""
    found = compare_over(blocks, arm, other)
    if found is None:
        return None
    own = {(block.data_set, block.budget) for block in blocks}
    winners = [
        row["better"]
        for row in tests
        if (row["data_set"], row["budget"]) in own and {row["arm"], row["other"]} == {arm, other}
    ]
    seen = (found["difference"], found["low"], found["high"])
    return Verdict(*seen, winners.count(arm), winners.count(other), len(blocks), found["seeds"])


def main_budget(blocks: Sequence[Block]) -> str:
    """Return all, if there is a result with all cases, else the largest budget."""
    return max((block.budget for block in blocks), key=_size)


def _size(budget: str) -> float:
    return math.inf if budget == "all" else float(budget)


def budget_words(budget: str) -> str:
    """Return what a budget is in words."""
    return "all labelled cases" if budget == "all" else f"{budget} labelled cases"


def of_planned(count: int, planned: int) -> str:
    """Return how many data sets there are, and of how many if that is fewer than planned.

    Example:
        >>> of_planned(3, 3), of_planned(2, 3)
        ('3 data sets', '2 of the 3 planned data sets')
    """
    return f"{count} data sets" if count == planned else f"{count} of the {planned} planned data sets"


def order_of_arms(results: Results, blocks: Sequence[Block]) -> list[str]:
    """Return the arms that are complete on all these blocks, the best first."""
    means = {arm: mean_score(blocks, arm) for arm in results.about["arms"]}
    return sorted((arm for arm, mean in means.items() if not math.isnan(mean)), key=lambda arm: -means[arm])


def headline(
    results: Results,
    blocks: Sequence[Block],
    tests: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Return the outcome: a paragraph for each task, with the budget that has most cases, and a sentence on plain rows.

    Args:
        results: of the study.
        blocks: its results.
        tests: paired ones.
        plain: comparisons with the plain rows, of :func:`.plain.against_plain`.
    """
    if not blocks:
        return ["No run is finished yet, so there is nothing to compare."]
    told = []
    for task in dict.fromkeys(block.task for block in blocks):
        own = [block for block in blocks if block.task == task]
        budget = main_budget(own)
        here = [block for block in own if block.budget == budget]
        told.append(_outcome(results, here, tests))
        if sentence := _of_plain_rows(here, plain):
            told.append(sentence)
    for task in METRICS:
        budgets = [budget for budget in map(str, results.about["budgets"]) if results.data_sets(task, budget)]
        if budgets and not any(block.task == task for block in blocks):
            largest = max(budgets, key=_size)
            told.append(f"{task.capitalize()}: no run is finished yet.{_without(results, task, largest, ())}")
    return told


def _of_plain_rows(blocks: Sequence[Block], plain: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence on plain rows over these blocks."""
    column = ALL if len(blocks) > 1 else blocks[0].data_set
    asked = (blocks[0].task, blocks[0].budget, column)
    own = [row for row in plain if (row["task"], row["budget"], row["column"]) == asked]
    outcomes = by_arm((row["arm"], row["row"], row["outcome"]) for row in own)
    return plain_sentence(outcomes, one_run=any(row["seeds"] < 2 for row in own))


def _without(results: Results, task: str, budget: str, present: Sequence[str]) -> str:
    """Name the planned data sets without a finished run, and why there is none."""
    told = []
    for name in results.data_sets(task, budget):
        runs = [run["name"] for run in results.planned(data_set=name, budget=budget)]
        failed = sum(run in results.failed for run in runs)
        if name not in present:
            told.append(f"{name} ({failed} of {len(runs)} runs failed)" if failed else f"{name} (no run is there yet)")
    return f" Planned but without a result with {budget_words(budget)}: {', '.join(told)}." if told else ""


def _outcome(results: Results, blocks: Sequence[Block], tests: Sequence[Mapping[str, Any]]) -> str:
    first = blocks[0]
    planned = len(results.data_sets(first.task, first.budget))
    where = f"the mean of {of_planned(len(blocks), planned)}" if len(blocks) > 1 else first.data_set
    start = f"{first.task.capitalize()} with {budget_words(first.budget)}: "
    complete = order_of_arms(results, blocks)
    left = [arm for arm in results.about["arms"] if arm not in complete and _planned(results, blocks, arm)]
    order = [arm for arm in complete if results.about["arms"][arm]["weights"] not in PLAIN_ROWS]
    without = _without(results, first.task, first.budget, [block.data_set for block in blocks])
    waiting = f" Not compared, since not all of their unseen cases are scored: {', '.join(left)}." if left else ""
    if len(order) == 1 < len(complete):
        return (
            f"{start}{order[0]} has {_percent(blocks, order[0])} on {where}, beside plain rows alone.{without}{waiting}"
        )
    if len(order) < 2:
        one = f"only {order[0]} is" if order else "no arm is"
        return f"{start}{one} scored on all unseen cases, so there is nothing to compare yet.{without}{waiting}"
    lead, second = order[:2]
    value = number(mean_score(blocks, lead))
    told = f"{start}{lead} has the highest {TITLES[first.metrics[0]]}, {value} %, on {where}.{without}"
    if lead != complete[0]:
        told += f" (Of the arms that are compared; {complete[0]}, a plain row, has {_percent(blocks, complete[0])}.)"
    against = baseline(results.about["arms"], lead)
    if results.about["arms"][lead]["weights"] == "scratch":
        told += " That is an arm from scratch: no pre-trained arm scored higher."
    elif against is None:
        told += " The study has no arm from scratch of its backbone, so it does not tell what pre-training gave."
    elif against not in order:
        told += f" The arm from scratch of its backbone, {against}, is not finished."
    else:
        told += f" {_against(blocks, tests, lead, against, 'the same backbone from scratch')}"
    if second != against:
        told += f" {_against(blocks, tests, lead, second, 'the next arm')}"
    return told + _others(results, blocks, tests, order[1:]) + waiting


def _planned(results: Results, blocks: Sequence[Block], arm: str) -> bool:
    """Return whether the study has runs of an arm in these blocks."""
    return any(results.planned(arm=arm, data_set=block.data_set, budget=block.budget) for block in blocks)


def _percent(blocks: Sequence[Block], arm: str) -> str:
    return f"{number(mean_score(blocks, arm))} %"


def _against(blocks: Sequence[Block], tests: Sequence[Mapping[str, Any]], arm: str, other: str, what: str) -> str:
    verdict = judge(blocks, tests, arm, other)
    if verdict is None:
        return f"It shares no run with {what}, {other}."
    points = f"{number(verdict.difference, sign=True)} points {bounds(verdict.low, verdict.high, sign=True)}".strip()
    told = f"Against {what}, {other}, the difference is {points}: "
    if verdict.seeds < 2:
        return f"{told}one run of each, so no verdict, since the luck of a run is not known."
    if not verdict.shown:
        return f"{told}no difference is shown."
    on = f" (paired tests: on {verdict.better} of {verdict.count} data sets)" if verdict.count > 1 else ""
    return f"{told}shown to be {verdict.shown}{on}."


def _others(results: Results, blocks: Sequence[Block], tests: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """Say of the arms after the leading one how they stand to the arms from scratch."""
    by: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    for arm in arms:
        against = baseline(results.about["arms"], arm)
        verdict = judge(blocks, tests, arm, against) if against else None
        if verdict is not None and verdict.seeds > 1:
            by[verdict.shown].append(arm)
    words = {"better": "shown to be better", "worse": "shown to be worse", "": "no difference shown"}
    told = [f"{words[kind]}: {', '.join(names)}" for kind, names in by.items() if names]
    return f" Of the other arms, against the same backbone from scratch: {'; '.join(told)}." if told else ""


def caveats(results: Results, blocks: Sequence[Block], tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the numbers do not say, as far as the results tell."""
    told: list[str] = []
    if not blocks:
        return told
    if len(tests) and min(len(block.seeds) for block in blocks) < 2:
        told.append(
            "With one seed, intervals and tests hold how much cases differ but not how much runs do: they are about "
            "these trained networks, not about the methods."
        )
    elif min(len(block.seeds) for block in blocks) < 5:
        told.append("With so few seeds, the part of the intervals that is the luck of a run is rough.")
    fewest = min(blocks, key=lambda block: len(np.unique(block.unit)))
    count = len(np.unique(fewest.unit))
    if count < 20:
        told.append(
            f"{fewest.data_set} has only {count} unseen cases: intervals from so few are rough where scores are skewed"
            + (f", and no paired test over them can give a p below {2.0 ** (1 - count):.2g}." if count < 9 else ".")
        )
    if any(len(block.folds) > 1 for block in blocks):
        told.append("Networks of different folds share training cases, which neither intervals nor tests know.")
    if blocks[0].task == "segmentation" and len({block.data_set for block in blocks}) < 3:
        told.append("Few data sets: what holds on them need not hold on others.")
    epochs = sorted({str(arm["epochs"]) for arm in results.about["arms"].values() if arm.get("epochs")})
    length = f" ({', '.join(epochs)} epochs)" if epochs else ""
    told.append(
        f"All holds for the length{length}, network size and settings of this study, listed below; other lengths may "
        "order the arms otherwise. The leading arm was found with the same scores that it is praised for."
    )
    return told
