# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Ignite handlers that MONAI and ignite lack."""

from .checkpoints import BestModel, PretrainingCheckpoint, check_resume
from .collapse import CollapseWatch
from .optimization import GradientClip, Reproducible, SetLearningRate, StopAtNonFiniteLoss
from .pictures import Pictures, draw_fusion, draw_reconstruction, draw_restoration, draw_similarity
from .progress import Progress, shared

__all__ = [
    "BestModel",
    "CollapseWatch",
    "GradientClip",
    "Pictures",
    "PretrainingCheckpoint",
    "Progress",
    "Reproducible",
    "SetLearningRate",
    "StopAtNonFiniteLoss",
    "check_resume",
    "draw_fusion",
    "draw_reconstruction",
    "draw_restoration",
    "draw_similarity",
    "shared",
]
