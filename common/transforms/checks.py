# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What is no volume in space, and what no values to learn from: judged of arrays, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from .formats.header import SPACING_LIMITS_MM, SPLIT, times

__all__ = ["FEW_NEARLY_ZERO", "check_affine", "check_values", "nearly_zero", "told_nearly_zero"]

FEW_NEARLY_ZERO = 0.01  # share of a volume; fewer move no crop and no mean


def check_affine(name: str, shape: Sequence[int], affine: np.ndarray, *, channels: int = 1) -> None:
    """Refuse what is not a volume in space.

    Args:
        name: of the file.
        shape: of its voxels.
        affine: to millimetres.
        channels: that it may have as a fourth dimension.

    Raises:
        DataError: if it is not three-dimensional, or its spacing is zero, not finite or absurd.
    """
    if channels > 1 and len(shape) == 4:
        if shape[3] != channels:
            raise DataError(f"{name} holds {shape[3]} channels, but --channels is {channels}; correct it")
        shape = shape[:3]
    if len(shape) != 3:
        raise DataError(f"{name} has {len(shape)} dimensions {tuple(shape)}; {SPLIT}")
    if min(shape) < 2:
        raise DataError(f"{name} has shape {tuple(shape)}; a volume needs at least 2 voxels along every axis")
    spacing = np.linalg.norm(np.asarray(affine, dtype=float)[:3, :3], axis=0)
    low, high = SPACING_LIMITS_MM
    if not np.isfinite(spacing).all() or (spacing < low).any() or (spacing > high).any():
        raise DataError(
            f"{name} says its voxels are {times(spacing)} mm; outside {low:g} to {high:g} mm, correct its header"
        )
    affine = np.asarray(affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * np.prod(spacing):
        raise DataError(f"{name} does not say where its axes point: they lie in one plane; correct its header")


def check_values(name: str, values: np.ndarray) -> None:
    """Refuse intensities that cannot be normalised.

    Raises:
        DataError: if a voxel is NaN or infinite, or all have one value.
    """
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise DataError(f"{name} has {bad:,} voxels that are NaN or infinite; repair or leave out the file")
    if values.min() == values.max():
        raise DataError(f"{name} is constant ({values.flat[0]:g} everywhere); leave out the file")


def nearly_zero(values: np.ndarray) -> float:
    """Return the share of voxels that are not 0 but within a millionth of the range of all voxels.

    So is a background that was resampled by splines. It is not cropped, and counts in mean and deviation.

    Example:
        >>> nearly_zero(np.array([0.0, 1e-31, -1e-9, 900.0]))
        0.5
    """
    limit = 1e-6 * (float(values.max()) - float(values.min()))
    near = np.count_nonzero((values < limit) & (values > -limit))
    return float(near - (values.size - np.count_nonzero(values))) / values.size


def told_nearly_zero(share: float) -> str | None:
    """Return what to tell of an image with a share of such voxels, None if they are few."""
    if share < FEW_NEARLY_ZERO:
        return None
    return (
        f"{share:.0%} of its voxels are nearly but not exactly 0 (within a millionth of its range): they are "
        "not cropped and count in its mean. If they are background, set them to 0 and save it again"
    )
