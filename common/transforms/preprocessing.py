# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The deterministic part of the pipeline, the same for pre-training, fine-tuning and inference."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, EnsureChannelFirstd, LoadImaged, MapTransform
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from ..errors import SettingsError
from .checks import check_affine, check_values, nearly_zero
from .geometry import OnImageGridd, ResampleToSpacingd, ResizeTod, SliceAxisFirstd
from .loading import VolumeReader, WholeNumbersd

__all__ = [
    "OUTSIDE",
    "CheckVolumed",
    "CropToImaged",
    "NormalizeChannelsd",
    "cropped_volumes",
    "load_volumes",
    "nonzero",
    "volume_preprocessing",
]

OUTSIDE = "outside"  # metadata of a cropped map: how many voxels of each value other than 0 were cut off


def nonzero(image: torch.Tensor) -> torch.Tensor:
    """Return where an image is not 0; the part that cropping keeps."""
    return image != 0


def load_volumes(keys: KeysCollection, *, maps: bool = False) -> LoadImaged:
    """Build MONAI's loader for every format of :class:`VolumeReader`; ``EnsureChannelFirstd`` is to follow.

    Args:
        keys: files to read.
        maps: keep values as they are stored, for label maps: float32 holds no large numbers to the last digit.
    """
    # MONAI also makes its own readers, which complain of what they lack, in every process
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoadImaged(keys, reader=VolumeReader(maps=maps), image_only=True, dtype=None)


class CheckVolumed(MapTransform):
    """Refuse images that would train or predict nonsense: not 3-D, wrong spacing, NaN, constant, other channels.

    What share of an image is nearly but not exactly 0 is noted as ``meta["nearly_zero"]``, for a run to count.

    Args:
        keys: images.
        channels: that each must have.

    Raises:
        DataError: naming the file.
    """

    def __init__(self, keys: KeysCollection, *, channels: int = 1) -> None:
        super().__init__(keys)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` unchanged but for what is noted."""
        for key in self.key_iterator(data):
            image = data[key]
            name = str(image.meta.get("filename_or_obj", key))
            several = image.shape[0] > 1 or self.channels > 1
            shape = (*image.shape[1:], image.shape[0]) if several else image.shape[1:]
            check_affine(name, shape, image.affine.cpu().numpy(), channels=self.channels)
            values = image.as_tensor().numpy()
            for channel in values:
                check_values(name, channel)
            image.meta["nearly_zero"] = max(map(nearly_zero, values))
        return dict(data)


class CropToImaged(CropForegroundd):
    """Crop an image to the box around what is not 0, and its maps with it; count what maps mark outside of the box.

    Args:
        keys: the image, and maps on its grid.
        image: key of the image.
    """

    def __init__(self, keys: KeysCollection, *, image: str = "image") -> None:
        super().__init__(keys, source_key=image, select_fn=nonzero, allow_smaller=True)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Crop every key, ``(C, D, H, W)``."""
        out: dict[Hashable, Any] = super().__call__(data, lazy)
        for key in self.key_iterator(out):
            if key != self.source_key:
                lost = _marked(data[key])
                lost.subtract(_marked(out[key]))
                out[key].meta[OUTSIDE] = {value: count for value, count in lost.items() if count}
        return out


def _marked(labels: Tensor) -> Counter[int]:
    """Count the voxels of each value other than 0."""
    values, counts = torch.unique(labels[labels != 0], return_counts=True)
    return Counter(dict(zip(map(int, values.tolist()), counts.tolist(), strict=True)))


class NormalizeChannelsd(MapTransform):
    """Normalise each channel of an image that was cropped to its non-zero part, by nnU-Net's schemes.

    * ``zscore``: mean and standard deviation of all voxels;
    * ``zscore_nonzero``: of the voxels within the non-zero region and its holes; what is outside becomes 0;
    * ``{"ct": [low, high, mean, std]}``: clip, subtract, divide, by figures of the whole data set;
    * ``none``.

    Args:
        keys: what to normalise.
        schemes: one for all channels, or one for each.

    Raises:
        SettingsError: if a scheme is unknown or their number is not that of the channels.

    Example:
        >>> image = torch.tensor([[[[-2000.0, 0.0, 100.0, 2000.0]]]])
        >>> NormalizeChannelsd("image", schemes=[{"ct": [-100, 300, 50, 100]}])({"image": image})["image"].flatten()
        tensor([-1.5000, -0.5000,  0.5000,  2.5000])
    """

    def __init__(self, keys: KeysCollection, *, schemes: Sequence[str | Mapping[str, Sequence[float]]]) -> None:
        super().__init__(keys)
        self.schemes = list(schemes)
        for scheme in self.schemes:
            figures = scheme.get("ct") if isinstance(scheme, Mapping) else None
            if scheme not in ("zscore", "zscore_nonzero", "none") and (figures is None or len(figures) != 4):
                raise SettingsError(
                    f"normalization {scheme!r} is not known; it is zscore, zscore_nonzero, ct or none, for all "
                    "channels or one for each"
                )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Normalise every key, ``(C, D, H, W)``, to float32."""
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key].float()
            schemes = self.schemes if len(self.schemes) > 1 else self.schemes * image.shape[0]
            if len(schemes) != image.shape[0]:
                raise SettingsError(f"normalization lists {len(schemes)} schemes for {image.shape[0]} channels")
            values = image.as_tensor() if isinstance(image, MetaTensor) else image
            channels = [_normalize(channel, scheme, values) for channel, scheme in zip(values, schemes, strict=True)]
            values = channels[0][None] if len(channels) == 1 else torch.stack(channels)
            out[key] = MetaTensor(values).copy_meta_from(image) if isinstance(image, MetaTensor) else values
        return out


def _normalize(channel: Tensor, scheme: str | Mapping[str, Sequence[float]], image: Tensor) -> Tensor:
    if isinstance(scheme, Mapping):
        low, high, mean, std = scheme["ct"]
        return (channel.clamp(low, high) - mean) / max(std, 1e-8)
    if scheme == "none":
        return channel
    if scheme == "zscore":
        mean, deviation = float(channel.mean()), float(channel.std(correction=0))
        return channel.sub(mean).div_(deviation or 1)
    inside = torch.from_numpy(binary_fill_holes((image != 0).any(0).numpy()))
    chosen = channel[inside]
    normal = (channel - chosen.mean()) / chosen.std(correction=0).clamp(min=1e-8)
    return torch.where(inside, normal, 0)


def volume_preprocessing(
    keys: KeysCollection = ("image",),
    *,
    spacing_mm: float | Sequence[float] | None = 1.0,
    reorient: bool = True,
    normalization: str | Sequence[str | Mapping[str, Sequence[float]]] = "zscore",
    channels: int = 1,
    size: Sequence[int] | None = None,
) -> Compose:
    """Build the chain: read, check, one grid, axes, crop to non-zero, normalise, resample.

    Every step after the axes but the normalisation is invertible, so MONAI's ``Invertd`` brings predictions back
    to the file's own grid. The order is the reference's: normalise over all voxels of the cropped image, then resample.

    Args:
        keys: ``image``, and integer maps on its grid where there are any (``label``, masks).
        spacing_mm: target spacing, one or three (slice, row, column) values; None keeps the file's own.
        reorient: canonical axes (true) or the file's own in reversed order, as the reference.
        normalization: scheme of :class:`NormalizeChannelsd`, one for all channels or one for each.
        channels: of the image.
        size: resize the image to these voxels at the end, for classification; not invertible.
    """
    schemes = [normalization] if isinstance(normalization, (str, Mapping)) else list(normalization)
    return Compose(
        [
            *cropped_volumes(keys, reorient=reorient, channels=channels),
            NormalizeChannelsd("image", schemes=schemes),
            ResampleToSpacingd(keys, spacing_mm=spacing_mm),
            *([] if size is None else [ResizeTod("image", size=size)]),
        ]
    )


def cropped_volumes(keys: KeysCollection, *, reorient: bool = True, channels: int = 1) -> list[MapTransform]:
    """Return the first steps of the chain: read, check, one grid, axes, crop to non-zero.

    Args:
        keys: as in :func:`volume_preprocessing`.
        reorient: the same.
        channels: the same.
    """
    keys = [keys] if isinstance(keys, str) else list(keys)
    maps = [key for key in keys if key != "image"]
    return [
        load_volumes("image"),  # MONAI Deploy leaves this one out and reads by itself
        *([load_volumes(maps, maps=True), WholeNumbersd(maps)] if maps else []),
        EnsureChannelFirstd(keys),
        CheckVolumed("image", channels=channels),
        *([OnImageGridd(maps)] if maps else []),
        SliceAxisFirstd(keys, reorient=reorient),
        CropToImaged(keys),
    ]
