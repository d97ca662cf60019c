# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One embedding per volume with a frozen encoder: tiles, the embedder, the folder of features, and extraction."""

from typing import TYPE_CHECKING

from ...lazy import on_demand

if TYPE_CHECKING:
    from .embedder import Embedding, VolumeEmbedder
    from .extraction import embed_files, extract_features, frozen_encoder
    from .folder import FROZEN_CAVEAT, FeatureFolder, read_features

__all__ = [
    "FROZEN_CAVEAT",
    "Embedding",
    "FeatureFolder",
    "VolumeEmbedder",
    "embed_files",
    "extract_features",
    "frozen_encoder",
    "read_features",
]

__getattr__ = on_demand(globals())
