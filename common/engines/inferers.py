# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Sliding-window inference by nnU-Net's rule, in memory that does not grow with the volume on the device.

=========  ==========================================================================
goes in    volume ``(B, C, D, H, W)`` on the device; any size
between    tiles ``(n, C, *roi_size)``; sums ``(classes, D or roi_size[0], H, W)``, their weights along each axis
comes out  logits ``(B, classes, D, H, W)``, float32; or labels, decided row by row
=========  ==========================================================================

MONAI's own sliding window lays tiles at a fixed step and shifts the last one; the reference spreads them evenly. One
departure from the reference: weights and sums are float32. In its float16 the smallest weights are lost, so that its
logits are rounded at the edges of a volume, in the corners to whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, combinations, product
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor, decollate_batch
from monai.inferers import Inferer
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from ..errors import DataError, SettingsError
from ..memory import comfortable_bytes, room
from ..networks.blocks.convolution import predicting
from ..networks.untrained import refuse_untrained
from ..tasks import SegmentationTask
from ..terminal import progress_bar
from ..transforms.restoring import Decision
from ..views import axis_numbers

if TYPE_CHECKING:
    from monai.transforms import Compose

__all__ = ["DecideSlices", "GaussianSlidingWindow", "all_finite", "gaussian_weights", "tile_starts"]

_MANY_TILES = 30  # a volume of more gets a progress bar of its own
_PLACES = ("auto", "device", "cpu")


def tile_starts(size: int, tile: int, overlap: float = 0.5) -> list[int]:
    """Return where tiles start along an axis: as many as ``overlap`` asks for, evenly spread over its whole length.

    Example:
        >>> tile_starts(300, 160), tile_starts(160, 160), tile_starts(17, 8)
        ([0, 70, 140], [0], [0, 3, 6, 9])
    """
    count = math.ceil((size - tile) / (tile * (1 - overlap))) + 1
    step = (size - tile) / (count - 1) if count > 1 else 0.0
    return [int(np.round(step * index)) for index in range(count)]


def gaussian_weights(shape: Sequence[int]) -> Tensor:
    """Return the weight of every voxel of a tile: a Gaussian of an eighth of its sides, 1 in the middle.

    Example:
        >>> weights = gaussian_weights((16, 16, 8))
        >>> float(weights[8, 8, 4]), f"{float(weights.min()):.1e}"
        (1.0, '3.8e-11')
    """
    weights = torch.ones((), dtype=torch.float64)
    for side in shape:
        weights = weights[..., None] * _line(side)
    return weights.float()


def _line(side: int) -> Tensor:
    """Return the Gaussian along one axis ``(side,)``, float64, 1 in the middle."""
    line = np.zeros(side)
    line[side // 2] = 1
    line = gaussian_filter1d(line, side / 8, mode="constant", truncate=4)
    return torch.from_numpy(line / line.max())


def _covered(size: int, side: int, starts: Sequence[int]) -> Tensor:
    """Return the sum of the weights of all tiles along one axis ``(size,)``, float32; over a volume it is their
    product, since tiles stand in rows along every axis.
    """
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + side] += _line(side)
    return total.float()


class GaussianSlidingWindow(Inferer):
    """Predict a volume tile by tile, tiles weighted by a Gaussian; optionally averaged over mirrored copies.

    Tiles go through the volume row by row along its first axis. Once a row is done, the slices that no later tile
    touches are divided by their weights. They are decided upon at once, see :class:`DecideSlices`, or kept: where the
    logits of the whole volume do not fit on the device, on the CPU, or in a file.

    A network in training mode is one that is sampled, with dropout, to see how sure it is (MONAI Label's scoring does
    so): then the result is probabilities, since the entropy of logits or of label values means nothing.

    Args:
        roi_size: sides of a tile in voxels, one or three. A smaller volume is padded with zeros on both sides.
        overlap: share of a tile that the next one covers at least, from 0 to below 1.
        mirror_axes: axes to mirror, e.g. (0, 1, 2) for the mean of the logits of eight copies; by number or in the
            words of :mod:`common.views.axes`.
        sw_batch_size: tiles that go through the network at once.
        accumulate_on: where sums and result are kept: ``device``, ``cpu``, or ``auto``, the device as long as what is
            kept takes less than half of its free memory.
        memory_limit_gb: most memory of the CPU for a result, by default half of what is free; a larger one is kept in
            a file.
        scratch_dir: folder of that file.
        task: what the outputs are, for probabilities of a sampled network; without it they stay logits.

    Raises:
        SettingsError: if a setting is out of its range.

    Example:
        >>> inferer = GaussianSlidingWindow(4, mirror_axes=(0, 2))
        >>> image = torch.rand(1, 1, 9, 5, 3)
        >>> bool(torch.allclose(inferer(image, lambda tile: tile), image, atol=1e-6))
        True
    """

    def __init__(
        self,
        roi_size: int | Sequence[int],
        *,
        overlap: float = 0.5,
        mirror_axes: Sequence[int | str] = (),
        sw_batch_size: int = 1,
        accumulate_on: str = "auto",
        memory_limit_gb: float | None = None,
        scratch_dir: str | None = None,
        task: SegmentationTask | None = None,
    ) -> None:
        super().__init__()
        sides = [roi_size] * 3 if isinstance(roi_size, int) else [int(side) for side in roi_size]
        if len(sides) != 3 or min(sides) < 1:
            raise SettingsError(f"patch_size is {roi_size!r}; it must be one or three positive numbers of voxels")
        if not 0 <= overlap < 1:
            raise SettingsError(f"overlap is {overlap!r}; it must be from 0 to below 1")
        if sw_batch_size < 1:
            raise SettingsError(f"tiles_per_step is {sw_batch_size!r}; it must be at least 1")
        if accumulate_on not in _PLACES:
            raise SettingsError(f"accumulate_on is {accumulate_on!r}; it must be one of {', '.join(_PLACES)}")
        self.roi_size, self.overlap, self.sw_batch_size = sides, overlap, sw_batch_size
        axes = axis_numbers(mirror_axes)
        self.flips = [[a + 2 for a in some] for some in chain(*(combinations(axes, n) for n in range(len(axes) + 1)))]
        self.accumulate_on, self.memory_limit_gb, self.scratch_dir = accumulate_on, memory_limit_gb, scratch_dir
        self.weights, self.task = gaussian_weights(sides), task

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *,
        decide: Callable[[MetaTensor], Decision] | None = None,
    ) -> Tensor:
        """Map ``(B, C, D, H, W)`` to the network's logits of the same size, float32, on the device or the CPU.

        Args:
            inputs: volumes of one size.
            network: what sees each tile.
            decide: what takes the logits of a volume as they come. Then the result is what it makes of them, ``(B, 1,
                d, h, w)``, and no more than the sums of one row of tiles is ever held.

        Raises:
            DataError: if the network's output is not finite.
            WeightsError: if the network has not been trained to segment.
        """
        refuse_untrained(network)
        volume = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        decisions = [None] * len(volume) if decide is None else [decide(one) for one in decollate_batch(inputs)]
        with predicting():
            samples = [self._predict(*pair, network) for pair in zip(volume, decisions, strict=True)]
        logits = samples[0][None] if len(samples) == 1 else torch.stack(samples)
        if self.task is None or not getattr(network, "training", False):
            return logits
        return logits.softmax(1) if self.task.regions is None else logits.sigmoid()

    def _predict(self, volume: Tensor, decision: Decision | None, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Map one sample ``(C, D, H, W)`` to ``(classes, D, H, W)``, or to what is decided of it."""
        size = list(volume.shape[1:])
        missing = [max(tile - side, 0) for side, tile in zip(size, self.roi_size, strict=True)]
        inner = [slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True)]
        if any(missing):  # the odd voxel goes to the upper side
            volume = F.pad(volume, [n for m in reversed(missing) for n in (m // 2, m - m // 2)])
        starts = [tile_starts(n, tile, self.overlap) for n, tile in zip(volume.shape[1:], self.roi_size, strict=True)]
        depth, height, width = self.roi_size
        covered = [_covered(*axis) for axis in zip(volume.shape[1:], self.roi_size, starts, strict=True)]
        sums = result = torch.empty(0)
        gaussian, whole = self.weights, False
        total = math.prod(map(len, starts))
        bar = progress_bar(total=total, desc="tiles", unit="tile", leave=False, disable=total < _MANY_TILES)
        for start, end in zip(starts[0], [*starts[0][1:], starts[0][-1] + depth], strict=True):
            places = list(product(starts[1], starts[2]))
            for index in range(0, len(places), self.sw_batch_size):
                corners = places[index : index + self.sw_batch_size]
                tiles = [volume[:, start : start + depth, y : y + height, x : x + width] for y, x in corners]
                outputs = self._mirrored(torch.stack(tiles), network)
                if not len(sums):
                    classes = outputs.shape[1]
                    whole, place = self._plan((classes, *volume.shape[1:]), outputs.device, rows=decision is not None)
                    held = volume.shape[1] if whole else depth
                    sums = torch.zeros((classes, held, *volume.shape[2:]), device=place)
                    gaussian, *covered = [one.to(place, non_blocking=True) for one in (gaussian, *covered)]
                    result = sums if whole or decision else self._room((classes, *size))
                first = start if whole else 0  # of the sums, the slice where this row begins
                for (y, x), output in zip(corners, outputs, strict=True):
                    at = (slice(first, first + depth), slice(y, y + height), slice(x, x + width))
                    sums[(slice(None), *at)].addcmul_(output.to(sums.device), gaussian)
                bar.update(len(corners))
            done = sums[:, first : first + end - start]
            done.div_(covered[0][start:end, None, None] * covered[1][:, None] * covered[2])  # not held any longer
            if not all_finite(done):
                raise DataError(
                    "the network's output is not finite; add --amp false, or look whether the model's training had "
                    "failed"
                )
            if not whole:
                low, high = max(start, inner[0].start), min(end, inner[0].stop)
                slices = done[:, low - start : high - start, inner[1], inner[2]]
                if decision:
                    decision.take(slices)
                else:
                    result[:, low - inner[0].start : high - inner[0].start] = slices
                _move_on(sums, end - start)
        bar.close()
        if decision:
            return decision.labels()
        return result[(slice(None), *inner)] if whole else result

    def _mirrored(self, tiles: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean of the logits over all combinations of mirrored axes, float32."""
        total = network(tiles).float()
        for dims in self.flips[1:]:
            total = total + network(tiles.flip(dims)).float().flip(dims)
        return total / len(self.flips)

    def _plan(self, shape: Sequence[int], device: torch.device, *, rows: bool) -> tuple[bool, torch.device]:
        """Return whether the sums of a whole volume ``(classes, D, H, W)`` are kept, or of one row, and where."""
        cpu = torch.device("cpu")
        needed = 4 * math.prod(shape)
        row = needed * self.roi_size[0] // shape[1]
        if device.type != "cpu" and self.accumulate_on != "cpu":
            room_there = comfortable_bytes(device)
            if self.accumulate_on == "device" or needed <= room_there:
                return not rows, device
            if row <= room_there:
                return False, device
        return not rows and needed <= comfortable_bytes(limit_gb=self.memory_limit_gb), cpu

    def _room(self, shape: Sequence[int]) -> Tensor:
        return room(shape, folder=self.scratch_dir, limit_gb=self.memory_limit_gb)


class DecideSlices(Inferer):
    """Run a :class:`GaussianSlidingWindow` and decide labels while it goes, in memory that hardly grows with classes.

    Args:
        inferer: that runs the network.
        transform: preprocessing of the image.
        task: how outputs become labels.
        logits: give the logits of the whole volume instead, for what needs them: probabilities.
    """

    def __init__(
        self, inferer: GaussianSlidingWindow, *, transform: Compose, task: SegmentationTask, logits: bool = False
    ) -> None:
        super().__init__()
        self.inferer, self.decide = inferer, None if logits else partial(Decision, transform=transform, task=task)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor]) -> Tensor:  # type: ignore[override]
        """Map ``(B, C, D, H, W)`` to labels ``(B, 1, d, h, w)`` on the grid before resampling, or to logits."""
        return self.inferer(inputs, network, decide=self.decide)


def all_finite(logits: Tensor) -> bool:
    """Look whether the logits ``(classes, D, H, W)`` of a row are finite: the only value that the host waits for."""
    ends = [end for one in logits for end in torch.aminmax(one)]  # no copies
    return bool(torch.isfinite(torch.stack(ends)).all())


def _move_on(sums: Tensor, step: int) -> None:
    """Drop the first ``step`` slices of ``(classes, slices, H, W)`` in place; zeros follow at the end."""
    slices = sums.shape[1]
    for start in range(0, slices - step, step):  # in pieces that do not overlap what they replace
        count = min(step, slices - step - start)
        sums[:, start : start + count] = sums[:, start + step : start + step + count]
    sums[:, slices - step :] = 0
