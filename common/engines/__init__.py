# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What MONAI's engines lack: views as batches, mirrored inference, scores of files, features, the check of settings."""

from .batches import ViewsBatch, loss_of
from .evaluation import evaluate_predictions
from .features import FeatureFolder, VolumeEmbedder, extract_features, frozen_encoder
from .inferers import MirroringInferer
from .settings import check_settings

__all__ = [
    "FeatureFolder",
    "MirroringInferer",
    "ViewsBatch",
    "VolumeEmbedder",
    "check_settings",
    "evaluate_predictions",
    "extract_features",
    "frozen_encoder",
    "loss_of",
]
