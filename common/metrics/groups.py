# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of groups of cases, such as sites, scanners, sexes or bands of age, and how far the worst is from the best.

=========  ================================================================================================
goes in    a score as a function of cases, what each case says of itself, and whose scan it is
between    bootstrap over the patients of each group
comes out  of each group its score with an interval; of each column the gap between best and worst
=========  ================================================================================================

Best and worst are picked after looking, so that the gap is too large: of groups that do not differ one is best all the
same. Its interval therefore holds the differences of all pairs of groups at once, whichever pair is picked, and beside
it stands the gap that groups of these sizes would show if they did not differ. Groups of few patients are shown and
named, and take no part in the gap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ..figures import Figure
from ..files import replace_file
from ..paths import as_path
from .statistics import bootstrap_samples, equal_units, wider_percentiles

__all__ = [
    "FEWEST",
    "GROUPS_PICTURE",
    "draw_groups",
    "format_groups",
    "gap_between",
    "group_scores",
    "group_sentences",
    "group_table_rows",
    "group_title",
    "groups_figure",
    "ordered_groups",
]

FEWEST = 10  # patients of a group of which something can be said
GROUPS_PICTURE = "groups.png"


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def group_scores(
    statistic: Callable[[np.ndarray], float],
    columns: Mapping[str, Sequence[str]],
    *,
    patients: Sequence[str] | None = None,
    lower_is_better: bool = False,
    fewest: int = FEWEST,
    resamples: int = 2000,
    seed: int = 12345,
) -> dict[str, Any]:
    """Score each group of cases, and tell how far the worst is from the best.

    Args:
        statistic: function of row numbers of cases, ``(n,)`` with repetitions, that returns one score.
        columns: of each column the group of every case, "" where it has none.
        patients: whose scan each case is; each case is a patient by itself unless given.
        lower_is_better: whether the best score is the lowest.
        fewest: patients below which nothing is said of a group.
        resamples: of the bootstrap; 0 computes no intervals.
        seed: of the bootstrap.

    Returns:
        by column: ``groups`` (of each ``cases``, ``patients``, ``score``, ``interval`` and ``few``), ``missing``, how
        many cases have none, and ``gap``, as :func:`gap_between` tells it, None with fewer than two groups that are
        large enough; all of it plain values.

    Example:
        >>> dice = np.array([0.9, 0.8, 0.85, 0.5, 0.7])
        >>> found = group_scores(lambda rows: dice[rows].mean(), {"site": ["A", "A", "B", "B", ""]}, fewest=2)["site"]
        >>> found["missing"], [(name, round(one["score"], 3)) for name, one in found["groups"].items()]
        (1, [('A', 0.85), ('B', 0.675)])
        >>> found["gap"]["best"], found["gap"]["worst"], round(found["gap"]["gap"], 3)
        ('A', 'B', 0.175)
    """
    found: dict[str, Any] = {}
    for column, values in columns.items():
        groups: dict[str, Any] = {}
        large: dict[str, tuple[float, np.ndarray, float]] = {}
        for name in ordered_groups(value for value in values if value):
            rows = np.flatnonzero([value == name for value in values])
            whose = None if patients is None else [patients[row] for row in rows.tolist()]
            count = len(rows) if whose is None else len(set(whose))
            units = float(count) if whose is None else equal_units(whose)
            score = float(statistic(rows))
            samples = bootstrap_samples(statistic, rows, groups=whose, resamples=resamples, seed=seed)
            groups[name] = {
                "cases": len(rows),
                "patients": count,
                "score": _plain(score),
                "interval": _bounds(samples, units),
                "few": count < fewest,
            }
            if samples is not None and count >= fewest and np.isfinite(score):
                large[name] = (score, samples, units)
        gap = gap_between(large, lower_is_better=lower_is_better) if len(large) > 1 else None
        found[column] = {"groups": groups, "missing": sum(not value for value in values), "gap": gap, "fewest": fewest}
    return found


def ordered_groups(names: Iterable[str]) -> list[str]:
    """Return each name once, bands and numbers in their order.

    Example:
        >>> ordered_groups(["60 and above", "below 40", "40 to below 60", "below 40"]), ordered_groups(["10", "9"])
        (['below 40', '40 to below 60', '60 and above'], ['9', '10'])
    """
    return sorted(set(names), key=_place)


def _place(name: str) -> tuple[Any, ...]:
    """Return what groups are ordered by: bands and numbers as numbers, else names."""
    if name.startswith("below "):
        return (0, -np.inf, name)
    band = re.fullmatch(r"(\S+) (?:to below \S+|and above)", name)
    number = _number(band[1] if band else name)
    return (1, 0.0, name) if number is None else (0, number, name)


def _plain(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _bounds(samples: np.ndarray | None, units: float) -> list[float | None] | None:
    if samples is None or np.isnan(samples).all():
        return None
    return [_plain(bound) for bound in np.nanpercentile(samples, wider_percentiles(units))]


def gap_between(
    groups: Mapping[str, tuple[float, np.ndarray, float]], *, lower_is_better: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Return how far the worst group is from the best.

    The interval is simultaneous for all pairs of groups: its reach is the 95th percentile of the largest difference of
    any pair in the bootstrap, in units of that pair's standard error.

    Args:
        groups: score, bootstrap samples ``(resamples,)`` and number of patients of each of two groups or more.
        lower_is_better: whether the best score is the lowest.
        seed: of the order in which samples of different groups are put together.

    Returns:
        ``best`` and ``worst``, their ``gap``, its ``interval``, and ``by_chance``, the mean gap between best and worst
        of such groups if they did not differ.
    """
    rng = np.random.default_rng(seed)
    names = list(groups)
    order = sorted(names, key=lambda name: groups[name][0], reverse=not lower_is_better)
    best, worst = order[0], order[-1]
    drawn, errors, factors = [], [], []
    for _, samples, units in groups.values():
        known = samples[~np.isnan(samples)]
        freedom = max(units - 1, 1.0)
        apart = rng.choice(known - known.mean(), len(samples), replace=len(known) < len(samples))
        drawn.append(apart * np.sqrt(1 + 1 / freedom))
        errors.append(drawn[-1].std())
        factors.append(stdtrit(freedom, 0.975) / stdtrit(1e9, 0.975))
    deviations = np.stack(drawn)  # (groups, resamples)
    largest = np.zeros(deviations.shape[1])
    for one, other in combinations(range(len(names)), 2):
        error = np.hypot(errors[one], errors[other])
        if error > 0:
            apart = np.abs(factors[one] * deviations[one] - factors[other] * deviations[other])
            largest = np.maximum(largest, apart / error)
    gap = abs(groups[best][0] - groups[worst][0])
    pair = np.hypot(*(errors[names.index(name)] for name in (best, worst)))
    reach = float(np.quantile(largest, 0.95) * pair)
    return {
        "best": best,
        "worst": worst,
        "gap": _plain(gap),
        "interval": [_plain(gap - reach), _plain(gap + reach)],
        "by_chance": _plain(float(np.ptp(deviations, axis=0).mean())),
    }


def group_title(columns: Mapping[str, Any]) -> str:
    """Return what groups are called before their names: the column, "" where there are several."""
    return next(iter(columns)) if len(columns) == 1 else ""


def group_sentences(found: Mapping[str, Any], *, digits: int = 3) -> list[str]:
    """Return what the scores of groups say and do not say: gaps, groups of few patients, and cases without a group.

    Args:
        found: of :func:`group_scores`.
        digits: of scores.
    """
    told = []
    for column, one in found.items():
        gap = one["gap"]
        if gap is None:
            told.append(
                f"{column}: fewer than two groups have {one['fewest']} patients, so that nothing is said of a gap."
            )
        else:
            low, high = gap["interval"]
            shown = "a difference is shown" if low > 0 else "no difference is shown"
            told.append(
                f"{column}: {gap['best']} is best and {gap['worst']} worst, {gap['gap']:.{digits}f} apart "
                f"[{low:.{digits}f}, {high:.{digits}f}]; groups of these sizes that do not differ would be "
                f"{gap['by_chance']:.{digits}f} apart on average: {shown}."
            )
        few = [f"{name} ({each['patients']})" for name, each in one["groups"].items() if each["few"]]
        if few:
            told.append(
                f"{column}: too few patients, fewer than {one['fewest']}, to say anything of {', '.join(few)}; "
                "left out of the gap."
            )
        if one["missing"]:
            told.append(f"{column}: {one['missing']} case(s) have none and are in no group.")
    return told


def group_table_rows(found: Mapping[str, Any], *, digits: int = 3) -> list[list[str]]:
    """Return the scores of groups as rows of cells, without the heads (group, cases, patients, score with 95 %).

    A row of one cell is the column of those below it.

    Args:
        found: of :func:`group_scores`.
        digits: of scores.
    """
    rows: list[list[str]] = []
    for column, one in found.items():
        rows.append([column])
        for name, each in one["groups"].items():
            score = "-" if each["score"] is None else f"{each['score']:.{digits}f}"
            if each["interval"] is not None and None not in each["interval"]:
                score += " [{}]".format(", ".join(f"{bound:.{digits}f}" for bound in each["interval"]))
            rows.append([name, str(each["cases"]), str(each["patients"]), score + (" (few)" if each["few"] else "")])
    return rows


def format_groups(found: Mapping[str, Any], *, score: str, digits: int = 3) -> str:
    """Return the scores of groups as a table to print, with the sentences below it.

    Args:
        found: of :func:`group_scores`.
        score: what the score is called.
        digits: of scores.
    """
    rows = [["", "cases", "patients", f"{score} [95 %]"], *group_table_rows(found, digits=digits)]
    rows = [row if len(row) == 1 or not index else [f"  {row[0]}", *row[1:]] for index, row in enumerate(rows)]
    widths = [max(len(row[place]) for row in rows if len(row) > 1) for place in range(4)]
    lines = [
        "  ".join(
            cell.ljust(width) if place in (0, 3) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *group_sentences(found, digits=digits)])


def draw_groups(found: Mapping[str, Any], path: str | Path, *, score: str, whole: float | None = None) -> None:
    """Write :func:`groups_figure` as a PNG."""
    figure = groups_figure(found, score=score, whole=whole)
    replace_file(as_path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def groups_figure(found: Mapping[str, Any], *, score: str, whole: float | None = None) -> Figure:
    """Draw the score of each group as a point with its interval, column by column; few patients are drawn hollow.

    Args:
        found: of :func:`group_scores`.
        score: what the score is called.
        whole: score of all cases, a line to compare with.
    """
    labels: list[str] = []
    heads: list[int] = []
    rows = sum(1 + len(one["groups"]) for one in found.values())
    figure = Figure(figsize=(6.4, 1.2 + 0.3 * rows), layout="constrained")
    axes = figure.subplots()
    for column, one in found.items():
        heads.append(len(labels))
        labels.append(column)
        for name, each in one["groups"].items():
            labels.append(f"{name} ({each['patients']})")
            if each["score"] is None:
                continue
            at, colour = len(labels) - 1, "#999999" if each["few"] else "#0072b2"
            if each["interval"] is not None and None not in each["interval"]:
                axes.plot(each["interval"], [at, at], color=colour, linewidth=1.6)
            axes.plot(
                each["score"], at, "o", markerfacecolor="white" if each["few"] else colour, markeredgecolor=colour
            )
    if whole is not None:
        axes.axvline(whole, color="#d55e00", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(labels)), labels)
    for place in heads:
        axes.get_yticklabels()[place].set_fontweight("bold")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    note = "; dashed: all" if whole is not None else ""
    axes.set_xlabel(f"{score}, 95 % intervals (patients); hollow: too few{note}")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
