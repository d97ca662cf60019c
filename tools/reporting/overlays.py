# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Predictions to look at: one slice of a case with its label and what several arms made of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from common.drawing import canonical_voxels
from common.figures import Figure

from .pictures import png

__all__ = ["draw_case"]

_COLOURS = (
    "#e69f00",
    "#56b4e9",
    "#d55e00",
    "#cc79a7",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#ff7f7f",
    "#7fff7f",
    "#bf7fff",
)
_PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}


def draw_case(
    image: str | Path, label: str | Path, predictions: Mapping[str, Path], *, labels: Sequence[str] | Mapping[str, Any]
) -> bytes:
    """Draw an axial and a coronal slice through most of the label: the scan, the label, and each prediction on it.

    Args:
        image: volume; of several channels the first is shown.
        label: its reference.
        predictions: files by the title of their column.
        labels: names of the values 0, 1, 2, ..., or values by name.
    """
    scan, maps, spacing = canonical_voxels(image, {"label": label, **predictions})
    columns: dict[str, np.ndarray | None] = {"scan": None, **maps}
    values = sorted({int(v) for marks in columns.values() if marks is not None for v in np.unique(marks)} - {0})
    marked = maps["label"] if (maps["label"] > 0).any() else np.ones(scan.shape)
    low, high = np.percentile(scan, [0.5, 99.5])
    sides = [side * mm for side, mm in zip(scan.shape, spacing, strict=True)]
    width = 10.2 / len(columns)
    heights = [width * sides[1] / sides[0], width * sides[2] / sides[0]]
    figure = Figure(figsize=(10.4, min(sum(heights), 11) + 0.9), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    colours = ListedColormap([_colour(value) for value in values] or ["#ffffff"])
    for row, axis in enumerate((2, 1)):
        area = (marked > 0).sum(axis=tuple(a for a in range(3) if a != axis))
        most = np.flatnonzero(area == area.max())
        cut = int(most[len(most) // 2])
        across, up = (a for a in range(3) if a != axis)
        for cell, (title, marks) in zip(axes[row], columns.items(), strict=True):
            look: dict[str, Any] = {
                "origin": "lower",
                "aspect": spacing[up] / spacing[across],
                "interpolation": "nearest",
            }
            cell.imshow(np.take(scan, cut, axis).T, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **look)
            if marks is not None:
                places = np.searchsorted(values, np.take(marks, cut, axis).T) + 0.0
                shown = np.ma.masked_where(np.take(marks, cut, axis).T == 0, places)
                cell.imshow(shown, cmap=colours, vmin=-0.5, vmax=max(len(values), 1) - 0.5, alpha=0.6, **look)
            cell.set_xticks([])
            cell.set_yticks([])
            if row == 0:
                cell.set_title(textwrap.fill(title, 20), fontsize=9)
        axes[row, 0].set_ylabel(_PLANES[axis], fontsize=9)
    names = _names(labels)
    handles = [Patch(color=_colour(value), label=names.get(value, f"value {value}")) for value in values[:24]]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False
        )
    return png(figure)


def _colour(value: int) -> str:
    return _COLOURS[(value - 1) % len(_COLOURS)]


def _names(labels: Sequence[str] | Mapping[str, Any]) -> dict[int, str]:
    if isinstance(labels, Mapping):
        return {value: str(name) for name, value in labels.items() if isinstance(value, int)}
    return dict(enumerate(map(str, labels or ())))
