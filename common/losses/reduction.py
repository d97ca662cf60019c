# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Means over the global batch: what one process computes alone, many compute together, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "weighted_mean"]


def weighted_mean(weighted: Tensor, weight: Tensor) -> Tensor:
    """Return ``weighted.sum() / weight.sum()``, the weights summed over all processes.

    DistributedDataParallel averages over processes; the factor that undoes this is included, so that the mean of the
    processes' values is the value of one process with the whole batch. Nothing is divided by less than 1e-6.
    """
    total = weight.detach().sum()
    if not dist.is_initialized():
        return weighted.sum() / total.clamp(min=1e-6)
    dist.all_reduce(total)
    return weighted.sum() * dist.get_world_size() / total.clamp(min=1e-6)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # every process computes the whole loss, and each embedding gets what all of them ask of it
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather(x: Tensor, *, dim: int = 0) -> Tensor:
    """Join ``x`` of all processes along ``dim``, in the order of their ranks; gradients flow back to every process.

    In a single process ``x`` itself. All processes must hold the same shape.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return torch.cat(list(_Gather.apply(x)), dim=dim)  # type: ignore[no-untyped-call]
