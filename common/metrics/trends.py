# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Whether a curve falls, beyond what chance does."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["falls"]


def falls(values: Sequence[float], *, level: float = 0.01) -> bool:
    """Return whether values fall in their order more steadily than all but ``level`` of their orders would.

    Kendall's rank correlation with the order, one-sided (the test of Mann and Kendall for a trend): only which of two
    values is the higher counts, so that one outlier decides nothing.

    Args:
        values: of a curve, the oldest first.
        level: of the test.

    Example:
        >>> falls([8, 7, 6, 5, 4, 3, 2, 1]), falls([1, 2, 1, 2, 1, 2, 1, 2]), falls([8, 7])
        (True, False, False)
    """
    from scipy.stats import kendalltau  # not at the top: half a second of imports

    if len({*values}) < 2:
        return False
    return bool(kendalltau(range(len(values)), values, alternative="less").pvalue < level)
