# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Datalists, checks, the volume store and datasets."""

from .checks import usable_cases
from .datalists import image_list, pretraining_lists
from .datasets import CropDataset, EpochSampler, crop_loader, micro_batch, prepare_pretraining_data
from .labelled import labelled_lists, segmentation_task, split_cases
from .prediction import PredictionDataset, check_headers, pending_cases
from .store import StoredVolume, StoreSettings, VolumeStore
from .task import SegmentationTask

__all__ = [
    "CropDataset",
    "EpochSampler",
    "PredictionDataset",
    "SegmentationTask",
    "StoreSettings",
    "StoredVolume",
    "VolumeStore",
    "check_headers",
    "crop_loader",
    "image_list",
    "labelled_lists",
    "micro_batch",
    "pending_cases",
    "prepare_pretraining_data",
    "pretraining_lists",
    "segmentation_task",
    "split_cases",
    "usable_cases",
]
