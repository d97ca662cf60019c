# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Views: what a method sees of a volume. Draws are made once per sample, applied in batches on the training device."""

from .axes import axis_numbers, tell_mirroring
from .bias_field import BiasField
from .blocks import VisibleBlocks
from .classification import VolumeViews
from .intensity import AugmentationDraw, CropAugmentation
from .masks import MaskedViews, draw_hidden_blocks
from .randomness import SampleKey, progress_of, reading_stream, step_seed, step_stream, view_stream
from .segmentation import SegmentationViews
from .spatial import SpatialCrop, SpatialDraw

__all__ = [
    "AugmentationDraw",
    "BiasField",
    "CropAugmentation",
    "MaskedViews",
    "SampleKey",
    "SegmentationViews",
    "SpatialCrop",
    "SpatialDraw",
    "VisibleBlocks",
    "VolumeViews",
    "axis_numbers",
    "draw_hidden_blocks",
    "progress_of",
    "reading_stream",
    "step_seed",
    "step_stream",
    "tell_mirroring",
    "view_stream",
]
