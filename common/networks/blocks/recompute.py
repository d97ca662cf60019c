# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: compute again for the gradient what was not kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["in_chunks", "run"]


def run(module: nn.Module, *inputs: Tensor | None, recompute: bool) -> Tensor:
    """Call ``module(*inputs)``; with ``recompute`` its activations are not kept but computed again for the gradient."""
    if recompute:
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def in_chunks(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Call ``function`` on parts of a batch and join its outputs, with the memory of one part.

    For losses over a whole batch, where gradients cannot be summed over micro-batches: a first pass keeps the outputs
    only, the backward pass computes each part again with its share of the loss's gradient. This is the two-pass
    embedding cache of Gao et al. (arXiv:2101.06983), and exact.

    Args:
        function: maps ``(B, ...)`` to tensors whose first axis is ``B``; no sample may influence another.
        x: ``(B, ...)``.
        chunks: number of parts; 1 is a plain call.
    """
    if chunks == 1:
        return function(x)
    recompute = torch.is_grad_enabled()
    outputs = [
        checkpoint(function, part, use_reentrant=False) if recompute else function(part) for part in x.chunk(chunks)
    ]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
