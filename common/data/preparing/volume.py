# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Prepare one volume and its masks: check, axes, crop to non-zero, normalise, resample."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import DataError, causes
from ...transforms import OUTSIDE, explain, volume_preprocessing
from ...transforms.checks import FEW_NEARLY_ZERO
from ...transforms.grids import SLANTED_DEGREES, slant_degrees
from ..cases import LABEL, Case, images_of, inverted_of, masks_of
from ..checking.checks import check_channels, check_grid, check_mask
from .settings import StoreSettings

__all__ = ["PreparedVolume", "prepare_volume"]

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class PreparedVolume:
    """What is made of one case.

    Attributes:
        voxels: ``(D, H, W)`` of one channel, ``(C, D, H, W)`` of several.
        masks: by name, whole numbers ``(D, H, W)``.
        about: geometry, in millimetres where it says so, the files that it was made from, and what is odd.
    """

    voxels: np.ndarray
    masks: dict[str, np.ndarray]
    about: dict[str, Any]


def prepare_volume(case: Case, settings: StoreSettings) -> PreparedVolume:
    """Preprocess one image and its masks.

    Raises:
        DataError: if a file cannot be used.
    """
    image, masks, inverted = images_of(case)[0], masks_of(case), inverted_of(case)
    check_channels(case, settings.channels)
    for name in masks:
        if name == LABEL:
            check_grid(image, case[LABEL])
        else:
            check_mask(image, case[name])
    chain = volume_preprocessing(
        ["image", *masks],
        spacing_mm=settings.spacing_mm,
        reorient=settings.reorient,
        normalization=settings.normalization,
        channels=settings.channels,
        size=settings.size,
    )
    try:
        sources = [{"path": os.path.realpath(file), "bytes": os.path.getsize(file)} for file in images_of(case)]
        prepared = chain({key: case[key] for key in ("image", *masks)})
    except Exception as error:
        raise explain(image, _root_cause(error)) from error
    volume = prepared["image"]
    values = volume.as_tensor()
    lows, highs = zip(*((float(low), float(high)) for low, high in map(torch.aminmax, values)), strict=True)
    if any(low == high for low, high in zip(lows, highs, strict=True)):
        raise DataError(f"{image} is constant where it is not zero; leave out the file")
    if settings.dtype == "float16" and max(max(highs), -min(lows)) > _LARGEST:
        raise DataError(f"{image} has intensities beyond {_LARGEST:g}, which float16 cannot hold; use float32")
    voxels = values.to(getattr(torch, settings.dtype)).numpy()
    slant = slant_degrees(volume.affine.numpy())
    near = volume.meta["nearly_zero"]
    marks = {name: prepared[name].as_tensor()[0].numpy() for name in masks}
    return PreparedVolume(
        voxels[0] if len(voxels) == 1 else voxels,
        {name: 1 - mask if name in inverted else mask for name, mask in marks.items()},
        {
            "shape": list(volume.shape[1:]),
            "affine_mm": volume.affine.tolist(),
            "source": sources[0]
            | {
                "affine_mm": volume.meta["original_affine"].tolist(),
                "shape": [int(n) for n in volume.meta["spatial_shape"]][:3],
            },
            "channels": sources[1:],
            "outside": prepared[LABEL].meta[OUTSIDE] if LABEL in masks else {},
            "slant_degrees": round(slant, 3) if slant > SLANTED_DEGREES else 0,
            "nearly_zero": round(near, 4) if near >= FEW_NEARLY_ZERO else 0,
        },
    )


def _root_cause(error: BaseException) -> Exception:
    """Return the first exception of a chain, below what MONAI wraps around it."""
    *_, first = causes(error)
    return first if isinstance(first, Exception) else RuntimeError(str(first))
