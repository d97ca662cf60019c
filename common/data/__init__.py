# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Datalists, checks, the volume store and datasets."""

from .checks import usable_cases
from .classified import (
    ClassificationTask,
    class_weights,
    classified_lists,
    fingerprints,
    prediction_cases,
    target_digest,
    volume_settings,
)
from .datalists import every_image, image_list, pretraining_lists
from .datasets import CropDataset, EpochSampler, crop_loader, prepare_pretraining_data
from .fingerprint import check_spacing, preprocessing_settings
from .labelled import labelled_lists, segmentation_task, split_cases
from .patches import PatchDataset
from .prediction import PredictionDataset, check_headers, pending_cases
from .store import StoreSettings, VolumeStore
from .stored import StoredVolume, VolumeTable
from .task import SegmentationTask
from .volumes import CaseSampler, VolumeDataset

__all__ = [
    "CaseSampler",
    "ClassificationTask",
    "CropDataset",
    "EpochSampler",
    "PatchDataset",
    "PredictionDataset",
    "SegmentationTask",
    "StoreSettings",
    "StoredVolume",
    "VolumeDataset",
    "VolumeStore",
    "VolumeTable",
    "check_headers",
    "check_spacing",
    "class_weights",
    "classified_lists",
    "crop_loader",
    "every_image",
    "fingerprints",
    "image_list",
    "labelled_lists",
    "pending_cases",
    "prediction_cases",
    "prepare_pretraining_data",
    "preprocessing_settings",
    "pretraining_lists",
    "segmentation_task",
    "split_cases",
    "target_digest",
    "usable_cases",
    "volume_settings",
]
