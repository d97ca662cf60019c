# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""DICOM series as volumes: one file for each slice, or one file of many frames.

A series is named by its folder, or by any of its files where a folder holds several. Files belong together by their
SeriesInstanceUID. What would not become a regular grid is refused: missing slices, two images at one place, mixed
orientations, gantry tilt. MONAI's ``PydicomReader`` takes all files of a folder as one series and makes an affine up
where it finds none, so positions are judged by highdicom and pixels read by pydicom.
"""

from __future__ import annotations

import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .reading import ENDINGS, MOST_VOXELS, Header

__all__ = ["find_series", "is_dicom", "may_be_dicom", "series_in"]

_NEEDED = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality"),
    *("SeriesDescription", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient", "SpacingBetweenSlices", "BitsAllocated"),
    *("PixelRepresentation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


def may_be_dicom(name: str) -> bool:
    """Return whether a file may be DICOM, by its name."""
    suffix = Path(name).suffix.lower()
    return suffix in ("", ".dcm", ".dicom", ".ima") or re.fullmatch(r"\.\d+", suffix) is not None


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its first bytes, looked at only if its name may be one of DICOM's."""
    if not may_be_dicom(path.name):
        return False
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
            return False
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False


def _library() -> Any:
    try:
        import highdicom
        import pydicom
    except ImportError as error:
        raise DataError(
            f"DICOM is read with pydicom and highdicom, and {error.name} is not installed; pip install {error.name}"
        ) from error
    return pydicom, highdicom


def _look(path: Path) -> Any:
    """Read what places a file, without its pixels."""
    pydicom, _ = _library()
    return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_NEEDED)


def series_in(files: Iterable[Path]) -> tuple[dict[str, list[tuple[Path, Any]]], list[DataError]]:
    """Sort DICOM files, of one folder, into series.

    Returns:
        files with their headers by SeriesInstanceUID, and what is wrong with files that belong to none.
    """
    series: dict[str, list[tuple[Path, Any]]] = {}
    problems = []
    for file in sorted(files):
        try:
            dataset = _look(file)
            series.setdefault(str(dataset.SeriesInstanceUID), []).append((file, dataset))
        except DataError:
            raise
        except Exception as error:
            problems.append(DataError(f"{file} cannot be read as DICOM ({error}); restore it or leave it out"))
    return series, problems


def find_series(path: str) -> tuple[Header, Callable[[], np.ndarray]]:
    """Return the header of the series that a folder or file is of, and the way to its voxels.

    Raises:
        DataError: if the files do not make one volume.
    """
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    if place.is_file() and not is_dicom(place):
        raise DataError(
            f"{path} ({place.stat().st_size:,} bytes) is none of {', '.join(ENDINGS)} and not DICOM; convert it or "
            "leave it out"
        )
    own = None if place.is_dir() else str(_look(place).SeriesInstanceUID)
    series, problems = series_in(file for file in folder.iterdir() if file.is_file() and is_dicom(file))
    if own is None:
        if problems and not series:
            raise problems[0]
        if len(series) != 1:
            raise DataError(f"{path} holds {len(series)} DICOM series, not one; name a file of the one that is meant")
        (own,) = series
    files = [file for file, _ in series[own]]
    datasets = [dataset for _, dataset in series[own]]
    if any(int(getattr(dataset, "SamplesPerPixel", 1)) != 1 for dataset in datasets):
        raise DataError(f"{path} holds colours; save plain numbers, one per voxel")
    if any(int(getattr(dataset, "NumberOfFrames", 1) or 1) > 1 for dataset in datasets):
        return _frames(path, files)
    try:
        return _slices(path, files, datasets)
    except DataError as error:
        if not problems:
            raise
        # a file that cannot be read does not say of which series it is; that this one is not whole does
        description = str(getattr(datasets[0], "SeriesDescription", "") or own)
        raise DataError(f"series {description!r}: {error}; beside it, {problems[0]}") from error


def _slices(path: str, files: Sequence[Path], datasets: Sequence[Any]) -> tuple[Header, Callable[[], np.ndarray]]:
    pydicom, highdicom = _library()
    first = datasets[0]
    for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
        without = [file for file, each in zip(files, datasets, strict=True) if not getattr(each, name, None)]
        if without:
            raise DataError(f"{without[0]} has no {name}, so its place is not known; leave the series out")
    sizes = Counter((int(each.Rows), int(each.Columns)) for each in datasets)
    if len(sizes) > 1:
        raise DataError(f"{path} mixes slices of {' and '.join(f'{a} x {b}' for a, b in sizes)}; separate them")
    across = np.asarray(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
    turned = [
        file
        for file, each in zip(files, datasets, strict=True)
        if not np.allclose(np.asarray(each.ImageOrientationPatient, dtype=float), across.ravel(), atol=1e-3)
    ]
    if turned:
        raise DataError(f"{path} mixes orientations ({turned[0].name} differs from {files[0].name}); separate them")
    if len(datasets) < 2:
        raise DataError(f"{path} is a series of one slice; a volume needs at least 2 voxels along every axis")
    positions = np.asarray([each.ImagePositionPatient for each in datasets], dtype=float)
    spacing, order = highdicom.spatial.get_volume_positions(
        positions, first.ImageOrientationPatient, rtol=0.02, spacing_hint=None
    )
    if spacing is None:
        raise DataError(_irregular(path, files, positions, np.cross(*across)))
    indices = np.asarray(order)
    rows, columns = int(first.Rows), int(first.Columns)
    down, right = (float(value) for value in first.PixelSpacing)
    by_place = np.argsort(indices)
    step = (positions[by_place[-1]] - positions[by_place[0]]) / (len(files) - 1)
    lps = np.eye(4)
    lps[:3, :3] = np.stack([across[0] * right, across[1] * down, step], axis=1)
    lps[:3, 3] = positions[by_place[0]]
    shape = (columns, rows, len(files))
    if math.prod(shape) > MOST_VOXELS:
        raise DataError(f"{path} claims {shape} voxels, more than the limit of {MOST_VOXELS:,}; leave it out")

    def voxels() -> np.ndarray:
        volume = np.empty(shape, np.float32)
        for index, file in zip(indices, files, strict=True):
            dataset = pydicom.dcmread(file)
            try:
                plane = pydicom.pixels.apply_rescale(dataset.pixel_array, dataset)
            except Exception as error:
                raise _pixels(file, error) from error
            if plane.shape != (rows, columns):
                raise DataError(f"{file} holds {plane.shape} pixels, not {rows} x {columns}; copy it again")
            volume[:, :, index] = plane.T
        return volume

    return Header(shape, _ras(lps), np.dtype(np.float32), (right, down, float(np.linalg.norm(step)))), voxels


def _frames(path: str, files: Sequence[Path]) -> tuple[Header, Callable[[], np.ndarray]]:
    """Take the one file of many frames as a volume."""
    if len(files) > 1:
        raise DataError(f"{path} is a series of {len(files)} files with several frames each; convert it with dcm2niix")
    _, highdicom = _library()
    try:
        image = highdicom.imread(files[0], lazy_frame_retrieval=True)
        geometry = image.get_volume_geometry(rtol=0.02)
    except Exception as error:
        raise DataError(f"{path} has several frames and cannot be read ({error}); convert it with dcm2niix") from error
    if geometry is None:
        raise DataError(f"{path} has frames that are no regular stack of slices; convert it with dcm2niix")
    slices, rows, columns = geometry.spatial_shape
    if slices * rows * columns > MOST_VOXELS:
        raise DataError(f"{path} claims {geometry.spatial_shape} voxels, more than {MOST_VOXELS:,}; leave it out")
    lps = np.asarray(geometry.affine, dtype=float)[:, [2, 1, 0, 3]]  # highdicom counts (slice, row, column)
    spacing = tuple(float(value) for value in np.linalg.norm(lps[:3, :3], axis=0))

    def voxels() -> np.ndarray:
        try:
            volume = image.get_volume(dtype=np.float32, apply_presentation_lut=False, rtol=0.02)
        except Exception as error:
            raise _pixels(files[0], error) from error
        return np.asarray(volume.array).transpose(2, 1, 0)

    return Header((columns, rows, slices), _ras(lps), np.dtype(np.float32), spacing), voxels


def _ras(lps: np.ndarray) -> np.ndarray:
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _irregular(path: str, files: Sequence[Path], positions: np.ndarray, normal: np.ndarray) -> str:
    """Say why slices do not make a grid."""
    along = positions @ normal
    order = np.argsort(along)
    gaps = np.diff(along[order])
    usual = float(np.median(gaps))
    if (gaps < 0.01 * max(usual, 1e-3)).any():
        same = int(np.argmin(gaps))
        return (
            f"{path} has two images at one place ({files[order[same]].name}, {files[order[same + 1]].name}), such as "
            "echoes or time points; separate them, or convert it with dcm2niix"
        )
    wide = int(np.argmax(gaps))
    if gaps[wide] > 1.5 * usual:
        return (
            f"{path} lacks slices: between {files[order[wide]].name} and {files[order[wide + 1]].name} there are "
            f"{gaps[wide]:.3g} mm, elsewhere {usual:.3g}; copy it again from its source"
        )
    return f"{path} is no regular stack: its slices are unevenly spaced or tilted; convert it with dcm2niix"


def _pixels(file: Path, error: Exception) -> DataError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"the pixels of {file} cannot be read ({text}); copy it again, install python-gdcm if it is compressed, or "
        "convert it with dcm2niix"
    )
