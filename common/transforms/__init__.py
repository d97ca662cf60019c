# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""MONAI dictionary transforms that MONAI lacks."""

from .geometry import ResampleToSpacingd, ResizeTod, SliceAxisFirstd
from .preprocessing import CheckVolumed, check_affine, check_values, nonzero, volume_preprocessing
from .restoring import KeepLargestComponentd, RestoreSegmentationd, SaveProbabilitiesd
from .writing import AtomicNibabelWriter

__all__ = [
    "AtomicNibabelWriter",
    "CheckVolumed",
    "KeepLargestComponentd",
    "ResampleToSpacingd",
    "ResizeTod",
    "RestoreSegmentationd",
    "SaveProbabilitiesd",
    "SliceAxisFirstd",
    "check_affine",
    "check_values",
    "nonzero",
    "volume_preprocessing",
]
