# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Features of a frozen encoder: tiles, the embedder, the folder of features, extraction, and voxels to look at."""

from typing import TYPE_CHECKING

from ...lazy import on_demand

if TYPE_CHECKING:
    from .embedder import Embedding, VolumeEmbedder
    from .extraction import embed_files, extract_features, frozen_encoder
    from .folder import FROZEN_CAVEAT, FeatureFolder, read_features
    from .voxels import draw_voxels

__all__ = [
    "FROZEN_CAVEAT",
    "Embedding",
    "FeatureFolder",
    "VolumeEmbedder",
    "draw_voxels",
    "embed_files",
    "extract_features",
    "frozen_encoder",
    "read_features",
]

__getattr__ = on_demand(globals())
