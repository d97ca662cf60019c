# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Losses that two or more methods share, and means over the global batch."""

from .classification import ClassificationLoss
from .contrastive import NTXentLoss
from .deep_supervision import DeepSupervision
from .masked_mse import MaskedMSELoss
from .reduction import gather, weighted_mean
from .regression import RegressionLoss, target_loss
from .segmentation import DiceCrossEntropy

__all__ = [
    "ClassificationLoss",
    "DeepSupervision",
    "DiceCrossEntropy",
    "MaskedMSELoss",
    "NTXentLoss",
    "RegressionLoss",
    "gather",
    "target_loss",
    "weighted_mean",
]
