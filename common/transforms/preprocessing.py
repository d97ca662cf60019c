# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The deterministic part of the pipeline, the same for pre-training, fine-tuning and inference."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import Compose, CropForegroundd, LoadImaged, MapTransform, NormalizeIntensityd

from ..errors import DataError
from .geometry import ResampleToSpacingd, SliceAxisFirstd

__all__ = ["CheckVolumed", "check_affine", "check_values", "nonzero", "volume_preprocessing"]

_SPACING_LIMITS_MM = (0.01, 50.0)


def nonzero(image: torch.Tensor) -> torch.Tensor:
    """Return where an image is not 0; the part that cropping keeps."""
    return image != 0


def check_affine(name: str, shape: Sequence[int], affine: np.ndarray) -> None:
    """Refuse what is not a volume in space.

    Raises:
        DataError: if it is not three-dimensional, or its spacing is zero, not finite or absurd.
    """
    if len(shape) != 3:
        raise DataError(f"{name} has {len(shape)} dimensions {tuple(shape)}; save one 3-D volume per file")
    if min(shape) < 2:
        raise DataError(f"{name} has shape {tuple(shape)}; a volume needs at least 2 voxels along every axis")
    spacing = np.linalg.norm(np.asarray(affine, dtype=float)[:3, :3], axis=0)
    low, high = _SPACING_LIMITS_MM
    if not np.isfinite(spacing).all() or (spacing < low).any() or (spacing > high).any():
        printed = " x ".join(f"{value:g}" for value in spacing)
        raise DataError(f"{name} says its voxels are {printed} mm; outside {low:g} to {high:g} mm, correct its header")


def check_values(name: str, values: np.ndarray) -> None:
    """Refuse intensities that cannot be normalised.

    Raises:
        DataError: if a voxel is NaN or infinite, or all have one value.
    """
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise DataError(f"{name} has {bad:,} voxels that are NaN or infinite; repair or leave out the file")
    if values.min() == values.max():
        raise DataError(f"{name} is constant ({values.flat[0]:g} everywhere); leave out the file")


class CheckVolumed(MapTransform):
    """Refuse images that would train or predict nonsense: not 3-D, wrong spacing, NaN, constant.

    Raises:
        DataError: naming the file.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` unchanged."""
        for key in self.key_iterator(data):
            image = data[key]
            name = str(image.meta.get("filename_or_obj", key))
            shape = image.shape[1:] if image.shape[0] == 1 else (*image.shape[1:], image.shape[0])
            check_affine(name, shape, image.affine.cpu().numpy())
            check_values(name, image.as_tensor().numpy())
        return dict(data)


def volume_preprocessing(
    keys: KeysCollection = ("image",),
    *,
    spacing_mm: float | Sequence[float] | None = 1.0,
    reorient: bool = True,
) -> Compose:
    """Build the chain: read, check, axes, crop to non-zero, z-score, resample.

    Every step but the first two and the z-score is invertible, so MONAI's ``Invertd`` brings predictions back to the
    file's own grid. The order is the reference's: normalise over all voxels of the cropped image, then resample.

    Args:
        keys: ``image``, and integer maps on its grid where there are any (``label``, masks).
        spacing_mm: target spacing, one or three (slice, row, column) values; None keeps the file's own.
        reorient: canonical axes (true) or the file's own in reversed order, as the reference.
    """
    keys = [keys] if isinstance(keys, str) else list(keys)
    return Compose(
        [
            LoadImaged(keys, ensure_channel_first=True, image_only=True),
            CheckVolumed("image"),
            SliceAxisFirstd(keys, reorient=reorient),
            CropForegroundd(keys, source_key="image", select_fn=nonzero, allow_smaller=True),
            NormalizeIntensityd("image", channel_wise=True),
            ResampleToSpacingd(keys, spacing_mm=spacing_mm),
        ]
    )
