# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How sure a score is: means that skip what is undefined, and bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["bootstrap_interval", "known_mean"]


def known_mean(values: np.ndarray, *, axis: int = 0) -> Any:
    """Return the mean along ``axis`` over what is not NaN; NaN where nothing is known.

    Example:
        >>> known_mean(np.array([[1.0, np.nan], [3.0, np.nan]]))
        array([ 2., nan])
    """
    known = ~np.isnan(values)
    count = known.sum(axis)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis) / np.where(count, count, np.nan)


def bootstrap_interval(
    statistic: Callable[..., Any],
    *arrays: np.ndarray,
    groups: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 12345,
    level: float = 0.95,
) -> np.ndarray | None:
    """Return the percentile bootstrap interval of a statistic over cases.

    Cases are drawn with replacement, as many as there are, and the statistic is computed again; the interval holds the
    middle ``level`` of its values. Resamples in which the statistic is NaN are left out.

    Args:
        statistic: function of the arrays that returns a number, or an array of numbers that share their resamples.
        arrays: one row for each case; all are resampled alike.
        groups: which patient each case is of; patients are then drawn, with all their cases, since scans of one
            patient are no independent evidence.
        resamples: how many; 0 computes no interval.
        seed: of the draws.
        level: share of the resamples inside.

    Returns:
        lower and upper bound, ``(2, ...)``; None with fewer than two cases or patients.

    Example:
        >>> dice = np.array([0.8, 0.9, 0.7, 0.85, 0.95])
        >>> low, high = bootstrap_interval(np.mean, dice)
        >>> bool(0.7 < low < dice.mean() < high < 0.95)
        True
        >>> bootstrap_interval(np.mean, dice[:1]) is None
        True
    """
    count = len(arrays[0])
    _, unit = np.unique(np.arange(count) if groups is None else np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(unit == index) for index in range(unit.max() + 1)] if count else []
    if len(members) < 2 or resamples < 1:
        return None
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(members), len(members))
        rows = drawn if groups is None else np.concatenate([members[index] for index in drawn])
        found.append(np.asarray(statistic(*(array[rows] for array in arrays)), dtype=float))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice encountered")
        return np.nanpercentile(np.stack(found), [50 * (1 - level), 50 * (1 + level)], axis=0)
