# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Noise, blur, brightness, contrast, low resolution, gamma, mirrors and quarter turns of small crops.

====  =======================  ===========================================  ==========================================
step  transform                fires in                                     strength
====  =======================  ===========================================  ==========================================
1     Gaussian noise           10 %                                         standard deviation U(0, 0.1)
2     Gaussian blur            20 % x 50 %                                  sigma U(0.5, 1) voxels
3     brightness               15 %                                         factor U(0.75, 1.25)
4     contrast                 15 %                                         factor half U(0.75, 1), half U(1, 1.25)
5     low resolution           10 % x 50 % (or 25 % x 50 %)                 zoom U(0.5, 1)
6     gamma of the negative    10 %                                         exponent half U(0.7, 1), half U(1, 1.5)
7     gamma                    30 %                                         the same
8     mirrors                  50 %, for each axis                          the whole axis
9     quarter turns            30 % (or never)                              1, 2 or 3 from first to second axis
====  =======================  ===========================================  ==========================================

These are the published OpenMind values for VoCo and SimCLR (Wald et al., arXiv:2412.17041), the transforms are those of
batchgenerators (Isensee et al., doi:10.5281/zenodo.3632567) in their order; VolumeFusion and fine-tuning have the other
values. What batchgenerators names the variance of the noise is used as its standard deviation, there and here.

A crop has one channel in pre-training and may have several in fine-tuning. Whether a transform fires is drawn for the
crop, as are the standard deviation of the noise, mirrors and turns; blur and low resolution are then drawn again for
each channel, hence their second factor, and each channel has its own strength, mean and range, and voxels of noise.

Departures: none in what is drawn. Arithmetic is float32 throughout, where the reference resamples in float64. Blur and
the cubic spline of low resolution are linear along each axis, and done here by one matrix for each channel and axis; on
a GPU they follow the precision that torch is set to for float32 matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .axes import axis_numbers

__all__ = ["AugmentationDraw", "CropAugmentation"]

T = TypeVar("T")
_Sigma = float | tuple[float, float, float]  # for all axes, or for each
_VOXELS = (1, 2, 3, 4)
_TOGETHER = 2**20  # voxels changed at once on a CPU: more would not fit its cache


@dataclass(frozen=True)
class AugmentationDraw:
    """How one channel of a crop is changed; the default of each field leaves it as it is.

    Attributes:
        noise: standard deviation of the noise and the seed of its voxels.
        blur_sigma: in voxels; one number, or one for each axis.
        brightness: factor.
        contrast: factor of the distance to the mean.
        zoom: sides of the low resolution as a share of the crop's.
        inverted_gamma: exponent, on the negative.
        gamma: exponent.
        flips: which axes are mirrored.
        quarter_turns: from the first axis towards the second, after the mirrors.
    """

    noise: tuple[float, int] | None = None
    blur_sigma: _Sigma | None = None
    brightness: float | None = None
    contrast: float | None = None
    zoom: float | None = None
    inverted_gamma: float | None = None
    gamma: float | None = None
    flips: tuple[bool, bool, bool] = (False, False, False)
    quarter_turns: int = 0


class CropAugmentation:
    """Draw and apply the augmentation of VoCo and SimCLR, and with other arguments that of VolumeFusion or fine-tuning.

    The defaults are the published values for VoCo and SimCLR; VolumeFusion has ``low_resolution_probability=0.25`` and
    ``rot90_probability=0``; fine-tuning as in nnU-Net v2 has these two and ``blur_per_axis=True`` and
    ``low_resolution_interpolation="linear"``. Brightness is uniform in its range; contrast and gamma lie below 1 in one
    half of the cases and above 1 in the other, uniform within each. (Fine-tuning is published with brightness in two
    halves too, which is the same for a range whose middle is 1.)

    Args:
        noise_probability: share of crops with Gaussian noise.
        noise_std_range: of its standard deviation, in units of the crop's intensities.
        blur_probability: share of crops that may be blurred, times ``channel_probability``.
        blur_sigma_range: in voxels.
        blur_per_axis: draw a sigma for each axis instead of one for all.
        brightness_probability: share of crops that are multiplied by a factor.
        brightness_range: of that factor.
        contrast_probability: share of crops whose distance to their mean is scaled, within their old range.
        contrast_range: of that factor.
        low_resolution_probability: share of crops that may be made coarser, times ``channel_probability``.
        low_resolution_range: sides of the coarse crop as a share of the crop's.
        low_resolution_interpolation: between the voxels of the coarse crop; ``cubic`` (a spline, kept within their
            range) or ``linear``.
        channel_probability: share of the channels that are blurred, or made coarser, in a crop drawn for it.
        inverted_gamma_probability: share of crops whose negative is put through a gamma curve.
        gamma_probability: share of crops that are put through a gamma curve.
        gamma_range: of the exponent of both.
        flip_probability: for each of ``mirror_axes``.
        mirror_axes: axes that may be mirrored, by number or in the words of :mod:`common.views.axes`.
        rot90_probability: share of crops turned by one, two or three quarters in the plane of the first two axes.

    Raises:
        ValueError: if a probability, a range or an interpolation is impossible.

    Example:
        >>> augmentation = CropAugmentation()
        >>> draw = augmentation.draw(torch.Generator().manual_seed(21))
        >>> round(draw.brightness, 3), round(draw.gamma, 3), draw.flips, draw.quarter_turns
        (1.094, 0.983, (False, True, True), 1)
        >>> augmentation.apply(torch.rand(1, 1, 16, 16, 16), [draw]).shape
        torch.Size([1, 1, 16, 16, 16])
        >>> square = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 2, 2, 1)
        >>> augmentation.apply(square, [AugmentationDraw(brightness=2.0, quarter_turns=1)]).squeeze()
        tensor([[2., 6.],
                [0., 4.]])

        Two channels of one crop, as in fine-tuning:

        >>> stream = torch.Generator().manual_seed(2)
        >>> first, second = CropAugmentation(contrast_probability=1.0).draw_channels(stream, channels=2)
        >>> round(first.contrast, 3), round(second.contrast, 3), first.flips == second.flips
        (1.021, 0.962, True)
    """

    def __init__(
        self,
        *,
        noise_probability: float = 0.1,
        noise_std_range: Sequence[float] = (0.0, 0.1),
        blur_probability: float = 0.2,
        blur_sigma_range: Sequence[float] = (0.5, 1.0),
        blur_per_axis: bool = False,
        brightness_probability: float = 0.15,
        brightness_range: Sequence[float] = (0.75, 1.25),
        contrast_probability: float = 0.15,
        contrast_range: Sequence[float] = (0.75, 1.25),
        low_resolution_probability: float = 0.1,
        low_resolution_range: Sequence[float] = (0.5, 1.0),
        low_resolution_interpolation: str = "cubic",
        channel_probability: float = 0.5,
        inverted_gamma_probability: float = 0.1,
        gamma_probability: float = 0.3,
        gamma_range: Sequence[float] = (0.7, 1.5),
        flip_probability: float = 0.5,
        mirror_axes: Sequence[int | str] = (0, 1, 2),
        rot90_probability: float = 0.3,
    ) -> None:
        self.noise_probability = _probability("noise_probability", noise_probability)
        self.noise_std_range = _range("noise_std_range", noise_std_range)
        self.blur_probability = _probability("blur_probability", blur_probability)
        self.blur_sigma_range = _range("blur_sigma_range", blur_sigma_range)
        self.blur_per_axis = blur_per_axis
        self.brightness_probability = _probability("brightness_probability", brightness_probability)
        self.brightness_range = _range("brightness_range", brightness_range)
        self.contrast_probability = _probability("contrast_probability", contrast_probability)
        self.contrast_range = _range("contrast_range", contrast_range, around_one=True)
        self.low_resolution_probability = _probability("low_resolution_probability", low_resolution_probability)
        self.low_resolution_range = _range("low_resolution_range", low_resolution_range, highest=1)
        if low_resolution_interpolation not in _COARSEN:
            raise ValueError(f"low_resolution_interpolation {low_resolution_interpolation!r} is none of {[*_COARSEN]}")
        self.low_resolution_interpolation = low_resolution_interpolation
        self.channel_probability = _probability("channel_probability", channel_probability)
        self.inverted_gamma_probability = _probability("inverted_gamma_probability", inverted_gamma_probability)
        self.gamma_probability = _probability("gamma_probability", gamma_probability)
        self.gamma_range = _range("gamma_range", gamma_range, around_one=True)
        self.flip_probability = _probability("flip_probability", flip_probability)
        self.mirror_axes = axis_numbers(mirror_axes)
        self.rot90_probability = _probability("rot90_probability", rot90_probability)

    def draw(self, generator: torch.Generator) -> AugmentationDraw:
        """Draw for one crop of one channel.

        Args:
            generator: where the draw comes from; on the CPU, so that every device gets the same draws.
        """
        return self.draw_channels(generator, channels=1)[0]

    def draw_channels(self, generator: torch.Generator, *, channels: int) -> list[AugmentationDraw]:
        """Draw for one crop, always the same count of numbers, so that one setting does not move the others' draws.

        Args:
            generator: where the draw comes from; on the CPU, so that every device gets the same draws.
            channels: of the crop.

        Returns:
            a draw for each channel; the first one's does not depend on how many there are.
        """
        of_crop = torch.rand(7, 3, dtype=torch.float64, generator=generator).tolist()
        *mirrors, rotates, turns = torch.rand(5, dtype=torch.float64, generator=generator).tolist()
        seeds = [int(torch.randint(2**63 - 1, (), generator=generator))]
        rows = [of_crop]  # the first channel's own numbers are the crop's
        if channels > 1:
            others = torch.rand(channels - 1, 7, 3, dtype=torch.float64, generator=generator).tolist()
            seeds += torch.randint(2**63 - 1, (channels - 1,), generator=generator).tolist()
            probabilities = (
                self.noise_probability,
                self.blur_probability,
                self.brightness_probability,
                self.contrast_probability,
                self.low_resolution_probability,
                self.inverted_gamma_probability,
                self.gamma_probability,
            )
            rows += [[*map(_of_channel, of_crop, other, probabilities)] for other in others]
        axes: list[list[float]] = [[]] * channels  # places of sigma along the second and third axis
        if self.blur_per_axis:
            axes = torch.rand(channels, 2, dtype=torch.float64, generator=generator).tolist()
        noise_std = _between(of_crop[0], self.noise_probability, self.noise_std_range)
        first, second, third = (
            axis in self.mirror_axes and mirror < self.flip_probability for axis, mirror in enumerate(mirrors)
        )
        quarter_turns = 1 + int(3 * turns) if rotates < self.rot90_probability else 0
        draws = []
        for row, noise_seed, other_axes in zip(rows, seeds, axes, strict=True):
            _, blur, brightness, contrast, coarse, inverted, gamma = row
            draws.append(
                AugmentationDraw(
                    noise=None if noise_std is None else (noise_std, noise_seed),
                    blur_sigma=self._blur_sigma(blur, other_axes),
                    brightness=_between(brightness, self.brightness_probability, self.brightness_range),
                    contrast=_around_one(contrast, self.contrast_probability, self.contrast_range),
                    zoom=_between(
                        coarse, self.low_resolution_probability * self.channel_probability, self.low_resolution_range
                    ),
                    inverted_gamma=_around_one(inverted, self.inverted_gamma_probability, self.gamma_range),
                    gamma=_around_one(gamma, self.gamma_probability, self.gamma_range),
                    flips=(first, second, third),
                    quarter_turns=quarter_turns,
                )
            )
        return draws

    def _blur_sigma(self, uniform: Sequence[float], other_axes: Sequence[float]) -> _Sigma | None:
        first = _between(uniform, self.blur_probability * self.channel_probability, self.blur_sigma_range)
        if first is None or not other_axes:
            return first
        low, high = self.blur_sigma_range
        second, third = (low + (high - low) * place for place in other_axes)
        return (first, second, third)

    def apply(self, crops: Tensor, draws: Sequence[AugmentationDraw], *, in_place: bool = False) -> Tensor:
        """Change each crop as drawn for it; deterministic, and without waiting for the device.

        The voxels of the noise are made on the CPU from the seeds in the draws, so that they too are the same on
        every device.

        Args:
            crops: ``(N, C, d, h, w)`` on any device; left as they are, if not ``in_place``.
            draws: one for each channel of each crop, those of a crop one after the other.
            in_place: the crops may be overwritten, which saves a copy of them.

        Returns:
            ``(N, C, d, h, w)``, float32.

        Raises:
            ValueError: if shapes or draws do not fit, or crops are to be turned whose first two sides differ.
        """
        _check_shapes(crops, draws)
        depth, height = crops.shape[2:4]
        if depth != height and self.rot90_probability > 0:
            raise ValueError(f"crops whose first two sides {depth} and {height} differ cannot make quarter turns")

        with torch.autocast(crops.device.type, enabled=False):
            crops = crops.to(torch.float32, copy=not in_place, memory_format=torch.contiguous_format)
            each = crops.flatten(0, 1).unsqueeze(1)  # (N * C, 1, d, h, w), the same voxels
            _change(each, [draw.noise for draw in draws], _add_noise)
            _change(each, [_for_axes(draw.blur_sigma) for draw in draws], _blur)
            _change(each, [draw.brightness for draw in draws], _brighten)
            _change(each, [draw.contrast for draw in draws], _stretch)
            _change(each, [draw.zoom for draw in draws], _COARSEN[self.low_resolution_interpolation])
            _change(each, [draw.inverted_gamma for draw in draws], _bend_negative)
            _change(each, [draw.gamma for draw in draws], _bend)
            _orient(each, draws)
        return crops

    @staticmethod
    def orient(volumes: Tensor, draws: Sequence[AugmentationDraw]) -> Tensor:
        """Mirror and turn as drawn, and change nothing else: for the label maps of crops.

        Args:
            volumes: ``(N, C, d, h, w)`` of any type; left as they are.
            draws: one for each channel of each volume; of an image with several channels any one will do.

        Returns:
            ``(N, C, d, h, w)``, of the same type.

        Raises:
            ValueError: if shapes or draws do not fit, or volumes are to be turned whose first two sides differ.

        Example:
            >>> label = torch.tensor([1, 2, 3]).view(1, 1, 1, 1, 3)
            >>> CropAugmentation.orient(label, [AugmentationDraw(gamma=0.8, flips=(False, False, True))]).flatten()
            tensor([3, 2, 1])
        """
        _check_shapes(volumes, draws)
        volumes = volumes.clone(memory_format=torch.contiguous_format)
        _orient(volumes.flatten(0, 1).unsqueeze(1), draws)
        return volumes

    def __call__(self, crops: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw for each crop from its own generator, then apply."""
        channels = crops.shape[1]
        draws = [draw for generator in generators for draw in self.draw_channels(generator, channels=channels)]
        return self.apply(crops, draws)


def _check_shapes(crops: Tensor, draws: Sequence[AugmentationDraw]) -> None:
    if crops.ndim != 5:
        raise ValueError(f"crops have the shape {tuple(crops.shape)}, not (N, C, d, h, w)")
    count, channels, depth, height, _ = crops.shape
    if len(draws) != count * channels:
        raise ValueError(f"there are {len(draws)} draws for {count} crops of the shape {tuple(crops.shape)}")
    if depth != height and any(draw.quarter_turns for draw in draws):
        raise ValueError(f"crops whose first two sides {depth} and {height} differ cannot make quarter turns")
    for first in range(0, len(draws), channels):
        if len({(draw.flips, draw.quarter_turns) for draw in draws[first : first + channels]}) > 1:
            raise ValueError(f"the channels of crop {first // channels} are mirrored or turned differently")


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} must lie within 0 and 1")
    return value


def _range(
    name: str, values: Sequence[float], *, highest: float = float("inf"), around_one: bool = False
) -> tuple[float, float]:
    low, high = values
    if not 0 <= low <= high <= highest:
        raise ValueError(f"{name} {(low, high)} must rise within 0 and {highest}")
    if around_one and not low <= 1 <= high:
        raise ValueError(f"{name} {(low, high)} must contain 1")
    return float(low), float(high)


def _between(uniform: Sequence[float], probability: float, limits: tuple[float, float]) -> float | None:
    chance, place, _ = uniform
    low, high = limits
    return low + (high - low) * place if chance < probability else None


def _of_channel(of_crop: Sequence[float], own: Sequence[float], probability: float) -> tuple[float, float, float]:
    """Return what a further channel draws for a transform: it fires there only if it fires in the crop.

    In crops in which it fires, the first channel's chance is uniform between 0 and ``probability``; so is this one.
    """
    chance, place, side = own
    return (probability * chance if of_crop[0] < probability else 1.0, place, side)


def _around_one(uniform: Sequence[float], probability: float, limits: tuple[float, float]) -> float | None:
    chance, place, side = uniform
    low, high = limits
    return _between((chance, place, side), probability, (low, 1.0) if side < 0.5 else (1.0, high))


def _change(crops: Tensor, drawn: Sequence[T | None], change: Callable[[Tensor, list[T]], Tensor]) -> None:
    """Replace, in place, those of the crops for which something was drawn by what ``change`` makes of them."""
    chosen = [(place, value) for place, value in enumerate(drawn) if value is not None]
    for some in _groups(chosen, crops):
        if len(some) == 1:  # large crops are changed one by one: where they are, if they can be
            place, value = some[0]
            crop = crops[place : place + 1]
            crop.copy_(change(crop, [value]))
            continue
        index = _to(torch.tensor([place for place, _ in some]), crops.device)
        crops.index_copy_(0, index, change(crops.index_select(0, index), [value for _, value in some]))


def _groups(chosen: list[T], crops: Tensor) -> list[list[T]]:
    """Split what is chosen into groups that are changed at once: all on a GPU, what fits its cache on a CPU."""
    together = max(len(chosen) if crops.device.type != "cpu" else _TOGETHER // crops.shape[1:].numel(), 1)
    return [chosen[first : first + together] for first in range(0, len(chosen), together)]


def _to(host: Tensor, device: torch.device) -> Tensor:
    """Move what was made on the CPU to the device; through pinned memory, else the host waits for the GPU."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def _per_crop(values: Sequence[float], device: torch.device) -> Tensor:
    return _to(torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1, 1), device)  # (n, 1, 1, 1, 1)


def _add_noise(crops: Tensor, drawn: list[tuple[float, int]]) -> Tensor:
    shape = crops.shape[1:]
    voxels = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _, seed in drawn])
    return crops.addcmul_(_to(voxels, crops.device), _per_crop([std for std, _ in drawn], crops.device))


def _brighten(crops: Tensor, factors: list[float]) -> Tensor:
    return crops.mul_(_per_crop(factors, crops.device))


def _stretch(crops: Tensor, factors: list[float]) -> Tensor:
    """Scale each crop's distance to its mean, and clip it to its old range."""
    low, high = crops.amin(_VOXELS, keepdim=True), crops.amax(_VOXELS, keepdim=True)
    mean = crops.mean(_VOXELS, keepdim=True)
    stretched = crops.sub_(mean).mul_(_per_crop(factors, crops.device)).add_(mean)
    return torch.minimum(torch.maximum(stretched, low), high)


def _bend(crops: Tensor, exponents: list[float]) -> Tensor:
    """Raise each crop, scaled to 0..1, to a power; scale it back and give it its old mean and standard deviation."""
    mean, std = _mean_and_std(crops)
    low = crops.amin(_VOXELS, keepdim=True)
    span = crops.amax(_VOXELS, keepdim=True) - low + 1e-7
    bent = crops.sub_(low).div_(span).pow_(_per_crop(exponents, crops.device)).mul_(span)
    bent_mean, bent_std = _mean_and_std(bent)
    return bent.sub_(bent_mean).mul_(std / (bent_std + 1e-8)).add_(mean)


def _bend_negative(crops: Tensor, exponents: list[float]) -> Tensor:
    return _bend(crops.neg_(), exponents).neg_()


def _mean_and_std(crops: Tensor) -> tuple[Tensor, Tensor]:
    mean = crops.mean(_VOXELS, keepdim=True)
    return mean, (crops - mean).square_().mean(_VOXELS, keepdim=True).sqrt()  # several times faster than torch.std_mean


def _for_axes(sigma: _Sigma | None) -> tuple[float, float, float] | None:
    return sigma if sigma is None or isinstance(sigma, tuple) else (sigma, sigma, sigma)


def _blur(crops: Tensor, sigmas: list[tuple[float, float, float]]) -> Tensor:
    """Blur each crop with its own Gaussian, cut at 4 sigma, the crop being mirrored at its borders as SciPy does."""
    sides = zip(zip(*sigmas, strict=True), crops.shape[2:], strict=True)
    matrices = [_to(_blur_matrices(along, side), crops.device) for along, side in sides]
    return _along_axes(crops[:, 0], matrices).unsqueeze(1)


def _blur_matrices(sigmas: Sequence[float], side: int) -> Tensor:
    """Return ``(n, side, side)``: blurring along one axis as a matrix for each sigma."""
    sigma = torch.tensor(sigmas, dtype=torch.float64).clamp(min=1e-6)[:, None]
    reach = (4 * sigma + 0.5).floor()
    offsets = torch.arange(-int(reach.max()), int(reach.max()) + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2) * (offsets.abs() <= reach)  # (n, offsets)
    weights = weights / weights.sum(1, keepdim=True)
    source = (torch.arange(side)[:, None] + offsets) % (2 * side)  # d c b a | a b c d | d c b a
    source = torch.where(source < side, source, 2 * side - 1 - source)  # (side, offsets)
    spread = F.one_hot(source, side).double()  # (side, offsets, side)
    return torch.einsum("no,soi->nsi", weights, spread).float()


def _coarsen(crops: Tensor, zooms: list[float]) -> Tensor:
    """Keep the nearest voxels of a coarser grid, and interpolate between them by a cubic spline within their range."""
    nearest, splines = [], []
    for side in crops.shape[2:]:
        coarse = [max(round(side * zoom), 1) for zoom in zooms]
        most = max(coarse)  # crops differ in their coarse sides: the last voxel is repeated, and then has no weight
        centres = torch.arange(most, dtype=torch.float64) + 0.5
        places = [(centres.clamp(max=n - 0.5) * (side / n)).long() for n in coarse]
        nearest.append(_to(torch.stack(places), crops.device))  # (n, most)
        padded = [F.pad(_spline_matrix(n, side), (0, most - n)) for n in coarse]
        splines.append(_to(torch.stack(padded), crops.device))  # (n, side, most)
    first, second, third = nearest
    each = torch.arange(len(crops), device=crops.device)[:, None, None, None]
    seen = crops[each, 0, first[:, :, None, None], second[:, None, :, None], third[:, None, None, :]]
    low, high = seen.amin((1, 2, 3), keepdim=True), seen.amax((1, 2, 3), keepdim=True)
    return torch.minimum(torch.maximum(_along_axes(seen, splines), low), high).unsqueeze(1)


def _coarsen_linear(crops: Tensor, zooms: list[float]) -> Tensor:
    """Keep the nearest voxels of a coarser grid, and interpolate between them linearly."""
    sides = list(crops.shape[2:])
    fine = []
    for crop, zoom in zip(crops, zooms, strict=True):
        coarse = F.interpolate(crop[None], size=[max(round(side * zoom), 1) for side in sides], mode="nearest-exact")
        fine.append(F.interpolate(coarse, size=sides, mode="trilinear", align_corners=False))
    return torch.cat(fine)


_COARSEN: dict[str, Callable[[Tensor, list[float]], Tensor]] = {"cubic": _coarsen, "linear": _coarsen_linear}


@lru_cache(maxsize=512)
def _spline_matrix(coarse: int, fine: int) -> Tensor:
    """Return ``(fine, coarse)``: cubic spline interpolation along one axis, edge values going on beyond both ends."""
    margin = 12  # as in SciPy: what the ends do to a spline has died away there
    count = coarse + 2 * margin
    samples = F.one_hot(torch.arange(-margin, coarse + margin).clamp(0, coarse - 1), coarse).double()
    distance = (torch.arange(count)[:, None] - torch.arange(count)).abs()
    system = (distance == 0) * (2 / 3) + (distance == 1) * (1 / 6)
    coefficients = torch.linalg.solve(system.double(), samples)  # (count, coarse), of the B-splines through the samples
    places = (torch.arange(fine, dtype=torch.float64) + 0.5) * coarse / fine - 0.5 + margin
    far = (places[:, None] - torch.arange(count)).abs()
    splines = torch.where(far < 1, 2 / 3 - far**2 + far**3 / 2, (2 - far).clamp(min=0) ** 3 / 6)  # (fine, count)
    return (splines @ coefficients).float()


def _along_axes(crops: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply ``(n, d, h, w)`` by one matrix ``(n, new, old)`` along each axis."""
    for matrix in matrices:
        n, _, second, third = crops.shape
        # the first axis goes to the end, so that after three rounds all are back in their places
        product = torch.bmm(crops.flatten(2).transpose(1, 2), matrix.transpose(1, 2))  # (n, second * third, new)
        crops = product.view(n, second, third, -1)
    return crops


def _orient(crops: Tensor, draws: Sequence[AugmentationDraw]) -> None:
    """Mirror and turn in place, crops with the same result together."""
    groups: dict[tuple[bool, tuple[bool, bool, bool]], list[int]] = {}
    for place, draw in enumerate(draws):
        first, second, third = draw.flips
        turns = draw.quarter_turns % 4
        # a quarter turn swaps the two axes and mirrors the new first one, three turns mirror the new second one
        swapped = turns % 2 == 1
        if swapped:
            first, second = second, first
        groups.setdefault((swapped, (first ^ (turns in (1, 2)), second ^ (turns in (2, 3)), third)), []).append(place)
    for (swapped, flips), places in groups.items():
        axes = [axis + 2 for axis, flip in enumerate(flips) if flip]
        for some in _groups(places if swapped or axes else [], crops):
            index = _to(torch.tensor(some), crops.device)
            turned = crops.index_select(0, index)
            turned = turned.transpose(2, 3) if swapped else turned
            crops.index_copy_(0, index, turned.flip(axes))
