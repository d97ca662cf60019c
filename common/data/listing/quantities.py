# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Numbers as targets of whole volumes: how they are read, what is refused, and their spread in the training cases."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ...errors import DataError
from ...tasks import TARGET, RegressionTask
from ..cases import Case

__all__ = ["check_numbers", "number_of", "ranges", "spread", "standardised"]

_FEW = 5  # cases, of which two different numbers may be all that was measured
_COMMA = re.compile(r"[-+]?\d+,\d+")


def number_of(case: Case, column: str, source: str) -> float:
    """Return the number that a case has in a column.

    Raises:
        DataError: if it is none, or not finite.

    Example:
        >>> number_of({"case": "a", "age": " 61.5"}, "age", "t.csv")
        61.5
    """
    text = str(case[column]).strip()
    try:
        value = float(text)
    except ValueError as error:
        hint = "; write it with a point" if _COMMA.fullmatch(text) else ""
        raise DataError(
            f"{source}: {case['case']} has {text!r} in {column!r}, where a number is needed{hint}"
        ) from error
    if not math.isfinite(value):
        raise DataError(f"{source}: {case['case']} has {text!r} in {column!r}, where a finite number is needed")
    return value


def check_numbers(texts: Sequence[str], column: str, source: str) -> None:
    """Refuse a column that holds no numbers, or too few different ones to be a quantity.

    Args:
        texts: what is known of the cases, as it is written.
        column: that holds them.
        source: table or list, to be named.

    Raises:
        DataError: saying what the column holds, and the remedy.
    """
    values = set()
    for text in texts:
        try:
            values.add(float(text))
        except ValueError:
            continue
    if not texts:
        raise DataError(f"the column {column!r} of {source} holds nothing; a regression needs a number for each case")
    if not values:
        raise DataError(
            f"the column {column!r} of {source} holds no number, but for example {texts[0]!r}; leave out --task "
            "regression if these are classes"
        )
    if len(values) == 1:
        raise DataError(
            f"the column {column!r} of {source} holds {values.pop():g} for every case; there is nothing to predict"
        )
    if len(values) == 2 and len(texts) >= _FEW:
        low, high = sorted(values)
        raise DataError(
            f"the column {column!r} of {source} holds two different numbers, {low:g} and {high:g}, which are classes; "
            "leave out --task regression"
        )


def ranges(cases: Sequence[Case], *, parts: int, most: int = 5) -> Callable[[Case], str]:
    """Return a function that names the range of a case's number, so that splits have low and high ones alike.

    Args:
        cases: with their targets.
        parts: of the split; each range holds about as many cases, or more.
        most: ranges, of about as many cases each.

    Example:
        >>> cases = [{"target": float(value)} for value in range(10)]
        >>> [ranges(cases, parts=5)(case) for case in cases[3:6]]
        ['0 to 4', '0 to 4', '5 to 9']
    """
    if not cases:
        return lambda _: ""
    values = np.array([case[TARGET] for case in cases])
    count = max(1, min(most, len(values) // max(parts, 1)))
    edges = np.unique(np.quantile(values, np.arange(1, count) / count, method="inverted_cdf"))
    places = np.searchsorted(edges, values)
    own = [values[places == place] for place in range(places.max() + 1)]
    names = [f"{part.min():g} to {part.max():g}" for part in own]
    return lambda case: names[int(np.searchsorted(edges, case[TARGET]))]


def standardised(task: RegressionTask, cases: Sequence[Case], *, source: str) -> RegressionTask:
    """Return the task with the mean and standard deviation of the training cases.

    Raises:
        DataError: if all of them have one number.
    """
    values = np.array([case[TARGET] for case in cases], dtype=np.float64)
    mean, std = float(values.mean()), float(values.std())
    if not std > 0:
        raise DataError(
            f"all {len(cases)} training cases have the {task.name} {values[0]:g} in {source}; there is nothing to "
            "learn: give more cases, or another split"
        )
    return replace(task, mean=mean, std=std)


def spread(task: RegressionTask, cases: Sequence[Case]) -> str:
    """Return mean, standard deviation and range of the numbers of cases, in words."""
    values = np.array([case[TARGET] for case in cases])
    units = f" {task.units}" if task.units else ""
    return f"{task.name} {values.mean():.4g} ± {values.std():.3g}{units} ({values.min():g} to {values.max():g})"
