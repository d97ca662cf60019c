# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of one predicted segmentation against its reference, in millimetres and millilitres.

| score | unit | definition | only one of the two is empty | both are empty |
|---|---|---|---|---|
| dice | 0 to 1 | 2 (P and R) / (P + R), counting voxels | 0 | NaN |
| nsd | 0 to 1 | share of both surfaces' area within the tolerance of the other surface | 0 | NaN |
| hd95_mm | mm | the larger of the two directions' 95th percentile of distances between border voxels | infinite | NaN |
| volume_error_ml | ml | predicted - reference volume | the difference | 0 |
| volume_error_percent | % | the same, of the reference volume | -100, or NaN without a reference | NaN |

NSD follows DeepMind's surface-distance (arXiv:1809.04430), which nnU-Net's evaluation uses too: surface elements sit at
the corners of voxels and weigh their area in mm^2, found by marching cubes. Voxels beyond the volume are background, so
a mask that is cut by the edge of the volume has a surface there.

Where axes are not at right angles, as of a gantry that was tilted, volumes are those of the slanted voxels, surface
elements have the area that they have in space, and distances are those between places in space.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.metrics import compute_surface_dice
from monai.metrics.utils import (
    _get_neighbour_code_to_normals_table,
    create_table_neighbour_code_to_surface_area,
    get_edge_surface_distance,
)
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import cKDTree
from torch import Tensor

from ..transforms.grids import SLANTED_DEGREES, slant_degrees, voxel_sides

__all__ = ["METRICS", "score_maps", "score_masks"]

METRICS = ("dice", "nsd", "hd95_mm", "volume_error_ml", "volume_error_percent")
_COUNTED = 2**16  # values up to which a place is kept for each
_SLACK = 1e-4  # headers round: 1 mm is often 1.00001 mm there, and still within a tolerance of 1 mm
# MONAI warns of an argument that it gives itself
warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*", category=FutureWarning)


def score_masks(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    spacing_mm: Sequence[float] | np.ndarray,
    tolerance_mm: float = 1.0,
) -> dict[str, float]:
    """Score one structure.

    Args:
        prediction: bool ``(X, Y, Z)``.
        reference: bool, of the same shape.
        spacing_mm: size of a voxel along each axis; or the step from one voxel to the next along each axis in space,
            the columns of an affine ``(3, 3)``, which may be slanted.
        tolerance_mm: distance up to which NSD takes surfaces as equal.

    Returns:
        the scores in the table above, and ``reference_ml`` and ``predicted_ml``.

    Example:
        >>> cube, moved = np.zeros((2, 16, 16, 16), bool)
        >>> cube[2:12, 2:12, 2:12] = moved[4:14, 2:12, 2:12] = True
        >>> scores = score_masks(moved, cube, spacing_mm=(1, 1, 3))
        >>> scores["dice"], scores["hd95_mm"], scores["volume_error_ml"], scores["reference_ml"]
        (0.8, 2.0, 0.0, 3.0)
    """
    steps = np.asarray(spacing_mm, dtype=float)
    voxel_ml = float(np.prod(steps) if steps.ndim == 1 else abs(np.linalg.det(steps))) / 1000
    steps = np.diag(steps) if steps.ndim == 1 else steps
    predicted, wanted = int(prediction.sum()), int(reference.sum())
    scores = dict.fromkeys(METRICS, float("nan"))
    scores["volume_error_ml"] = (predicted - wanted) * voxel_ml
    scores["reference_ml"], scores["predicted_ml"] = wanted * voxel_ml, predicted * voxel_ml
    if wanted:
        scores["volume_error_percent"] = 100 * (predicted - wanted) / wanted
    if predicted and wanted:
        scores["dice"] = 2 * int((prediction & reference).sum()) / (predicted + wanted)
        surfaces = _slanted_surfaces if slant_degrees(steps) > SLANTED_DEGREES else _upright_surfaces
        scores["nsd"], scores["hd95_mm"] = surfaces(prediction, reference, steps, tolerance_mm * (1 + _SLACK))
    elif predicted or wanted:
        scores |= {"dice": 0.0, "nsd": 0.0, "hd95_mm": float("inf")}
    return scores


def _upright_surfaces(
    prediction: np.ndarray, reference: np.ndarray, steps: np.ndarray, tolerance_mm: float
) -> tuple[float, float]:
    """Return NSD and HD95 where axes are at right angles."""
    spacing = [float(side) for side in voxel_sides(steps)]
    p, r = torch.from_numpy(prediction), torch.from_numpy(reference)
    nsd = compute_surface_dice(
        p[None, None], r[None, None], [tolerance_mm], include_background=True, spacing=spacing, use_subvoxels=True
    )
    # compute_hausdorff_distance does the same, but takes quantiles of no more than 2^24 distances
    _, distances, _ = get_edge_surface_distance(p, r, spacing=spacing, symmetric=True)
    return float(nsd), max(float(np.percentile(each.numpy(), 95)) for each in distances)


def _slanted_surfaces(
    prediction: np.ndarray, reference: np.ndarray, steps: np.ndarray, tolerance_mm: float
) -> tuple[float, float]:
    """Return NSD and HD95 by the same definitions for axes at any angles, which MONAI's distance maps do not know."""
    masks = [np.pad(mask, 1) for mask in (prediction, reference)]
    (p_at, p_area), (r_at, r_area) = (_surface_elements(mask, steps) for mask in masks)
    near = [area[cKDTree(b).query(a)[0] <= tolerance_mm] for a, b, area in ((p_at, r_at, p_area), (r_at, p_at, r_area))]
    nsd = sum(float(area.sum()) for area in near) / float(p_area.sum() + r_area.sum())
    p, r = (np.argwhere(mask & ~binary_erosion(mask)) @ steps.T for mask in masks)
    return nsd, max(float(np.percentile(cKDTree(b).query(a)[0], 95)) for a, b in ((p, r), (r, p)))


def _surface_elements(mask: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the surface elements of a padded mask lie in mm, ``(n, 3)``, and their areas in mm^2, ``(n,)``."""
    normals: Tensor = _get_neighbour_code_to_normals_table()  # (256, 4, 3), of triangles in a cell of sides 1
    _, kernel = create_table_neighbour_code_to_surface_area((1.0, 1.0, 1.0))
    volume = torch.from_numpy(mask)[None, None].float()
    codes = torch.nn.functional.conv3d(volume, kernel.float())[0, 0].long().numpy()
    # a map of space takes areas with their normals by the matrix of its cofactors
    cofactors = np.linalg.det(steps) * np.linalg.inv(steps).T
    areas = np.linalg.norm(normals.numpy() @ cofactors.T, axis=-1).sum(-1)
    crossed = np.argwhere((codes != 0) & (codes != 255))
    return crossed @ steps.T, areas[codes[tuple(crossed.T)]]


def score_maps(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    structures: Mapping[str, Sequence[int]],
    spacing_mm: Sequence[float] | np.ndarray,
    tolerance_mm: float = 1.0,
    ignore_label: int | None = None,
) -> dict[str, dict[str, float]]:
    """Score all classes or regions of a label map, each as a mask of its own.

    Args:
        prediction: whole numbers ``(X, Y, Z)``.
        reference: the same shape.
        structures: name of each class or region, and the positive label values that it consists of.
        spacing_mm: size of a voxel along each axis, or the steps along each, as in :func:`score_masks`.
        tolerance_mm: of NSD.
        ignore_label: value of the reference; where it stands, both maps count as background.

    Returns:
        the scores of :func:`score_masks` by name.

    Example:
        >>> reference = np.zeros((8, 8, 8), np.uint8)
        >>> reference[2:6, 2:6, 2:6], reference[3:5, 3:5, 3:5], reference[0] = 1, 2, 9
        >>> scores = score_maps(
        ...     np.minimum(reference, 1), reference, structures={"whole": [1, 2], "core": [2]}, spacing_mm=(1, 1, 1),
        ...     ignore_label=9,
        ... )
        >>> [scores[name]["dice"] for name in ("whole", "core")]
        [1.0, 0.0]
    """
    if ignore_label is not None:
        counted = reference != ignore_label
        prediction, reference = prediction * counted, reference * counted
    boxes = [_boxes(found) for found in (prediction, reference)]
    scores = {}
    for name, values in structures.items():
        own = [box for found in boxes for box in (found.get(value) for value in values) if box is not None]
        spans = zip(*own, strict=True) if own else [[slice(0, 0)]] * 3
        box = tuple(slice(min(s.start for s in span), max(s.stop for s in span)) for span in spans)
        masks = [np.isin(found[box], list(values)) for found in (prediction, reference)]
        scores[name] = score_masks(*masks, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)
    return scores


def _boxes(labels: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """Return where each value above 0 lies: only those boxes are looked at. An atlas may count to any number."""
    values = np.arange(1, min(int(labels.max(initial=0)), _COUNTED) + 1)
    if int(labels.max(initial=0)) > _COUNTED:
        values = np.unique(labels[labels > 0])
        labels = np.where(labels > 0, np.searchsorted(values, labels) + 1, 0)
    found = find_objects(labels.astype(np.int32, copy=False), len(values))
    return {int(value): box for value, box in zip(values, found, strict=True) if box is not None}
