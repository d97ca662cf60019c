# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a loader hands to views, without files; and narrow backbones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.networks import Primus, ResEncUNet
from common.views import SpatialCrop, reading_stream

__all__ = ["BACKBONES", "fit", "plain", "read", "unmoved", "volume"]

BACKBONES: dict[str, Callable[..., ResEncUNet | Primus]] = {
    "unet": lambda **settings: ResEncUNet(features_per_stage=[8, 16, 16], blocks_per_stage=[1, 1, 1], **settings),
    "transformer": lambda **settings: Primus(input_size=16, embed_dim=48, depth=2, num_heads=4, **settings),
}


def plain(patch_size: int | Sequence[int]) -> SpatialCrop:
    """Return a crop that is only cut: the volume itself where that is as large."""
    return SpatialCrop(patch_size, rotation_probability=0, zoom_probability=0, flip_probability=0)


def volume(number: int, shape: Sequence[int]) -> Tensor:
    """Return smooth waves and a little noise, different for each number."""
    generator = torch.Generator().manual_seed(number)
    waves = 0.2 + 0.4 * torch.rand(3, generator=generator)
    axes = [torch.sin(wave * torch.arange(side) + number) for wave, side in zip(waves, shape, strict=True)]
    smooth = axes[0][:, None, None] + axes[1][:, None] + axes[2]
    return smooth + 0.05 * torch.randn(*shape, generator=generator)


def read(
    spatial: SpatialCrop, indices: Sequence[int], *, shape: Sequence[int] = (20, 22, 24), each: int = 1, epoch: int = 1
) -> dict[str, Any]:
    """Read samples of a run as the loader does: ``each`` volumes and their draws from the sample's own stream."""
    batch: dict[str, Any] = {"key": [(0, epoch, index) for index in indices], "region": [], "spatial": []}
    for key in batch["key"]:
        rng = reading_stream(key)
        for part in range(each):
            draw = spatial.draw(rng, shape)
            where = tuple(map(slice, draw.start, draw.stop))
            batch["region"].append(volume(1000 * part + key[2], shape)[where].clone())
            batch["spatial"].append(draw)
    return batch


def fit(
    method: nn.Module, loss: nn.Module, batch: dict[str, Any], *, steps: int, lr: float = 3e-3
) -> tuple[list[float], dict[str, Tensor]]:
    """Train on one batch and return the losses, and the answer at the end."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        value = loss(method.train()(batch), batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses, method(batch)


def unmoved(method: nn.Module) -> set[str]:
    """Name the parameters that got no gradient, or one of zeros but for rounding.

    Biases in front of a norm are left out: the norm takes them away.
    """
    largest = max(float(p.grad.abs().max()) for p in method.parameters() if p.grad is not None)
    return {
        name
        for name, p in method.named_parameters()
        if p.grad is None or (float(p.grad.abs().max()) <= 1e-7 * largest and not name.endswith("conv.bias"))
    }
