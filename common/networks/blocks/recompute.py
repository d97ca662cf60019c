# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing, switched on by a flag of the network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["run"]


def run(module: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """Call ``module(*inputs)``; with ``recompute`` its activations are not kept but computed again for the gradient."""
    if recompute:
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)
