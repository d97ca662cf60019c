# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The charts of a study's report: scores with intervals, budgets, ranks, training curves."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from common.figures import Figure

from ..studies.definition import PLAIN_ROWS
from .cells import Cell
from .significance import ALPHA, Ranks
from .tables import TITLES

__all__ = ["Look", "draw_budgets", "draw_curves", "draw_ranks", "draw_scores", "looks", "png"]

# Paul Tol's "muted" colours without the two palest, and his grey for what starts from scratch
_COLOURS = ("#332288", "#cc6677", "#117733", "#44aa99", "#882255", "#999933", "#aa4499", "#6699cc")
_SCRATCH = ("#555555", "#999999")
_MARKERS = "osD^vPX*"
_INK = "#1b1f24"

Look = Mapping[str, Any]  # how an arm is drawn: color, linestyle, marker


def looks(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Look]:
    """Return a colour, line and marker for each arm, no two alike.

    Arms from scratch are grey and dashed, plain rows grey and dotted.
    """
    found: dict[str, Look] = {}
    scratch = [name for name, arm in arms.items() if arm["weights"] == "scratch"]
    plain = [name for name, arm in arms.items() if arm["weights"] in PLAIN_ROWS]
    others = [name for name in arms if name not in scratch and name not in plain]
    for index, name in enumerate(others):
        turn = index // len(_COLOURS)
        line = ("-", "-.", (0, (4, 1, 1, 1, 1, 1)))[turn % 3]
        marker = _MARKERS[(index + turn) % len(_MARKERS)]
        found[name] = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": line, "marker": marker}
    for index, name in enumerate(scratch):
        colour, marker = _SCRATCH[index % 2], "sD^vPX*"[index % 7]
        found[name] = {"color": colour, "linestyle": (0, (4, 1 + index // 2)), "marker": marker}
    for index, name in enumerate(plain):
        marker = "hx+1|_"[index % 6]
        found[name] = {"color": _SCRATCH[index % 2], "linestyle": (0, (1, 1 + index // 2)), "marker": marker}
    return {name: found[name] for name in arms}


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, facecolor="white")
    return stream.getvalue()


def _tidy(axes: Axes, *, grid: str = "both") -> None:
    axes.grid(axis=grid, color="0.9")  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8)


def _panels(count: int, *, width: float, height: float, across: int, share: bool = False) -> tuple[Figure, list[Axes]]:
    across = min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=share).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, list(grid[:count])


def _key(figure: Figure, arms: Sequence[str], own: Mapping[str, Look], *, lines: bool) -> None:
    handles = [
        Line2D([], [], label=arm, **{**own[arm], **({"marker": ""} if lines else {"linestyle": ""})}) for arm in arms
    ]
    widest = max(len(arm) for arm in arms)
    columns = max(1, min(len(arms), int(figure.get_figwidth() * 11 // (widest + 5))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def draw_scores(cells: Sequence[Cell], own: Mapping[str, Look]) -> bytes:
    """Draw each column's scores with their intervals, a line for each arm."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    arms = [arm for arm in own if any(cell.arm == arm for cell in cells)]
    arms.sort(key=[cell.arm for cell in cells].index)
    height = 0.9 + 0.24 * len(arms)
    figure, panels = _panels(len(columns), width=2.9, height=height, across=3, share=True)
    for axes, column in zip(panels, columns, strict=True):
        for cell in cells:
            if cell.column != column or math.isnan(cell.value):
                continue
            at = len(arms) - 1 - arms.index(cell.arm)
            if not math.isnan(cell.low):
                axes.plot([100 * cell.low, 100 * cell.high], [at, at], color=own[cell.arm]["color"], linewidth=1.6)
            axes.plot(
                [100 * cell.value],
                [at],
                color=own[cell.arm]["color"],
                marker=own[cell.arm]["marker"],
                markersize=6,
                markerfacecolor=own[cell.arm]["color"] if cell.complete else "white",
            )
        axes.set_title(column, fontsize=9, color=_INK)
        axes.set_yticks(range(len(arms)), arms[::-1])
        axes.set_ylim(-0.6, len(arms) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _tidy(axes)
        axes.tick_params(axis="y", length=0)
    figure.supxlabel(f"{TITLES[cells[0].metric]}, %", fontsize=9, color=_INK)
    return png(figure)


def draw_budgets(cells: Sequence[Cell], counts: Mapping[tuple[str, str], float], own: Mapping[str, Look]) -> bytes:
    """Draw each data set's scores over the number of labelled training cases.

    Args:
        cells: of several budgets, one metric.
        counts: number of cases by data set and budget.
        own: looks of the arms.
    """
    columns = list(dict.fromkeys(cell.column for cell in cells))
    figure, panels = _panels(len(columns), width=3.3, height=2.7, across=3)
    arms = [arm for arm in own if any(cell.arm == arm for cell in cells)]
    for axes, column in zip(panels, columns, strict=True):
        places = sorted({counts[column, cell.budget] for cell in cells if cell.column == column})
        for index, arm in enumerate(arms):
            line = sorted(
                (counts[column, c.budget], c.value, c.low, c.high)
                for c in cells
                if c.column == column and c.arm == arm and c.complete
            )
            if not line:
                continue
            count, value, low, high = np.array(line).T
            count = count * 1.03 ** (index - len(arms) / 2)  # beside each other
            axes.plot(count, 100 * value, markersize=4.5, linewidth=1.4, **own[arm])
            axes.vlines(count, 100 * low, 100 * high, color=own[arm]["color"], linewidth=1.0, alpha=0.7)
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{count:g}" for count in places])
        axes.minorticks_off()
        axes.set_xlabel("labelled training cases", fontsize=8, color=_INK)
        axes.set_title(column, fontsize=9, color=_INK)
        _tidy(axes)
    panels[0].set_ylabel(f"{TITLES[cells[0].metric]}, %", fontsize=9, color=_INK)
    _key(figure, arms, own, lines=False)
    return png(figure)


def draw_ranks(ranks: Ranks, own: Mapping[str, Look], title: str) -> bytes:
    """Draw mean ranks on a line, best on the left; a bar joins arms that Nemenyi's test cannot tell apart."""
    from scikit_posthocs import critical_difference_diagram

    assert ranks.pairs is not None
    assert ranks.cd is not None
    figure = Figure(figsize=(8.4, 1.5 + 0.22 * len(ranks.arms)), layout="constrained")
    axes = figure.subplots()
    over = "data sets" if ranks.over == "data sets" else f"cases of {ranks.over} alone"
    drawn = critical_difference_diagram(
        pd.Series(ranks.mean, index=ranks.arms),
        pd.DataFrame(ranks.pairs, index=ranks.arms, columns=ranks.arms),
        alpha=ALPHA,
        ax=axes,
        label_fmt_left="{label} ({rank:.2f})",
        label_fmt_right="({rank:.2f}) {label}",
        color_palette={arm: own[arm]["color"] for arm in ranks.arms},
        label_props={"fontsize": 9},
        crossbar_props={"color": _INK, "linewidth": 2.5},
        marker_props={"zorder": 3},
    )
    for label in drawn["labels"]:
        label.set_color(_INK)
    axes.set_title(
        f"{title}: mean ranks over {ranks.count} {over}, 1 is best; critical difference {ranks.cd:.2f}",
        fontsize=9,
        color=_INK,
    )
    return png(figure)


def draw_curves(histories: Sequence[tuple[str, Sequence[Mapping[str, float]]]], own: Mapping[str, Look]) -> bytes:
    """Draw one data set's training curves, a thin line for each run in the colour of its arm.

    Args:
        histories: arm and epochs of each run.
        own: looks of the arms.
    """
    keys = [("train_loss", "training loss")]
    checked = sorted({key for _, history in histories for epoch in history for key in epoch if key.startswith("val_")})
    keys += [(key, f"validation {key.removeprefix('val_').replace('_', ' ')}") for key in checked[:2]]
    figure, panels = _panels(len(keys), width=4.2 if len(keys) > 1 else 6, height=3.0, across=3)
    present = {arm for arm, _ in histories}
    for axes, (key, title) in zip(panels, keys, strict=True):
        for arm, history in histories:
            points = [(e["epoch"], e[key]) for e in history if e.get(key) is not None and math.isfinite(e[key])]
            if points:
                epochs, values = zip(*points, strict=True)
                look = {name: own[arm][name] for name in ("color", "linestyle")}
                axes.plot(epochs, values, linewidth=0.9, alpha=0.75, marker="." if len(points) == 1 else "", **look)
        axes.set_title(title, fontsize=9, color=_INK)
        axes.set_xlabel("epoch", fontsize=8, color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _tidy(axes)
    _key(figure, [arm for arm in own if arm in present], own, lines=True)
    return png(figure)
