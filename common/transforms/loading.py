# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How MONAI's ``LoadImaged`` reads volumes of every format."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import ImageReader, MetaTensor
from monai.transforms import MapTransform

from ..errors import DataError
from .grids import same_grid
from .maps import whole_numbers
from .reading import read_volume

__all__ = ["VolumeReader", "WholeNumbersd"]


class VolumeReader(ImageReader):
    """The reader of every format, for MONAI's ``LoadImaged``.

    Files are named in ``read`` and read in ``get_data``, whose errors ``LoadImaged`` passes on as they are.

    Args:
        maps: keep values as they are stored, for label maps: float32 holds no large numbers to the last digit.
    """

    def __init__(self, *, maps: bool = False) -> None:
        self.maps = maps

    def verify_suffix(self, filename: Any) -> bool:
        """Return true: it reads every format that there is."""
        return True

    def read(self, data: Any, **kwargs: Any) -> list[str]:
        """Return the names of one file, or of one for each channel."""
        return [str(data)] if isinstance(data, (str, Path)) else [str(name) for name in data]

    def get_data(self, img: Any) -> tuple[Any, dict[str, Any]]:
        """Return the voxels, those of several files stacked in front, and where they lie.

        Those of images are a tensor, float32, in the order in memory that the file has: it is that of the axes which
        volumes are prepared in, while MONAI lays out every array anew, the other way round.
        """
        volumes = [read_volume(name) for name in img]
        values, affine = volumes[0]
        channel: float = float("nan") if values.ndim <= 3 else -1
        shape = np.asarray(values.shape[:3])
        if len(volumes) > 1:  # axes in the order of the first file's
            turns = [
                same_grid(
                    name,
                    each.shape,
                    own,
                    onto=img[0],
                    onto_shape=values.shape,
                    onto_affine=affine,
                    remedy="resample one onto the other",
                )
                for name, (each, own) in zip(img, volumes, strict=True)
            ]
            values = np.stack([turn.array(each) for turn, (each, _) in zip(turns, volumes, strict=True)])
            channel = 0
        return values if self.maps else _tensor(values), {
            "affine": affine.copy(),
            "original_affine": affine.copy(),
            "spatial_shape": shape,
            "original_channel_dim": channel,
            "space": "RAS",
        }


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Return an array as float32, copied only if PyTorch cannot share it."""
    shared = values.flags.writeable and min(values.strides) >= 0
    return torch.from_numpy((np.asarray if shared else np.array)(values, np.float32, order="K"))


class WholeNumbersd(MapTransform):
    """Turn maps into whole numbers, none below 0.

    Args:
        keys: maps.

    Raises:
        DataError: if a map holds something else.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Convert every key, a MetaTensor."""
        out = dict(data)
        for key in self.key_iterator(out):
            name = str(out[key].meta.get("filename_or_obj", key))
            values = whole_numbers(out[key].as_tensor().numpy(), name)
            if values.min() < 0:
                raise DataError(f"{name} holds the value {values.min()}; labels are whole numbers from 0, correct it")
            out[key] = MetaTensor(torch.from_numpy(values)).copy_meta_from(out[key])
        return out
