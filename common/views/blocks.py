# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which blocks of a batch are visible and what lies beside each: what a sparse encoder has to know on the host.

Built on the host, where the mask is drawn, so that the shapes of a step are known there and no step waits for the
device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["VisibleBlocks"]

_BESIDE = [(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1)]


@dataclass(frozen=True, eq=False)
class VisibleBlocks:
    """The visible blocks of a batch, sample by sample, each in the order of the grid.

    Attributes:
        grid: blocks along each axis.
        counts: visible blocks of each sample; ``N`` in all.
        where: ``(4, N)`` sample and position in the grid of each block.
        neighbours: ``(N, 27)`` the block at each of the offsets (-1, -1, -1) to (1, 1, 1); ``N`` where it is hidden or
            outside.
        pairs: how many blocks have a visible neighbour at each of the 27 offsets.
        tables: index tables that are made of these for one size of blocks, kept for the layers that share it.

    Example:
        >>> visible = torch.tensor([True, True, False]).view(1, 1, 1, 3)
        >>> blocks = VisibleBlocks.of(visible)
        >>> blocks.counts, blocks.neighbours[0, 13].item(), blocks.neighbours[0, 14].item(), blocks.pairs[14]
        ((2,), 0, 1, 1)
    """

    grid: tuple[int, int, int]
    counts: tuple[int, ...]
    where: Tensor
    neighbours: Tensor
    pairs: tuple[int, ...]
    tables: dict[object, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, visible: Tensor) -> VisibleBlocks:
        """Number the visible blocks of a grid ``(B, d, h, w)``, boolean; one on a device is waited for."""
        visible = visible.cpu()
        samples, depth, height, width = visible.shape
        where = visible.nonzero().t().contiguous()  # (4, N)
        count = where.shape[1]
        numbers = torch.full((samples, depth + 2, height + 2, width + 2), count)
        numbers[:, 1:-1, 1:-1, 1:-1][visible] = torch.arange(count)
        sample, z, y, x = where
        neighbours = torch.stack([numbers[sample, z + 1 + dz, y + 1 + dy, x + 1 + dx] for dz, dy, dx in _BESIDE], dim=1)
        return cls(
            (depth, height, width),
            tuple(visible.flatten(1).sum(1).tolist()),
            where,
            neighbours,
            tuple((neighbours < count).sum(0).tolist()),
        )

    def to(self, device: torch.device) -> VisibleBlocks:
        """Return the same on a device, without waiting for it."""
        if self.where.device == device:
            return self
        where, neighbours = (
            (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
            for table in (self.where, self.neighbours)
        )
        return VisibleBlocks(self.grid, self.counts, where, neighbours, self.pairs)

    def __len__(self) -> int:
        return sum(self.counts)
