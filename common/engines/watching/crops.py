# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The crops that a pre-training is looked at with, always the same, and a network that is not disturbed by it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ...data import StoredVolume

__all__ = ["crop_box", "crop_sides", "read_crop", "undisturbed"]

_LARGEST = 96  # voxels along a side of a crop: a fifth of the voxels of 160^3


def crop_sides(patch_size: int | Sequence[int], stride: int) -> list[int]:
    """Return the sides of crops: those of the run, at most 96, in multiples of the network's coarsest stride.

    Example:
        >>> crop_sides([160, 160, 64], 32), crop_sides(40, 16)
        ([96, 96, 64], [32, 32, 32])
    """
    sides = [patch_size] * 3 if isinstance(patch_size, int) else list(patch_size)
    return [max(min(side, _LARGEST) // stride, 1) * stride for side in sides]


def crop_box(
    shape: Sequence[int], sides: Sequence[int], centre: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Return where a crop begins and ends, which lies inside the volume as far as this is large enough.

    Args:
        shape: of the volume.
        sides: of the crop.
        centre: voxel in its middle; None for that of the volume.

    Example:
        >>> crop_box((10, 4, 10), (4, 8, 4), (9, 0, 5))
        ([6, 0, 3], [10, 4, 7])
    """
    middle = [n // 2 for n in shape] if centre is None else centre
    start = [max(min(c - s // 2, n - s), 0) for c, s, n in zip(middle, sides, shape, strict=True)]
    return start, [min(a + s, n) for a, s, n in zip(start, sides, shape, strict=True)]


def read_crop(volume: StoredVolume, start: Sequence[int], stop: Sequence[int]) -> Tensor:
    """Return a region of a volume, ``(C, d, h, w)`` as stored."""
    values = torch.from_numpy(volume.read(start, stop))
    return values if values.ndim == 4 else values[None]


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Leave a network's modes, what it learns, and all generators of random numbers as they were."""
    modes = [(module, module.training) for module in network.modules()]
    learns = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002 (what other code draws from)
    devices = {parameter.device for parameter, _ in learns if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng([device.index or 0 for device in devices]):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        for module, mode in modes:
            module.training = mode
        for parameter, learned in learns:
            parameter.requires_grad_(learned)
