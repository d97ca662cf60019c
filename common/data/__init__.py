# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Datalists, checks, the volume store and datasets."""

from .checks import pending_cases, usable_cases
from .datalists import image_list, labelled_lists, pretraining_lists
from .datasets import CropDataset, crop_loader, prepare_pretraining_data
from .store import StoredVolume, StoreSettings, VolumeStore

__all__ = [
    "CropDataset",
    "StoreSettings",
    "StoredVolume",
    "VolumeStore",
    "crop_loader",
    "image_list",
    "labelled_lists",
    "pending_cases",
    "prepare_pretraining_data",
    "pretraining_lists",
    "usable_cases",
]
