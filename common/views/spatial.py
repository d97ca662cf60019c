# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Random crop with rotation, zoom and flips, drawn before reading and interpolated on the device.

The draw comes first, so that only the region the crop needs is read from the store: the crop itself in the 64 % of
samples that are neither rotated nor zoomed, the bounding box of the transformed crop otherwise.

Departure from the reference: it interpolates by cubic splines on the CPU; this is trilinear on the training device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SpatialCrop", "SpatialDraw"]

_SLAB = 8  # planes interpolated at once on a CPU: the sampling grid of a whole crop would not fit its cache


@dataclass(frozen=True)
class SpatialDraw:
    """Where a crop lies in its volume and how it is transformed.

    Attributes:
        low: lower corner of the untransformed crop in voxels of the volume; may lie outside it.
        matrix: ``(3, 3)`` map from offsets to the crop's centre to offsets in the volume, None if it is the identity.
        flips: which axes are mirrored at the end.
        start: lower corner of the region to read.
        stop: upper corner of that region, exclusive; both within the volume.
    """

    low: tuple[int, int, int]
    matrix: tuple[tuple[float, ...], ...] | None
    flips: tuple[bool, bool, bool]
    start: tuple[int, int, int]
    stop: tuple[int, int, int]


class SpatialCrop:
    """Draw and cut random crops; the augmentation of MAE, SimMIM and Spark3D.

    With the default probabilities these are the published values; rotation and zoom fire independently, so that 36 % of
    the crops are interpolated.

    Args:
        patch_size: sides of the crop in voxels, one or three.
        rotation_probability: share of crops that are rotated, by three angles.
        rotation_degrees: each angle is uniform in plus or minus this.
        zoom_probability: share of crops that are zoomed, by one factor for all axes.
        zoom_range: with probability one half uniform in (low, 1), else in (1, high); above 1 shows more of the volume.
        flip_probability: for each axis.
        centred: take the middle of the volume instead of a random place.

    Example:
        >>> crop = SpatialCrop(4, rotation_probability=0, zoom_probability=0, flip_probability=0)
        >>> draw = crop.draw(np.random.default_rng(0), (10, 10, 3))
        >>> draw.low, draw.start, draw.stop
        ((5, 4, 0), (5, 4, 0), (9, 8, 3))
        >>> crop.apply(torch.ones(4, 4, 3), draw).shape
        torch.Size([4, 4, 4])
    """

    def __init__(
        self,
        patch_size: int | Sequence[int],
        *,
        rotation_probability: float = 0.2,
        rotation_degrees: float = 30.0,
        zoom_probability: float = 0.2,
        zoom_range: Sequence[float] = (0.7, 1.4),
        flip_probability: float = 0.5,
        centred: bool = False,
    ) -> None:
        sides = [patch_size] * 3 if isinstance(patch_size, int) else list(patch_size)
        if len(sides) != 3 or any(side < 1 for side in sides):
            raise ValueError(f"patch_size {patch_size} must be one or three positive sides")
        self.patch_size = (sides[0], sides[1], sides[2])
        self.rotation_probability = rotation_probability
        self.rotation_degrees = rotation_degrees
        self.zoom_probability = zoom_probability
        self.zoom_range = (float(zoom_range[0]), float(zoom_range[1]))
        self.flip_probability = flip_probability
        self.centred = centred

    def draw(self, rng: np.random.Generator, shape: Sequence[int]) -> SpatialDraw:
        """Place one crop in a volume of ``shape``; a side shorter than the crop is centred in it."""
        low = []
        for side, size in zip(shape, self.patch_size, strict=True):
            if self.centred:
                low.append((side - size) // 2)
                continue
            lack = max(size - side, 0)
            low.append(int(rng.integers(-(lack // 2) - lack % 2, max(side - size, 0) - lack // 2 + 1)))
        rotates, zooms = rng.random(2) < (self.rotation_probability, self.zoom_probability)
        matrix = np.eye(3)
        if rotates:
            limit = np.deg2rad(self.rotation_degrees)
            matrix = _rotation(rng.uniform(-limit, limit, 3))
        if zooms:
            lowest, highest = self.zoom_range
            matrix = matrix * (rng.uniform(lowest, 1) if rng.random() < 0.5 else rng.uniform(1, highest))
        flips = rng.random(3) < self.flip_probability

        start, stop = np.array(low), np.array(low) + self.patch_size
        if rotates or zooms:
            half = (np.array(self.patch_size) - 1) / 2
            reach = np.abs(matrix) @ half  # of the transformed crop's corners from its centre
            start = np.floor(np.array(low) + half - reach).astype(int)
            stop = np.ceil(np.array(low) + half + reach).astype(int) + 1
        start = np.clip(start, 0, np.array(shape) - 1)
        stop = np.clip(stop, start + 1, shape)
        return SpatialDraw(
            low=(low[0], low[1], low[2]),
            matrix=tuple(tuple(float(v) for v in row) for row in matrix) if rotates or zooms else None,
            flips=(bool(flips[0]), bool(flips[1]), bool(flips[2])),
            start=(int(start[0]), int(start[1]), int(start[2])),
            stop=(int(stop[0]), int(stop[1]), int(stop[2])),
        )

    def apply(self, region: Tensor, draw: SpatialDraw, *, mode: str = "bilinear") -> Tensor:
        """Cut the drawn crop out of the region that was read; deterministic.

        Args:
            region: ``(d, h, w)``, the volume from ``draw.start`` to ``draw.stop``.
            draw: what :meth:`draw` returned.
            mode: ``bilinear`` (trilinear in three dimensions), or ``nearest`` for masks.

        Returns:
            ``patch_size``, float32, 0 outside the volume.
        """
        region = region.float()
        if draw.matrix is None:
            crop = region.new_zeros(self.patch_size)
            into = [slice(a - b, a - b + n) for a, b, n in zip(draw.start, draw.low, region.shape, strict=True)]
            crop[into[0], into[1], into[2]] = region
        else:
            crop = self._interpolate(region, draw, mode)
        axes = [axis for axis, flip in enumerate(draw.flips) if flip]
        return crop.flip(axes) if axes else crop

    def __call__(self, batch: dict[str, Any], name: str = "region") -> Tensor:
        """Cut all crops of a batch: its lists ``region`` and ``spatial`` become ``(B, 1, D, H, W)``.

        Args:
            batch: what the loader gives, on the device.
            name: which list to cut; any other than ``region`` holds masks.
        """
        mode = "bilinear" if name == "region" else "nearest"
        crops = [
            self.apply(region, draw, mode=mode) for region, draw in zip(batch[name], batch["spatial"], strict=True)
        ]
        return torch.stack(crops).unsqueeze(1)

    def _interpolate(self, region: Tensor, draw: SpatialDraw, mode: str) -> Tensor:
        device, (depth, height, width) = region.device, self.patch_size
        matrix = torch.tensor(draw.matrix, dtype=torch.float64)
        half = (torch.tensor(self.patch_size, dtype=torch.float64) - 1) / 2
        centre = torch.tensor(draw.low) + half - torch.tensor(draw.start)
        # output index o reads the region at matrix @ (o - half) + centre; in grid_sample's units -1 and 1 are its ends
        unit = 2 / (torch.tensor(region.shape, dtype=torch.float64) - 1).clamp(min=1)
        matrix = matrix * unit[:, None]
        offset = centre * unit - 1 - matrix @ half
        # grid order is x, y, z; a copy that does not block keeps a GPU from waiting
        matrix = matrix.float().flip(0).to(device, non_blocking=True)
        offset = offset.float().flip(0).to(device, non_blocking=True)
        d, h, w = (torch.arange(n, device=device, dtype=torch.float32) for n in self.patch_size)
        plane = h[:, None, None] * matrix[:, 1] + w[None, :, None] * matrix[:, 2] + offset  # (H, W, 3)
        slab = depth if device.type != "cpu" else _SLAB
        together = 1 if device.type != "cpu" else torch.get_num_threads()  # a CPU's threads share the batch axis only
        source = region[None, None]
        out = []
        for first in range(0, depth, slab * together):
            planes = d[first : first + slab * together]
            count = -(-len(planes) // slab)
            rows = F.pad(planes, (0, count * slab - len(planes))).view(count, slab)
            grid = rows[:, :, None, None, None] * matrix[:, 0] + plane  # (count, slab, H, W, 3)
            part = F.grid_sample(source.expand(count, -1, -1, -1, -1), grid, mode=mode, align_corners=True)
            out.append(part.reshape(count * slab, height, width)[: len(planes)])
        return torch.cat(out)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Return the rotation by three angles in radians, about each axis in turn."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = [a for a in range(3) if a != axis]
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    return matrix
