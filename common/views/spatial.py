# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Random crop with rotation, zoom and flips, drawn before reading and interpolated on the device.

The draw comes first, so that only the region the crop needs is read from the store: the crop itself in the 64 % of
samples that are neither rotated nor zoomed, the bounding box of the transformed crop otherwise.

Images are interpolated trilinearly, masks take the nearest voxel. In a label map each label is interpolated trilinearly
on its own and the largest share wins, as in nnU-Net v2 (Isensee et al., doi:10.1038/s41592-020-01008-z). No volume for
each label is made: only the eight labels around a place have a share in it.

Departures from the reference: its pre-training interpolates by cubic splines on the CPU; this is trilinear on the
training device. Earlier releases of batchgeneratorsv2 give what lies outside the volume to no label, later ones to the
background; so does this, as the image is 0 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..transforms.votes import largest_share, mixed_cells
from .axes import axis_numbers

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
    """Draw and cut random crops; the augmentation of MAE, SimMIM and Spark3D, and of fine-tuning.

    With the default probabilities these are the published values; rotation and zoom fire independently, so that 36 % of
    the crops are interpolated. Fine-tuning has the same but for ``uniform_zoom=True``.

    Args:
        patch_size: sides of the crop in voxels, one or three.
        rotation_probability: share of crops that are rotated, by three angles.
        rotation_degrees: each angle is uniform in plus or minus this.
        zoom_probability: share of crops that are zoomed, by one factor for all axes.
        zoom_range: with probability one half uniform in (low, 1), else in (1, high); above 1 shows more of the volume.
        flip_probability: for each of ``mirror_axes``.
        mirror_axes: axes that may be flipped, by number or in the words of :mod:`common.views.axes`; without the last,
            left stays left.
        centred: take the middle of the volume instead of a random place.
        uniform_zoom: draw the factor uniformly in the whole range, instead of from one half of it or the other.

    Raises:
        ValueError: if ``patch_size`` is not one or three positive sides.

    Example:
        >>> crop = SpatialCrop(4, rotation_probability=0, zoom_probability=0, flip_probability=0)
        >>> draw = crop.draw(np.random.default_rng(0), (10, 10, 3))
        >>> draw.low, draw.start, draw.stop
        ((5, 4, 0), (5, 4, 0), (9, 8, 3))
        >>> crop.apply(torch.ones(4, 4, 3), draw).shape
        torch.Size([4, 4, 4])
        >>> crop.draw(np.random.default_rng(0), (10, 10, 3), centre=(0, 6, 1)).low
        (0, 4, 0)
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
        mirror_axes: Sequence[int | str] = (0, 1, 2),
        centred: bool = False,
        uniform_zoom: bool = False,
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
        self.mirror_axes = axis_numbers(mirror_axes)
        self.centred = centred
        self.uniform_zoom = uniform_zoom

    def draw(self, rng: np.random.Generator, shape: Sequence[int], centre: Sequence[int] | None = None) -> SpatialDraw:
        """Place one crop in a volume of ``shape``; a side shorter than the crop is centred in it.

        Args:
            rng: where the draw comes from; the same numbers are drawn with and without ``centre``.
            shape: of the volume.
            centre: voxel to put into the middle of the crop, or as near to it as a crop within the volume allows; for
                crops that are to show a certain label. A crop that is neither rotated nor zoomed contains it.

        Raises:
            ValueError: if ``centre`` lies outside the volume.
        """
        if centre is not None and not all(0 <= at < side for at, side in zip(centre, shape, strict=True)):
            raise ValueError(f"centre {tuple(centre)} lies outside a volume of {tuple(shape)}")
        low = []
        for side, size in zip(shape, self.patch_size, strict=True):
            if self.centred:
                low.append((side - size) // 2)
                continue
            lack = max(size - side, 0)
            low.append(int(rng.integers(-(lack // 2) - lack % 2, max(side - size, 0) - lack // 2 + 1)))
        if centre is not None:
            places = zip(low, centre, shape, self.patch_size, strict=True)
            low = [min(max(at - size // 2, 0), side - size) if side > size else a for a, at, side, size in places]
        rotates, zooms = rng.random(2) < (self.rotation_probability, self.zoom_probability)
        matrix = np.eye(3)
        if rotates:
            limit = np.deg2rad(self.rotation_degrees)
            matrix = _rotation(rng.uniform(-limit, limit, 3))
        if zooms:
            lowest, highest = self.zoom_range
            if not self.uniform_zoom:
                lowest, highest = (lowest, 1) if rng.random() < 0.5 else (1, highest)
            matrix = matrix * rng.uniform(lowest, highest)
        flips = (rng.random(3) < self.flip_probability) & np.isin(range(3), self.mirror_axes)

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
            region: ``(d, h, w)`` or ``(C, d, h, w)``, the volume from ``draw.start`` to ``draw.stop``.
            draw: what :meth:`draw` returned.
            mode: ``bilinear`` (trilinear in three dimensions), or ``nearest`` for masks.

        Returns:
            ``patch_size``, behind the channels if there are any; float32, 0 outside the volume.
        """
        region = region.float()
        return _flip(self._cut(region, draw, 0) if draw.matrix is None else self._interpolate(region, draw, mode), draw)

    def apply_label(self, region: Tensor, draw: SpatialDraw, *, outside: int = 0) -> Tensor:
        """Cut the drawn crop out of a label map, without a label that was not there; deterministic.

        Where the crop is rotated or zoomed, each label is interpolated trilinearly on its own and the largest share
        wins; of equal shares the one of the smallest label.

        Args:
            region: ``(d, h, w)`` of any integer type, the label map from ``draw.start`` to ``draw.stop``.
            draw: what :meth:`draw` returned, the same as for the image.
            outside: label of what lies outside the volume.

        Returns:
            ``patch_size``, of the region's type; int16 if that is unsigned and ``outside`` negative.

        Raises:
            ValueError: if the region holds no integers.

        Example:
            >>> crop = SpatialCrop((2, 1, 3), rotation_probability=0, zoom_probability=0, flip_probability=0)
            >>> draw = crop.draw(np.random.default_rng(0), (2, 1, 1))
            >>> crop.apply_label(torch.tensor([[[3]], [[5]]]), draw, outside=-1).squeeze(1)
            tensor([[-1,  3, -1],
                    [-1,  5, -1]])
        """
        if region.is_floating_point() or region.is_complex():
            raise ValueError(f"a label map of {region.dtype} has no integer labels")
        if outside < 0 and not region.dtype.is_signed:
            region = region.short()
        cut = self._cut if draw.matrix is None else self._interpolate_label
        return _flip(cut(region, draw, outside), draw)

    def __call__(self, batch: dict[str, Any], name: str = "region") -> Tensor:
        """Cut all crops of a batch: its lists ``region`` and ``spatial`` become ``(B, C, D, H, W)``.

        Args:
            batch: what the loader gives, on the device; regions without a channel axis have one channel.
            name: which list to cut; any other than ``region`` holds masks.
        """
        mode = "bilinear" if name == "region" else "nearest"
        crops = [
            self.apply(region, draw, mode=mode) for region, draw in zip(batch[name], batch["spatial"], strict=True)
        ]
        return torch.stack([crop if crop.ndim == 4 else crop[None] for crop in crops])

    def _cut(self, region: Tensor, draw: SpatialDraw, outside: int) -> Tensor:
        """Copy the region into a crop that is neither rotated nor zoomed."""
        crop = region.new_full((*region.shape[:-3], *self.patch_size), outside)
        into = [slice(a - b, a - b + n) for a, b, n in zip(draw.start, draw.low, region.shape[-3:], strict=True)]
        crop[..., into[0], into[1], into[2]] = region
        return crop

    def _interpolate(self, region: Tensor, draw: SpatialDraw, mode: str) -> Tensor:
        device, (depth, height, width) = region.device, self.patch_size
        if 1 in region.shape[-3:]:  # grid_sample sees a single plane all along its axis, but not with zeros behind it
            region = F.pad(region, [end for side in reversed(region.shape[-3:]) for end in (0, int(side == 1))])
        matrix = torch.tensor(draw.matrix, dtype=torch.float64)
        half = (torch.tensor(self.patch_size, dtype=torch.float64) - 1) / 2
        centre = torch.tensor(draw.low) + half - torch.tensor(draw.start)
        # output index o reads the region at matrix @ (o - half) + centre; in grid_sample's units -1 and 1 are its ends
        unit = 2 / (torch.tensor(region.shape[-3:], dtype=torch.float64) - 1)
        matrix = matrix * unit[:, None]
        offset = centre * unit - 1 - matrix @ half
        # grid order is x, y, z; a copy that does not block keeps a GPU from waiting
        matrix = matrix.float().flip(0).to(device, non_blocking=True)
        offset = offset.float().flip(0).to(device, non_blocking=True)
        d, h, w = (torch.arange(n, device=device, dtype=torch.float32) for n in self.patch_size)
        plane = h[:, None, None] * matrix[:, 1] + w[None, :, None] * matrix[:, 2] + offset  # (H, W, 3)
        slab = depth if device.type != "cpu" else _SLAB
        together = 1 if device.type != "cpu" else torch.get_num_threads()  # a CPU's threads share the batch axis only
        channels = region.shape[:-3]
        source = region.view(1, -1, *region.shape[-3:])
        out = []
        for first in range(0, depth, slab * together):
            planes = d[first : first + slab * together]
            count = -(-len(planes) // slab)
            rows = F.pad(planes, (0, count * slab - len(planes))).view(count, slab)
            grid = rows[:, :, None, None, None] * matrix[:, 0] + plane  # (count, slab, H, W, 3)
            part = F.grid_sample(source.expand(count, -1, -1, -1, -1), grid, mode=mode, align_corners=True)
            part = part.transpose(0, 1)  # (C, count, slab, H, W)
            out.append(part.reshape(*channels, count * slab, height, width)[..., : len(planes), :, :])
        return torch.cat(out, dim=-3)

    def _interpolate_label(self, region: Tensor, draw: SpatialDraw, outside: int) -> Tensor:
        on_cpu, (depth, height, width) = region.device.type == "cpu", self.patch_size
        padded = F.pad(region, (1,) * 6, value=outside)
        steps = padded.stride()
        labels = padded.flatten()
        mixed = mixed_cells(padded).flatten() if on_cpu else None
        d, h, w = (torch.arange(n, device=region.device, dtype=torch.float32) for n in self.patch_size)
        d, h, w = d - (depth - 1) / 2, h - (height - 1) / 2, w - (width - 1) / 2  # offsets to the crop's centre
        sides = zip(draw.low, self.patch_size, draw.start, strict=True)
        centre = [low + (size - 1) / 2 - start + 1 for low, size, start in sides]  # in the padded region
        assert draw.matrix is not None
        planes = [h[:, None] * row[1] + w * row[2] + at for row, at in zip(draw.matrix, centre, strict=True)]
        slab = _SLAB if on_cpu else depth
        out = []
        for first in range(0, depth, slab):
            rows = zip(draw.matrix, planes, region.shape, strict=True)
            places = [
                (d[first : first + slab, None, None] * row[0] + plane).clamp_(0, side + 1).flatten()
                for row, plane, side in rows
            ]
            corners = [place.floor().clamp_(max=side) for place, side in zip(places, region.shape, strict=True)]
            shares = [place.sub_(corner) for place, corner in zip(places, corners, strict=True)]
            z, y, x = (corner.long() for corner in corners)
            cell = z * steps[0] + y * steps[1] + x * steps[2]  # lower corner, in the flattened, padded label map
            if mixed is None:  # asking where labels meet would make a GPU wait
                crop = largest_share(labels, cell, shares, steps)
            else:
                crop = labels.take(cell)
                meet = mixed.take(cell).nonzero().squeeze(1)
                crop[meet] = largest_share(labels, cell[meet], [share[meet] for share in shares], steps)
            out.append(crop.view(-1, height, width))
        return torch.cat(out)


def _flip(crop: Tensor, draw: SpatialDraw) -> Tensor:
    axes = [axis - 3 for axis, flip in enumerate(draw.flips) if flip]
    return crop.flip(axes) if axes else crop


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Return the rotation by three angles in radians, about each axis in turn."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = [a for a in range(3) if a != axis]
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    return matrix
