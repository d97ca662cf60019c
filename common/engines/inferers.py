# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Sliding-window inference by nnU-Net's rule, in memory that does not grow with the volume on the device.

=========  ==========================================================================
goes in    volume ``(B, C, D, H, W)`` on the device; any size
between    tiles ``(n, C, *roi_size)``; one row of tiles ``(classes, roi_size[0], H, W)``
comes out  logits ``(B, classes, D, H, W)``, float32
=========  ==========================================================================

MONAI's own sliding window lays tiles at a fixed step and shifts the last one; the reference spreads them evenly. Two
departures from the reference: sums are float32 (its float16 loses the smallest weights), and no weight is less than a
thousandth of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations, product

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from tqdm import tqdm

from ..errors import DataError, SettingsError
from ..memory import comfortable_bytes, room

__all__ = ["GaussianSlidingWindow", "gaussian_weights", "tile_starts"]

_LEAST_WEIGHT = 1e-3
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
        >>> float(weights[8, 8, 4]), round(float(weights.min()), 6)
        (1.0, 0.001)
    """
    weights = np.ones(())
    for side in shape:
        line = np.zeros(side)
        line[side // 2] = 1
        weights = weights[..., None] * gaussian_filter1d(line, side / 8, mode="constant", truncate=4)
    return torch.from_numpy(weights / weights.max()).clamp(min=_LEAST_WEIGHT).float()


class GaussianSlidingWindow(Inferer):
    """Predict a volume tile by tile, tiles weighted by a Gaussian; optionally averaged over mirrored copies.

    Tiles go through the volume row by row along its first axis. Once a row is done, the slices that no later tile
    touches are divided by their weights and put away, so the device holds the sums of one row only.

    Args:
        roi_size: sides of a tile in voxels, one or three. A smaller volume is padded with zeros on both sides.
        overlap: share of a tile that the next one covers at least, from 0 to below 1.
        mirror_axes: spatial axes to mirror, e.g. (0, 1, 2) for the mean of the logits of eight copies.
        sw_batch_size: tiles that go through the network at once.
        accumulate_on: where sums and result are kept: ``device``, ``cpu``, or ``auto``, the device as long as they take
            less than half of its free memory.
        memory_limit_gb: most memory of the CPU for a result, by default half of what is free; a larger one is kept in
            a file.
        scratch_dir: folder of that file.

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
        mirror_axes: Sequence[int] = (),
        sw_batch_size: int = 1,
        accumulate_on: str = "auto",
        memory_limit_gb: float | None = None,
        scratch_dir: str | None = None,
    ) -> None:
        super().__init__()
        sides = [roi_size] * 3 if isinstance(roi_size, int) else [int(side) for side in roi_size]
        if len(sides) != 3 or min(sides) < 1:
            raise SettingsError(f"patch_size is {roi_size!r}; it must be one or three positive numbers of voxels")
        if not 0 <= overlap < 1:
            raise SettingsError(f"overlap is {overlap!r}; it must be from 0 to below 1")
        if not set(mirror_axes) <= {0, 1, 2}:
            raise SettingsError(f"mirror_axes is {mirror_axes!r}; axes are 0, 1 and 2")
        if sw_batch_size < 1:
            raise SettingsError(f"tiles_per_step is {sw_batch_size!r}; it must be at least 1")
        if accumulate_on not in _PLACES:
            raise SettingsError(f"accumulate_on is {accumulate_on!r}; it must be one of {', '.join(_PLACES)}")
        self.roi_size, self.overlap, self.sw_batch_size = sides, overlap, sw_batch_size
        axes = sorted(set(mirror_axes))
        self.flips = [[a + 2 for a in some] for some in chain(*(combinations(axes, n) for n in range(len(axes) + 1)))]
        self.accumulate_on, self.memory_limit_gb, self.scratch_dir = accumulate_on, memory_limit_gb, scratch_dir
        self.weights = gaussian_weights(sides)

    @torch.no_grad()
    def __call__(self, inputs: Tensor, network: Callable[..., Tensor]) -> Tensor:  # type: ignore[override]
        """Map ``(B, C, D, H, W)`` to the network's logits of the same size, float32, on the device or the CPU.

        Raises:
            DataError: if the network's output is not finite.
        """
        volume = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        samples = [self._predict(sample, network) for sample in volume]
        return samples[0][None] if len(samples) == 1 else torch.stack(samples)

    def _predict(self, volume: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Map one sample ``(C, D, H, W)`` to ``(classes, D, H, W)``."""
        size = list(volume.shape[1:])
        missing = [max(tile - side, 0) for side, tile in zip(size, self.roi_size, strict=True)]
        before = [m // 2 for m in missing]
        if any(missing):  # the odd voxel goes to the upper side
            sides = [(b, m - b) for b, m in zip(before, missing, strict=True)]
            volume = F.pad(volume, [n for pair in reversed(sides) for n in pair])
        starts = [tile_starts(n, tile, self.overlap) for n, tile in zip(volume.shape[1:], self.roi_size, strict=True)]
        inner = (slice(None), slice(before[1], before[1] + size[1]), slice(before[2], before[2] + size[2]))
        result: Tensor | None = None
        total = math.prod(map(len, starts))
        with tqdm(total=total, desc="tiles", unit="tile", leave=False, disable=total < _MANY_TILES) as bar:
            for first, done in self._rows(volume, starts, network, bar):  # (classes, n, H, W), padded
                result = self._result((done.shape[0], *size), done.device) if result is None else result
                low, high = max(first, before[0]), min(first + done.shape[1], before[0] + size[0])
                if low < high:
                    part = done[:, low - first : high - first][(slice(None), *inner)]
                    result[:, low - before[0] : high - before[0]] = part
        assert result is not None
        return result

    def _rows(
        self, volume: Tensor, starts: list[list[int]], network: Callable[[Tensor], Tensor], bar: tqdm
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield, one after the other, the first slice of a finished part and its logits ``(classes, n, H, W)``."""
        depth = self.roi_size[0]
        logits: Tensor | None = None  # sums over the slices from the current row of tiles on
        weights = torch.zeros(())
        gaussian = self.weights
        ends = [*starts[0][1:], starts[0][-1] + depth]
        for start, end in zip(starts[0], ends, strict=True):
            places = list(product(starts[1], starts[2]))
            for index in range(0, len(places), self.sw_batch_size):
                corners = places[index : index + self.sw_batch_size]
                tiles = [
                    volume[:, start : start + depth, y : y + self.roi_size[1], x : x + self.roi_size[2]]
                    for y, x in corners
                ]
                outputs = self._mirrored(torch.stack(tiles), network)
                if logits is None:
                    shape = (outputs.shape[1], depth, *volume.shape[2:])
                    logits = torch.zeros(shape, device=self._place(shape, outputs.device))
                    weights = torch.zeros(shape[1:], device=logits.device)
                    gaussian = gaussian.to(logits.device)
                for (y, x), output in zip(corners, outputs, strict=True):
                    at = (slice(None), slice(y, y + self.roi_size[1]), slice(x, x + self.roi_size[2]))
                    logits[(slice(None), *at)] += output.to(logits.device) * gaussian
                    weights[at] += gaussian
                bar.update(len(corners))
            assert logits is not None
            done = logits[:, : end - start].div_(weights[: end - start])
            if not torch.isfinite(done).all():
                raise DataError(
                    "the network's output is not finite; add --amp false, or look whether the model's training had "
                    "failed"
                )
            yield start, done
            step = end - start
            for done_with in range(0, depth - step, step):  # move on, keeping what the next row adds to
                to, of = slice(done_with, min(done_with + step, depth - step)), slice(done_with + step, None)
                logits[:, to] = logits[:, of][:, : to.stop - to.start]
                weights[to] = weights[of][: to.stop - to.start]
            logits[:, depth - step :] = 0
            weights[depth - step :] = 0

    def _mirrored(self, tiles: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean of the logits over all combinations of mirrored axes, float32."""
        total = network(tiles).float()
        for dims in self.flips[1:]:
            total = total + network(tiles.flip(dims)).float().flip(dims)
        return total / len(self.flips)

    def _place(self, shape: Sequence[int], device: torch.device) -> torch.device:
        """Return where ``shape`` float32 numbers are kept."""
        if self.accumulate_on == "auto":
            fits = device.type == "cpu" or 4 * math.prod(shape) <= comfortable_bytes(device)
            return device if fits else torch.device("cpu")
        return device if self.accumulate_on == "device" else torch.device("cpu")

    def _result(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return room for the whole volume's logits."""
        if device.type != "cpu" and self._place(shape, device).type != "cpu":
            return torch.empty(tuple(shape), device=device)
        return room(shape, folder=self.scratch_dir, limit_gb=self.memory_limit_gb)
