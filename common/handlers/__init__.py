# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Ignite handlers that MONAI and ignite lack."""

from .checkpoints import PretrainingCheckpoint
from .optimization import GradientClip, Reproducible, SetLearningRate
from .pictures import ReconstructionPictures, draw_reconstruction
from .progress import Progress

__all__ = [
    "GradientClip",
    "PretrainingCheckpoint",
    "Progress",
    "ReconstructionPictures",
    "Reproducible",
    "SetLearningRate",
    "draw_reconstruction",
]
