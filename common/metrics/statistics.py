# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How sure a score is: means that skip what is undefined, and intervals that hold as often as they say.

A plain percentile bootstrap of few units is too narrow twice: its spread is that of a sample, which falls short of the
population's by ``(n - 1) / n``, and it takes that spread for known. Wider percentiles mend both, those at which a
normal distribution has the bounds of Student's t (Hesterberg, The American Statistician 69, 2015).

Where cases are crossed with runs, a run's luck is shared by all its cases. Drawing two or three runs again cannot tell
how much runs differ; :func:`crossed_interval` estimates the part of runs by itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

__all__ = [
    "bootstrap_interval",
    "bootstrap_samples",
    "crossed_interval",
    "equal_units",
    "known_mean",
    "plain_number",
    "wider_by",
    "wider_percentiles",
    "with_intervals",
]


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


def plain_number(value: float) -> float | None:
    """Return a number that JSON knows, to six digits; None for NaN and infinity.

    Example:
        >>> plain_number(1234567.8), plain_number(math.inf)
        (1234570.0, None)
    """
    return float(f"{value:.6g}") if math.isfinite(value) else None


def with_intervals(
    values: np.ndarray, interval: np.ndarray | None, plain: Callable[[float], float | None] = plain_number
) -> list[dict[str, Any]]:
    """Return for each value its ``value`` and ``interval``, as JSON knows them.

    Args:
        values: ``(n,)``.
        interval: ``(2, n)``, of :func:`bootstrap_interval`.
        plain: how a number is written.
    """
    return [
        {
            "value": plain(value),
            "interval": None if interval is None else [plain(bound) for bound in interval[:, place]],
        }
        for place, value in enumerate(values)
    ]


def bootstrap_samples(
    statistic: Callable[..., Any],
    *arrays: np.ndarray,
    groups: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 12345,
) -> np.ndarray | None:
    """Return a statistic of cases drawn with replacement, as many as there are, ``(resamples, ...)``.

    Args:
        statistic: function of the arrays that returns a number, or an array of numbers that share their resamples.
        arrays: one row for each case; all are resampled alike.
        groups: which patient each case is of; patients are then drawn, with all their cases.
        resamples: how many.
        seed: of the draws.

    Returns:
        the statistic in each; None without resamples, or with fewer than two cases or patients.
    """
    members = _members(len(arrays[0]), groups)
    if len(members) < 2 or resamples < 1:
        return None
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(members), len(members))
        rows = drawn if groups is None else np.concatenate([members[index] for index in drawn])
        found.append(np.asarray(statistic(*(array[rows] for array in arrays)), dtype=float))
    return np.stack(found)


def _members(count: int, groups: Sequence[Any] | None) -> list[np.ndarray]:
    """Return the rows of each case, or of each patient."""
    _, unit = np.unique(np.arange(count) if groups is None else np.asarray(groups), return_inverse=True)
    return [np.flatnonzero(unit == index) for index in range(unit.max() + 1)] if count else []


def equal_units(groups: Sequence[Any] | np.ndarray) -> float:
    """Return how many patients with one scan each would tell as much as these with their scans (Kish).

    Args:
        groups: the patient of each case.

    Example:
        >>> equal_units(["a", "a", "b", "b"]), round(equal_units(["a", "a", "a", "b"]), 2)
        (2.0, 1.6)
    """
    sizes = np.unique(np.asarray(groups), return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def wider_by(units: float, *, level: float = 0.95) -> float:
    """Return how many times as far as a normal bootstrap's the bounds of an interval of ``level`` lie from the middle.

    Args:
        units: how many are drawn, more than 1; of patients with unequal numbers of scans their :func:`equal_units`.
        level: of the interval.

    Example:
        >>> [round(wider_by(units), 3) for units in (10, 100, 10000)]
        [1.217, 1.017, 1.0]
    """
    freedom = max(units - 1, 0.1)
    return float(np.sqrt(1 + 1 / freedom) * stdtrit(freedom, (1 + level) / 2) / ndtri((1 + level) / 2))


def wider_percentiles(units: float, *, level: float = 0.95) -> tuple[float, float]:
    """Return the percentiles of a bootstrap between which an interval of ``level`` lies.

    Args:
        units: how many are drawn, more than 1; of patients with unequal numbers of scans their :func:`equal_units`.
        level: of the interval.

    Example:
        >>> [[round(bound, 2) for bound in wider_percentiles(units)] for units in (10, 100, 10000)]
        [[0.86, 99.14], [2.31, 97.69], [2.5, 97.5]]
    """
    low = 100 * ndtr(wider_by(units, level=level) * ndtri((1 - level) / 2))
    return float(low), float(100 - low)


def bootstrap_interval(
    statistic: Callable[..., Any],
    *arrays: np.ndarray,
    groups: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 12345,
    level: float = 0.95,
) -> np.ndarray | None:
    """Return the bootstrap interval of a statistic over cases: between the :func:`wider_percentiles` of its resamples.

    It never leaves the range of a score. Resamples in which the statistic is NaN are left out.

    Args:
        statistic: function of the arrays that returns a number, or an array of numbers that share their resamples.
        arrays: one row for each case; all are resampled alike.
        groups: which patient each case is of; patients are then drawn, with all their cases, since scans of one
            patient are no independent evidence.
        resamples: how many; 0 computes no interval.
        seed: of the draws.
        level: how often the interval is to hold the truth.

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
    found = bootstrap_samples(statistic, *arrays, groups=groups, resamples=resamples, seed=seed)
    if found is None:
        return None
    units = len(arrays[0]) if groups is None else equal_units(groups)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice encountered")
        return np.nanpercentile(found, wider_percentiles(units, level=level), axis=0)


def crossed_interval(
    values: np.ndarray, folds: Sequence[Any], *, units: Sequence[Any] | None = None, level: float = 0.95
) -> np.ndarray | None:
    """Return the interval of the mean of scores of cases that several runs have judged.

    What differs between units, between the runs of a fold, and what remains are estimated each by itself, as in an
    analysis of variance with two crossed factors: the variance of the mean is that of units and that of runs, less the
    rest, which is in both. Bounds are Student's, with Satterthwaite's degrees of freedom. With one run of each fold
    the luck of runs is not known, and not in the interval; nor is what the runs of a fold share.

    Args:
        values: ``(cases, seeds)``, or ``(cases, seeds, outcomes)``; NaN where a run is missing. A run is one seed of
            one fold.
        folds: of the cases, ``(cases,)``; a case is judged by the runs of its fold.
        units: the patient of each case; each case by itself unless given.
        level: how often the interval is to hold the truth.

    Returns:
        lower and upper bound, ``(2,)`` or ``(2, outcomes)``; None with fewer than two units.

    Example:
        >>> cases, luck = np.linspace(0.6, 0.9, 12)[:, None], np.array([[-0.02, 0.0, 0.02]])
        >>> low, high = crossed_interval(cases + luck, [0] * 12)
        >>> round(float(low + high), 6), bool(high - low > np.subtract(*crossed_interval(cases, [0] * 12)[::-1]))
        (1.5, True)
    """
    if values.ndim > 2:
        found = [crossed_interval(values[..., k], folds, units=units, level=level) for k in range(values.shape[2])]
        known = [bounds for bounds in found if bounds is not None]
        return np.stack(known, axis=-1) if len(known) == len(found) else None
    _, fold = np.unique(np.asarray(folds), return_inverse=True)
    _, unit = np.unique(np.arange(len(values)) if units is None else np.asarray(units), return_inverse=True)
    weights = (~np.isnan(values)).astype(float)
    weights, values = weights / max(weights.sum(), 1), np.nan_to_num(values)
    shares = np.bincount(unit, weights.sum(1))
    if (shares > 0).sum() < 2:
        return None
    mean = float((weights * values).sum())
    of_units = _variance_of_units(np.bincount(unit, (weights * (values - mean)).sum(1)), shares)
    of_runs, rest = _variances_of_runs(values, weights, fold, unit)
    luck = max(of_runs[0] - rest[0], 0.0)
    variance = of_units[0] + luck
    doubt = sum(part**2 / freedom for part, freedom in (of_units, (luck, of_runs[1])) if freedom > 0)
    if not doubt:
        return np.array([mean, mean])
    reach = stdtrit(variance**2 / doubt, (1 + level) / 2) * np.sqrt(variance)
    return np.array([mean - reach, mean + reach])


def _variance_of_units(residuals: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """Return the variance of a mean over units of unequal shares, and its degrees of freedom.

    A squared residual is divided by what is left of it once the mean is estimated; the degrees of freedom are those of
    the sum if all units vary alike (Bell and McCaffrey, Survey Methodology 28, 2002).

    Args:
        residuals: of each unit its share times its distance from the mean.
        shares: of the units, 1 in all.
    """
    residuals, shares = residuals[shares > 0], shares[shares > 0]
    whole = float((shares**2).sum())
    left = 1 - 2 * shares + whole
    factors = shares**2 / left
    product = np.eye(len(shares)) - shares[:, None] - shares + whole
    return float((residuals**2 / left).sum()), float(whole**2 / (factors @ product**2 @ factors))


def _variances_of_runs(
    values: np.ndarray, weights: np.ndarray, fold: np.ndarray, unit: np.ndarray
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return what runs of a fold, and what remains of runs and units, add to the variance of the mean.

    Each with its degrees of freedom, 0 where every fold has a single run. All runs, and all remainders, are taken to
    vary alike.
    """
    runs, rest = np.zeros(2), np.zeros(2)  # sum of squares, degrees of freedom
    runs_share = rest_share = 0.0
    for index in range(fold.max() + 1):
        own = fold == index
        _, place = np.unique(unit[own], return_inverse=True)
        mass, total = np.zeros((2, place.max() + 1, values.shape[1]))
        np.add.at(mass, place, weights[own])
        np.add.at(total, place, (weights * values)[own])
        ran = mass.any(0)
        mass, total = mass[mass.any(1)][:, ran], total[mass.any(1)][:, ran]  # (units, runs)
        runs_share += (mass.sum(0) ** 2).sum()
        rest_share += (mass**2).sum()
        if mass.shape[1] < 2:
            continue
        of_run, of_unit, mean = total.sum(0) / mass.sum(0), total.sum(1) / mass.sum(1), total.sum() / mass.sum()
        runs += ((of_run - mean) ** 2).sum(), len(of_run) - 1
        cells = total / np.where(mass > 0, mass, 1)
        left = np.where(mass > 0, cells - of_unit[:, None] - of_run + mean, 0.0)
        rest += (left**2).sum(), (len(of_unit) - 1) * (len(of_run) - 1)
    return _variance(runs_share, *runs), _variance(rest_share, *rest)


def _variance(share: float, squares: float, freedom: float) -> tuple[float, float]:
    return (float(share * squares / freedom) if freedom else 0.0), float(freedom)
