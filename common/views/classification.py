# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Augmented whole volumes, for classification.

==========  =====================================================================================
comes in    ``region``  list of ``(C, d, h, w)``, as stored; ``spatial``, the draws; ``key``
goes out    ``image``   ``(B, C, D, H, W)`` float32
==========  =====================================================================================

The chain is that of fine-tuning a segmentation (see :mod:`common.views.segmentation`), without label maps: rotation by
three angles, each U(-30, 30) degrees, zoom, noise, blur, brightness, contrast, low resolution, gamma, mirrors. (The
reference hands the rotation over as one number, so that it is 30 degrees about every axis whenever it fires.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .intensity import CropAugmentation
from .randomness import view_stream
from .spatial import SpatialCrop

__all__ = ["VolumeViews"]


class VolumeViews:
    """Place and augment the volumes of a batch.

    Args:
        spatial: how a volume is placed in the input.
        augmentation: of the intensities; None for validation and prediction.
    """

    def __init__(self, spatial: SpatialCrop, *, augmentation: CropAugmentation | None = None) -> None:
        self.spatial, self.augmentation = spatial, augmentation

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map a batch of regions, spatial draws and sample keys on the device to ``image``."""
        image = self.spatial(batch)  # (B, C, D, H, W)
        if self.augmentation is not None:
            image = self.augmentation(image, [view_stream(key) for key in batch["key"]])
        return {"image": image}
