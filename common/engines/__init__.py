# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What MONAI's engines lack: views as batches, sliding windows, predicting a folder case by case,
pictures of predictions, evaluation of files, what a labelling server needs, the check of settings.
"""

from typing import TYPE_CHECKING

from ..lazy import on_demand

if TYPE_CHECKING:
    from .batches import SegmentationBatch, ViewsBatch, loss_of
    from .budget.starting import check_memory
    from .classification import (
        ClassificationBatch,
        check_new_file,
        classifier_settings,
        read_classifier_settings,
        target_task,
        tell_resized,
    )
    from .evaluation import evaluate_predictions
    from .features import FeatureFolder, VolumeEmbedder, embed_files, extract_features, frozen_encoder
    from .inferers import DecideSlices, GaussianSlidingWindow
    from .precision import AtPrecision, Precision
    from .prediction import EachCase
    from .serving import ModelPreprocessing
    from .settings import check_settings, model_settings
    from .telling import tell_beginning, tell_end
    from .watching import FeatureWatch, ProbeSource

__all__ = [
    "AtPrecision",
    "ClassificationBatch",
    "DecideSlices",
    "EachCase",
    "FeatureFolder",
    "FeatureWatch",
    "GaussianSlidingWindow",
    "ModelPreprocessing",
    "Precision",
    "ProbeSource",
    "SegmentationBatch",
    "ViewsBatch",
    "VolumeEmbedder",
    "check_memory",
    "check_new_file",
    "check_settings",
    "classifier_settings",
    "embed_files",
    "evaluate_predictions",
    "extract_features",
    "frozen_encoder",
    "loss_of",
    "model_settings",
    "read_classifier_settings",
    "target_task",
    "tell_beginning",
    "tell_end",
    "tell_resized",
]

__getattr__ = on_demand(globals())
