# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Models Genesis: spoil a crop in several ways at once, restore it (Zhou et al., arXiv:2004.07882).

=========  ========================  ==================================================================
views      ``image``                 ``(B, 1, D, H, W)`` crop, flipped, then shuffled, bent and painted over
           ``target``                ``(B, 1, D, H, W)`` the same crop, flipped only, z-scored
           ``ignored``               ``(B, 1, D, H, W)`` boolean, flipped too; only if the batch has ``anonymised``
method     ``reconstruction``        ``(B, 1, D, H, W)`` the crop as the network restores it
loss       scalar                    mean squared error over all voxels that are not ignored
kept       ``backbone``              encoder and decoder; nothing is thrown away
=========  ========================  ==================================================================

The published recipe cuts its crops without rotation, zoom or flips, so flips are drawn here; it validates with the same
random transform as it trains, and so do we.

As published, and not as in the paper: the paper scales intensities to [0, 1], the published recipe feeds z-scores to
the same transform. The intensity curve is defined on [0, 1], so everything below 0 takes its value at 0 and everything
above 1 its value at 1; painted noise is uniform in [0, 1], the upper half of what z-scores usually span.

Departures, on purpose: the published recipe ignores no voxel; with masks of anonymised voxels those are left out of the
loss. The intensity curve is read from a table of 16,384 steps instead of a search among 100,000 points, which changes
it by less than 0.001 but where it is all but vertical. Permutations and noise are made on the training device from
seeds of the sample's own stream, so they repeat on one kind of device, but a CPU and a GPU make different ones of the
same law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..losses import weighted_mean
from ..networks import Primus, ResEncUNet
from ..views import SpatialCrop, axis_numbers, view_stream

__all__ = ["GenesisDraw", "GenesisViews", "RestorationLoss", "RestorationNetwork"]

_FLIP_ROUNDS = 3
_PAINT_ROUNDS, _PAINT_AGAIN = 5, 0.95
_MARGIN = 3  # voxels between a painted or kept box and the faces of the crop
_STEPS = 16384  # of the table that holds an intensity curve
_TOGETHER = 64  # boxes permuted by one sort on a CPU: more would not fit its cache


@dataclass(frozen=True)
class GenesisDraw:
    """How one crop is spoiled. Boxes are ``(n, 2, 3)``: lower corner and sides, in the order they are written.

    Attributes:
        flips: axes of ``(D, H, W)`` that are mirrored.
        shuffled: boxes whose voxels are permuted; none if the crop is not shuffled.
        curve: ``(4, 2)`` control points (before, after) of the intensity curve, None if intensities are kept.
        inpainted: boxes filled with noise.
        kept: the only boxes that noise leaves; none if the crop is not painted from outside.
        seeds: of the permutations and of the noise.
    """

    flips: tuple[int, ...]
    shuffled: np.ndarray
    curve: np.ndarray | None
    inpainted: np.ndarray
    kept: np.ndarray
    seeds: tuple[int, int]


class GenesisViews:
    """Cut the crops and spoil a copy of each; the defaults are the published values.

    Sides of boxes are uniform and follow the crop's side ``s`` along each axis: shuffled 1 to ``s // 10``, in-painted
    ``s // 6`` to ``s // 3``, kept by out-painting ``s - 4 * s // 7`` to ``s - 3 * s // 7``. At 160 voxels that is 1 to
    16, 26 to 53 and 69 to 92. Painted and kept boxes stay 3 voxels away from the faces of the crop.

    Args:
        spatial: how crops are cut; the published recipe neither rotates, zooms nor flips there.
        flip_probability: for each of up to three rounds, the first that fails being the last; a round flips one axis.
        mirror_axes: axes that may be flipped, by number or in the words of :mod:`common.views.axes`; a round that draws
            another flips nothing.
        shuffle_probability: share of crops that are shuffled.
        shuffle_boxes: boxes in a shuffled crop; they may overlap, and then the later one is seen.
        intensity_probability: share of crops whose intensities follow a random curve, rising as often as falling.
        paint_probability: share of crops that are painted.
        inpaint_share: share of those where boxes are painted; in the others everything but some boxes is.

    Raises:
        ValueError: if a crop side is too short for the boxes.

    Example:
        >>> views = GenesisViews(SpatialCrop(32), shuffle_probability=1.0)
        >>> draw = views.draw(torch.Generator().manual_seed(0))
        >>> draw.shuffled.shape, int(draw.shuffled[:, 1].max())
        ((10000, 2, 3), 3)
        >>> views.apply(torch.zeros(32, 32, 32), draw).shape
        torch.Size([32, 32, 32])
    """

    def __init__(
        self,
        spatial: SpatialCrop,
        *,
        flip_probability: float = 0.4,
        mirror_axes: Sequence[int | str] = (0, 1, 2),
        shuffle_probability: float = 0.5,
        shuffle_boxes: int = 10000,
        intensity_probability: float = 0.9,
        paint_probability: float = 0.9,
        inpaint_share: float = 0.2,
    ) -> None:
        for side in spatial.patch_size:
            if side < 10 or 3 * side // 7 < 2 * _MARGIN:
                raise ValueError(
                    f"patch_size {list(spatial.patch_size)} has a side of {side} voxels, too short for the boxes of "
                    f"Models Genesis: a kept box of up to {side - 3 * side // 7} with {_MARGIN} on both ends, "
                    f"and shuffled boxes of up to {side // 10}"
                )
        self.spatial = spatial
        self.flip_probability, self.mirror_axes = flip_probability, axis_numbers(mirror_axes)
        self.shuffle_probability = shuffle_probability
        self.shuffle_boxes = shuffle_boxes
        self.intensity_probability = intensity_probability
        self.paint_probability = paint_probability
        self.inpaint_share = inpaint_share

    def draw(self, generator: torch.Generator) -> GenesisDraw:
        """Draw how one crop is spoiled."""
        side = np.array(self.spatial.patch_size)
        shuffles, bends, paints, inpaints, falls = torch.rand(5, generator=generator).tolist()

        # an axis that is flipped twice is back where it was
        axes = torch.randint(3, (_rounds(generator, _FLIP_ROUNDS, self.flip_probability),), generator=generator)
        flips = tuple(axis for axis in self.mirror_axes if int((axes == axis).sum()) % 2)

        count = self.shuffle_boxes if shuffles < self.shuffle_probability else 0
        shuffled = _boxes(generator, count, side, np.ones_like(side), side // 10)

        curve = None
        if bends < self.intensity_probability:
            # from (0, 0) to (1, 1) or from (0, 1) to (1, 0); all heights lie between, so the curve is monotone
            start = 0.0 if falls < 0.5 else 1.0
            middle = torch.rand(2, 2, generator=generator, dtype=torch.float64).numpy()
            curve = np.array([[0.0, start], *middle, [1.0, 1.0 - start]])

        inside, outside = 0, 0
        if paints < self.paint_probability:
            if inpaints < self.inpaint_share:
                inside = _rounds(generator, _PAINT_ROUNDS, _PAINT_AGAIN)
            else:  # the first box is always kept
                outside = 1 + _rounds(generator, _PAINT_ROUNDS - 1, _PAINT_AGAIN)
        inpainted = _boxes(generator, inside, side, side // 6, side // 3, margin=_MARGIN)
        kept = _boxes(generator, outside, side, side - 4 * side // 7, side - 3 * side // 7, margin=_MARGIN)

        permutations, noise = torch.randint(2**63 - 1, (2,), generator=generator).tolist()
        return GenesisDraw(flips, shuffled, curve, inpainted, kept, (permutations, noise))

    def apply(self, crop: Tensor, draw: GenesisDraw) -> Tensor:
        """Spoil a crop that is already flipped, ``(D, H, W)`` to ``(D, H, W)``; deterministic."""
        # texture: permuting the voxels of small boxes hides detail but leaves shapes
        if len(draw.shuffled):
            crop = crop.flatten().index_select(0, _shuffle(crop, draw.shuffled, draw.seeds[0])).view_as(crop)
        # appearance: a monotone curve changes what tissue looks like but not where it ends
        if draw.curve is not None:
            crop = _bend(crop, draw.curve)
        # context: noise in boxes must be filled from around them, noise around boxes from inside them
        if len(draw.inpainted) or len(draw.kept):
            crop = _paint(crop, draw)
        return crop

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map a batch of regions, spatial draws and sample keys on the device to ``image`` and ``target``.

        With masks of ``anonymised`` voxels in the batch, ``ignored`` is true there.
        """
        draws = [self.draw(view_stream(key)) for key in batch["key"]]

        def flip(crops: Tensor) -> Tensor:
            return torch.stack(
                [crop.flip([1 + axis for axis in d.flips]) for crop, d in zip(crops, draws, strict=True)]
            )

        target = flip(self.spatial(batch))  # (B, 1, D, H, W)
        image = torch.stack([self.apply(crop[0], draw) for crop, draw in zip(target, draws, strict=True)]).unsqueeze(1)
        views = {"image": image, "target": target}
        if "anonymised" in batch:
            views["ignored"] = flip(self.spatial(batch, name="anonymised")) > 0
        return views


class RestorationNetwork(nn.Module):
    """Restore a spoiled crop with the backbone alone."""

    def __init__(self, backbone: ResEncUNet | Primus) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"reconstruction": (B, 1, D, H, W)}``."""
        return {"reconstruction": self.backbone(batch["image"])}


class RestorationLoss(nn.Module):
    """Mean squared error over all voxels that are not ignored, in float32.

    A batch in which everything is ignored costs 0: refusing it would make the host wait for the device in every step.

    Example:
        >>> target, ignored = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)
        >>> reconstruction = torch.ones(1, 1, 2, 2, 2)
        >>> reconstruction[0, 0, 0], ignored[0, 0, 0] = 9.0, True
        >>> float(RestorationLoss()({"reconstruction": reconstruction}, {"target": target, "ignored": ignored}))
        1.0
    """

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Compare ``pred["reconstruction"]`` with ``batch["target"]``, both ``(B, 1, D, H, W)``, but not in
        ``batch["ignored"]``.
        """
        error = (pred["reconstruction"].float() - batch["target"].float()).square()
        if "ignored" not in batch:
            return error.mean()
        counted = (~batch["ignored"]).float()
        return weighted_mean(error * counted, counted)


def _rounds(generator: torch.Generator, most: int, probability: float) -> int:
    """Count successes before the first failure, at most ``most``."""
    return int((torch.rand(most, generator=generator) < probability).cumprod(0).sum())


def _boxes(
    generator: torch.Generator,
    count: int,
    crop: np.ndarray,
    shortest: np.ndarray,
    longest: np.ndarray,
    *,
    margin: int = 0,
) -> np.ndarray:
    """Draw ``(count, 2, 3)`` lower corners and sides, uniform within a crop of the given sides; both ends included."""
    place, size = torch.rand(2, count, 3, generator=generator, dtype=torch.float64).numpy()
    sides = shortest + (size * (longest - shortest + 1)).astype(np.int64)
    low = margin + (place * (crop - 2 * margin - sides + 1)).astype(np.int64)
    return np.stack([low, sides], 1)


def _shuffle(crop: Tensor, boxes: np.ndarray, seed: int) -> Tensor:
    """Return for every voxel of the flattened crop the voxel whose value it takes.

    Each box permutes the values of the original crop, all orders being equally likely; later boxes overwrite.
    """
    if crop.device.type == "cpu":
        return torch.from_numpy(_shuffle_by_numpy(boxes, crop.shape, seed))
    return _shuffle_by_torch(boxes, crop.shape, seed, crop.device)


def _shuffle_by_numpy(boxes: np.ndarray, shape: Sequence[int], seed: int) -> np.ndarray:
    """Sort packed keys (box, random number, voxel), some boxes at a time: several times faster on a CPU than torch."""
    random = np.random.Generator(np.random.SFC64(seed))
    _, height, width = shape
    source = np.arange(np.prod(shape), dtype=np.int32)
    for first in range(0, len(boxes), _TOGETHER):
        low, sides = boxes[first : first + _TOGETHER].transpose(1, 0, 2)
        # the rows of every box, then the voxels of every row
        rows = sides[:, 0] * sides[:, 1]
        box = np.repeat(np.arange(len(rows)), rows)
        d, h = np.divmod(np.arange(len(box)) - np.repeat(rows.cumsum() - rows, rows), sides[box, 1])
        start = ((low[box, 0] + d) * height + low[box, 1] + h) * width + low[box, 2]
        length = sides[box, 2]
        end = length.cumsum()
        order = np.arange(end[-1], dtype=np.uint64)
        voxel = np.repeat(start - (end - length), length) + order.view(np.int64)
        # one key per voxel: its box in the top bits, its number in the bottom ones, random bits (some 40) between
        top, bottom = (_TOGETHER - 1).bit_length(), int(end[-1]).bit_length()
        key = random.integers(2**64 - 1, size=len(order), dtype=np.uint64, endpoint=True)
        key = (key >> np.uint64(top + bottom)) << np.uint64(bottom)
        key |= np.repeat(box.astype(np.uint64) << np.uint64(64 - top), length)
        key |= order
        key.sort()
        key &= np.uint64(2**bottom - 1)
        source[voxel] = voxel[key.view(np.int64)]  # in order, so the last box to write a voxel stays
    return source


def _shuffle_by_torch(boxes: np.ndarray, shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Do all boxes at once on the device, without waiting for it and whatever order its threads write in."""
    generator = torch.Generator(device).manual_seed(seed)
    _, height, width = shape
    total = int(boxes[:, 1].prod(1).sum())
    low, sides = torch.from_numpy(boxes).to(device, non_blocking=True).unbind(1)  # (n, 3) each
    volume = sides.prod(1)
    box = torch.repeat_interleave(torch.arange(len(boxes), device=device), volume, output_size=total)
    order = torch.arange(total, device=device)
    place = order - (volume.cumsum(0) - volume)[box]
    row, w = place // sides[box, 2], place % sides[box, 2]
    d, h = row // sides[box, 1], row % sides[box, 1]
    voxel = ((low[box, 0] + d) * height + low[box, 1] + h) * width + low[box, 2] + w
    key = box << 44 | torch.randint(2**44, (total,), generator=generator, device=device)
    permuted = voxel[key.argsort()]
    # the last box to write a voxel is the one whose turn there has the highest number
    untouched = torch.arange(height * width * shape[0], device=device)
    last = torch.full_like(untouched, -1).scatter_reduce_(0, voxel, order, "amax")
    return torch.where(last >= 0, permuted[last.clamp(min=0)], untouched)


def _bend(crop: Tensor, curve: np.ndarray) -> Tensor:
    """Map intensities through the cubic Bezier curve of four control points; outside [0, 1] it keeps its end values."""
    t = np.linspace(0, 1, _STEPS + 1)[:, None]
    bernstein = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    before, after = (bernstein @ curve).T
    height = np.interp(t[:, 0], before, after)
    table = torch.from_numpy(np.stack([height, np.diff(height, append=height[-1])])).float()
    place = crop.flatten().clamp(0, 1).mul_(_STEPS)
    step = place.int()
    value, slope = (row.index_select(0, step) for row in table.to(crop.device, non_blocking=True))
    return value.addcmul_(slope, place.sub_(step)).view_as(crop)


def _paint(crop: Tensor, draw: GenesisDraw) -> Tensor:
    """Fill boxes with noise uniform in [0, 1), or everything but the kept boxes."""
    noise = torch.rand(
        crop.shape, generator=torch.Generator(crop.device).manual_seed(draw.seeds[1]), device=crop.device
    )
    painted, source, boxes = (noise, crop, draw.kept) if len(draw.kept) else (crop.clone(), noise, draw.inpainted)
    for low, sides in boxes.tolist():
        box = tuple(slice(a, a + n) for a, n in zip(low, sides, strict=True))
        painted[box] = source[box]
    return painted
