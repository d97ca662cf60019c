# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""MONAI dictionary transforms that MONAI lacks."""

from typing import TYPE_CHECKING

from ..lazy import on_demand

if TYPE_CHECKING:
    from .checks import check_affine, check_values
    from .formats.dicom import may_be_dicom, series_in
    from .formats.header import Header
    from .geometry import ResampleToSpacingd, ResizeTod, SliceAxisFirstd
    from .grids import same_grid
    from .loading import VolumeReader
    from .maps import whole_numbers
    from .preprocessing import OUTSIDE, CheckVolumed, load_volumes, volume_preprocessing
    from .reading import (
        ENDINGS,
        FileKind,
        as_nifti,
        explain,
        file_kind,
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
    "OUTSIDE",
    "AtomicNibabelWriter",
    "CheckVolumed",
    "FileKind",
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
    "file_kind",
    "files_behind",
    "load_volumes",
    "may_be_dicom",
    "read_header",
    "read_volume",
    "same_grid",
    "series_in",
    "volume_format",
    "volume_preprocessing",
    "whole_numbers",
    "without_ending",
]

__getattr__ = on_demand(globals())
