# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Augmented crops of images and their label maps, for fine-tuning.

==========  ================  =====================================================================================
comes in    ``region``        list of ``(C, d, h, w)``, images as they were stored
            ``label_region``  list of ``(d, h, w)``, integers, of the same places
            ``spatial``       list of :class:`SpatialDraw`, drawn before both were read
            ``key``           list of sample keys, for the draws that are made here
goes out    ``image``         ``(B, C, D, H, W)`` float32
            ``label``         ``(B, 1, D, H, W)`` of the stored integer type, none below 0
==========  ================  =====================================================================================

The chain of nnU-Net v2 (Isensee et al., doi:10.1038/s41592-020-01008-z), as the OpenMind benchmark fine-tunes (Wald et
al., arXiv:2412.17041), in this order:

====  =======================  =============  =========================================================================
step  transform                fires in       strength
====  =======================  =============  =========================================================================
1     rotation                 20 %           three angles, U(-30, 30) degrees each
      zoom                     20 %           one factor, U(0.7, 1.4); the crop comes after both
2     Gaussian noise           10 %           standard deviation U(0, 0.1), the same for all channels
3     Gaussian blur            20 % x 50 %    sigma U(0.5, 1) voxels for each channel and axis
4     brightness               15 %           factor U(0.75, 1.25) for each channel
5     contrast                 15 %           factor half U(0.75, 1), half U(1, 1.25) for each channel
6     low resolution           25 % x 50 %    zoom U(0.5, 1) for each channel; nearest voxel, then trilinear
7     gamma of the negative    10 %           exponent half U(0.7, 1), half U(1, 1.5) for each channel
8     gamma                    30 %           the same
9     mirrors                  50 %           for each axis
10    outside the mask         if asked for   image 0 where the label is negative
11    label                    always         0 where it is negative
====  =======================  =============  =========================================================================

The second factor of blur and low resolution is drawn for each channel. Step 1 is :class:`SpatialCrop`'s, steps 2 to 9
are :class:`CropAugmentation`'s; the example below has all numbers that are not their defaults. No other step prefers a
direction, so that mirrors may as well be left to :class:`SpatialCrop`, where they cost less.

Departure from batchgeneratorsv2: blur is that of pre-training and of SciPy, whose Gaussian is cut at 4 sigma and whose
crop is mirrored with its edge voxel; there it is cut at 3 sigma and mirrored without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .intensity import CropAugmentation
from .randomness import view_stream
from .spatial import SpatialCrop

__all__ = ["SegmentationViews"]


class SegmentationViews:
    """Cut and augment the images of a batch, and their label maps along with them.

    Args:
        spatial: how crops are cut.
        augmentation: of the intensities, and mirrors; None for validation.
        zero_outside: negative labels mark what is outside a mask that intensities were normalised in, where the image
            is put back to 0 after augmentation; so is what is outside the volume. Else negative labels are background.

    Example:
        >>> import numpy as np
        >>> views = SegmentationViews(
        ...     SpatialCrop(4, uniform_zoom=True, flip_probability=0),
        ...     augmentation=CropAugmentation(
        ...         blur_per_axis=True,
        ...         low_resolution_probability=0.25,
        ...         low_resolution_interpolation="linear",
        ...         rot90_probability=0,
        ...     ),
        ... )
        >>> draw = views.spatial.draw(np.random.default_rng(0), (9, 9, 9), centre=(2, 4, 8))
        >>> shape = [stop - start for start, stop in zip(draw.start, draw.stop)]
        >>> batch = {"region": [torch.rand(2, *shape)], "label_region": [torch.ones(shape, dtype=torch.uint8)]}
        >>> made = views({**batch, "spatial": [draw], "key": [(0, 1, 0)]})
        >>> made["image"].shape, made["label"].shape, made["label"].dtype
        (torch.Size([1, 2, 4, 4, 4]), torch.Size([1, 1, 4, 4, 4]), torch.uint8)
    """

    def __init__(
        self, spatial: SpatialCrop, *, augmentation: CropAugmentation | None = None, zero_outside: bool = False
    ) -> None:
        self.spatial, self.augmentation, self.zero_outside = spatial, augmentation, zero_outside

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map a batch of regions, spatial draws and sample keys on the device to ``image`` and ``label``.

        Raises:
            ValueError: if an image and its label map are not of the same place, or labels are no integers.
        """
        for image, label in zip(batch["region"], batch["label_region"], strict=True):
            if image.shape[-3:] != label.shape:
                raise ValueError(f"the image of {tuple(image.shape)} has a label map of {tuple(label.shape)}")
        crops = self.spatial(batch)  # (B, C, D, H, W)
        outside = -1 if self.zero_outside else 0
        regions = zip(batch["label_region"], batch["spatial"], strict=True)
        labels = torch.stack([self.spatial.apply_label(region, draw, outside=outside) for region, draw in regions])
        labels = labels.unsqueeze(1)  # (B, 1, D, H, W)
        if self.augmentation is not None:
            channels = crops.shape[1]
            streams = [view_stream(key) for key in batch["key"]]
            draws = [draw for one in streams for draw in self.augmentation.draw_channels(one, channels=channels)]
            crops = self.augmentation.apply(crops, draws, in_place=True)
            labels = self.augmentation.orient(labels, draws[::channels])
        if self.zero_outside:
            crops = crops.masked_fill(labels < 0, 0)
        return {"image": crops, "label": labels.clamp(min=0)}
