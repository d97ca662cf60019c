# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Sliding-window inference with mirrored copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from monai.inferers import SlidingWindowInferer
from torch import Tensor

__all__ = ["MirroringInferer"]


class MirroringInferer(SlidingWindowInferer):
    """Gaussian sliding window; optionally the mean of the logits over all combinations of mirrored axes.

    MONAI's inferer with the reference's window: half-overlapping tiles, weights of a Gaussian of an eighth of the tile,
    accumulated in float32 on the input's device.

    Args:
        roi_size: sides of a tile in voxels, one or three.
        mirror_axes: spatial axes to mirror, e.g. (0, 1, 2) for eight copies; none for one pass.
        kwargs: further arguments of ``monai.inferers.SlidingWindowInferer``.

    Example:
        >>> import torch
        >>> inferer = MirroringInferer(4, mirror_axes=(0, 2))
        >>> image = torch.rand(1, 1, 6, 5, 4)
        >>> bool(torch.allclose(inferer(image, lambda x: x), image, atol=1e-6))
        True
    """

    def __init__(self, roi_size: int | Sequence[int], *, mirror_axes: Sequence[int] = (), **kwargs: Any) -> None:
        sides = [roi_size] * 3 if isinstance(roi_size, int) else list(roi_size)
        options = {"overlap": 0.5, "mode": "gaussian", "sigma_scale": 0.125, "sw_batch_size": 1}
        super().__init__(roi_size=sides, **{**options, **kwargs})
        self.mirror_axes = tuple(mirror_axes)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(B, C, D, H, W)`` to the network's logits of the same size."""

        def mirrored(tile: Tensor, *a: Any, **k: Any) -> Tensor:
            total = network(tile, *a, **k).float()
            count = 1
            for size in range(1, len(self.mirror_axes) + 1):
                for axes in combinations(self.mirror_axes, size):
                    dims = [axis + 2 for axis in axes]
                    total = total + network(tile.flip(dims), *a, **k).float().flip(dims)
                    count += 1
            return total / count

        return super().__call__(inputs, mirrored, *args, **kwargs)
