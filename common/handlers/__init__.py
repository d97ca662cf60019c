# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Ignite handlers that MONAI and ignite lack."""

from .checkpoints import FineTuningCheckpoint, PretrainingCheckpoint, check_resume
from .collapse import CollapseWatch
from .optimization import GradientClip, Reproducible, SetLearningRate, StopAtNonFiniteLoss
from .pictures import Pictures, draw_fusion, draw_reconstruction, draw_restoration, draw_similarity
from .phases import FineTuningPhases
from .progress import Progress, shared
from .validation import PooledDice

__all__ = [
    "CollapseWatch",
    "FineTuningCheckpoint",
    "FineTuningPhases",
    "GradientClip",
    "Pictures",
    "PooledDice",
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
