# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How good features look without any label: the dimensions that they use, and what they keep of one volume."""

from __future__ import annotations

import numpy as np

__all__ = ["effective_rank", "view_agreement"]


def effective_rank(features: np.ndarray) -> float:
    """Return how many dimensions features use: the exponential of the entropy of their normalised singular values.

    RankMe (Garrido et al., arXiv:2210.02885), of features as they are, not centred. The paper adds 1e-7 to every share;
    here a share of 0 adds nothing, which is its limit.

    Args:
        features: ``(n, E)``.

    Returns:
        from 1, all rows on one line, to ``min(n, E)``; 0 if all are zero.

    Example:
        >>> round(effective_rank(np.eye(5)), 6), round(effective_rank(np.ones((5, 3))), 6)
        (5.0, 1.0)
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / max(values.sum(), np.finfo(float).tiny)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def view_agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return how much more alike two views of one volume are than views of two volumes.

    The mean cosine of the pairs of one volume minus that of all others, after the mean of all is taken off, since a
    part that all features share tells volumes apart in no way.

    Args:
        first: features of one view of each volume, ``(n, E)``, at least two.
        second: of the other view, in the same order.

    Returns:
        0 where views tell nothing of their volume; ``n / (n - 1)`` where they tell all and volumes have nothing in
        common.

    Raises:
        ValueError: with fewer than two volumes, or different shapes.

    Example:
        >>> round(view_agreement(np.eye(4), np.eye(4)), 6)
        1.333333
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"views of shapes {first.shape} and {second.shape}; two of the same, of two volumes or more")
    both = np.stack([first, second]).astype(np.float64)  # (2, n, E)
    both -= both.mean((0, 1))
    both /= np.maximum(np.linalg.norm(both, axis=2, keepdims=True), 1e-12)
    cosines = both[0] @ both[1].T  # (n, n)
    n, same = len(first), np.trace(cosines)
    return float(same / n - (cosines.sum() - same) / (n * (n - 1)))
