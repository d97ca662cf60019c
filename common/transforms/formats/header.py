# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a file says of its voxels, and whether that can be true."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import DataError

__all__ = [
    "MOST_VOXELS",
    "SPACING_LIMITS_MM",
    "SPLIT",
    "Found",
    "Header",
    "check_claim",
    "corners_apart",
    "notes_on_axes",
    "times",
    "to_mm",
    "without_ones",
]

MOST_VOXELS = 2**31  # 1290 along every axis; what claims more is no scan
SPACING_LIMITS_MM = (0.01, 50.0)
SPLIT = "save one 3-D volume per file, such as with nibabel.four_to_three or fslsplit"
_SHEAR = 1e-4  # cosine between two axes; rounding makes less


@dataclass(frozen=True)
class Header:
    """What a file says of its voxels.

    Attributes:
        shape: ``(X, Y, Z)``, and channels if there are several.
        affine: ``(4, 4)`` from voxels to millimetres in RAS.
        dtype: of the stored voxels.
        spacing_mm: along ``(X, Y, Z)``.
        bytes: of its files on the disk.
        notes: what readers do not agree on, or would take for something else, each a sentence about the file.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    dtype: np.dtype
    spacing_mm: tuple[float, ...]
    bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A header with the way to its voxels."""

    header: Header
    voxels: Callable[[], np.ndarray]


def times(sides: Sequence[float]) -> str:
    """Return sizes as people write them.

    Example:
        >>> times((0.5, 1.0, 2.0))
        '0.5 x 1 x 2'
    """
    return " x ".join(f"{side:g}" for side in sides)


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without axes of length 1 behind the three of space: such a file holds one volume.

    Example:
        >>> without_ones((20, 18, 1, 1)), without_ones((20, 18, 16, 1, 3)), without_ones((20, 18, 16, 2, 1))
        ((20, 18, 1), (20, 18, 16, 3), (20, 18, 16, 2))
    """
    return (*shape[:3], *(side for side in shape[3:] if side != 1))


def check_claim(path: str, shape: Sequence[int], dtype: np.dtype, *, before: int, size: int, growth: int = 1) -> None:
    """Refuse a header that claims voxels which its file cannot hold.

    Args:
        path: of the file, for the message.
        shape: claimed.
        dtype: claimed.
        before: bytes before the voxels.
        size: of the file that holds the voxels, in bytes.
        growth: bytes that one of them can become when it is unpacked.

    Raises:
        DataError: naming what is claimed and what is there.
    """
    printed = " x ".join(str(side) for side in shape)
    if min(shape, default=0) < 1:
        raise DataError(f"{path} says its voxels are {printed}; correct its header or leave it out")
    voxels = math.prod(shape)
    if voxels > MOST_VOXELS:
        if len(shape) > 3 and math.prod(shape[:3]) <= MOST_VOXELS:
            raise DataError(f"{path} has {len(shape)} dimensions {tuple(shape)}; {SPLIT}")
        raise DataError(f"{path} claims {printed} voxels, more than the limit of {MOST_VOXELS:,}; leave it out")
    needed = before + voxels * dtype.itemsize
    if needed > size * growth:
        raise DataError(
            f"{path} ({size:,} bytes) is cut short or damaged: its header claims {printed} voxels of {dtype}, "
            f"{needed:,} bytes; copy it again from its source"
        )


def to_mm(path: str, affine: np.ndarray, scale: np.ndarray, unit: str) -> np.ndarray:
    """Return an affine in millimetres.

    Args:
        path: of the file.
        affine: ``(4, 4)`` in the file's own unit.
        scale: millimetres per unit, along each axis of space.
        unit: its name.

    Raises:
        DataError: if no scan has such voxels in that unit, but could have them in millimetres.
    """
    mm = affine * np.array([*scale, 1.0])[:, None]
    said, made = (np.linalg.norm(each[:3, :3], axis=0) for each in (affine, mm))
    low, high = SPACING_LIMITS_MM
    if not ((low <= made) & (made <= high)).all() and ((low <= said) & (said <= high)).all():
        raise DataError(
            f"{path} says its voxels are {times(said)} {unit}, which is {times(made)} mm; if they are millimetres, "
            "correct the unit in its header"
        )
    return mm


def notes_on_axes(affine: np.ndarray, *, other: str) -> list[str]:
    """Return what is unusual about the axes of a volume.

    Args:
        affine: ``(4, 4)`` to millimetres.
        other: what SimpleITK does with axes that are not at right angles.
    """
    axes = np.asarray(affine, dtype=float)[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(axes).all() or (lengths == 0).any():
        return []
    directions = axes / lengths
    notes = []
    shear = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if shear > _SHEAR:
        angle = math.degrees(math.asin(min(shear, 1.0)))
        notes.append(f"its axes are up to {angle:.2g} degrees off right angles, and are used as they are; {other}")
    if np.linalg.det(axes) < 0:
        notes.append("its axes are left-handed, which all readers take as it is")
    return notes


def corners_apart(shape: Sequence[int], first: np.ndarray, second: np.ndarray) -> float:
    """Return how far two affines place a corner voxel of a volume apart at most, in their unit."""
    corners = np.array([(*place, 1) for place in np.ndindex(2, 2, 2)], dtype=float)
    corners[:, :3] *= np.subtract(shape[:3], 1)
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())
