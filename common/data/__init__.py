# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Datalists, checks, the volume store and datasets."""

from .checks import check_labels, pending_cases, usable_cases
from .datalists import image_list, labelled_lists, pretraining_lists
from .datasets import CropDataset, EpochSampler, crop_loader, micro_batch, prepare_pretraining_data
from .store import StoredVolume, StoreSettings, VolumeStore

__all__ = [
    "CropDataset",
    "EpochSampler",
    "StoreSettings",
    "StoredVolume",
    "VolumeStore",
    "check_labels",
    "crop_loader",
    "image_list",
    "labelled_lists",
    "micro_batch",
    "pending_cases",
    "prepare_pretraining_data",
    "pretraining_lists",
    "usable_cases",
]
