# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Backbones: ``encode(image, visible=None)`` to feature maps, ``decode(features)`` to an image-sized map."""

from .blocks.transformer import Transformer
from .nets.primus import Primus, primus_b, primus_l, primus_m, primus_s
from .nets.resenc_unet import ResEncUNet, resenc_l

__all__ = ["Primus", "ResEncUNet", "Transformer", "primus_b", "primus_l", "primus_m", "primus_s", "resenc_l"]
