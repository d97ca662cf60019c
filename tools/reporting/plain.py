# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which arms beat the plain rows: a frozen random encoder, a small plain CNN, the mean of the training cases.

An arm beats a row where the interval of the paired difference in the first score leaves out 0. Plain rows are in no
test and no rank, so that they change nothing of what is said of the arms themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..studies.definition import FROZEN_RANDOM, PLAIN_ROWS
from ..studies.results import Block, Results
from .comparison import compare_over

__all__ = ["ALL", "against_plain", "by_arm", "outcome_of", "plain_rows_of", "plain_sentence"]

ALL = "All"  # the mean of several data sets


def plain_rows_of(arms: Mapping[str, Mapping[str, Any]], arm: str) -> list[str]:
    """Return the plain rows that an arm has to beat, of each kind the one of its length and spacing.

    Args:
        arms: of study.json.
        arm: no plain row itself.

    Example:
        >>> arms = {
        ...     "mae": {"weights": "a.pt", "backbone": "resenc_l"},
        ...     "frozen random resenc_l": {"weights": "frozen_random", "backbone": "resenc_l"},
        ...     "frozen random primus_m": {"weights": "frozen_random", "backbone": "primus_m"},
        ...     "plain CNN": {"weights": "plain", "backbone": "plain"},
        ... }
        >>> plain_rows_of(arms, "mae")
        ['frozen random resenc_l', 'plain CNN']
    """
    own, found = arms[arm], []
    for kind in PLAIN_ROWS:
        known = [
            name
            for name, each in arms.items()
            if each["weights"] == kind and (kind != FROZEN_RANDOM or each["backbone"] == own["backbone"])
        ]
        keys = ("epochs", "spacing")
        if known:
            found.append(max(known, key=lambda name: [arms[name].get(key) == own.get(key) for key in keys]))
    return found


def outcome_of(low: float, high: float) -> str:
    """Return what an interval of a difference shows: better, worse, or "" for neither."""
    return "better" if low > 0 else "worse" if high < 0 else ""


def by_arm(told: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, str]]:
    """Gather outcomes by arm and row, for :func:`plain_sentence`.

    Args:
        told: arm, row and outcome.
    """
    found: dict[str, dict[str, str]] = {}
    for arm, row, outcome in told:
        found.setdefault(arm, {})[row] = outcome
    return found


def plain_sentence(outcomes: Mapping[str, Mapping[str, str]], *, one_run: bool = False) -> str:
    """Say in one sentence which arms beat the plain rows and which do not; "" where nothing is compared.

    Args:
        outcomes: by arm and row what :func:`outcome_of` says.
        one_run: of each, so that the luck of a run is in no interval.

    Example:
        >>> told = {"a": {"frozen": "better", "CNN": "better"}, "b": {"frozen": "better", "CNN": ""}}
        >>> plain_sentence(told)
        'Against the plain rows: a beats frozen and CNN; b beats frozen, but is not shown to beat CNN.'
        >>> plain_sentence({"a": {"frozen": "", "CNN": "worse"}})
        'Against the plain rows: a is not shown to beat frozen and is worse than CNN.'
    """
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for arm, found in outcomes.items():
        if found:
            alike.setdefault(tuple(found.items()), []).append(arm)
    clauses = [_clause(arms, found) for found, arms in alike.items()]
    luck = " (with one run of each, whose luck is not in these intervals)" if one_run else ""
    return f"Against the plain rows{luck}: {'; '.join(clauses)}." if clauses else ""


def _clause(arms: Sequence[str], found: Sequence[tuple[str, str]]) -> str:
    several = len(arms) > 1
    rows = {word: _listed([row for row, outcome in found if outcome == word]) for word in ("better", "", "worse")}
    is_ = "are" if several else "is"
    missed = [f"{is_} not shown to beat {rows['']}"] if rows[""] else []
    missed += [f"{is_} worse than {rows['worse']}"] if rows["worse"] else []
    told = [f"{'beat' if several else 'beats'} {rows['better']}"] if rows["better"] else []
    told += [" and ".join(missed)] if missed else []
    return f"{_listed(arms)} {', but '.join(told)}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def against_plain(results: Results, blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Compare every arm with its plain rows in the first score, on each data set and on the mean of several.

    Returns:
        for each task, budget, column, arm and row ``difference``, ``low``, ``high``, ``outcome`` and the fewest
        ``seeds`` of a fold; of pairs that are complete.
    """
    arms = results.about["arms"]
    found = []
    for task, budget in dict.fromkeys((block.task, block.budget) for block in blocks):
        own = [block for block in blocks if (block.task, block.budget) == (task, budget)]
        columns = {block.data_set: [block] for block in own} | ({ALL: own} if len(own) > 1 else {})
        for column, members in columns.items():
            for arm in (name for name in arms if arms[name]["weights"] not in PLAIN_ROWS):
                for row in plain_rows_of(arms, arm):
                    if not all(block.has(arm) and block.has(row) for block in members):
                        continue
                    gap = compare_over(members, arm, row)
                    if gap is not None and not math.isnan(gap["low"]):
                        told = {"task": task, "budget": budget, "column": column, "arm": arm, "row": row}
                        found.append({**told, **gap, "outcome": outcome_of(gap["low"], gap["high"])})
    return found
