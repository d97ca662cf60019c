# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Masks of whole blocks, and the views that hide them; shared by MAE, SimMIM and Spark3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import VisibleBlocks
from .randomness import step_stream, view_stream
from .spatial import SpatialCrop

__all__ = ["MaskedViews", "draw_hidden_blocks"]


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


class MaskedViews:
    """Cut the crops and draw which of their blocks are hidden.

    Args:
        spatial: how crops are cut and augmented.
        block_size: side of a block in voxels, or three.
        hidden_ratio: share of blocks to hide; two numbers draw a ratio between them, the same for a whole batch.
        batch_size: samples of one optimizer step over all processes, by which samples of one step find each other;
            needed for a drawn ratio.
        sparse: also say which blocks are neighbours, for an encoder that computes visible ones only.

    Raises:
        ValueError: if a crop side is not a multiple of the block, or the ratio leaves nothing hidden or visible.
    """

    def __init__(
        self,
        spatial: SpatialCrop,
        *,
        block_size: int | Sequence[int],
        hidden_ratio: float | Sequence[float] = 0.75,
        batch_size: int | None = None,
        sparse: bool = False,
    ) -> None:
        block = [block_size] * 3 if isinstance(block_size, int) else list(block_size)
        if any(side % b for side, b in zip(spatial.patch_size, block, strict=True)):
            raise ValueError(f"patch_size {list(spatial.patch_size)} is not a multiple of block_size {block}")
        self.spatial = spatial
        self.grid = [side // b for side, b in zip(spatial.patch_size, block, strict=True)]
        ratios = [hidden_ratio] * 2 if isinstance(hidden_ratio, (int, float)) else list(hidden_ratio)
        self.lowest, self.highest = ratios
        self.batch_size = batch_size
        self.sparse = sparse
        self.blocks = self.grid[0] * self.grid[1] * self.grid[2]
        if not 0 < int(self.lowest * self.blocks) <= int(self.highest * self.blocks) < self.blocks:
            raise ValueError(f"hidden_ratio {hidden_ratio} of {self.blocks} blocks must hide at least one and not all")
        if self.lowest != self.highest and batch_size is None:
            raise ValueError(f"a hidden_ratio between {self.lowest} and {self.highest} needs batch_size")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Map a batch of regions, spatial draws and sample keys on the device to views.

        Returns:
            ``image (B, 1, D, H, W)``; ``hidden (B, d, h, w)``, boolean, true in hidden blocks; ``visible_count``, how
            many blocks every sample shows; ``blocks``, for a sparse encoder; ``ignored (B, 1, D, H, W)``, boolean, if
            masks of anonymised regions are read.
        """
        image = self.spatial(batch)
        ratio = self._ratio(batch["key"][0])
        hidden = torch.stack([draw_hidden_blocks(self.grid, ratio, view_stream(key)) for key in batch["key"]])
        views = {
            "image": image,
            "hidden": hidden.to(image.device, non_blocking=True),
            "visible_count": self.blocks - int(ratio * self.blocks),
        }
        if self.sparse:
            views["blocks"] = VisibleBlocks.of(~hidden).to(image.device)
        if "anonymised" in batch:
            views["ignored"] = self.spatial(batch, name="anonymised") > 0
        return views

    def _ratio(self, key: tuple[int, int, int]) -> float:
        if self.batch_size is None or self.lowest == self.highest:
            return self.lowest
        seed, epoch, index = key
        stream = step_stream(seed, epoch, index // self.batch_size)
        return float(stream.uniform(self.lowest, self.highest))
