# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Ignite handlers that MONAI and ignite lack."""

from .checkpoints import FineTuningCheckpoint, PretrainingCheckpoint, check_resume, hold_folders
from .classification import PooledScores, Predictions
from .collapse import CollapseWatch
from .optimization import GradientClip, Reproducible, SetLearningRate, StopAtNonFiniteLoss
from .phases import FineTuningPhases
from .pictures import (
    Curves,
    Pictures,
    SegmentationPicture,
    draw_features,
    draw_fusion,
    draw_reconstruction,
    draw_restoration,
    draw_similarity,
)
from .progress import CaseBar, ListedOutput, Progress, shared
from .progress_page import ProgressPage
from .reading import UnreadableVolumes
from .validation import PooledDice

__all__ = [
    "CaseBar",
    "CollapseWatch",
    "Curves",
    "FineTuningCheckpoint",
    "FineTuningPhases",
    "GradientClip",
    "ListedOutput",
    "Pictures",
    "PooledDice",
    "PooledScores",
    "Predictions",
    "PretrainingCheckpoint",
    "Progress",
    "ProgressPage",
    "Reproducible",
    "SegmentationPicture",
    "SetLearningRate",
    "StopAtNonFiniteLoss",
    "UnreadableVolumes",
    "check_resume",
    "draw_features",
    "draw_fusion",
    "draw_reconstruction",
    "draw_restoration",
    "draw_similarity",
    "hold_folders",
    "shared",
]
