# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Full sharding: every process holds a share of each parameter, of its gradient and of its optimizer states.

PyTorch's ``fully_shard`` (FSDP2, the method of Zhao et al., arXiv:2304.11277) does it; here is what a run needs around
it. Files do not show it: tensors are joined before they are written and cut up after they are read, so that a run
goes on with any number of processes, sharded, copied by DistributedDataParallel, or alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import SettingsError
from .networks.blocks.transformer import TransformerBlock

__all__ = ["fully_sharded", "joined", "share"]


def fully_sharded(module: nn.Module, *, device: torch.device) -> nn.Module:
    """Shard each transformer block of ``module``, and all else as one more part, over all processes.

    A part is gathered just before it computes and let go of afterwards. Processes must have built the same weights; an
    optimizer must be built from what is returned.

    Args:
        module: on any device; changed in place.
        device: of this process, where its shares go.

    Raises:
        SettingsError: if there are no processes or no transformer blocks, or a part is not trained.
    """
    if not dist.is_initialized():
        raise SettingsError("full sharding is over the processes of torchrun; start the run with torchrun")
    blocks = [part for part in module.modules() if isinstance(part, TransformerBlock)]
    if not blocks:
        raise SettingsError(
            "full sharding takes a transformer block by block, and this network has none; use multi_gpu instead of fsdp"
        )
    if not all(parameter.requires_grad for parameter in module.parameters()):
        raise SettingsError(
            "full sharding does not follow weights that move without a gradient, such as a teacher's; use "
            "multi_gpu instead of fsdp"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh)
    return module


def joined(state: Any, *, keep: bool = True) -> Any:
    """Return a state dict with every sharded tensor whole and on the CPU, all else as it is.

    If anything is sharded all processes must call it; those that do not ``keep`` get None in its place.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()  # type: ignore[no-untyped-call]
        return full.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: joined(value, keep=keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(joined(value, keep=keep) for value in state)
    return state


def share(value: Any, like: Tensor | None) -> Any:
    """Return this process's share of a whole tensor, if ``like`` is sharded and has its shape; else ``value``."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value
