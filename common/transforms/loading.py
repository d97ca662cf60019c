# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How MONAI's ``LoadImaged`` reads volumes of every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader

from .reading import read_volume

__all__ = ["VolumeReader"]


class VolumeReader(ImageReader):
    """The reader of every format, for MONAI's ``LoadImaged``.

    Files are named in ``read`` and read in ``get_data``, whose errors ``LoadImaged`` passes on as they are.
    """

    def verify_suffix(self, filename: Any) -> bool:
        """Return true: it reads every format that there is."""
        return True

    def read(self, data: Any, **kwargs: Any) -> list[str]:
        """Return the names of one file, or of one for each channel."""
        return [str(data)] if isinstance(data, (str, Path)) else [str(name) for name in data]

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the voxels, those of several files stacked in front, and where they lie."""
        volumes = [read_volume(name) for name in img]
        values, affine = volumes[0]
        channel: float = float("nan") if values.ndim <= 3 else -1
        shape = np.asarray(values.shape[:3])
        if len(volumes) > 1:
            values, channel = np.stack([each for each, _ in volumes]), 0
        return values, {
            "affine": affine.copy(),
            "original_affine": affine.copy(),
            "spatial_shape": shape,
            "original_channel_dim": channel,
            "space": "RAS",
        }
