# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How a volume is covered by overlapping tiles, so that every voxel counts once and padding nowhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["SIGMA", "tile_origins", "tile_shares"]

SIGMA = 0.125  # of a tile's side, as in inference


def tile_origins(size: int, *, tile: int, stride: int, overlap: float) -> list[int]:
    """Return where tiles begin along one axis: multiples of the stride, evenly spread, the last one flush.

    Args:
        size: of the axis, a multiple of ``stride``, at least ``tile``.
        tile: side of a tile, a multiple of ``stride``.
        stride: of the coarsest map, on whose grid all tiles must lie.
        overlap: share of a tile that its neighbour covers at least.

    Example:
        >>> tile_origins(224, tile=160, stride=32, overlap=0.5), tile_origins(160, tile=160, stride=32, overlap=0.5)
        ([0, 64], [0])
    """
    step = max(stride, int(tile * (1 - overlap)) // stride * stride)
    count = math.ceil((size - tile) / step) + 1
    span = (size - tile) // stride
    return [round(index * span / max(count - 1, 1)) * stride for index in range(count)]


def tile_shares(origins: Sequence[int], *, size: int, tile: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of each position belongs to each tile along one axis.

    Shares of an axis multiply to those in space, since tiles are a grid and a Gaussian is a product over the axes.

    Args:
        origins: of the tiles in voxels, multiples of ``stride``.
        size: voxels of the volume, without padding.
        tile: side of a tile in voxels.
        stride: voxels along a side of a position.

    Returns:
        shares ``(tiles, tile / stride)``, which sum to 1 over the tiles at every position; and the share of each
        position that is inside the volume, of the same shape.

    Example:
        >>> shares, inside = tile_shares([0, 2], size=5, tile=4, stride=2)
        >>> shares.round(2).tolist(), inside.tolist()
        ([[1.0, 0.5], [0.5, 1.0]], [[1.0, 1.0], [1.0, 0.5]])
    """
    cells = tile // stride
    gaussian = np.exp(-0.5 * ((np.arange(cells) - (cells - 1) / 2) / (SIGMA * cells)) ** 2)
    total = np.zeros(max(origins) // stride + cells)
    for origin in origins:
        total[origin // stride : origin // stride + cells] += gaussian
    places = np.array([np.arange(cells) + origin // stride for origin in origins])  # (tiles, cells)
    inside = np.clip(size - places * stride, 0, stride) / stride
    return gaussian / total[places], inside
