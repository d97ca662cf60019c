# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of a study with intervals, and differences between arms.

Score of a data set: each case's score is averaged over seeds; a class's over the cases in which it is defined; then the
plain mean over classes. Of classification, AP and balanced accuracy of each run on its own unseen cases, then the mean
over runs: models of different folds need not be calibrated alike, so that their cases are not ranked together. Of
regression, R2 and Pearson's correlation likewise.

Intervals draw the units again and add the luck of runs, as far as seeds tell it, for all arms alike. Two arms are only
ever compared on the folds and seeds that both have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.metrics import classification_scores, equal_units, known_mean
from common.metrics.statistics import wider_by

from ..studies.definition import NO_FILE, PRETRAINING
from ..studies.results import Block, every_run, shared_runs

__all__ = [
    "RESAMPLES",
    "average_precision",
    "baseline",
    "bounded",
    "case_scores",
    "compare",
    "compare_over",
    "interval",
    "one_hot",
    "paired_case_scores",
    "resampled",
    "score",
]

RESAMPLES = 2000
_SEED = 12345
_CHUNK = 2**22  # numbers at a time
_BEST = {"dice": 1.0, "nsd": 1.0}  # what is reached where neither truth nor prediction holds anything


def score(block: Block, arm: str, runs: np.ndarray | None = None, rows: np.ndarray | None = None) -> np.ndarray:
    """Return an arm's scores ``(metrics,)``, of all its runs or these, on all rows or those where ``rows`` is true."""
    runs = every_run(block, arm) if runs is None else runs
    weights = np.ones(len(block.rows)) if rows is None else rows.astype(float)
    return _evaluate(block, arm, runs[None].astype(float), weights[None])[0]


def resampled(
    block: Block,
    arm: str,
    runs: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    *,
    wide: bool = True,
) -> np.ndarray:
    """Return an arm's scores in each resample, ``(RESAMPLES, metrics)``; the same draws for every arm with these runs.

    Units are drawn with replacement. With ``wide`` they are spread as Student's t asks for so few, see
    :func:`common.metrics.statistics.wider_by`. To this comes what differs between seeds, if there are several.

    With a single unit all is NaN: one case does not tell how much cases differ.
    """
    runs = every_run(block, arm) if runs is None else runs
    inside: np.ndarray = np.asarray(runs.any(1))[block.fold] & (True if rows is None else rows)
    units = np.unique(block.unit[inside])
    if len(units) < 2:
        return np.full((RESAMPLES, len(block.metrics)), np.nan)
    key = (arm, runs.tobytes(), None if rows is None else rows.tobytes())
    if key not in block.cache:
        block.cache[key] = _drawn(block, arm, runs, inside)
    samples, luck = block.cache[key]
    if wide:
        middle = known_mean(samples)
        samples = middle + wider_by(equal_units(block.unit[inside])) * (samples - middle)
    return np.asarray(samples + luck)


def _drawn(block: Block, arm: str, runs: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return scores in resamples of the units, and what comes to them by the luck of runs, ``(2, RESAMPLES, metrics)``.

    Args:
        block: of results.
        arm: one of its arms.
        runs: ``(folds, seeds)``.
        inside: rows that count, ``(rows,)``.
    """
    units = np.unique(block.unit[inside])
    generator = np.random.default_rng([_SEED, *block.data_set.encode()])
    drawn = generator.integers(0, len(units), (RESAMPLES, len(units)))
    counts = np.zeros((RESAMPLES, block.unit.max() + 1))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], units[drawn]), 1)
    weights = np.broadcast_to(runs.astype(float), (RESAMPLES, *runs.shape))
    samples = _evaluate(block, arm, weights, counts[:, block.unit] * inside)
    if block.task == "classification":  # AP of doubled cases is too high: that bias is taken off
        samples = samples + score(block, arm, runs, inside) - known_mean(samples)
    return np.stack([samples, _luck_of_runs(block, arm, runs, inside, generator)])


def _luck_of_runs(
    block: Block, arm: str, runs: np.ndarray, inside: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return by how much the scores could differ with other seeds, ``(RESAMPLES, metrics)``.

    Drawing two or three seeds again makes intervals far too narrow. Instead, what each run adds to the score is
    multiplied by a normal number, the same for all arms, so that the variance is that of a mean over seeds, and the
    whole by the factor that makes it Student's t with as many degrees of freedom as there are seeds beyond the first of
    each fold.
    """
    seeds = runs.sum(1)
    freedom = int((seeds - 1)[seeds > 0].sum())
    several = np.argwhere(runs & (seeds > 1)[:, None])
    normal = generator.standard_normal((RESAMPLES, *runs.shape))
    if not len(several):
        return np.zeros((RESAMPLES, len(block.metrics)))
    shift = 1e-3
    weights = np.repeat(runs[None].astype(float), len(several) + 1, axis=0)
    weights[np.arange(len(several)), several[:, 0], several[:, 1]] += shift
    found = _evaluate(block, arm, weights, np.repeat(inside[None].astype(float), len(weights), axis=0))
    effects = (found[:-1] - found[-1]) / shift  # of each run, (runs, metrics)
    effects *= np.sqrt(seeds / np.maximum(seeds - 1, 1))[several[:, 0], None]
    student = np.sqrt(freedom / generator.chisquare(freedom, RESAMPLES))
    return student[:, None] * (normal[:, several[:, 0], several[:, 1]] @ np.nan_to_num(effects))


def _evaluate(block: Block, arm: str, run_weights: np.ndarray, row_weights: np.ndarray) -> np.ndarray:
    """Return scores ``(resamples, metrics)`` where each run and row counts as often as its weight says.

    Args:
        block: of results.
        arm: one of its arms.
        run_weights: ``(resamples, folds, seeds)``.
        row_weights: ``(resamples, rows)``.
    """
    values = block.values[block.arms.index(arm)]
    step = max(1, _CHUNK // max(values[:, 0].size, 1))
    evaluate = _segmentation if block.task == "segmentation" else _by_run
    parts = [
        evaluate(block, values, run_weights[i : i + step], row_weights[i : i + step])
        for i in range(0, len(run_weights), step)
    ]
    return np.concatenate(parts)


def _segmentation(block: Block, values: np.ndarray, run_weights: np.ndarray, row_weights: np.ndarray) -> np.ndarray:
    rows, seeds, classes, metrics = values.shape
    known = ~np.isnan(values)
    of_row = run_weights[:, block.fold].transpose(1, 0, 2)  # (rows, resamples, seeds)
    total = of_row @ np.where(known, values, 0.0).reshape(rows, seeds, -1)
    count = of_row @ known.astype(float).reshape(rows, seeds, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cases = np.where(count > 0, total / count, 0.0)  # each case's score over seeds, (rows, resamples, ...)
        weight = row_weights.T[:, :, None] * (count > 0)
        means = (weight * cases).sum(0) / weight.sum(0)  # over cases
    return known_mean(means.reshape(-1, classes, metrics), axis=1)


def _by_run(block: Block, values: np.ndarray, run_weights: np.ndarray, row_weights: np.ndarray) -> np.ndarray:
    """Score each run on its own unseen cases, and return the mean over runs."""
    assert block.truth is not None
    score_run = _numbers_of_run if block.task == "regression" else _classes_of_run
    true = block.truth if block.task == "regression" else one_hot(block)
    total = np.zeros((len(run_weights), 2))
    count = np.zeros((len(run_weights), 2))
    for fold, seed in zip(*np.nonzero(run_weights.any(0)), strict=True):
        own = np.flatnonzero(block.fold == fold)
        found = np.stack(score_run(block, values[own, seed, :, 0], true[own], row_weights[:, own]), axis=1)
        weight = run_weights[:, fold, seed][:, None] * ~np.isnan(found)
        total += weight * np.nan_to_num(found)
        count += weight
    with np.errstate(invalid="ignore"):
        return total / np.where(count > 0, count, np.nan)


def one_hot(block: Block) -> np.ndarray:
    """Return which classes or labels the cases of a classification have, ``(rows, classes)``."""
    assert block.truth is not None
    own = block.truth if block.truth.ndim == 2 else block.truth[:, None] == np.arange(len(block.classes))
    return own.astype(bool)


def _classes_of_run(
    block: Block, probabilities: np.ndarray, true: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return AP and balanced accuracy ``(resamples,)`` as common.metrics has them, with a weight for each case."""
    assert block.truth is not None
    labels = block.truth.ndim == 2
    if (weights == 1).all():
        found = classification_scores(probabilities, true.astype(int) if labels else true.argmax(1))
        return np.full(len(weights), found["ap"]), np.full(len(weights), found["balanced_accuracy"])
    chosen = probabilities > 0.5 if labels else np.eye(len(block.classes), dtype=bool)[probabilities.argmax(1)]
    precision = [average_precision(p[None], own, weights) for p, own in zip(probabilities.T, true.T, strict=True)]
    with np.errstate(invalid="ignore"):
        recall = (weights @ (true & chosen)) / (weights @ true)  # (resamples, classes)
        specificity = (weights @ (~true & ~chosen)) / (weights @ ~true)
    balanced = (recall + specificity) / 2 if labels else recall
    return known_mean(np.stack(precision)), known_mean(balanced, axis=1)


def _numbers_of_run(
    block: Block, predicted: np.ndarray, true: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return R2 and Pearson's correlation ``(resamples,)`` as common.metrics has them, with a weight for each case."""
    total = weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        away = true - (weights @ true / total)[:, None]  # (resamples, cases)
        other = predicted[:, 0] - (weights @ predicted[:, 0] / total)[:, None]
        spread, own = (weights * away**2).sum(1), (weights * other**2).sum(1)
        r2 = 1 - weights @ (predicted[:, 0] - true) ** 2 / np.where(spread > 0, spread, np.nan)
        correlation = (weights * away * other).sum(1) / np.sqrt(np.where(spread * own > 0, spread * own, np.nan))
    return r2, correlation


def average_precision(probabilities: np.ndarray, own: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the average precision of one class in many resamples at once; equal probabilities are one threshold.

    NaN where all or none of the cases that have a weight are of the class.

    Args:
        probabilities: ``(resamples or 1, cases)``.
        own: which cases are of the class, ``(cases,)``.
        weights: of the cases, ``(resamples, cases)``.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, 1)
    last = np.append(ordered[:, 1:] != ordered[:, :-1], np.ones((len(ordered), 1), bool), axis=1)
    ends = np.where(last, np.arange(len(own)), len(own) - 1)
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]  # of each case the last with its probability
    order, ends = (np.broadcast_to(index, weights.shape) for index in (order, ends))
    weight = np.take_along_axis(weights, order, 1)
    hits = np.cumsum(weight * own[order], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.take_along_axis(hits, ends, 1) / np.take_along_axis(np.cumsum(weight, 1), ends, 1)
        total = np.where((weights @ own > 0) & (weights @ ~own > 0), hits[:, -1], np.nan)
        return (weight * own[order] * np.nan_to_num(precision)).sum(1) / total


def case_scores(block: Block, arm: str, runs: np.ndarray | None = None, metric: int = 0) -> np.ndarray:
    """Return the score of each row, over seeds, then over classes; NaN where nothing is defined (segmentation)."""
    runs = every_run(block, arm) if runs is None else runs
    values = np.where(runs[block.fold][:, :, None], block.values[block.arms.index(arm), ..., metric], np.nan)
    return known_mean(known_mean(values, axis=1), axis=1)


def paired_case_scores(
    block: Block, arms: Sequence[str], runs: np.ndarray | None = None, metric: int = 0
) -> np.ndarray:
    """Return the scores of each row of several arms ``(arms, rows)``, to be held against each other row by row.

    As :func:`case_scores`, with one difference. DSC and NSD of a class that is neither there nor predicted are not
    defined, while an arm that predicts it gets 0. Where one of these arms has a score in a case and class, what is not
    defined of the others was rightly left empty and counts as 1; else just these cases would drop out of the pairs.
    """
    places = [block.arms.index(arm) for arm in arms]
    ran = block.ran[places] if runs is None else np.broadcast_to(runs, (len(places), *runs.shape))
    inside = ran[:, block.fold, :, None]
    values = np.where(inside, block.values[places][..., metric], np.nan)  # (arms, rows, seeds, classes)
    if (best := _BEST.get(block.metrics[metric])) is not None:
        told = np.any(~np.isnan(values), axis=(0, 2), keepdims=True)  # truth or a prediction holds the class
        values = np.where(inside & told & np.isnan(values), best, values)
    return np.asarray(known_mean(known_mean(values, axis=2), axis=2))


def bounded(block: Block, samples: np.ndarray) -> np.ndarray:
    """Return samples of a score within what it can be: 0 to 1, of regression also below 0."""
    return np.clip(samples, None if block.task == "regression" else 0, 1)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Return the bounds that hold the middle 95 % of the samples that are defined; NaN without one."""
    known = samples[~np.isnan(samples)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def compare(block: Block, arm: str, other: str) -> dict[str, Any] | None:
    """Return the difference of two arms in every metric, with intervals; None without a run that both have.

    Returns:
        ``difference``, ``low`` and ``high``, ``(metrics,)`` each, ``samples`` ``(RESAMPLES, metrics)`` and the number
        of ``runs`` of each that went in.
    """
    if arm not in block.arms or other not in block.arms:
        return None
    runs = shared_runs(block, arm, other)
    if not runs.any():
        return None
    samples = resampled(block, arm, runs) - resampled(block, other, runs)
    bounds = np.array([interval(column) for column in samples.T])
    return {
        "difference": score(block, arm, runs) - score(block, other, runs),
        "low": bounds[:, 0],
        "high": bounds[:, 1],
        "samples": samples,
        "runs": int(runs.sum()),
    }


def compare_over(blocks: Sequence[Block], arm: str, other: str) -> dict[str, Any] | None:
    """Return the difference of two arms in the first score, its mean over these blocks.

    Returns:
        ``difference``, ``low``, ``high`` and the fewest ``seeds`` of a fold that both have; None if there is a block in
        which they share no run.
    """
    found = [compare(block, arm, other) for block in blocks]
    known = [each for each in found if each is not None]
    if not blocks or len(known) < len(blocks):
        return None
    low, high = interval(np.mean([each["samples"][:, 0] for each in known], axis=0))
    seeds = [int(counts[counts > 0].min()) for counts in (shared_runs(b, arm, other).sum(1) for b in blocks)]
    difference = float(np.mean([each["difference"][0] for each in known]))
    return {"difference": difference, "low": low, "high": high, "seeds": min(seeds)}


def baseline(arms: Mapping[str, Mapping[str, Any]], arm: str) -> str | None:
    """Return the arm from scratch that an arm is held against: of its backbone, at best of its length and spacing.

    None of an arm from scratch, and of a plain row.

    Example:
        >>> arms = {
        ...     "scratch": {"backbone": "resenc_l", "weights": "scratch", "epochs": 150},
        ...     "scratch, long": {"backbone": "resenc_l", "weights": "scratch", "epochs": 1000},
        ...     "mae, long": {"backbone": "resenc_l", "weights": "a.pt", "epochs": 1000},
        ... }
        >>> baseline(arms, "mae, long")
        'scratch, long'
    """
    own = arms[arm]
    if own["weights"] in NO_FILE and own["weights"] != PRETRAINING:
        return None
    known = [n for n, a in arms.items() if a["weights"] == "scratch" and a["backbone"] == own["backbone"]]
    keys = ("epochs", "spacing", "schedule")
    return max(known, key=lambda name: [arms[name].get(key) == own.get(key) for key in keys], default=None)
