# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Ignite handlers that MONAI and ignite lack."""

from .checkpoints import BestModel, PretrainingCheckpoint, check_resume
from .optimization import GradientClip, Reproducible, SetLearningRate
from .pictures import ReconstructionPictures, draw_reconstruction
from .progress import Progress, shared

__all__ = [
    "BestModel",
    "GradientClip",
    "PretrainingCheckpoint",
    "Progress",
    "ReconstructionPictures",
    "Reproducible",
    "SetLearningRate",
    "check_resume",
    "draw_reconstruction",
    "shared",
]
