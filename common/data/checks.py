# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Look at every file before a long run begins, and say in a sentence what is wrong with the bad ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from nibabel.openers import Opener
from tqdm import tqdm

from ..errors import DataError
from ..transforms import check_affine, check_values
from .datalists import Case, images_of
from .task import SegmentationTask

__all__ = [
    "attempt",
    "check_case",
    "check_channels",
    "check_grid",
    "check_header",
    "check_label",
    "check_label_values",
    "check_mask",
    "explain",
    "read_nifti",
    "settle",
    "usable_cases",
]

T = TypeVar("T")


def explain(path: str, error: Exception) -> DataError:
    """Turn what a reader raised into one sentence about the file."""
    if isinstance(error, DataError):
        return error
    if not Path(path).is_file():
        return DataError(f"there is no file {path}; correct the list or restore the file")
    size = Path(path).stat().st_size
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, (EOFError, zlib.error)) or "end-of-stream" in text or "Expected" in text:
        return DataError(f"{path} ({size:,} bytes) is cut short or damaged ({text}); copy it again from its source")
    return DataError(f"{path} ({size:,} bytes) cannot be read as NIfTI ({text}); convert it or leave it out")


def check_header(path: str, *, channels: int = 1) -> None:
    """Refuse a file whose header already says that it is no usable volume, before its voxels are read.

    Args:
        path: of a NIfTI file.
        channels: that it may hold as a fourth dimension.

    Raises:
        DataError: if the file is missing, not NIfTI, not 3-D or of zero or absurd spacing.
    """
    try:
        image = nib.load(path)
        if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
            raise DataError(f"{path} is a {type(image).__name__}, not NIfTI; convert it")
        check_affine(path, image.shape, image.affine, channels=channels)
        if image.get_data_dtype().kind not in "iuf":
            raise DataError(f"{path} holds {image.get_data_dtype()} voxels; save plain numbers, one per voxel")
        with Opener(path) as stream:  # nibabel repairs a zero spacing to 1 mm with only a log line
            stored = type(image.header).from_fileobj(stream, check=False)["pixdim"][1:4]
    except Exception as error:
        raise explain(path, error) from error
    if (stored == 0).any():
        printed = " x ".join(f"{value:g}" for value in stored)
        raise DataError(f"{path} says its voxels are {printed} mm; correct its header")


def check_channels(case: Case, channels: int) -> None:
    """Refuse a case whose files are not of ``channels`` on one grid, by their headers.

    Raises:
        DataError: naming the file, the value and the remedy.
    """
    files = images_of(case)
    if len(files) not in (1, channels):
        raise DataError(
            f"{files[0]} and the others of its case are {len(files)} channels, but --channels is {channels}; correct it"
        )
    for file in files:
        check_header(file, channels=1 if len(files) > 1 else channels)
    first = nib.load(files[0])
    if len(files) == 1 and channels > 1 and len(first.shape) == 3:
        raise DataError(
            f"{files[0]} is one image, but --channels is {channels}; name the files of a case <case>_0000, "
            "<case>_0001, ..., or save them as one four-dimensional file"
        )
    for file in files[1:]:
        other = nib.load(file)
        if other.shape != first.shape or not np.allclose(other.affine, first.affine, atol=1e-2):
            raise DataError(
                f"{file} {other.shape} and {files[0]} {first.shape} do not share one grid (shape or affine differ); "
                "resample one onto the other"
            )


def read_nifti(path: str, *, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Read and check one image.

    Returns:
        the voxels as stored order ``(X, Y, Z)``, several channels as ``(X, Y, Z, C)``, and the affine to millimetres.

    Raises:
        DataError: if the file is missing, damaged, not NIfTI, not 3-D or of absurd spacing.
    """
    try:
        check_header(path, channels=channels)
        image = nib.load(path)
        return np.asanyarray(image.dataobj), image.affine
    except Exception as error:
        raise explain(path, error) from error


def check_grid(image: str, label: str) -> None:
    """Refuse a map that is not on the grid of its image, by their headers.

    Raises:
        DataError: naming both files and the remedy.
    """
    check_header(label)
    theirs, volume = nib.load(label), nib.load(image)
    if theirs.shape != volume.shape[:3] or not np.allclose(theirs.affine, volume.affine, atol=1e-2):
        raise DataError(
            f"{label} {theirs.shape} and {image} {volume.shape[:3]} do not share one grid "
            "(shape or affine differ); resample the map onto the image"
        )


def check_label(case: Case, task: SegmentationTask) -> np.ndarray:
    """Refuse a label map that is not on its image's grid or holds values that the task does not know.

    Returns:
        the values that it holds.

    Raises:
        DataError: naming the file, the value and the remedy.
    """
    path = case["label"]
    check_grid(images_of(case)[0], path)
    found = np.unique(read_nifti(path)[0])
    check_label_values(path, found.tolist(), task)
    return found


def check_label_values(path: str, found: Iterable[float], task: SegmentationTask) -> None:
    """Refuse values that the task does not know.

    Raises:
        DataError: naming them and the classes.
    """
    outside = [float(value) for value in found if not (np.isfinite(value) and value in task.known)]
    if outside:
        named = ", ".join(f"{value:g}" for value in outside[:5])
        raise DataError(
            f"{path} holds the values {named}, but the classes are {dict(enumerate(task.labels))}; renumber the label, "
            "list its classes with --labels, or leave a value out with --ignore_label"
        )


def check_case(case: Case, *, task: SegmentationTask | None = None, channels: int = 1) -> None:
    """Read a case and refuse it if anything is wrong.

    Args:
        case: ``image`` and, where labelled, ``label``.
        task: whose values a label map may hold.
        channels: of its image.

    Raises:
        DataError: naming the file, the value and the remedy.
    """
    check_channels(case, channels)
    files = images_of(case)
    for file in files:
        values, _ = read_nifti(file, channels=1 if len(files) > 1 else channels)
        for channel in np.moveaxis(values, 3, 0) if values.ndim == 4 else [values]:
            check_values(file, channel)
    if "label" in case and task is not None:
        check_label(case, task)


def check_mask(image: str, mask: str) -> None:
    """Refuse a mask that is not of 0 and 1 or not on the grid of its image.

    Raises:
        DataError: naming the file, the value and the remedy.
    """
    check_grid(image, mask)
    values, _ = read_nifti(mask)
    other = [value for value in np.unique(values).tolist() if value not in (0, 1)]
    if other:
        named = ", ".join(f"{value:g}" for value in other[:5])
        raise DataError(f"{mask} holds the values {named}; a mask is 1 inside and 0 outside, correct the file")


def settle(problems: Sequence[DataError], usable: int, *, strict: bool) -> None:
    """Report bad files at the end of a check, and stop if strict or if nothing is left.

    Raises:
        DataError: with ``strict``, or when ``usable`` is 0.
    """
    if not problems:
        return
    listed = "\n".join(f"  - {problem}" for problem in problems)
    summary = f"{len(problems)} of {len(problems) + usable} cannot be used:\n{listed}"
    if strict:
        raise DataError(f"{summary}\nRepair them, or run without --strict to go on with the rest.")
    if not usable:
        raise DataError(f"{summary}\nNothing is left to work on.")
    tqdm.write(f"Going on without them: {summary}")


def attempt(function: Callable[[T], Any], items: Iterable[T]) -> list[DataError | None]:
    """Call ``function`` on every item in threads, and return what each raised."""

    def one(item: T) -> DataError | None:
        try:
            function(item)
        except DataError as error:
            return error
        return None

    items = list(items)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(
            tqdm(pool.map(one, items), total=len(items), desc="checking files", unit="case", disable=len(items) < 2)
        )


def usable_cases(
    cases: Sequence[Case], *, task: SegmentationTask | None = None, channels: int = 1, strict: bool = False
) -> list[Case]:
    """Return the cases whose files are in order, read voxel by voxel; report the others.

    Raises:
        DataError: with ``strict`` and a bad case, or if none is usable.
    """
    problems = attempt(lambda case: check_case(case, task=task, channels=channels), cases)
    good = [case for case, problem in zip(cases, problems, strict=True) if problem is None]
    settle([problem for problem in problems if problem is not None], len(good), strict=strict)
    return good
