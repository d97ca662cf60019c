# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One embedding per volume with a frozen encoder.

=========  ==============================================================================================
goes in    a preprocessed volume ``(C, D, H, W)`` of any size
between    overlapping tiles of ``patch_size``; the feature maps of each, ``(C_s, d, h, w)``, weighted
comes out  one vector ``(E,)``: every chosen stage pooled over the volume, joined
           optionally the map of the coarsest chosen stage, ``(C_s, ...)``, with its affine
=========  ==============================================================================================

Every voxel of the volume counts once, however many tiles cover it, and padding counts nowhere: a position of a map
weighs as much as it holds voxels of the volume, shared among the tiles there by a Gaussian as in inference. Only one
tile's maps are held at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import DataError, SettingsError
from .tiles import SIGMA, tile_origins, tile_shares

__all__ = ["Embedding", "VolumeEmbedder"]

_POOLINGS = ("mean", "std", "max")


@dataclass
class Embedding:
    """What the encoder says of one volume.

    Attributes:
        stages: pooled features ``(E_s,)`` of each chosen stage, by its index.
        positions: voxels of the coarsest chosen map.
        dense: that map ``(C_s, d, h, w)`` in float16, if asked for.
        affine: from indices of that map to millimetres, ``(4, 4)``.
    """

    stages: dict[int, np.ndarray]
    positions: int
    dense: np.ndarray | None = None
    affine: np.ndarray | None = None

    @property
    def vector(self) -> np.ndarray:
        """All stages joined, ``(E,)`` float32."""
        return np.concatenate(list(self.stages.values()))


@dataclass
class _Pool:
    """Sums of one stage over the tiles so far."""

    total: Tensor
    squares: Tensor
    highest: Tensor


class VolumeEmbedder:
    """Encode a volume tile by tile and pool what the chosen stages say over it.

    Args:
        network: with ``encode``, ``feature_channels`` and ``feature_strides``; put into evaluation mode.
        patch_size: sides of a tile in voxels, multiples of the network's coarsest stride.
        overlap: share of a tile that its neighbour covers at least.
        stages: which feature maps, fine to coarse from 0; negative ones count from the coarsest.
        pooling: ``mean``, ``std`` and ``max`` over the volume, joined with ``+``.
        small_volumes: what is done where a volume is smaller than a tile. ``shrink``: the tile is cut to the volume,
            up to the stride. ``hide``: the tile stays as it is, and the network is told which blocks are padding, so
            that a transformer drops these tokens and keeps its positions.
        dense: also return the map of the coarsest chosen stage.
        device: where to compute.
        amp: compute in mixed precision.

    Raises:
        SettingsError: if a tile, a stage or the pooling does not fit.

    Example:
        >>> from common.networks import ResEncUNet
        >>> network = ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1, 1], with_decoder=False)
        >>> VolumeEmbedder(network, patch_size=[8, 8, 8])(torch.rand(1, 9, 12, 7)).vector.shape
        (8,)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        patch_size: Sequence[int],
        overlap: float = 0.5,
        stages: Sequence[int] = (-1,),
        pooling: str = "mean",
        small_volumes: str = "shrink",
        dense: bool = False,
        device: torch.device | str = "cpu",
        amp: bool = False,
    ) -> None:
        self.device = torch.device(device)
        backbone: Any = network.to(self.device).eval().requires_grad_(False)
        self.network = backbone
        self.strides: list[int] = list(backbone.feature_strides)
        self.patch_size = [patch_size] * 3 if isinstance(patch_size, int) else list(patch_size)
        coarsest = self.strides[-1]
        if len(self.patch_size) != 3 or any(side < 1 or side % coarsest for side in self.patch_size):
            raise SettingsError(
                f"patch_size {self.patch_size} must be three multiples of {coarsest}, the stride of this encoder"
            )
        if not 0 <= overlap < 1:
            raise SettingsError(f"overlap is {overlap}; it must be at least 0 and less than 1")
        count = len(self.strides)
        chosen = [stages] if isinstance(stages, int) else list(stages)
        if not chosen or any(not isinstance(one, int) or not -count <= one < count for one in chosen):
            raise SettingsError(f"stages is {stages}; this encoder has the stages 0 to {count - 1}, fine to coarse")
        if small_volumes not in ("shrink", "hide"):
            raise SettingsError(f"small_volumes is {small_volumes!r}; it must be shrink or hide")
        self.pooling = pooling.split("+") if isinstance(pooling, str) else list(pooling)
        if any(name not in _POOLINGS for name in self.pooling) or len(set(self.pooling)) < len(self.pooling):
            raise SettingsError(f"pooling is {pooling!r}; it must be of {', '.join(_POOLINGS)}, joined with +")
        self.overlap = overlap
        self.stages = sorted({one % count for one in chosen})
        self.small_volumes = small_volumes
        self.dense = dense
        self.amp = amp

    @property
    def columns(self) -> list[dict[str, Any]]:
        """Say for each number of the vector which stage, pooling and channel it is."""
        return [
            {"stage": stage, "stride": self.strides[stage], "pooling": pooling, "channel": channel}
            for stage in self.stages
            for pooling in self.pooling
            for channel in range(self.network.feature_channels[stage])
        ]

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Embedding:
        """Embed a volume.

        Args:
            image: ``(C, D, H, W)``; the affine of a MONAI ``MetaTensor`` gives that of the dense map.

        Raises:
            DataError: if the result is not finite.
        """
        size = list(image.shape[1:])
        affine = np.asarray(getattr(image, "affine", np.eye(4)), dtype=float)
        values = image.as_tensor() if hasattr(image, "as_tensor") else image
        tile, origins = self._tiles(size)
        plans = {
            stage: [
                tile_shares(starts, size=n, tile=t, stride=self.strides[stage])
                for starts, n, t in zip(origins, size, tile, strict=True)
            ]
            for stage in self.stages
        }
        last = self.stages[-1]
        grid = [math.ceil(n / self.strides[last]) for n in size]
        pools: dict[int, _Pool] = {}
        dense: Tensor | None = None
        for place in itertools.product(*(range(len(starts)) for starts in origins)):
            corner = [starts[index] for starts, index in zip(origins, place, strict=True)]
            for stage, features in self._encode(values, corner, tile).items():
                weights = [
                    (torch.from_numpy(shares[index]).to(features), torch.from_numpy(inside[index]).to(features))
                    for (shares, inside), index in zip(plans[stage], place, strict=True)
                ]
                _add(pools, stage, features, weights)
                if self.dense and stage == last:
                    if dense is None:
                        dense = features.new_zeros((features.shape[0], *grid))
                    _blend(dense, features, [shares for shares, _ in weights], corner, self.strides[last])
        voxels = {stage: math.prod(n / self.strides[stage] for n in size) for stage in self.stages}
        found = Embedding({stage: self._pooled(pools[stage], voxels[stage]) for stage in self.stages}, math.prod(grid))
        if not np.isfinite(found.vector).all():
            raise DataError("its features are NaN or infinite; compute without mixed precision, with --amp false")
        if dense is not None:
            found.dense = dense.cpu().numpy().astype(np.float16)
            found.affine = affine @ _to_positions(self.strides[last])
        return found

    @torch.inference_mode()
    def at(self, image: Tensor, points: np.ndarray) -> np.ndarray:
        """Return the features of some voxels: of every chosen stage, interpolated between its positions, and joined.

        Where tiles overlap, each tells as much as the voxel is near its middle, by the Gaussian of inference.

        Args:
            image: ``(C, D, H, W)``.
            points: indices of voxels ``(P, 3)``.

        Returns:
            ``(P, E)`` float32, stages in the order of ``stages``.

        Raises:
            DataError: if the result is not finite.

        Example:
            >>> from common.networks import ResEncUNet
            >>> network = ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1, 1], with_decoder=False)
            >>> embedder = VolumeEmbedder(network, patch_size=[8, 8, 8], stages=[0, 1])
            >>> embedder.at(torch.rand(1, 9, 12, 7), np.array([[0, 0, 0], [8, 11, 6]])).shape
            (2, 12)
        """
        size = list(image.shape[1:])
        values = image.as_tensor() if hasattr(image, "as_tensor") else image
        tile, origins = self._tiles(size)
        wanted = torch.from_numpy(np.asarray(points)).to(self.device, torch.float32)  # (P, 3)
        sides = torch.tensor(tile, device=self.device)
        total = torch.zeros(len(wanted), sum(self.network.feature_channels[stage] for stage in self.stages))
        weight = torch.zeros(len(wanted), 1)
        for corner in itertools.product(*origins):
            place = wanted - torch.tensor(corner, device=self.device)
            inside = ((place >= 0) & (place < sides)).all(1)
            if not inside.any():
                continue
            place = place[inside]
            found = []
            for stage, features in self._encode(values, corner, tile).items():
                stride = self.strides[stage]
                held = [
                    min(n, math.ceil((whole - start) / stride))
                    for n, whole, start in zip(features.shape[1:], size, corner, strict=True)
                ]  # positions beyond the end of the volume tell nothing
                found.append(_interpolate(features[:, : held[0], : held[1], : held[2]], (place + 0.5) / stride - 0.5))
            share = torch.exp(-0.5 * (((place + 0.5) / sides - 0.5) / SIGMA).square().sum(1, keepdim=True)).cpu()
            chosen = inside.cpu()
            total[chosen] += torch.cat(found, 1).cpu() * share
            weight[chosen] += share
        features_there = (total / weight).numpy()
        if not np.isfinite(features_there).all():
            raise DataError("its features are NaN or infinite; compute without mixed precision, with --amp false")
        return features_there

    def _tiles(self, size: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """Return the sides of a tile of a volume of this size, and where tiles begin along each axis."""
        coarsest = self.strides[-1]
        padded = [math.ceil(n / coarsest) * coarsest for n in size]
        tile = [
            min(p, n) if self.small_volumes == "shrink" else p for p, n in zip(self.patch_size, padded, strict=True)
        ]
        origins = [
            tile_origins(max(n, t), tile=t, stride=coarsest, overlap=self.overlap)
            for n, t in zip(padded, tile, strict=True)
        ]
        return tile, origins

    def _encode(self, values: Tensor, corner: Sequence[int], tile: Sequence[int]) -> dict[int, Tensor]:
        """Return the chosen maps ``(C_s, d, h, w)`` of one tile in float32, zeros put where the volume has ended."""
        window = values[(slice(None), *(slice(c, c + t) for c, t in zip(corner, tile, strict=True)))]
        there = list(window.shape[1:])
        lacking = [(0, t - n) for t, n in zip(tile, there, strict=True)]
        window = F.pad(window.to(self.device, torch.float32), [n for pair in reversed(lacking) for n in pair])
        visible = None
        if self.small_volumes == "hide":
            block = self.strides[-1]
            visible = torch.zeros([1, *(t // block for t in tile)], dtype=torch.bool, device=self.device)
            visible[(slice(None), *(slice(0, math.ceil(n / block)) for n in there))] = True
            visible = None if bool(visible.all()) else visible
        with torch.autocast(self.device.type, enabled=self.amp):
            maps = self.network.encode(window[None], visible=visible, sparse=visible is not None)
        return {stage: maps[stage][0].float() for stage in self.stages}

    def _pooled(self, pool: _Pool, voxels: float) -> np.ndarray:
        mean = pool.total / voxels
        parts = {"mean": mean, "std": (pool.squares / voxels - mean**2).clamp(min=0).sqrt(), "max": pool.highest}
        return torch.cat([parts[name] for name in self.pooling]).float().cpu().numpy()


def _add(pools: dict[int, _Pool], stage: int, features: Tensor, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add one tile's map ``(C_s, d, h, w)`` to the sums of its stage."""
    d, h, w = ((shares * inside) for shares, inside in weights)
    total, squares = (((values @ w) @ h) @ d for values in (features, features**2))  # (C_s,)
    held = [int((inside > 0).sum()) for _, inside in weights]
    highest = features[:, : held[0], : held[1], : held[2]].amax((1, 2, 3)).double()
    pool = pools.get(stage)
    if pool is None:
        pools[stage] = _Pool(total.double(), squares.double(), highest)
    else:
        pool.total += total
        pool.squares += squares
        pool.highest = torch.maximum(pool.highest, highest)


def _blend(dense: Tensor, features: Tensor, shares: Sequence[Tensor], corner: Sequence[int], stride: int) -> None:
    """Add one tile's map to the map of the whole volume, leaving out positions beyond its end."""
    d, h, w = shares
    starts = [c // stride for c in corner]
    held = [min(n, whole - start) for n, whole, start in zip(features.shape[1:], dense.shape[1:], starts, strict=True)]
    weighted = features * d[:, None, None] * h[:, None] * w
    target = tuple(slice(start, start + n) for start, n in zip(starts, held, strict=True))
    dense[(slice(None), *target)] += weighted[:, : held[0], : held[1], : held[2]]


def _interpolate(features: Tensor, places: Tensor) -> Tensor:
    """Return a map ``(C, d, h, w)`` at places ``(P, 3)``, in its positions, as ``(P, C)``; flat beyond its ends."""
    sides = torch.tensor(features.shape[1:], device=places.device, dtype=places.dtype)
    grid = (2 * places / (sides - 1).clamp(min=1) - 1).flip(1)  # grid_sample counts the last axis first
    found = F.grid_sample(features[None], grid[None, None, None], padding_mode="border", align_corners=True)
    return found[0, :, 0, 0].T  # (1, C, 1, 1, P) -> (P, C)


def _to_positions(stride: int) -> np.ndarray:
    """Return the matrix from indices of a map to indices of the image: the middle of the voxels it stands for."""
    matrix = np.diag([stride, stride, stride, 1.0])
    matrix[:3, 3] = (stride - 1) / 2
    return matrix
