# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which differences between arms are shown: paired tests over cases, ranks over data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range, wilcoxon
from statsmodels.stats.multitest import multipletests

from common.metrics import known_mean

from ..studies.results import Block, shared_runs
from .comparison import average_precision, compare, one_hot, paired_case_scores

__all__ = ["ALPHA", "Ranks", "by_unit", "critical_difference", "pair_tests", "rank"]

ALPHA = 0.05
_SEED = 12345
_PERMUTATIONS = 5000


def pair_tests(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Test each pair of arms in each block, and correct all p values of the study together after Holm.

    Plain rows are left out: they would make the correction for the arms' own pairs harsher.

    Segmentation: Wilcoxon's signed-rank test of the units' Dice, averaged over seeds and classes; a class that one arm
    alone rightly leaves empty counts as 1 (see :func:`.comparison.paired_case_scores`). Classification and regression:
    a permutation test of AP or R2, in which what the two arms say of a unit is exchanged at random.

    Returns:
        a row for each: both arms, ``difference`` with its interval, ``cases`` (units), ``test``, ``p``, ``p_holm`` and
        ``better``, the arm that is shown to be better, or "": p after Holm is below 0.05, the interval, which holds
        the luck of runs too where there are several seeds, does not reach 0, and both point the same way. The signed
        ranks of many small gains can outweigh those of a few large losses that decide the mean.
    """
    rows = []
    sides = []
    for block in blocks:
        for arm, other in combinations(block.compared, 2):
            found = compare(block, arm, other)
            if found is None:
                continue
            test = _wilcoxon if block.task == "segmentation" else _permutation
            p, count, wins, side = test(block, arm, other)
            sides.append(side)
            rows.append(
                {
                    "data_set": block.data_set,
                    "budget": block.budget,
                    "metric": block.metrics[0],
                    "arm": arm,
                    "other": other,
                    "difference": float(found["difference"][0]),
                    "low": float(found["low"][0]),
                    "high": float(found["high"][0]),
                    "cases": count,
                    "arm_better_on": wins,
                    "runs_of_each": found["runs"],
                    "test": "Wilcoxon signed-rank" if block.task == "segmentation" else "permutation of cases",
                    "p": p,
                }
            )
    known = [row for row in rows if not np.isnan(row["p"])]
    corrected = multipletests([row["p"] for row in known], ALPHA, method="holm")[1] if known else []
    for row in rows:
        row |= {"p_holm": float("nan"), "better": ""}
    for row, p in zip(known, corrected, strict=True):
        row["p_holm"] = float(p)
    for row, side in zip(rows, sides, strict=True):
        if row["p_holm"] < ALPHA and row["low"] > 0 and side > 0:
            row["better"] = row["arm"]
        if row["p_holm"] < ALPHA and row["high"] < 0 and side < 0:
            row["better"] = row["other"]
    return rows


def _wilcoxon(block: Block, arm: str, other: str) -> tuple[float, int, int | None, float]:
    """Return p, the number of units, how many the arm is better on, and the sign of the sum of the signed ranks."""
    one, two = paired_case_scores(block, (arm, other), shared_runs(block, arm, other))
    difference = by_unit(block, one - two)
    difference = np.round(difference[~np.isnan(difference)], 12)  # rounding errors are no difference
    wins = int((difference > 0).sum())
    if len(difference) < 2:
        return float("nan"), len(difference), wins, 0.0
    if not difference.any():
        return 1.0, len(difference), wins, 0.0
    differing = difference[difference != 0]
    side = float(np.sign((np.sign(differing) * rankdata(np.abs(differing))).sum()))
    return float(wilcoxon(difference).pvalue), len(difference), wins, side


def _permutation(block: Block, arm: str, other: str) -> tuple[float, int, int | None, float]:
    """Return p, the number of units, None (no case has an AP or R2 of its own), and the sign of the difference."""
    runs = shared_runs(block, arm, other)
    differ = _r2_difference if block.task == "regression" else _ap_difference
    own = np.flatnonzero(np.asarray(runs.any(1))[block.fold])
    units = len(np.unique(block.unit[own]))
    swapped = np.random.default_rng(_SEED).random((_PERMUTATIONS, block.unit.max() + 1)) < 0.5
    swapped[0] = False  # the first is what was seen
    one, two = (block.values[block.arms.index(name), ..., 0] for name in (arm, other))
    differences = []
    for fold, seed in zip(*np.nonzero(runs), strict=True):
        rows = np.flatnonzero(block.fold == fold)
        differences.append(differ(block, rows, one[rows, seed], two[rows, seed], swapped[:, block.unit[rows]]))
    signed = known_mean(np.stack(differences))
    if units < 2 or np.isnan(signed[0]):
        return float("nan"), units, None, 0.0
    found = np.abs(signed)
    return float((found >= found[0] - 1e-12).mean()), units, None, float(np.sign(signed[0]))


def _ap_difference(block: Block, rows: np.ndarray, one: np.ndarray, two: np.ndarray, swap: np.ndarray) -> np.ndarray:
    """Return the difference in AP of one run with each exchange of rows ``(permutations,)``."""
    true, weights = one_hot(block)[rows], np.ones(swap.shape)
    of_class = []
    for index in range(len(block.classes)):
        p, q = one[:, index], two[:, index]
        pair = (np.where(swap, q, p), np.where(swap, p, q))
        first, second = (average_precision(each, true[:, index], weights) for each in pair)
        of_class.append(first - second)
    return np.asarray(known_mean(np.stack(of_class)))


def _r2_difference(block: Block, rows: np.ndarray, one: np.ndarray, two: np.ndarray, swap: np.ndarray) -> np.ndarray:
    """Return the difference in R2 of one run with each exchange of rows ``(permutations,)``: each turns one sign."""
    assert block.truth is not None
    true = block.truth[rows]
    gained = (two[:, 0] - true) ** 2 - (one[:, 0] - true) ** 2
    spread = ((true - true.mean()) ** 2).sum()
    return np.where(swap, -gained, gained).sum(1) / (spread if spread > 0 else np.nan)


def by_unit(block: Block, values: np.ndarray) -> np.ndarray:
    """Return the mean of each unit of what is known of its rows."""
    return np.array([known_mean(values[block.unit == unit]) for unit in range(block.unit.max() + 1)])


@dataclass
class Ranks:
    """Mean ranks of arms, 1 is best, over data sets or over the cases of one.

    Attributes:
        over: "data sets", or the name of the data set over whose cases ranks are taken.
        count: how many.
        arms: that are ranked.
        mean: mean rank of each.
        p: of Friedman's test; None if it cannot be made.
        cd: critical difference of Nemenyi's test; None if it cannot be made.
        pairs: Nemenyi's p value of each pair, ``(arms, arms)``; None likewise.
    """

    over: str
    count: int
    arms: list[str]
    mean: np.ndarray
    p: float | None
    cd: float | None
    pairs: np.ndarray | None


def critical_difference(arms: int, count: int, alpha: float = ALPHA) -> float:
    """Return how far two mean ranks must lie apart in Nemenyi's test (Demsar, JMLR 7, 2006).

    Example:
        >>> round(critical_difference(4, 14), 2)  # in Demsar's section 3.2.2, at 0.05
        1.25
    """
    q = studentized_range.ppf(1 - alpha, arms, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(arms * (arms + 1) / (6 * count)))


def rank(values: np.ndarray, arms: Sequence[str], over: str) -> Ranks | None:
    """Rank arms by their values ``(data sets or cases, arms)``, higher is better; rows with a NaN are left out.

    Friedman's and Nemenyi's tests are made with three arms or more and three rows or more.
    """
    values = np.round(values[~np.isnan(values).any(1)], 12)
    if not len(values) or len(arms) < 2:
        return None
    mean = rankdata(-values, axis=1).mean(0)
    if len(arms) < 3 or len(values) < 3:
        return Ranks(over, len(values), list(arms), mean, None, None, None)
    p = 1.0 if np.ptp(values, axis=1).max() == 0 else float(friedmanchisquare(*values.T).pvalue)
    from scikit_posthocs import posthoc_nemenyi_friedman  # takes a second to import

    pairs = posthoc_nemenyi_friedman(values).to_numpy()
    return Ranks(over, len(values), list(arms), mean, p, critical_difference(len(arms), len(values)), pairs)
