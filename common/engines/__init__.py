# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What MONAI's engines lack: views as batches, sliding windows, predicting a folder case by case,
pictures of predictions, evaluation of files, the check of settings.
"""

from .batches import ViewsBatch, loss_of
from .drawing import draw_overlay, draw_prediction
from .evaluation import evaluate_predictions
from .inferers import GaussianSlidingWindow, MirroringInferer
from .prediction import EachCase
from .settings import check_settings

__all__ = [
    "EachCase",
    "GaussianSlidingWindow",
    "MirroringInferer",
    "ViewsBatch",
    "check_settings",
    "draw_overlay",
    "draw_prediction",
    "evaluate_predictions",
    "loss_of",
]
