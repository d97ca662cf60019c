# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of predicted numbers against the true ones, with intervals, as a table and a picture.

| score | definition |
|---|---|
| mae | mean absolute error, in the number's own units |
| rmse | root of the mean squared error, in the same units |
| r2 | 1 minus the squared error over that of always saying the mean of these cases; 1 is perfect, 0 that mean's |
| pearson | correlation: how well a straight line takes predictions to the truth, whatever its slope |
| spearman | correlation of the ranks: whether the order is right |

What is not defined is NaN: R2 where all cases have one number, correlations also where all predictions are one. Beside
them stands what always saying the mean of the training cases would have scored on the same cases, which a model has to
beat to be of any use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ..figures import Figure
from ..files import replace_file
from ..paths import as_path
from ..tasks import RegressionTask
from .statistics import bootstrap_interval, plain_number, with_intervals

__all__ = [
    "REGRESSION_SCORES",
    "draw_regression",
    "format_regression",
    "regression_scores",
    "summarise_regression",
]

REGRESSION_SCORES = {"mae": "MAE", "rmse": "RMSE", "r2": "R2", "pearson": "Pearson", "spearman": "Spearman"}
_IN_UNITS = ("mae", "rmse")


def regression_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compute all scores at once.

    Args:
        predicted: ``(cases,)``.
        truth: ``(cases,)``.

    Example:
        >>> found = regression_scores(np.array([2.0, 4.0, 9.0]), np.array([1.0, 5.0, 9.0]))
        >>> {name: round(value, 3) for name, value in found.items()}
        {'mae': 0.667, 'rmse': 0.816, 'r2': 0.938, 'pearson': 0.971, 'spearman': 1.0}
    """
    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    squares = (predicted - truth) ** 2
    spread = ((truth - truth.mean()) ** 2).sum()
    return {
        "mae": float(np.abs(predicted - truth).mean()),
        "rmse": float(np.sqrt(squares.mean())),
        "r2": float(1 - squares.sum() / spread) if spread > 0 else math.nan,
        "pearson": _correlation(predicted, truth),
        "spearman": _correlation(rankdata(predicted), rankdata(truth)),
    }


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation; NaN where either says one number only.

    SciPy's, which a test compares, warn of such resamples and compute p values, at ten times the cost.
    """
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    first, second = first - first.mean(), second - second.mean()
    return float(np.clip((first @ second) / math.sqrt((first @ first) * (second @ second)), -1, 1))


def summarise_regression(
    predicted: np.ndarray,
    truth: np.ndarray,
    task: RegressionTask,
    *,
    groups: Sequence[Any] | None = None,
    resamples: int = 1000,
    seed: int = 12345,
) -> dict[str, Any]:
    """Score all cases, with 95 % bootstrap intervals over cases or groups.

    Args:
        predicted: ``(cases,)``, in the number's own units.
        truth: ``(cases,)``.
        task: name, units, and the mean of the training cases.
        groups: which patient each case is of; intervals then resample patients.
        resamples: of the bootstrap; 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        ``cases``, ``scores`` (for each its ``value`` and ``interval``) and ``mean_of_training``: its ``value``, the
        ``mae`` and ``rmse`` of always saying it, by how much the model's are lower (``mae_gain``, ``rmse_gain``, of the
        same resamples), and a ``sentence`` on whether that is shown.
    """

    def statistic(p: np.ndarray, t: np.ndarray) -> np.ndarray:
        own = regression_scores(p, t)
        constant = [float(np.abs(t - task.mean).mean()), float(np.sqrt(((t - task.mean) ** 2).mean()))]
        gains = [value - own[name] for name, value in zip(_IN_UNITS, constant, strict=True)]
        return np.array([*own.values(), *constant, *gains])

    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    values = statistic(predicted, truth)
    interval = bootstrap_interval(statistic, predicted, truth, groups=groups, resamples=resamples, seed=seed)
    entries = with_intervals(values, interval)
    beside = [*_IN_UNITS, *(f"{name}_gain" for name in _IN_UNITS)]
    constant: dict[str, Any] = {
        "value": plain_number(task.mean),
        **dict(zip(beside, entries[-len(beside) :], strict=True)),
    }
    constant["sentence"] = _sentence(constant, _units(task.units))
    return {
        "cases": len(truth),
        "groups": None if groups is None else len(set(groups)),
        "target": task.name,
        "units": task.units,
        "scores": dict(zip(REGRESSION_SCORES, entries, strict=False)),
        "mean_of_training": constant,
        "resamples": resamples,
    }


def _units(units: str | None) -> str:
    return f" {units}" if units else ""


def _sentence(constant: dict[str, Any], units: str) -> str:
    """Say whether the model is better than always saying the mean of the training cases."""
    start = (
        f"always saying {constant['value']:.4g}{units}, the mean of the training cases, has an MAE of "
        f"{constant['mae']['value']:.4g}{units}; the model"
    )
    gain, interval = constant["mae_gain"]["value"], constant["mae_gain"]["interval"]
    if interval is None:
        return f"{start} is {'better' if gain > 0 else 'not better'}, by {abs(gain):.3g}, which has no interval"
    low, high = interval
    if low > 0:
        return f"{start} is better by {gain:.3g} ({low:.3g} to {high:.3g})"
    if high < 0:
        return f"{start} is worse by {-gain:.3g} ({-high:.3g} to {-low:.3g})"
    return f"{start} is not shown to be better: its MAE is lower by {gain:.3g} ({low:.3g} to {high:.3g})"


def format_regression(summary: dict[str, Any]) -> str:
    """Write a summary as a table to read."""
    unit = f"{summary['groups']} groups" if summary["groups"] is not None else "cases"
    name = summary["target"] + (f", {summary['units']}" if summary["units"] else "")
    resampled = f"{summary['resamples']} resamples of {unit}"
    lines = [f"{name}: {summary['cases']} cases; in brackets 95 % intervals, {resampled}"]
    lines += [f"{REGRESSION_SCORES[key]:9s} {_cell(entry, key)}" for key, entry in summary["scores"].items()]
    return "\n".join([*lines, summary["mean_of_training"]["sentence"]])


def _cell(entry: dict[str, Any], key: str) -> str:
    if entry["value"] is None:
        return "undefined"
    kind = ".4g" if key in _IN_UNITS else ".3f"
    text = format(entry["value"], kind)
    if entry["interval"] is not None and None not in entry["interval"]:
        low, high = entry["interval"]
        text += f" ({low:{kind}} to {high:{kind}})"
    return text


def draw_regression(predicted: np.ndarray, truth: np.ndarray, task: RegressionTask, path: str | Path) -> None:
    """Draw predictions against the truth, the line of no error, and the mean of the training cases."""
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes = figure.subplots()
    everything = np.concatenate([predicted, truth, [task.mean]])
    low, high = float(everything.min()), float(everything.max())
    margin = 0.05 * (high - low) or 1.0
    ends = [low - margin, high + margin]
    axes.plot(ends, ends, color="0.4", linewidth=1, label="no error")
    axes.axhline(task.mean, color="0.6", linewidth=1, linestyle="--", label="mean of the training cases")
    axes.scatter(truth, predicted, s=22, color="#0077bb", alpha=0.7 if len(truth) < 200 else 0.35, linewidths=0)
    scores = regression_scores(predicted, truth)
    told = f"MAE {scores['mae']:.3g}{_units(task.units)}"
    told += "" if math.isnan(scores["r2"]) else f", R2 {scores['r2']:.2f}"
    units = f" [{task.units}]" if task.units else ""
    axes.set(
        xlim=ends,
        ylim=ends,
        xlabel=f"true {task.name}{units}",
        ylabel=f"predicted {task.name}{units}",
        title=f"{len(truth)} cases: {told}",
    )
    axes.set_aspect("equal")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left")
    replace_file(as_path(path), lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
