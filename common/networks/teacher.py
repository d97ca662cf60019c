# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What methods with a teacher share: how it follows its student, and what a backbone says of each block of an image."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["at_places", "block_features", "follow", "momentum_at", "teacher_of"]

M = TypeVar("M", bound=nn.Module)


def teacher_of(student: M) -> M:
    """Return a copy that gets no gradient: where a moving average starts."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher


def momentum_at(progress: float, *, momentum: Sequence[float]) -> float:
    """Return the share of its weights that a teacher keeps in a step: a cosine from the first number to the second.

    Args:
        progress: share of the run that is done, 0 in the first step.
        momentum: at the start and at the end.

    Raises:
        ValueError: if a momentum is not within 0 and 1.

    Example:
        >>> [round(momentum_at(progress, momentum=[0.9, 1.0]), 3) for progress in (0, 0.5, 1)]
        [0.9, 0.95, 1.0]
    """
    first, last = momentum
    if not 0 <= first <= last <= 1:
        raise ValueError(f"momentum {list(momentum)} must rise within 0 and 1")
    return last - (last - first) * (1 + math.cos(math.pi * progress)) / 2


def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every weight of a teacher towards that of its student: ``momentum`` of the old one is kept."""
    mine: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = [weight.detach() for weight in student.parameters()]
    torch._foreach_lerp_(mine, theirs, 1 - momentum)


def block_features(features: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """Describe every block of a grid by all feature maps: finer ones averaged over it, coarser ones repeated.

    Args:
        features: maps ``(B, C, D, H, W)`` of one image, of any resolutions that the grid divides or that divide it.
        grid: blocks along each axis.

    Returns:
        ``(B, sum of C, *grid)``, float32.

    Example:
        >>> fine, coarse = torch.arange(4.0).view(1, 1, 4, 1, 1), torch.tensor([7.0]).view(1, 1, 1, 1, 1)
        >>> block_features([fine, coarse], [2, 1, 1]).flatten(2)
        tensor([[[0.5000, 2.5000],
                 [7.0000, 7.0000]]])
    """
    parts = []
    for x in features:
        finer = all(side >= blocks for side, blocks in zip(x.shape[2:], grid, strict=True))
        if finer:
            # not avg_pool3d of float32, whose gradient would be spread over a map of float32
            windows = [side // blocks for side, blocks in zip(x.shape[2:], grid, strict=True)]
            parts.append(F.avg_pool3d(x, windows).float() if max(windows) > 1 else x.float())
        else:
            for axis, blocks in enumerate(grid, start=2):
                x = x.repeat_interleave(blocks // x.shape[axis], dim=axis)
            parts.append(x.float())
    return torch.cat(parts, dim=1)


def at_places(blocks: Tensor, places: Tensor) -> Tensor:
    """Return the blocks ``(B, M, C)`` that lie at some places ``(B, M)``, numbers in a grid, of all ``(B, N, C)``."""
    return blocks.gather(1, places[:, :, None].expand(-1, -1, blocks.shape[2]))
