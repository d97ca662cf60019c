# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Headers of many volumes, and measures of a few that hint at poor quality. Nothing is left out because of a hint."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from skimage.filters import threshold_otsu

from ...errors import DataError
from ...terminal import progress_bar
from ...transforms import Header
from ...transforms.checks import nearly_zero, told_nearly_zero
from ..cases import Case, images_of
from .checks import check_header, read_image

__all__ = ["Measures", "Survey", "hints", "in_threads", "kind_of", "measure", "survey"]

T = TypeVar("T")
_AT_ONCE = 1024  # items handed to threads; more would only wait in memory
_SIDE = 128  # voxels along an axis that are measured, up to twice as many
_EXTENT_MM = (60.0, 700.0)


def in_threads(function: Callable[[T], Any], items: Sequence[T], *, threads: int, doing: str) -> list[Any]:
    """Call a function on all items in threads, with a progress bar and time left; what is waiting stays bounded."""
    results: list[Any] = []
    with (
        ThreadPoolExecutor(max_workers=max(threads, 1)) as pool,
        progress_bar(total=len(items), desc=doing, unit="volume") as bar,
    ):
        for first in range(0, len(items), _AT_ONCE):
            for result in pool.map(function, items[first : first + _AT_ONCE]):
                results.append(result)
                bar.update()
    return results


@dataclass
class Survey:
    """What the headers of a list of cases say, row by row.

    Attributes:
        shape: ``(N, 3)`` voxels along the file's axes; 0 where the header cannot be read.
        spacing_mm: ``(N, 3)``.
        bytes: ``(N,)`` on the disk.
        problems: a sentence for each row that cannot be used.
        notes: of a row, what readers do not agree on.
    """

    shape: np.ndarray
    spacing_mm: np.ndarray
    bytes: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)
    notes: dict[int, list[str]] = field(default_factory=dict)

    @property
    def readable(self) -> np.ndarray:
        """Return which rows can be used."""
        return self.shape[:, 0] > 0

    def refuse(self, row: int, problem: str) -> None:
        """Note that a row cannot be used, which its header did not say."""
        self.problems[row] = problem
        self.shape[row] = 0


def survey(cases: Sequence[Case], *, threads: int = 8) -> Survey:
    """Read the headers of all cases."""

    def look(case: Case) -> list[Header] | str:
        try:
            return [check_header(file) for file in images_of(case)]
        except DataError as error:
            return str(error)

    found = Survey(
        np.zeros((len(cases), 3), np.int32), np.zeros((len(cases), 3), np.float32), np.zeros(len(cases), int)
    )
    for row, result in enumerate(in_threads(look, cases, threads=threads, doing="reading headers")):
        if isinstance(result, str):
            found.problems[row] = result
        else:
            first = result[0]
            found.shape[row], found.bytes[row] = first.shape, sum(header.bytes for header in result)
            found.spacing_mm[row] = np.linalg.norm(first.affine[:3, :3], axis=0)
            if notes := list(dict.fromkeys(note for header in result for note in header.notes)):
                found.notes[row] = notes
    return found


def kind_of(problem: str, file: str) -> str:
    """Return a sentence about a file without what is particular to the file, to count those of a kind.

    Example:
        >>> kind_of("/a/b.nii has 4 dimensions (8, 8, 8, 2); save one 3-D volume per file", "/a/b.nii")
        'FILE has N dimensions (N, N, N, N); save one N-D volume per file'
    """
    return re.sub(r"\d[\d.,]*(?<=\d)", "N", problem.replace(file, "FILE"))


@dataclass(frozen=True)
class Measures:
    """Simple measures of one volume.

    Attributes:
        foreground: share of voxels brighter than Otsu's threshold.
        border: share of the six outer faces that is foreground; high where the field of view cuts the body.
        focus: entropy focus criterion (Atkinson et al., IEEE TMI 1997), 0 for one bright voxel and 1 for equal ones;
            motion spreads energy over the image and raises it.
        extent_mm: ``(X, Y, Z)``.
        nearly_zero: share of voxels that are not 0 but within a millionth of the range of all.
    """

    foreground: float
    border: float
    focus: float
    extent_mm: tuple[float, ...]
    nearly_zero: float = 0.0


def measure(case: Case) -> tuple[Measures, np.ndarray, np.ndarray]:
    """Read a volume and measure it, of long axes every n-th voxel, to 128 to 255 of them.

    Returns:
        its measures, the voxels measured in axes that lead right, forward and up, and their spacing.

    Raises:
        DataError: if it cannot be read, or holds NaN or infinite voxels.
    """
    file = images_of(case)[0]
    values, affine = read_image(file)
    if bad := int(values.size - np.isfinite(values).sum()):
        raise DataError(f"{file} has {bad:,} voxels that are NaN or infinite; repair or leave out the file")
    almost = nearly_zero(values)
    steps = [max(1, side // _SIDE) for side in values.shape]
    towards = nib.io_orientation(affine)  # of each axis of the file: which of space, and its sign
    order = np.argsort(towards[:, 0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    extent = tuple(float(spacing[axis] * values.shape[axis]) for axis in order)
    voxels = nib.apply_orientation(values[tuple(slice(None, None, step) for step in steps)], towards)
    voxels = np.array(voxels, np.float32)
    spacing = (spacing * steps)[order]
    voxels -= min(float(voxels.min()), 0.0)
    if voxels.min() == voxels.max():
        return Measures(0.0, 0.0, 1.0, extent, almost), voxels, spacing
    marked = voxels > threshold_otsu(voxels)
    faces = [np.take(marked, side, axis).ravel() for axis in range(3) for side in (0, -1)]
    energy = float(np.sqrt(np.square(voxels, dtype=np.float64).sum()))
    share = voxels[voxels > 0].astype(np.float64) / energy
    most = np.sqrt(voxels.size) * np.log(np.sqrt(voxels.size))
    focus = float(-(share * np.log(share)).sum() / most)
    border = float(np.concatenate(faces).mean())
    return Measures(float(marked.mean()), border, focus, extent, almost), voxels, spacing


def hints(measures: Sequence[Measures | None], groups: Sequence[str]) -> dict[int, str]:
    """Return, by row, what is odd about volumes: empty, cut, moved, or nearly 0 around.

    Motion is judged against the others of the same group, such as a modality, if at least 20 are measured: a focus
    criterion more than 3.5 robust standard deviations above their median.

    Args:
        measures: of the volumes, None for those that were not measured.
        groups: of each.
    """
    found: dict[int, str] = {}
    for row, each in enumerate(measures):
        if each is None:
            continue
        low, high = _EXTENT_MM
        if each.foreground < 0.005:
            found[row] = f"perhaps empty: {each.foreground:.2%} of the voxels are brighter than background"
        elif min(each.extent_mm) < low or max(each.extent_mm) > high:
            printed = " x ".join(f"{mm:.0f}" for mm in each.extent_mm)
            found[row] = f"perhaps a wrong field of view: {printed} mm, outside {low:g} to {high:g} mm"
        elif each.border > 0.4:
            found[row] = f"perhaps cut by the field of view: {each.border:.0%} of its outer faces are foreground"
    for group in set(groups):
        rows = [row for row, name in enumerate(groups) if name == group and measures[row] is not None]
        if len(rows) < 20:
            continue
        focus = np.array([each.focus for row in rows if (each := measures[row]) is not None])
        spread = 1.4826 * float(np.median(np.abs(focus - np.median(focus))))
        for row, value in zip(rows, focus, strict=True):
            if value > np.median(focus) + 3.5 * max(spread, 1e-3):
                found.setdefault(row, f"perhaps motion: focus criterion {value:.3f}, usual is {np.median(focus):.3f}")
    for row, each in enumerate(measures):
        if each is not None and (told := told_nearly_zero(each.nearly_zero)):
            found[row] = f"{found[row]}; {told}" if row in found else told
    return found
