# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the scores of a run so far come to, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...handlers.progress import AT_START, PROBED, PROBED_FILE
from ...metrics.trends import falls

__all__ = ["decline", "outcome"]

_RANK, _KNN, _AGREEMENT = "probe_rank", "probe_knn", "probe_agreement"
_WINDOW = 8  # probes that a fall is told from
_LEAST = 0.02  # that a score must have fallen by
_LEAST_SHARE = 0.05  # of the rank
_NAMES = {PROBED: "the linear probe", _KNN: "the nearest neighbours", _RANK: "the effective rank"}


def decline(history: Sequence[Mapping[str, float]], *, labelled: bool) -> str | None:
    """Return a sentence if features got worse over the last probes while the loss fell, None if they did not.

    That is: over the last eight probes a score fell more steadily than in 99 of 100 orders of its values, the training
    loss as well, and the last three scores are on average lower than the first three by more than 0.02, the effective
    rank by more than a twentieth. With labelled cases only what is told of them counts: the rank may well fall while
    features get better.

    Args:
        history: records of epochs, some with scores.
        labelled: whether there are labelled cases.
    """
    for name in (PROBED, _KNN) if labelled else (_RANK,):
        records = [record for record in history if name in record][-_WINDOW:]
        scores, losses = ([record[key] for record in records] for key in (name, "train_loss"))
        if len(records) < _WINDOW or not (falls(scores) and falls(losses)):
            continue
        first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
        if first - last <= (_LEAST if labelled else _LEAST_SHARE * first):
            continue
        what, remedy = (
            ("what is learned now tells less of the labelled cases", f"models/{PROBED_FILE} is of the best probe")
            if labelled
            else ("features use fewer dimensions", "labelled cases tell if that matters: --probe_data FOLDER")
        )
        return (
            f"warning: over the last {_WINDOW} probes (epochs {records[0]['epoch']} to {records[-1]['epoch']}) "
            f"{_NAMES[name]} fell from {scores[0]:.3g} to {scores[-1]:.3g} while the training loss fell from "
            f"{losses[0]:.4g} to {losses[-1]:.4g}: {what}; {remedy}"
        )
    return None


def outcome(history: Sequence[Mapping[str, float]], *, asked: str = "", score: str = "", chance: float = 0.0) -> str:
    """Return what the first, the best and the last probe told, empty if there is none.

    Args:
        history: records of epochs, some with scores; the first one also holds those of the start.
        asked: what is told of labelled cases; empty without any.
        score: what is measured.
        chance: the score of somebody who knows nothing.

    Example:
        >>> history = [{"epoch": 1, "start_probe_rank": 3.0}, {"epoch": 2, "probe_rank": 12.5}]
        >>> outcome(history)
        'effective rank of the features: 3.0 with random weights, 12.5 after epoch 2'
    """
    name, digits = (PROBED, 3) if asked else (_RANK, 1)
    records = [record for record in history if name in record]
    if not records:
        return ""
    start, last = history[0].get(f"{AT_START}{name}"), records[-1]
    told = [] if start is None else [f"{start:.{digits}f} with random weights"]
    if asked:
        best = max(records, key=lambda record: record[name])
        told.append(f"best {best[name]:.3f} after epoch {best['epoch']} (models/{PROBED_FILE})")
    told.append(f"{'last ' if asked else ''}{last[name]:.{digits}f} after epoch {last['epoch']}")
    if asked and start is not None and start >= max(record[name] for record in records):
        told.append("so that random weights told as much")
    if not asked and _AGREEMENT in last:
        told.append(f"views of one volume are more alike than of two by {last[_AGREEMENT]:.2f}")
    what = f"linear probe of {asked} ({score}, chance {chance:.2g})" if asked else "effective rank of the features"
    return f"{what}: {', '.join(told)}"
