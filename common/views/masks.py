# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Masks of whole blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw_hidden_blocks"]


def draw_hidden_blocks(grid: Sequence[int], ratio: float, generator: torch.Generator) -> Tensor:
    """Hide a fixed share of the blocks of a grid, all sets of that size being equally likely.

    Args:
        grid: blocks along each axis.
        ratio: share to hide; ``int(ratio * blocks)`` are hidden exactly.
        generator: where the draw comes from.

    Returns:
        boolean ``grid``, true where hidden.

    Example:
        >>> int(draw_hidden_blocks((4, 4, 4), 0.75, torch.Generator().manual_seed(0)).sum())
        48
    """
    count = int(grid[0] * grid[1] * grid[2])
    hidden = torch.zeros(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=generator)[: int(ratio * count)]] = True
    return hidden.view(*grid)
