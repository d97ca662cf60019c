# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Backbones: ``encode(image, visible=None)`` to feature maps, ``decode(features)`` to an image-sized map."""

from .blocks.convolution import Convolution
from .blocks.recompute import in_chunks, recalled, selects
from .blocks.sparse import mask_at, masked_instance_norm
from .blocks.transformer import Transformer
from .classifier import ClassificationNet
from .ensemble import Ensemble
from .heads import ProjectionHead, pool_features
from .nets.plain_unet import PlainUNet
from .nets.primus import Primus, primus_b, primus_l, primus_m, primus_s
from .nets.resenc_unet import ResEncUNet, resenc_l
from .teacher import at_places, block_features, follow, momentum_at, teacher_of
from .untrained import UNTRAINED, mark_untrained, refuse_untrained, watch_untrained

__all__ = [
    "UNTRAINED",
    "ClassificationNet",
    "Convolution",
    "Ensemble",
    "PlainUNet",
    "Primus",
    "ProjectionHead",
    "ResEncUNet",
    "Transformer",
    "at_places",
    "block_features",
    "follow",
    "in_chunks",
    "mark_untrained",
    "mask_at",
    "masked_instance_norm",
    "momentum_at",
    "pool_features",
    "primus_b",
    "primus_l",
    "primus_m",
    "primus_s",
    "recalled",
    "refuse_untrained",
    "resenc_l",
    "selects",
    "teacher_of",
    "watch_untrained",
]
