# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Whether two volumes lie on one grid, judged in millimetres, and how one's axes are turned onto the other's.

Two files share a grid if their voxels are the same places: after axes are exchanged and mirrored, no corner lies
further from its counterpart than a quarter of the finest side of a voxel. Entries of two affines say little: over 512
voxels a difference of a hundredth of a millimetre becomes five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SLANTED_DEGREES", "AxesTurn", "prepared_sides", "same_grid", "slant_degrees", "turn_onto", "voxel_sides"]

SLANTED_DEGREES = 0.05  # from which the angles between axes are no rounding of headers
_TOLERANCE = 0.25  # of a voxel's finest side: the nearest voxel is still the same one


@dataclass(frozen=True)
class AxesTurn:
    """Axes exchanged and mirrored; no voxel changes its value or its place in space.

    Attributes:
        order: which of the old axes each new one is.
        flips: which of the new axes run the other way.

    Example:
        >>> turn = AxesTurn((2, 0, 1), (False, True, False))
        >>> values = np.arange(24).reshape(2, 3, 4)
        >>> turn.array(values).shape, bool((turn.inverse().array(turn.array(values)) == values).all())
        ((4, 2, 3), True)
        >>> turn.affine(np.diag([1.0, 2.0, 3.0, 1.0]), values.shape) @ [0, 0, 0, 1]  # of what was the voxel (1, 0, 0)
        array([1., 0., 0., 1.])
    """

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def to_codes(cls, affine: np.ndarray, codes: str) -> AxesTurn:
        """Return the turn after which axes lead, as nearly as they can, where letters of L, R, P, A, I and S say."""
        wanted = nib.orientations.axcodes2ornt(codes)
        turned = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), wanted)
        order = np.argsort(turned[:, 0])
        return cls(*_three(order, turned[order, 1] < 0))

    @classmethod
    def to_slices(cls, affine: np.ndarray, *, reorient: bool = True) -> AxesTurn:
        """Return the turn to the axes in which volumes are prepared: slice, row, column.

        Args:
            affine: of the volume as its file has it.
            reorient: true: canonical RAS+ transposed to (S, A, R); false: the file's own axes in reversed order.
        """
        return cls.to_codes(affine, "SAR") if reorient else cls((2, 1, 0), (False, False, False))

    def array(self, values: np.ndarray) -> np.ndarray:
        """Return ``(X, Y, Z, ...)`` with turned axes; a view."""
        rest = range(3, values.ndim)
        return np.flip(values.transpose(*self.order, *rest), tuple(axis for axis in range(3) if self.flips[axis]))

    def tensor(self, values: Tensor) -> Tensor:
        """Return ``(C, X, Y, Z)`` with turned axes."""
        turned = values.permute(0, *(1 + axis for axis in self.order))
        return turned.flip([1 + axis for axis in range(3) if self.flips[axis]]) if any(self.flips) else turned

    def affine(self, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return the affine of the turned volume.

        Args:
            affine: of the volume as it was.
            shape: of it, before it is turned.
        """
        back = np.zeros((4, 4))  # from new to old voxels
        back[3, 3] = 1
        for new, (old, flipped) in enumerate(zip(self.order, self.flips, strict=True)):
            back[old, new] = -1 if flipped else 1
            back[old, 3] = shape[old] - 1 if flipped else 0
        return np.asarray(affine, dtype=float) @ back

    def inverse(self) -> AxesTurn:
        """Return the turn that undoes this one."""
        order = np.argsort(self.order)
        return AxesTurn(*_three(order, np.array(self.flips)[order]))


def _three(order: np.ndarray, flips: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    first, second, third = (int(axis) for axis in order)
    mirrors = (bool(flips[0]), bool(flips[1]), bool(flips[2]))
    return (first, second, third), mirrors


def voxel_sides(affine: np.ndarray) -> np.ndarray:
    """Return the sides of a voxel in mm, along its own axes, ``(3,)``."""
    return np.linalg.norm(np.asarray(affine, dtype=float)[:3, :3], axis=0)


def prepared_sides(affine: np.ndarray, *, reorient: bool = True) -> np.ndarray:
    """Return the sides of a voxel in mm, ``(slice, row, column)`` as the volume of a file is prepared.

    Example:
        >>> prepared_sides(np.diag([0.5, 0.7, 3, 1])), prepared_sides(np.diag([0.5, 0.7, 3, 1])[[0, 2, 1, 3]])
        (array([3. , 0.7, 0.5]), array([0.7, 3. , 0.5]))
    """
    return voxel_sides(affine)[list(AxesTurn.to_slices(affine, reorient=reorient).order)]


def slant_degrees(affine: np.ndarray) -> float:
    """Return by how much the angle between two axes differs from a right one at most, as a gantry that was tilted does.

    Example:
        >>> tilted = np.eye(4)
        >>> tilted[1:3, 2] = np.sin(np.deg2rad(25)), np.cos(np.deg2rad(25))
        >>> round(slant_degrees(tilted), 6), slant_degrees(np.diag([1, 2, 3, 1]))
        (25.0, 0.0)
    """
    directions = np.asarray(affine, dtype=float)[:3, :3] / voxel_sides(affine)
    cosines = np.abs(directions.T @ directions)[np.triu_indices(3, 1)]
    return float(np.rad2deg(np.arcsin(min(cosines.max(), 1.0))))


def turn_onto(
    shape: Sequence[int], affine: np.ndarray, onto_shape: Sequence[int], onto_affine: np.ndarray
) -> tuple[AxesTurn | None, float]:
    """Return how a volume's axes are turned onto those of another, and how far its corners then lie off.

    Args:
        shape: ``(X, Y, Z)`` of the volume.
        affine: of it, to millimetres.
        onto_shape: of the other.
        onto_affine: of the other.

    Returns:
        the turn and the largest distance of two corners in mm; None and infinity if no turn gives the same shape.

    Example:
        >>> mirrored = np.diag([-1.0, 1.0, 1.0, 1.0])
        >>> mirrored[0, 3] = 3
        >>> turn_onto((4, 5, 6), mirrored, (4, 5, 6), np.eye(4))
        (AxesTurn(order=(0, 1, 2), flips=(True, False, False)), 0.0)
        >>> turn_onto((4, 5, 6), np.diag([1.0, 1, 1.01, 1]), (4, 5, 6), np.eye(4))[1]  # five voxels on
        0.05
    """
    old, new = np.asarray(affine, dtype=float), np.asarray(onto_affine, dtype=float)
    steps = np.rint(np.linalg.solve(new[:3, :3], old[:3, :3]))  # of the other's axes that one of its own makes
    turn = AxesTurn((0, 1, 2), (False, False, False))
    if (np.abs(steps).sum(0) == 1).all() and (np.abs(steps).sum(1) == 1).all():
        turn = AxesTurn(*_three(np.abs(steps).argmax(1), steps.sum(1) < 0))
    if [shape[axis] for axis in turn.order] != list(onto_shape):
        return None, float("inf")
    corners = np.array([[*corner, 1.0] for corner in product(*((0, side - 1) for side in onto_shape))])
    apart = corners @ (turn.affine(old, shape) - new).T
    return turn, round(float(np.linalg.norm(apart[:, :3], axis=1).max()), 9)


def same_grid(
    name: str,
    shape: Sequence[int],
    affine: np.ndarray,
    *,
    onto: str,
    onto_shape: Sequence[int],
    onto_affine: np.ndarray,
    remedy: str,
) -> AxesTurn:
    """Refuse a volume whose voxels are not those of another, in whatever order of axes.

    Args:
        name: of the volume, for the message.
        shape: of it; channels behind are left out.
        affine: of it.
        onto: name of the other.
        onto_shape: of the other.
        onto_affine: of the other.
        remedy: what to do about it.

    Returns:
        how to turn its axes onto the other's.

    Raises:
        DataError: naming both, how far apart they are, and the remedy.
    """
    turn, apart = turn_onto(shape[:3], affine, onto_shape[:3], onto_affine)
    sides = voxel_sides(onto_affine)
    if turn is not None and apart <= _TOLERANCE * sides.min():
        return turn
    if turn is None:
        reason = "their shapes differ"
    else:
        printed = " x ".join(f"{side:.3g}" for side in sides)
        reason = f"corners lie up to {apart:.3g} mm apart, with voxels of {printed} mm"
    raise DataError(
        f"{name} {tuple(shape[:3])} and {onto} {tuple(onto_shape[:3])} do not share one grid ({reason}); {remedy}"
    )
