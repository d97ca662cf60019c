# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""DICOM series as volumes: one file for each slice, or one file of many frames.

A series is named by its folder, or by any of its files where a folder holds several. Files belong together by their
SeriesInstanceUID. What would not become a regular grid is refused: missing slices, two images at one place, mixed
orientations, gantry tilt. So is a series beside whose files, by their names, lies one that cannot be read: it may be a
slice of it. MONAI's ``PydicomReader`` takes all files of a folder as one series and makes an affine up where it finds
none, so positions are judged by highdicom and pixels read by pydicom.
"""

from __future__ import annotations

import logging
import math
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from .header import MOST_VOXELS, Found, Header, notes_on_axes

__all__ = ["Series", "find_dicom", "is_dicom", "may_be_dicom", "series_in"]

_NEEDED = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality"),
    *("SeriesDescription", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient", "SpacingBetweenSlices", "BitsAllocated"),
    *("PixelRepresentation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("InstanceNumber", "ImagesInAcquisition"),
]
_ENDINGS = (".dcm", ".dicom", ".ima")
_STARTS = (b"\x08\x00", b"\x02\x00")  # of a file without the preamble: its first group
_DIRECTORY = "1.2.840.10008.1.3.10"  # DICOMDIR, an index
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # transfer syntaxes, not compressed
_REFERENCES = ("DerivationImageSequence", "ReferencedImageSequence", "SourceImageSequence")


def may_be_dicom(name: str) -> bool:
    """Return whether a file may be DICOM, by its name."""
    suffix = Path(name).suffix.lower()
    return suffix in ("", *_ENDINGS) or re.fullmatch(r"\.\d+", suffix) is not None


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its first bytes, looked at only if its name may be one of DICOM's."""
    if not may_be_dicom(path.name):
        return False
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
            return False
        with open(path, "rb") as stream:
            start = stream.read(132)
        return start[128:] == b"DICM" or (len(start) == 132 and start.startswith(_STARTS) and start[3] == 0)
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
    # what they remark on names of patients and the like is no matter here; what matters is said here
    warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)\b")
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return pydicom, highdicom


def _look(path: Path) -> Any:
    """Read what places a file, without its pixels, and note where those begin."""
    pydicom, _ = _library()
    with open(path, "rb") as stream:
        dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_NEEDED, force=True)
        dataset.pixels_at = stream.tell()
    return dataset


def _read(path: Path) -> Any:
    """Read a whole file; one without a preamble does not say how its pixels are encoded, but it was just decoded."""
    pydicom, _ = _library()
    dataset = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = _PLAIN[0 if implicit else 1 if little else 2]
    return dataset


@dataclass
class Series:
    """The DICOM files of one folder.

    Attributes:
        files: with their headers, by SeriesInstanceUID.
        problems: what is wrong with files that belong to none.
        doubtful: by SeriesInstanceUID, the first of those that may be a slice of it.
    """

    files: dict[str, list[tuple[Path, Any]]] = field(default_factory=dict)
    problems: list[DataError] = field(default_factory=list)
    doubtful: dict[str, DataError] = field(default_factory=dict)


def series_in(files: Iterable[Path]) -> Series:
    """Sort the files of one folder that may be DICOM, by their names, into series.

    What is no DICOM at all counts as damaged if it ends as DICOM does, or is named as the files of a series but for
    numbers. An index (DICOMDIR) is passed over.
    """
    found = Series()
    bad: list[tuple[Path, DataError]] = []
    others: list[Path] = []
    series_of: dict[Path, str] = {}
    for file in sorted(files, key=lambda file: _natural(file.name)):
        if not is_dicom(file):
            others.append(file)
            continue
        try:
            dataset = _look(file)
            kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
            if kind == _DIRECTORY:
                continue
            if not dataset.get("Rows"):
                name = getattr(kind, "name", None) or "of no known kind"
                if "Image Storage" in name or not dataset.get("SeriesInstanceUID"):
                    raise EOFError("its header is not whole")
                found.problems.append(DataError(f"{file} is DICOM without an image ({name}) and is left out"))
                continue
            series_of[file] = str(dataset.SeriesInstanceUID)
            found.files.setdefault(series_of[file], []).append((file, dataset))
        except DataError:
            raise
        except Exception as error:
            bad.append((file, DataError(f"{file} cannot be read as DICOM ({error}); restore it or leave it out")))
    patterns = {_pattern(file.name) for file in series_of}
    for file in others:
        if (told := _damage(file)) and (file.suffix.lower() in _ENDINGS or _pattern(file.name) in patterns):
            bad.append((file, DataError(f"{file} {told}; restore it or leave it out")))
    names = sorted([*series_of, *(file for file, _ in bad)], key=lambda file: _natural(file.name))
    for file, problem in bad:
        found.problems.append(problem)
        here = names.index(file)
        before = next((each for each in names[:here][::-1] if each in series_of), None)
        after = next((each for each in names[here + 1 :] if each in series_of), None)
        for each in (before, after):
            if each is not None and _pattern(each.name) == _pattern(file.name):
                found.doubtful.setdefault(series_of[each], problem)
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return what sorts a name with its numbers by their size."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "0", name.lower())


def _damage(file: Path) -> str | None:
    """Return what is wrong with a file that should be DICOM; None for what is no file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return "is a link that leads nowhere"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return None
    return f"({status.st_size:,} bytes) is not DICOM" if status.st_size else "is empty"


def find_dicom(path: str) -> Found:
    """Return the header of the series that a folder or file is of, and the way to its voxels.

    Raises:
        DataError: if the files do not make one volume.
    """
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    own = None
    if not place.is_dir():
        dataset = _look(place)
        if not dataset.get("Rows"):
            raise DataError(f"{path} is DICOM without an image; leave it out")
        own = str(dataset.SeriesInstanceUID)
    found = series_in(file for file in folder.iterdir() if may_be_dicom(file.name) and not file.is_dir())
    if own is None:
        if found.problems and not found.files:
            raise found.problems[0]
        if len(found.files) != 1:
            raise DataError(
                f"{path} holds {len(found.files)} DICOM series, not one; name a file of the one that is meant"
            )
        (own,) = found.files
    files = [file for file, _ in found.files[own]]
    datasets = [dataset for _, dataset in found.files[own]]
    description = str(getattr(datasets[0], "SeriesDescription", "") or own)
    if any(int(dataset.get("SamplesPerPixel") or 1) != 1 for dataset in datasets):
        raise DataError(f"{path} holds colours; save plain numbers, one per voxel")
    try:
        if any(int(dataset.get("NumberOfFrames") or 1) > 1 for dataset in datasets):
            return _frames(path, files, datasets)
        result = _slices(path, files, datasets)
    except DataError as error:
        if own not in found.doubtful:
            raise
        raise DataError(f"series {description!r}: {error}; beside it, {found.doubtful[own]}") from error
    if own in found.doubtful:
        raise DataError(
            f"series {description!r} of {folder} may lack a slice: {found.doubtful[own]} by moving it to another folder"
        )
    return result


def _slices(path: str, files: Sequence[Path], datasets: Sequence[Any]) -> Found:
    pydicom, _ = _library()
    first = datasets[0]
    for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
        without = [file for file, each in zip(files, datasets, strict=True) if not getattr(each, name, None)]
        if without:
            raise DataError(f"{without[0]} has no {name}, so its place is not known; leave the series out")
    sizes = Counter((int(each.Rows), int(each.Columns)) for each in datasets)
    if len(sizes) > 1:
        raise DataError(f"{path} mixes slices of {' and '.join(f'{a} x {b}' for a, b in sizes)}; separate them")
    if len(datasets) < 2:
        raise DataError(f"{path} is a series of one slice; a volume needs at least 2 voxels along every axis")
    stack = _stack(
        path,
        [file.name for file in files],
        orientations=[each.ImageOrientationPatient for each in datasets],
        positions=[each.ImagePositionPatient for each in datasets],
        spacings=[each.PixelSpacing for each in datasets],
        plane=(int(first.Columns), int(first.Rows)),
    )
    size = sum(_whole(file, dataset) for file, dataset in zip(files, datasets, strict=True))
    notes = [*_missing(path, stack, datasets), *notes_on_axes(stack.affine, other="SimpleITK does so too")]

    def voxels() -> np.ndarray:
        volume = np.empty(stack.shape, np.float32)
        for index, file in zip(stack.indices, files, strict=True):
            try:
                dataset = _read(file)
                plane = pydicom.pixels.apply_rescale(dataset.pixel_array, dataset)
            except Exception as error:
                raise _pixels(file, error) from error
            if plane.T.shape != stack.shape[:2]:
                raise DataError(f"{file} holds {plane.shape} pixels, not {stack.shape[1::-1]}; copy it again")
            volume[:, :, index] = plane.T
        return volume

    return Found(Header(stack.shape, stack.affine, np.dtype(np.float32), stack.spacing_mm, size, tuple(notes)), voxels)


@dataclass(frozen=True)
class _Stack:
    """Planes that lie one behind the other.

    Attributes:
        shape: ``(X, Y, Z)``.
        affine: ``(4, 4)`` to millimetres in RAS.
        indices: the place of each plane along z.
        step_mm: from one to the next.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    indices: np.ndarray
    step_mm: float

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        return tuple(float(side) for side in np.linalg.norm(self.affine[:3, :3], axis=0))


def _stack(
    path: str,
    names: Sequence[str],
    *,
    orientations: Sequence[Any],
    positions: Sequence[Any],
    spacings: Sequence[Any],
    plane: tuple[int, int],
) -> _Stack:
    """Place planes, or say why they do not make a grid.

    Args:
        path: of the series.
        names: of its planes, for messages.
        orientations: ``ImageOrientationPatient`` of each.
        positions: ``ImagePositionPatient`` of each.
        spacings: ``PixelSpacing`` of each.
        plane: their columns and rows.

    Raises:
        DataError: if they do not lie on a regular grid.
    """
    _, highdicom = _library()
    across = np.asarray(orientations[0], dtype=float).reshape(2, 3)
    pixels = np.asarray(spacings[0], dtype=float)
    for name, orientation, spacing in zip(names, orientations, spacings, strict=True):
        if not np.allclose(np.asarray(orientation, dtype=float), across.ravel(), atol=1e-3):
            raise DataError(f"{path} mixes orientations ({name} differs from {names[0]}); separate them")
        if not np.allclose(np.asarray(spacing, dtype=float), pixels, rtol=1e-3):
            raise DataError(f"{path} mixes pixel sizes ({name} differs from {names[0]}); separate them")
    places = np.asarray(positions, dtype=float)
    spacing, order = highdicom.spatial.get_volume_positions(
        places, [float(value) for value in across.ravel()], rtol=0.02, spacing_hint=None
    )
    if spacing is None:
        raise DataError(_irregular(path, names, places, np.cross(*across)))
    indices = np.asarray(order)
    down, right = (float(value) for value in pixels)
    by_place = np.argsort(indices)
    step = (places[by_place[-1]] - places[by_place[0]]) / (len(names) - 1)
    lps = np.eye(4)
    lps[:3, :3] = np.stack([across[0] * right, across[1] * down, step], axis=1)
    lps[:3, 3] = places[by_place[0]]
    shape = (*plane, len(names))
    if math.prod(shape) > MOST_VOXELS:
        raise DataError(f"{path} claims {shape} voxels, more than the limit of {MOST_VOXELS:,}; leave it out")
    return _Stack(shape, _ras(lps), indices, float(np.linalg.norm(step)))


def _whole(file: Path, dataset: Any) -> int:
    """Return the size of a file, which must hold the pixels that its header claims unless they are compressed."""
    size = os.path.getsize(file)
    if str(dataset.file_meta.get("TransferSyntaxUID", _PLAIN[0])) in _PLAIN:
        frames, rows, columns = int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns)
        needed = frames * rows * columns * int(dataset.get("BitsAllocated") or 1) // 8
        if needed > size - dataset.pixels_at:
            of = f"{frames} frames of " if frames > 1 else ""
            raise DataError(
                f"{file} ({size:,} bytes) is cut short: its header claims {of}{rows} x {columns} pixels, {needed:,} "
                "bytes; copy it again from its source"
            )
    return size


def _missing(path: str, stack: _Stack, datasets: Sequence[Any]) -> list[str]:
    """Return what hints at slices that are not there, though those that are make a grid.

    Raises:
        DataError: if slices lie several times as far apart as they say, and are numbered so.
    """
    by_place = np.argsort(stack.indices)
    numbers = np.array([int(dataset.get("InstanceNumber") or 0) for dataset in datasets])[by_place]
    said = float(datasets[0].get("SpacingBetweenSlices") or 0)
    times = round(stack.step_mm / said) if said > 0 else 0
    steps = np.abs(np.diff(numbers))
    if times > 1 and abs(stack.step_mm / said - times) < 0.02 * times and (steps == times).all():
        raise DataError(
            f"{path} lacks slices: they lie {stack.step_mm:.3g} mm apart and say {said:.3g}, and their numbers go by "
            f"{times}; copy it again from its source"
        )
    notes = []
    if (steps == 1).all() and (lowest := int(numbers.min())) > 1:
        notes.append(f"its slices are numbered from {lowest}; some may be missing in front")
    if (all_of_them := int(datasets[0].get("ImagesInAcquisition") or 0)) > len(datasets):
        notes.append(f"its acquisition has {all_of_them} images and {len(datasets)} are here; some may be missing")
    return notes


def _group(frame: Any, shared: Any, sequence: str, name: str) -> Any:
    """Return a value of a frame's functional groups, or of those that all frames share."""
    for groups in (frame, shared):
        items = groups.get(sequence) if groups is not None else None
        if items and (value := items[0].get(name)):
            return value
    return None


def _frames(path: str, files: Sequence[Path], datasets: Sequence[Any]) -> Found:
    """Take the one file of many frames as a volume."""
    if len(files) > 1:
        raise DataError(f"{path} is a series of {len(files)} files with several frames each; convert it with dcm2niix")
    _, highdicom = _library()
    file, dataset = files[0], datasets[0]
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), None)
    if len(frames) != int(dataset.NumberOfFrames):
        raise DataError(f"{path} has several frames and does not say where each lies; convert it with dcm2niix")
    values: dict[str, list[Any]] = {}
    for sequence, name in (
        ("PlaneOrientationSequence", "ImageOrientationPatient"),
        ("PlanePositionSequence", "ImagePositionPatient"),
        ("PixelMeasuresSequence", "PixelSpacing"),
    ):
        values[name] = [_group(frame, shared, sequence, name) for frame in frames]
        if None in values[name]:
            raise DataError(
                f"{path} has no {name} for its frame {values[name].index(None) + 1}, so its place is not known; "
                "convert it with dcm2niix"
            )
    stack = _stack(
        path,
        [f"frame {number}" for number in range(1, len(frames) + 1)],
        orientations=values["ImageOrientationPatient"],
        positions=values["ImagePositionPatient"],
        spacings=values["PixelSpacing"],
        plane=(int(dataset.Columns), int(dataset.Rows)),
    )
    size = _whole(file, dataset)
    notes = notes_on_axes(stack.affine, other="SimpleITK does so too")

    def voxels() -> np.ndarray:
        try:
            whole = _read(file)
            groups = [*whole.PerFrameFunctionalGroupsSequence, *(whole.get("SharedFunctionalGroupsSequence") or [])]
            for each in (whole, *groups):  # highdicom wants them to name one frame; some name many
                for name in _REFERENCES:
                    if name in each:
                        delattr(each, name)
            image = highdicom.Image.from_dataset(whole, copy=False)
            volume = image.get_volume(dtype=np.float32, apply_presentation_lut=False, rtol=0.02)
        except Exception as error:
            raise _pixels(file, error) from error
        return np.asarray(volume.array).transpose(2, 1, 0)

    return Found(Header(stack.shape, stack.affine, np.dtype(np.float32), stack.spacing_mm, size, tuple(notes)), voxels)


def _ras(lps: np.ndarray) -> np.ndarray:
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _irregular(path: str, names: Sequence[str], positions: np.ndarray, normal: np.ndarray) -> str:
    """Say why slices do not make a grid."""
    along = positions @ normal
    order = np.argsort(along)
    gaps = np.diff(along[order])
    usual = float(np.median(gaps))
    if (gaps < 0.01 * max(usual, 1e-3)).any():
        same = int(np.argmin(gaps))
        return (
            f"{path} has two images at one place ({names[order[same]]}, {names[order[same + 1]]}), such as "
            "echoes or time points; separate them, or convert it with dcm2niix"
        )
    wide = int(np.argmax(gaps))
    if gaps[wide] > 1.5 * usual:
        return (
            f"{path} lacks slices: between {names[order[wide]]} and {names[order[wide + 1]]} there are "
            f"{gaps[wide]:.3g} mm, elsewhere {usual:.3g}; copy it again from its source"
        )
    return f"{path} is no regular stack: its slices are unevenly spaced or tilted; convert it with dcm2niix"


def _pixels(file: Path, error: Exception) -> DataError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"the pixels of {file} cannot be read ({text}); copy it again, install python-gdcm if it is compressed, or "
        "convert it with dcm2niix"
    )
