# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pictures of label maps on their images: orthogonal slices with every class as an outline or as a colour over them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from .figures import Figure, subplots
from .files import replace_file
from .paths import as_path
from .transforms import read_volume, same_grid, whole_numbers
from .transforms.grids import AxesTurn, voxel_sides

__all__ = ["busiest", "canonical_voxels", "colour", "draw_overlay", "draw_planes", "draw_prediction"]

_PLANES = ("axial", "coronal", "sagittal")  # of slices along S, A and R
_COLOURS = (
    *("#e69f00", "#56b4e9", "#d55e00", "#cc79a7", "#009e73", "#f0e442", "#0072b2"),  # told apart by everyone
    *("#ff7f7f", "#7fff7f", "#bf7fff", "#7fffff", "#ffbf7f", "#c0c0c0"),
)
_MOST_NAMES = 24  # in the legend


def draw_overlay(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    path: str | Path,
    *,
    labels: Sequence[str] | Mapping[int, str],
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
) -> None:
    """Draw an image and, in a row for each, the outlines of label maps on it.

    The slices are those through the middle of what is marked most: along each axis, where the maps together mark the
    largest area; without any mark, the middle of the volume.

    Args:
        image: ``(D, H, W)``, axes (S, A, R), drawn from its 0.5th to its 99.5th percentile.
        maps: integer maps of the same shape, by the name of their row, such as ``prediction`` and ``reference``.
        path: PNG to write.
        labels: names of the values 0, 1, 2, ..., or of any by value.
        spacing_mm: of the voxels, so that slices keep their proportions.
        title: above the picture.
    """
    marked = np.zeros(image.shape, bool)
    for marks in maps.values():
        marked |= marks > 0
    cuts = [busiest(marked, axis) for axis in range(3)]
    window = _window(image)
    extents = [side * mm for side, mm in zip(image.shape, spacing_mm, strict=True)]
    widths = [extents[2], extents[2], extents[1]]
    heights = [extents[1], extents[0], extents[0]]
    scale = 10.5 / sum(widths)  # inches per millimetre
    row = min(max(max(heights) * scale, 1.5), 6.0)
    figure, axes = subplots(
        *(len(maps), 3),
        figsize=(11, len(maps) * (row + 0.3) + 0.9),
        squeeze=False,
        gridspec_kw={"width_ratios": widths},
    )
    shown: set[int] = set()
    for panels, (name, marks) in zip(axes, maps.items(), strict=True):
        for axis, panel in enumerate(panels):
            _show(panel, image, axis, cuts[axis], window=window, spacing_mm=spacing_mm)
            values = np.take(marks, cuts[axis], axis=axis)
            for value in np.unique(values[values > 0]).tolist():
                shown.add(int(value))
                inside = np.pad((values == value).astype(float), 1)  # closes outlines at the border
                rows, columns = (np.arange(-1, n + 1) for n in values.shape)
                panel.contour(columns, rows, inside, levels=[0.5], colors=[colour(value)], linewidths=1.1)
            panel.set_xlim(-0.5, values.shape[1] - 0.5)
            panel.set_ylim(-0.5, values.shape[0] - 0.5)
            panel.set_title(f"{_PLANES[axis]} {cuts[axis] + 1}/{image.shape[axis]}", fontsize=9)
        panels[0].set_ylabel(name, fontsize=10)
    _legend(figure, shown, labels)
    figure.suptitle(title if shown else f"{title}: nothing is marked".removeprefix(": "), fontsize=10)
    replace_file(as_path(path), lambda temporary: figure.savefig(temporary, dpi=100, format="png"))


def draw_planes(
    image: str | Path,
    maps: Mapping[str, str | Path],
    *,
    labels: Sequence[str] | Mapping[int, str],
    planes: Sequence[str] = _PLANES,
) -> Figure:
    """Draw an image and, in a column for each, label maps over it, all as they lie on the disk, in canonical axes.

    The slices are those through the middle of what the first map marks most, or of the volume.

    Args:
        image: volume; of several channels the first is shown.
        maps: files on its grid, by the title of their column; the first is the reference.
        labels: names of the values 0, 1, 2, ..., or of any by value.
        planes: a row for each: axial, coronal, sagittal.

    Raises:
        DataError: if a map is on another grid, or is none.
    """
    voxels, marked, sides = canonical_voxels(image, maps)
    scan, spacing = voxels.T, sides[::-1].tolist()  # (S, A, R)
    columns = {"scan": np.zeros(scan.shape, np.int8), **{title: marks.T for title, marks in marked.items()}}
    values = sorted({int(value) for marks in columns.values() for value in np.unique(marks)} - {0})
    axes = [_PLANES.index(plane) for plane in planes]
    width = 10.2 / len(columns)
    shapes = [[side * mm for a, (side, mm) in enumerate(zip(scan.shape, spacing, strict=True)) if a != x] for x in axes]
    heights = [width * up / across for up, across in shapes]
    figure = Figure(figsize=(10.4, min(sum(heights), 11) + 0.9), layout="constrained")
    panels = figure.subplots(len(axes), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    colours = ListedColormap([colour(value) for value in values] or ["#ffffff"])
    reference, window = next(iter(marked.values())).T > 0, _window(scan)
    for row, axis in zip(panels, axes, strict=True):
        cut = busiest(reference, axis)
        for panel, (title, marks) in zip(row, columns.items(), strict=True):
            _show(panel, scan, axis, cut, window=window, spacing_mm=spacing)
            shown = np.take(marks, cut, axis=axis)
            panel.imshow(
                np.ma.masked_where(shown == 0, np.searchsorted(values, shown)),
                cmap=colours,
                vmin=-0.5,
                vmax=max(len(values), 1) - 0.5,
                alpha=0.6,
                interpolation="nearest",
                aspect=panel.get_aspect(),
                origin="lower",
            )
            if axis == axes[0]:
                panel.set_title(textwrap.fill(title, 20), fontsize=9)
        row[0].set_ylabel(_PLANES[axis], fontsize=9)
    _legend(figure, values, labels)
    return figure


def draw_prediction(
    image: str,
    prediction: str | Path,
    path: str | Path,
    *,
    labels: Sequence[str] | Mapping[int, str],
    title: str = "",
) -> None:
    """Draw a predicted file on its image file, both as they lie on the disk, in canonical axes.

    Args:
        image: volume; of several channels the first is shown.
        prediction: label map on its grid.
        path: PNG to write.
        labels: names of the values 0, 1, 2, ..., or of any by value.
        title: above the picture.
    """
    voxels, maps, sides = canonical_voxels(image, {"prediction": prediction})
    draw_overlay(
        voxels.T,
        {name: values.T for name, values in maps.items()},
        path,
        labels=labels,
        spacing_mm=[float(mm) for mm in sides[::-1]],
        title=title,
    )


def canonical_voxels(
    image: str | Path, maps: Mapping[str, str | Path]
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Read an image and label maps on its grid, with axes that lead right, forward and up.

    Args:
        image: volume; of several channels the first is read.
        maps: files by name.

    Returns:
        voxels ``(X, Y, Z)``, float32; whole numbers of each map; sides of a voxel in mm.

    Raises:
        DataError: if a map is on another grid, or is none.
    """
    voxels, affine = read_volume(image)
    voxels = voxels[..., 0] if voxels.ndim == 4 else voxels
    turn = AxesTurn.to_codes(affine, "RAS")
    marks = {}
    for name, file in maps.items():
        values, own = read_volume(file)
        values = values[..., 0] if values.ndim == 4 else values
        onto = same_grid(
            str(file),
            values.shape,
            own,
            onto=str(image),
            onto_shape=voxels.shape,
            onto_affine=affine,
            remedy="resample the map onto the image",
        )
        marks[name] = turn.array(onto.array(whole_numbers(values, str(file))))
    sides = voxel_sides(turn.affine(affine, voxels.shape))
    return turn.array(voxels).astype(np.float32), marks, sides


def _window(image: np.ndarray) -> tuple[float, float]:
    """Return the intensities that are drawn black and white."""
    low, high = np.percentile(image, [0.5, 99.5])
    return float(low), max(float(high), float(low) + 1e-6)


def _show(
    panel: Axes, image: np.ndarray, axis: int, cut: int, *, window: tuple[float, float], spacing_mm: Sequence[float]
) -> None:
    """Draw one slice of an image ``(S, A, R)`` in its proportions."""
    height, width = (mm for a, mm in enumerate(spacing_mm) if a != axis)
    gray = np.take(image, cut, axis=axis)
    panel.imshow(gray, cmap="gray", vmin=window[0], vmax=window[1], aspect=height / width, origin="lower")
    panel.set_xticks([])
    panel.set_yticks([])


def _legend(figure: Figure, values: Iterable[int], labels: Sequence[str] | Mapping[int, str]) -> None:
    """Name the values below the figure."""
    names = labels if isinstance(labels, Mapping) else dict(enumerate(labels))
    handles = [
        Patch(color=colour(value), label=names.get(value, f"value {value}")) for value in sorted(values)[:_MOST_NAMES]
    ]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False
        )


def busiest(marked: np.ndarray, axis: int) -> int:
    """Return the slice along ``axis`` with the most marked voxels, of equal ones the one in the middle."""
    counts = marked.sum(axis=tuple(a for a in range(3) if a != axis))
    best = np.flatnonzero(counts == counts.max())
    return int(best[len(best) // 2])


def colour(value: float) -> str:
    """Return the colour of a label value."""
    return _COLOURS[(int(value) - 1) % len(_COLOURS)]
