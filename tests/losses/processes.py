# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What two processes compute together, as two GPUs would: each has some samples of a batch, and a copy of a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from common.losses import MaskedMSELoss, NTXentLoss, gather
from common.methods.dino import DINO, DINOLoss
from common.methods.jepa import JEPA, JEPALoss
from common.methods.voco import VoCo, VoCoLoss
from common.networks import ResEncUNet
from common.processes import leave_processes

__all__ = [
    "contrast",
    "distilling",
    "foretelling",
    "gathering",
    "ignoring",
    "in_processes",
    "masked_batch",
    "overlapping",
    "share",
]

Compute = Callable[[int, int], Any]


def _one(rank: int, world: int, compute: list[Compute], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save([one(rank, world) for one in compute], f"{folder}/{rank}.pt")
    dist.barrier()
    leave_processes()


def in_processes(compute: list[Compute], folder: Path, world: int = 2) -> list[list[Any]]:
    """Return what each ``compute(rank, world)`` gives in each of several connected processes."""
    multiprocessing.spawn(_one, args=(world, compute, str(folder)), nprocs=world)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return [list(one) for one in zip(*results, strict=True)]


def share(rank: int, world: int) -> tuple[nn.Linear, Tensor]:
    """Return a network and its process's part of two views of six samples."""
    torch.manual_seed(0)
    network, batch = nn.Linear(5, 3), torch.randn(2, 6, 5)
    return network, batch.chunk(world, dim=1)[rank]


def contrast(rank: int, world: int) -> dict[str, list[Tensor]]:
    """Return loss and gradients for both choices of negatives."""
    results = {}
    for negatives in ("global", "local"):
        network, views = share(rank, world)
        loss = NTXentLoss(negatives=negatives)(network(views))
        loss.backward()
        results[negatives] = [loss.detach(), network.weight.grad, network.bias.grad]
    return results


def masked_batch() -> tuple[Tensor, dict[str, Tensor]]:
    """Return a reconstruction and views with a different count of hidden blocks, and of ignored voxels, per sample."""
    generator = torch.Generator().manual_seed(0)
    prediction, image = torch.randn(2, 4, 1, 8, 8, 8, generator=generator)
    hidden = torch.rand(4, 2, 4, 2, generator=generator) < torch.tensor([0.2, 0.4, 0.6, 0.8]).view(4, 1, 1, 1)
    ignored = torch.rand(4, 1, 8, 8, 8, generator=generator) < torch.tensor([0.0, 0.1, 0.5, 0.7]).view(4, 1, 1, 1, 1)
    return prediction, {"image": image, "hidden": hidden, "ignored": ignored}


def ignoring(rank: int, world: int) -> list[Tensor]:
    """Return loss and gradients of a reconstruction of which some is ignored."""
    prediction, batch = masked_batch()
    torch.manual_seed(0)
    network = nn.Conv3d(1, 1, kernel_size=3, padding=1)
    pred = {"reconstruction": network(prediction.chunk(world)[rank])}
    loss = MaskedMSELoss()(pred, {key: value.chunk(world)[rank] for key, value in batch.items()})
    loss.backward()
    return [loss.detach(), network.weight.grad, network.bias.grad]


def gathering(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Return what is gathered, and the gradient that comes back; the second process asks for twice as much."""
    numbers = torch.arange(8.0).view(2, 4)
    x = numbers.chunk(world, dim=1)[rank].requires_grad_()
    everything = gather(x, dim=1)
    (everything * numbers * (rank + 1)).sum().backward()
    return everything.detach(), x.grad


def distilling(rank: int, world: int) -> list[Tensor]:
    """Return the loss of a student and its teacher, and the gradients, of a process's part of four samples."""
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {name: torch.randn(4, 2, 1, 8, 8, 8, generator=generator) for name in ("globals", "locals")}
    places = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(4)])
    batch |= {"places": places, "hidden": torch.zeros(4, 8).scatter(1, places, 1.0).bool().view(4, 2, 2, 2)}
    torch.manual_seed(0)
    backbone = ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1, 1], with_decoder=False)
    dino = DINO(backbone, hidden_features=8, bottleneck_features=6, prototypes=12)
    own = {name: value.chunk(world)[rank] for name, value in batch.items()} | {"progress": 0.5}
    loss = DINOLoss()(dino.train()(own), own)
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in dino.parameters() if weight.grad is not None)]


def foretelling(rank: int, world: int) -> list[Tensor]:
    """Return the same of JEPA, whose features are drawn towards one distribution over all samples."""
    generator = torch.Generator().manual_seed(0)
    image, order = torch.randn(4, 1, 8, 8, 8, generator=generator), torch.rand(4, 8, generator=generator).argsort(1)
    places, seen = order[:, :5], order[:, 5:]
    hidden = torch.zeros(4, 8).scatter(1, places, 1.0).bool().view(4, 2, 2, 2)
    batch = {"image": image, "hidden": hidden, "places": places, "seen": seen}
    torch.manual_seed(0)
    backbone = ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1, 1], with_decoder=False)
    jepa = JEPA(backbone, grid=[2, 2, 2], predictor_dim=12, predictor_depth=1, predictor_heads=2)
    own = {name: value.chunk(world)[rank] for name, value in batch.items()} | {"progress": 0.5, "seed": 7}
    loss = JEPALoss(isotropy_weight=0.5)(jepa.train()(own), own)
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in jepa.parameters() if weight.grad is not None)]


def overlapping(rank: int, world: int) -> list[Tensor]:
    """Return the same of VoCo with its teacher, whose projection normalises over all crops."""
    generator = torch.Generator().manual_seed(0)
    grid, targets = (torch.randn(4, count, 1, 8, 8, 8, generator=generator) for count in (2, 3))
    overlap = torch.rand(4, 3, 2, generator=generator).sub(0.3).clamp(min=0).chunk(world)[rank]
    torch.manual_seed(0)
    backbone = ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1, 1], with_decoder=False)
    voco = VoCo(backbone, hidden_features=8, embedding_features=6, teacher_momentum=0.9)
    crops = torch.cat([each.chunk(world)[rank].flatten(0, 1) for each in (grid, targets)])
    loss = VoCoLoss()(voco.train()({"crops": crops, "overlap": overlap}), {"overlap": overlap})
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in voco.parameters() if weight.grad is not None)]
