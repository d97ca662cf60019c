# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The way of a volume: ``listing``, ``checking``, ``preparing``, ``storing``, ``cropping``, imported in this order.

``prediction`` reads whole volumes for a trained network, without the store.
"""

from typing import TYPE_CHECKING

from ..lazy import on_demand

if TYPE_CHECKING:
    from ..tasks import ClassificationTask, RegressionTask, SegmentationTask
    from .checking.checks import check_first_labels, usable_cases
    from .cropping.crops import CropDataset, EpochSampler, crop_loader, prepare_pretraining_data
    from .cropping.patches import PatchDataset
    from .cropping.volumes import CaseSampler, VolumeDataset
    from .listing.classified import class_weights, classified_lists, fingerprints, prediction_cases, target_digest
    from .listing.datalists import every_image, image_list, pretraining_lists
    from .listing.descriptions import segmentation_task
    from .listing.labelled import labelled_lists, split_cases
    from .prediction import PredictionDataset, check_headers, pending_cases
    from .preparing.fingerprint import check_spacing, preprocessing_settings
    from .preparing.settings import StoreSettings, volume_settings
    from .storing.store import VolumeStore
    from .storing.stored import StoredVolume
    from .storing.tables import VolumeTable

__all__ = [
    "CaseSampler",
    "ClassificationTask",
    "CropDataset",
    "EpochSampler",
    "PatchDataset",
    "PredictionDataset",
    "RegressionTask",
    "SegmentationTask",
    "StoreSettings",
    "StoredVolume",
    "VolumeDataset",
    "VolumeStore",
    "VolumeTable",
    "check_first_labels",
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

__getattr__ = on_demand(globals())
