# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Look at every file before a long run begins, and say in a sentence what is wrong with the bad ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from ...errors import DataError
from ...tasks import SegmentationTask
from ...transforms import Header, check_affine, check_values, explain, read_header, read_volume
from ..cases import Case, images_of
from ..problems import attempt, settle

__all__ = [
    "check_case",
    "check_channels",
    "check_grid",
    "check_header",
    "check_label",
    "check_label_values",
    "check_mask",
    "explain",
    "read_image",
    "usable_cases",
]

T = TypeVar("T")


def check_header(path: str, *, channels: int = 1) -> Header:
    """Refuse a file whose header already says that it is no usable volume, before its voxels are read.

    Args:
        path: of a volume.
        channels: that it may hold as a fourth dimension.

    Returns:
        the header.

    Raises:
        DataError: if the file is missing, of no known format, not 3-D or of zero or absurd spacing.
    """
    header = read_header(path)
    check_affine(path, header.shape, header.affine, channels=channels)
    if header.dtype.kind not in "iuf":
        raise DataError(f"{path} holds {header.dtype} voxels; save plain numbers, one per voxel")
    return header


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
    headers = [check_header(file, channels=1 if len(files) > 1 else channels) for file in files]
    first = headers[0]
    if len(files) == 1 and channels > 1 and len(first.shape) == 3:
        raise DataError(
            f"{files[0]} is one image, but --channels is {channels}; name the files of a case <case>_0000, "
            "<case>_0001, ..., or save them as one four-dimensional file"
        )
    for file, other in zip(files[1:], headers[1:], strict=True):
        if other.shape != first.shape or not np.allclose(other.affine, first.affine, atol=1e-2):
            raise DataError(
                f"{file} {other.shape} and {files[0]} {first.shape} do not share one grid (shape or affine differ); "
                "resample one onto the other"
            )


def read_image(path: str, *, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Read and check one image.

    Returns:
        the voxels as stored order ``(X, Y, Z)``, several channels as ``(X, Y, Z, C)``, and the affine to millimetres.

    Raises:
        DataError: if the file is missing, damaged, of no known format, not 3-D or of absurd spacing.
    """
    check_header(path, channels=channels)
    return read_volume(path)


def check_grid(image: str, label: str) -> None:
    """Refuse a map that is not on the grid of its image, by their headers.

    Raises:
        DataError: naming both files and the remedy.
    """
    theirs, volume = check_header(label), read_header(image)
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
    found = np.unique(read_image(path)[0])
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
        values, _ = read_image(file, channels=1 if len(files) > 1 else channels)
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
    values, _ = read_image(mask)
    other = [value for value in np.unique(values).tolist() if value not in (0, 1)]
    if other:
        named = ", ".join(f"{value:g}" for value in other[:5])
        raise DataError(f"{mask} holds the values {named}; a mask is 1 inside and 0 outside, correct the file")


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
