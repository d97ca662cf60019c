# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""MONAI dictionary transforms that MONAI lacks."""

from .dicom import is_dicom, series_in
from .geometry import ResampleToSpacingd, ResizeTod, SliceAxisFirstd
from .preprocessing import CheckVolumed, check_affine, check_values, load_volumes, nonzero, volume_preprocessing
from .reading import (
    ENDINGS,
    Header,
    VolumeReader,
    as_nifti,
    explain,
    files_behind,
    read_header,
    read_volume,
    volume_format,
    without_ending,
)
from .restoring import KeepLargestComponentd, RestoreSegmentationd, SaveProbabilitiesd
from .writing import AtomicNibabelWriter

__all__ = [
    "ENDINGS",
    "AtomicNibabelWriter",
    "CheckVolumed",
    "Header",
    "KeepLargestComponentd",
    "ResampleToSpacingd",
    "ResizeTod",
    "RestoreSegmentationd",
    "SaveProbabilitiesd",
    "SliceAxisFirstd",
    "VolumeReader",
    "as_nifti",
    "check_affine",
    "check_values",
    "explain",
    "files_behind",
    "is_dicom",
    "load_volumes",
    "nonzero",
    "read_header",
    "read_volume",
    "series_in",
    "volume_format",
    "volume_preprocessing",
    "without_ending",
]
