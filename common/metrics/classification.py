# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of predicted probabilities against classes or labels, with intervals, as a table and a picture.

| score | definition |
|---|---|
| ap | average precision of each class against the rest, plain mean over the classes |
| balanced_accuracy | mean over classes of the recall; of labels, mean over labels of (recall + specificity) / 2 |
| balanced_accuracy_reference | mean over classes of (recall + specificity) / 2, as the published tables have it |
| auroc | area under the ROC curve of each class against the rest, plain mean over the classes |
| f1 | F1 of each class, plain mean over the classes |
| accuracy | share of right decisions, of labels over all of them |

Decisions are the likeliest class, or labels above 0.5. A class or label that all or no case has has neither an average
precision nor an AUROC, since there is nothing to rank, and a class without a case has no score at all: what is not
defined is NaN and left out of the means. The two balanced accuracies are equal for two classes and for labels; for
more, specificity, which is easy to have, raises the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from ..figures import Figure
from ..files import replace_file
from ..paths import as_path
from .statistics import bootstrap_interval, known_mean, with_intervals

__all__ = [
    "SCORES",
    "classification_scores",
    "draw_classification",
    "format_classification",
    "summarise_classification",
]

SCORES = ("ap", "balanced_accuracy", "balanced_accuracy_reference", "auroc", "f1", "accuracy")
_OF_CLASS = ("ap", "auroc", "f1", "recall", "specificity")


def classification_scores(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Compute all scores at once.

    Args:
        probabilities: ``(cases, classes)``.
        truth: index of each case's class ``(cases,)``, or 0 and 1 of each label ``(cases, labels)``.

    Returns:
        the scores of the table above, and ``classes``: ``(classes, 5)`` average precision, AUROC, F1, recall and
        specificity of each.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
        >>> scores = classification_scores(probabilities, np.array([0, 0, 1, 1]))
        >>> {name: round(scores[name], 3) for name in ("ap", "balanced_accuracy", "auroc", "f1")}
        {'ap': 0.833, 'balanced_accuracy': 0.75, 'auroc': 0.75, 'f1': 0.733}
    """
    labels = truth.ndim == 2
    true = (truth if labels else truth[:, None] == np.arange(probabilities.shape[1])).astype(bool)
    chosen = probabilities > 0.5 if labels else np.eye(probabilities.shape[1], dtype=bool)[probabilities.argmax(1)]
    rows = np.full((probabilities.shape[1], len(_OF_CLASS)), np.nan)
    for index, row in enumerate(rows):
        own, decided = true[:, index], chosen[:, index]
        positives, negatives = int(own.sum()), int((~own).sum())
        if negatives:
            row[4] = float((~own & ~decided).sum()) / negatives
        if not positives:
            continue
        hits = int((own & decided).sum())
        row[:2] = _ranking(own, probabilities[:, index])
        row[2] = 2 * hits / (positives + int(decided.sum()))
        row[3] = hits / positives
    balanced = (rows[:, 3] + rows[:, 4]) / 2
    return {
        "ap": float(known_mean(rows[:, 0])),
        "balanced_accuracy": float(known_mean(balanced if labels else rows[:, 3])),
        "balanced_accuracy_reference": float(known_mean(balanced)),
        "auroc": float(known_mean(rows[:, 1])),
        "f1": float(known_mean(rows[:, 2])),
        "accuracy": float((chosen == true).mean() if labels else (chosen & true).any(1).mean()),
        "classes": rows,
    }


def _ranking(own: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """Return average precision and area under the ROC curve; equal scores are one threshold; NaN without negatives.

    scikit-learn's, which a test compares, take twenty times as long, minutes for a thousand resamples.
    """
    order = np.argsort(-score, kind="stable")
    ranked, sorted_scores = own[order], score[order]
    ends = np.append(np.flatnonzero(np.diff(sorted_scores)), len(score) - 1)  # the last case of each threshold
    hits = np.cumsum(ranked)[ends]
    counted = ends + 1
    alarms = counted - hits
    if alarms[-1] == 0:
        return float("nan"), float("nan")
    precision = float((np.diff(hits, prepend=0) / hits[-1] * (hits / counted)).sum())
    heights = (hits + np.append(0, hits[:-1])) / 2
    return precision, float((np.diff(alarms, prepend=0) * heights).sum() / (hits[-1] * alarms[-1]))


def summarise_classification(
    probabilities: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    *,
    groups: Sequence[Any] | None = None,
    resamples: int = 1000,
    seed: int = 12345,
) -> dict[str, Any]:
    """Score all cases, with 95 % bootstrap intervals over cases or groups.

    Args:
        probabilities: ``(cases, classes)``.
        truth: classes ``(cases,)``, or 0 and 1 of labels ``(cases, labels)``.
        names: of classes or labels.
        groups: which patient each case is of; intervals then resample patients.
        resamples: of the bootstrap; 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        ``cases``, ``scores`` (for each its ``value`` and ``interval``), ``classes`` (for each its number of ``cases``
        and scores with intervals) and, of classes, ``confusion``: rows are the truth, columns the decision.
    """

    def statistic(p: np.ndarray, t: np.ndarray) -> np.ndarray:
        found = classification_scores(p, t)
        return np.concatenate([[found[name] for name in SCORES], found["classes"].ravel()])

    values = statistic(probabilities, truth)
    interval = bootstrap_interval(statistic, probabilities, truth, groups=groups, resamples=resamples, seed=seed)
    entries = with_intervals(values, interval, _plain)
    own = entries[len(SCORES) :]
    counts = truth.sum(0) if truth.ndim == 2 else np.bincount(truth, minlength=len(names))
    summary: dict[str, Any] = {
        "cases": len(truth),
        "groups": None if groups is None else len(set(groups)),
        "scores": dict(zip(SCORES, entries, strict=False)),
        "classes": {
            name: {
                "cases": int(counts[index]),
                **dict(zip(_OF_CLASS, own[index * len(_OF_CLASS) : (index + 1) * len(_OF_CLASS)], strict=True)),
            }
            for index, name in enumerate(names)
        },
        "resamples": resamples,
    }
    if truth.ndim == 1:
        confusion = np.zeros((len(names), len(names)), int)
        np.add.at(confusion, (truth, probabilities.argmax(1)), 1)
        summary["confusion"] = confusion.tolist()
    return summary


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def format_classification(summary: dict[str, Any]) -> str:
    """Write a summary as a table to read; scores in percent."""
    unit = f"{summary['groups']} groups" if summary["groups"] is not None else "cases"
    lines = [f"{summary['cases']} cases; in brackets 95 % intervals, {summary['resamples']} resamples of {unit}"]
    lines += [f"{name:28s} {_percent(summary['scores'][name])}" for name in SCORES]
    width = max(len(name) for name in summary["classes"])
    header = "  ".join(f"{name:21s}" for name in ("ap", "auroc", "f1", "recall"))
    lines.append(f"{'':{width}s}  cases  {header}".rstrip())
    for name, own in summary["classes"].items():
        cells = "  ".join(f"{_percent(own[key]):21s}" for key in ("ap", "auroc", "f1", "recall"))
        lines.append(f"{name:{width}s}  {own['cases']:5d}  {cells}".rstrip())
    return "\n".join(lines)


def _percent(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return "undefined"
    text = f"{100 * entry['value']:.1f}"
    if entry["interval"] is not None and None not in entry["interval"]:
        low, high = entry["interval"]
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return text


def draw_classification(probabilities: np.ndarray, truth: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Draw ROC curves, and decisions against the truth: a confusion matrix, or each label's hits and misses."""
    labels = truth.ndim == 2
    true = (truth if labels else truth[:, None] == np.arange(len(names))).astype(bool)
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    curves, grid = figure.subplots(1, 2)
    shown = range(1, 2) if len(names) == 2 and not labels else range(len(names))
    for index in shown:
        if true[:, index].all() or not true[:, index].any():
            continue
        fpr, tpr, _ = roc_curve(true[:, index], probabilities[:, index])
        area = _ranking(true[:, index], probabilities[:, index])[1]
        curves.plot(fpr, tpr, label=f"{names[index]}: {area:.3f}")
    curves.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    curves.set(xlabel="false positives, share", ylabel="true positives, share", title="ROC, area under the curve")
    curves.set_aspect("equal")
    if curves.get_legend_handles_labels()[0]:
        curves.legend(fontsize=8, loc="lower right")
    if labels:
        chosen = probabilities > 0.5
        columns = ["hit", "missed", "false alarm", "rightly not"]
        cells = np.stack(
            [(true & chosen).sum(0), (true & ~chosen).sum(0), (~true & chosen).sum(0), (~true & ~chosen).sum(0)], 1
        )
        grid.set(title="decisions at 0.5")
    else:
        columns = list(names)
        cells = np.zeros((len(names), len(names)), int)
        np.add.at(cells, (truth, probabilities.argmax(1)), 1)
        grid.set(title="decisions", xlabel="predicted", ylabel="true")
    grid.imshow(cells / np.maximum(cells.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    grid.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) < 6 else 60, fontsize=8)
    grid.set_yticks(range(len(names)), list(names), fontsize=8)
    for (row, column), count in np.ndenumerate(cells):
        dark = count > 0.6 * cells[row].sum()
        grid.text(column, row, str(count), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    replace_file(as_path(path), lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
