# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which voxels of a labelled volume a probe looks at."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import maximum_filter

from ...tasks import SegmentationTask

__all__ = ["draw_voxels"]

_NEAR = 5  # voxels around structures in which half of the background is drawn


def draw_voxels(
    labels: np.ndarray, task: SegmentationTask, *, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw voxels of every class, and of background near structures and far from them.

    Args:
        labels: index of the class of each voxel, ``(D, H, W)``; of one without a class, their number.
        task: whose classes these are.
        count: of voxels of each kind, at most.
        rng: draws.

    Returns:
        indices ``(P, 3)``, classes ``(P,)``, and of how many voxels of its kind each is one ``(P,)``.

    Example:
        >>> labels = np.zeros((9, 9, 9), int)
        >>> labels[4, 4, 4:6] = 1
        >>> task = SegmentationTask(["background", "lesion"])
        >>> _, values, weights = draw_voxels(labels, task, count=50, rng=np.random.default_rng(0))
        >>> values.tolist().count(1), round(float(weights[values == 0].sum()))
        (2, 727)
    """
    foreground = (labels > 0) & (labels < len(task.labels))
    near = maximum_filter(foreground, size=2 * _NEAR + 1)
    kinds = [labels == value for value in range(1, len(task.labels))]
    kinds += [(labels == 0) & near, (labels == 0) & ~near]
    points, weights = [], []
    for kind in kinds:
        there = np.flatnonzero(kind)
        chosen = rng.permutation(len(there))[:count]
        points.append(there[chosen])
        weights.append(np.full(len(chosen), len(there) / max(len(chosen), 1)))
    places = np.concatenate(points)
    indices = np.stack(np.unravel_index(places, labels.shape), 1)
    return indices, labels.reshape(-1)[places].astype(int), np.concatenate(weights)
