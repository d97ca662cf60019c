# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of many cases as a summary, a table to read, files to compute with, and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from ..figures import Figure
from ..files import replace_file, write_json
from ..paths import as_path
from ..tables import UNKNOWN, write_table
from .segmentation import METRICS
from .statistics import bootstrap_interval, known_mean, plain_number

__all__ = ["draw_scores", "format_summary", "summarise", "summary_rows", "units_of", "write_scores"]

Scores = Mapping[str, Mapping[str, float]]  # of one case: class or region, score, value
_SUMMARISED = (*METRICS, "absolute_volume_error_ml")
_LONGEST_TABLE = 40  # lines up to which each group's classes are printed too


def summarise(
    cases: Sequence[Scores],
    *,
    groups: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    patients: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 12345,
) -> dict[str, Any]:
    """Average over cases, with bootstrap intervals, for all and for each group.

    A class is averaged over the cases in which a score is defined; an infinite HD95, of a case in which only one of
    prediction and reference holds the class, is left out and counted as ``one_empty``. ``mean`` is the plain mean of
    the classes' means. Intervals resample cases, or patients, within the group if it is one of a group.

    Args:
        cases: scores of each case, of the same classes.
        groups: where each case belongs, for example its centre; or that by column, whose names then stand before those
            of groups if there are several.
        patients: whose scan each case is.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        ``all`` and ``groups``; in each ``cases``, ``patients`` (None where nobody tells), ``classes`` and ``mean``. A
        score has ``mean``, the 95 % ``interval`` (None with fewer than two cases) and the number of ``cases`` behind
        it.

    Example:
        >>> scores = dict.fromkeys(METRICS, 0.5)
        >>> summary = summarise([{"lesion": scores | {"dice": value}} for value in (0.7, 0.9)])
        >>> {key: summary["all"]["mean"]["dice"][key] for key in ("mean", "interval", "cases")}
        {'mean': 0.8, 'interval': [0.7, 0.9], 'cases': 2}
    """
    names = list(cases[0])
    values = np.array([[[case[name][metric] for metric in METRICS] for name in names] for case in cases])
    absolute = np.abs(values[..., METRICS.index("volume_error_ml")])
    values = np.concatenate([values, absolute[..., None]], axis=2)  # (cases, classes, scores)
    whose = None if patients is None else np.asarray(patients)
    often = {"resamples": resamples, "seed": seed}
    summary = {"all": _summary(values, names, whose, **often), "groups": {}}
    columns: Mapping[str, Sequence[str]] = groups if isinstance(groups, Mapping) else {"": groups or ()}
    for column, members in columns.items():
        for group in _ordered(members):
            own = np.array([name == group for name in members])
            part = _summary(values[own], names, None if whose is None else whose[own], **often)
            summary["groups"][f"{column} {group}" if len(columns) > 1 else group] = part
    return summary


def _ordered(groups: Sequence[str]) -> list[str]:
    return sorted(set(groups), key=lambda name: (name == UNKNOWN, name))


def _class_means(values: np.ndarray) -> np.ndarray:
    """Return the mean of each class over cases, and of the classes' means: ``(classes + 1, scores)``."""
    means = known_mean(values)
    return np.concatenate([means, known_mean(means)[None]])


def _summary(
    values: np.ndarray, names: Sequence[str], patients: np.ndarray | None, *, resamples: int, seed: int
) -> dict[str, Any]:
    dice, hd95 = (_SUMMARISED.index(name) for name in ("dice", "hd95_mm"))
    infinite = np.isinf(values)
    one_empty, both_empty = infinite[..., hd95].sum(0), np.isnan(values[..., dice]).sum(0)
    values = np.where(infinite, np.nan, values)
    means = _class_means(values)
    bounds = bootstrap_interval(
        _class_means, values, groups=None if patients is None else patients.tolist(), resamples=resamples, seed=seed
    )
    known = ~np.isnan(values)
    counts = np.concatenate([known.sum(0), known.any(1).sum(0)[None]])

    def of(row: int) -> dict[str, Any]:
        return {
            score: {
                "mean": plain_number(means[row, column]),
                "interval": (
                    None
                    if bounds is None or counts[row, column] < 2
                    else [plain_number(bound) for bound in bounds[:, row, column]]
                ),
                "cases": int(counts[row, column]),
            }
            for column, score in enumerate(_SUMMARISED)
        }

    return {
        "cases": len(values),
        "patients": None if patients is None else len(np.unique(patients)),
        "classes": {
            name: {**of(row), "one_empty": int(one_empty[row]), "both_empty": int(both_empty[row])}
            for row, name in enumerate(names)
        },
        "mean": of(len(names)),
    }


def summary_rows(summary: Mapping[str, Any], *, tolerance_mm: float = 1.0, group: str | None = None) -> list[list[str]]:
    """Return the summary as rows of cells, the heads first; a row of one cell is the title of those below it.

    Args:
        summary: of :func:`summarise`.
        tolerance_mm: of NSD.
        group: what the groups are called; "" where their names say it.
    """
    heads = ("cases", "Dice", f"NSD {tolerance_mm:g} mm", "HD95 mm", "volume error ml")
    shown = (("dice", 3), ("nsd", 3), ("hd95_mm", 2), ("volume_error_ml", 2))
    whole, groups = summary["all"], summary["groups"]
    names = list(whole["classes"])
    brief = _is_brief(summary)

    def cell(score: Mapping[str, Any], digits: int) -> str:
        if score["mean"] is None:
            return "-"
        bounds = score["interval"]
        mean, *ends = (f"{round(value, digits) + 0.0:.{digits}f}" for value in [score["mean"], *(bounds or ())])
        return f"{mean} [{', '.join(ends)}]" if ends else mean

    def line(title: str, scores: Mapping[str, Any]) -> list[str]:
        return [title, str(scores["dice"]["cases"]), *(cell(scores[name], digits) for name, digits in shown)]

    lines: list[list[str]] = [["", *heads]]
    for title, block in [
        ("", whole),
        *((f"{'group' if group is None else group} {name}".strip(), each) for name, each in groups.items()),
    ]:
        if title and brief:
            lines.append(line(title, block["mean"]))
            continue
        if title:
            lines.append([title])
        indent = "  " if title else ""
        lines += [line(f"{indent}{name}", block["classes"][name]) for name in names]
        if len(names) > 1:
            lines.append(line(f"{indent}mean of classes", block["mean"]))
    return lines


def format_summary(summary: Mapping[str, Any], *, tolerance_mm: float = 1.0, group: str | None = None) -> str:
    """Return the summary as a table to print.

    Args:
        summary: of :func:`summarise`.
        tolerance_mm: of NSD.
        group: what the groups are called.
    """
    lines = summary_rows(summary, tolerance_mm=tolerance_mm, group=group)
    whole, groups = summary["all"], summary["groups"]
    full = [row for row in lines if len(row) > 1]
    widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))]
    widths[0] = max(len(row[0]) for row in lines)
    text = [
        "  ".join(
            part.ljust(width) if column == 0 or len(row) == 1 else part.rjust(width)
            for column, (part, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in lines
    ]
    if any(score["interval"] for score in whole["mean"].values()):
        text.append(f"in brackets: 95 % bootstrap intervals over {units_of(summary)}")
    if groups and _is_brief(summary):
        text.append("of each group the mean of its classes; the classes are in scores.json")
    for name, scores in whole["classes"].items():
        if scores["one_empty"]:
            text.append(
                f"{name}: in {scores['one_empty']} case(s) only prediction or reference holds it: Dice and NSD 0, "
                "no HD95"
            )
        if scores["both_empty"]:
            text.append(f"{name}: in {scores['both_empty']} case(s) neither holds it: left out")
    return "\n".join(text)


def units_of(summary: Mapping[str, Any]) -> str:
    """Return what intervals resample."""
    return "cases" if summary["all"]["patients"] is None else f"{summary['all']['patients']} patients"


def _is_brief(summary: Mapping[str, Any]) -> bool:
    """Return whether of each group the mean alone is told."""
    return (len(summary["all"]["classes"]) + 2) * (len(summary["groups"]) + 1) > _LONGEST_TABLE


def write_scores(cases: Sequence[Mapping[str, Any]], content: Mapping[str, Any], *, folder: str | Path) -> None:
    """Write ``scores.csv``, a row for each case and class, and ``scores.json``, with everything.

    Of several columns of groups each is one of the CSV, ``group_<column>``.

    An undefined score is an empty field in the CSV and null in the JSON; an infinite HD95 is ``inf`` in the CSV and
    null in the JSON, where ``one_empty`` of its class counts it.

    Args:
        cases: ``case``, ``group`` (a name, or names by column), perhaps ``patient``, ``scores`` and, for the JSON,
            whatever else is known of each.
        content: what else the JSON says.
        folder: where to.
    """
    columns = (*METRICS, "reference_ml", "predicted_ml")
    several = isinstance(cases[0]["group"], Mapping)
    heads = [f"group_{column}" for column in cases[0]["group"]] if several else ["group"]
    heads += ["patient"] if "patient" in cases[0] else []
    rows = [
        [case["case"], *(case["group"].values() if several else [case["group"]])]
        + ([case["patient"]] if "patient" in case else [])
        + [name]
        + [None if math.isnan(scores[key]) else f"{scores[key]:.6g}" for key in columns]
        for case in cases
        for name, scores in case["scores"].items()
    ]
    write_table(Path(folder) / "scores.csv", ["case", *heads, "class", *columns], rows)
    plain = [
        {
            **case,
            "scores": {
                name: {key: plain_number(value) for key, value in scores.items()}
                for name, scores in case["scores"].items()
            },
        }
        for case in cases
    ]
    write_json({**content, "cases": plain}, as_path(folder) / "scores.json")


def draw_scores(
    cases: Sequence[Scores],
    path: str | Path,
    *,
    groups: Sequence[str] | None = None,
    group: str | None = None,
    tolerance_mm: float = 1.0,
) -> None:
    """Draw Dice and NSD of every case as points over boxes of their quartiles, by class and group.

    Args:
        cases: scores of each case, of the same classes.
        path: PNG to write.
        groups: where each case belongs.
        group: what the groups are called.
        tolerance_mm: of NSD.
    """
    names = list(cases[0])
    members = {"": list(range(len(cases)))}
    if groups is not None:
        members = {name: [i for i, own in enumerate(groups) if own == name] for name in _ordered(groups)}
    slots = len(names) * len(members)
    figure = Figure(figsize=(min(max(4.5, 2 + 0.45 * slots + 0.25 * len(names)), 28), 6.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (metric, title) in zip(panels, (("dice", "Dice"), ("nsd", f"NSD at {tolerance_mm:g} mm")), strict=True):
        lowest = 1.0
        for index, own in enumerate(members.values()):
            for place, name in enumerate(names):
                values = np.array([cases[i][name][metric] for i in own])
                values = values[~np.isnan(values)]
                lowest = min(lowest, *values, 1.0)
                at = place + 0.8 * ((index + 0.5) / len(members) - 0.5)
                _box(axes, at, values, width=0.8 / len(members), colour=_colour(index, len(members)))
        axes.set_ylabel(title)
        axes.set_ylim(max(-0.03, math.floor(10 * lowest - 0.5) / 10 - 0.03), 1.03)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(
        range(len(names)),
        names,
        rotation=0 if max(map(len, names)) * len(names) < 60 else 45,
        ha="center" if max(map(len, names)) * len(names) < 60 else "right",
    )
    panels[1].set_xlim(-0.6, len(names) - 0.4)
    counts = ", ".join(f"{len(own)}" for own in members.values())
    if groups is None:
        figure.suptitle(f"{counts} case(s)", fontsize="medium")
    else:
        handles = [
            axes.plot([], [], "o", color=_colour(index, len(members)), label=f"{name} ({len(own)})")[0]
            for index, (name, own) in enumerate(members.items())
        ]
        figure.legend(
            handles=handles,
            title=f"{group or 'group'} (cases)",
            loc="outside upper center",
            ncols=min(len(members), 6),
            frameon=False,
        )
    replace_file(as_path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _colour(index: int, count: int) -> Any:
    palette = colormaps["tab10" if count <= 10 else "tab20"]
    return palette(index % palette.N)


def _box(axes: Axes, at: float, values: np.ndarray, *, width: float, colour: Any) -> None:
    """Draw one box with its cases beside each other on it."""
    if not len(values):
        return
    if len(values) > 2:
        axes.boxplot(
            values,
            positions=[at],
            widths=0.75 * width,
            showfliers=False,
            manage_ticks=False,
            boxprops={"color": colour},
            whiskerprops={"color": colour},
            capprops={"color": colour},
            medianprops={"color": "black", "linewidth": 1.5},
        )
    spread = np.modf(np.arange(len(values)) * 0.618034)[0] - 0.5  # even, and the same in every run
    axes.plot(at + 0.5 * width * spread, values, "o", color=colour, markersize=3, alpha=0.6, markeredgewidth=0)
