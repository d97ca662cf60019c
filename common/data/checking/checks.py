# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Look at every file before a long run begins, and say in a sentence what is wrong with the bad ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from ...errors import DataError, SettingsError
from ...tasks import SegmentationTask
from ...transforms import (
    Header,
    check_affine,
    check_values,
    explain,
    read_header,
    read_volume,
    same_grid,
    whole_numbers,
)
from ...transforms.checks import FEW_NEARLY_ZERO
from ...transforms.grids import SLANTED_DEGREES
from ..cases import LABEL, Case, images_of
from ..problems import attempt, settle

__all__ = [
    "check_case",
    "check_channels",
    "check_first_labels",
    "check_grid",
    "check_header",
    "check_label",
    "check_label_values",
    "check_mask",
    "explain",
    "read_image",
    "tell_nearly_zero",
    "tell_outside",
    "tell_slants",
    "usable_cases",
]

T = TypeVar("T")
_FIRST = 3  # label maps that are looked at before any work


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


def check_channels(case: Case, channels: int) -> Header:
    """Refuse a case whose files are not of ``channels`` on one grid, by their headers.

    Returns:
        the header of the first file.

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
        _same_grid(file, other, files[0], first, "resample one onto the other")
    return first


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
    """Refuse a map that is not on the grid of its image, in whatever order of axes, by their headers.

    Raises:
        DataError: naming both files and the remedy.
    """
    _same_grid(label, check_header(label), image, read_header(image), "resample the map onto the image")


def _same_grid(file: str, header: Header, onto: str, other: Header, remedy: str) -> None:
    same_grid(
        file,
        header.shape,
        header.affine,
        onto=onto,
        onto_shape=other.shape,
        onto_affine=other.affine,
        remedy=remedy,
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
    found = np.unique(whole_numbers(read_image(path)[0], path))
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
            f"{path} holds the values {named}, but the classes are {task.by_value}; renumber the label, "
            "list its classes with --labels, or leave a value out with --ignore_label"
        )


def check_first_labels(cases: Sequence[Case], task: SegmentationTask) -> None:
    """Refuse names of classes that the values in the first label maps contradict, before any work is done.

    A single map may be wrong and is left out later; that all of those looked at are is a matter of ``--labels``. What
    cannot be read is judged later, too.

    Args:
        cases: of which the first few are looked at.
        task: whose classes are named.

    Raises:
        SettingsError: with the values that have no name.
    """
    problems: list[DataError | None] = []
    for case in cases[:_FIRST]:
        try:
            found = np.unique(whole_numbers(read_image(case[LABEL])[0], case[LABEL]))
        except (DataError, OSError, ValueError):
            continue
        problems.append(_problem_of_values(case[LABEL], found.tolist(), task))
    if problems and (first := problems[0]) is not None and None not in problems:
        raise SettingsError(f"{first} (and so it is in each of the {len(problems)} first label maps)")


def _problem_of_values(path: str, found: Iterable[float], task: SegmentationTask) -> DataError | None:
    try:
        check_label_values(path, found, task)
    except DataError as error:
        return error
    return None


def tell_outside(lost: Mapping[str, Mapping[int, int]], task: SegmentationTask) -> None:
    """Say which label maps mark voxels outside the box around what is not 0 in their images: nothing is kept of them.

    Args:
        lost: voxels of each value, by the name of the case.
        task: whose classes these are.
    """
    counted = {
        case: {value: count for value, count in counts.items() if value != task.ignore_label}
        for case, counts in lost.items()
    }
    told = [
        f"{case} ({', '.join(f'{count:,} of {task.by_value.get(value, value)}' for value, count in counts.items())})"
        for case, counts in counted.items()
        if counts
    ]
    if told:
        named = ", ".join(told[:5]) + (", ..." if len(told) > 5 else "")
        tqdm.write(
            f"note: {len(told)} of {len(lost)} labels mark voxels outside the box around what is not 0 in the image, "
            f"which are cut off and count nowhere: {named}; look whether image and label belong together"
        )


def tell_slants(slants: Mapping[str, float], *, total: int) -> None:
    """Say which volumes have axes that are not at right angles.

    Args:
        slants: in degrees, by file.
        total: volumes that were looked at.
    """
    slanted = {file: slant for file, slant in slants.items() if slant > SLANTED_DEGREES}
    if slanted:
        most = max(slanted, key=lambda file: slanted[file])
        tqdm.write(
            f"note: {len(slanted):,} of {total:,} volumes have axes that are not at right angles, as of a tilted "
            f"gantry, by up to {slanted[most]:.1f} degrees ({most}); each voxel keeps its place, but the network "
            "sees them slanted. Resample them to right angles if it should not"
        )


def tell_nearly_zero(shares: Mapping[str, float], *, total: int) -> None:
    """Say which images have a background that is nearly but not exactly 0.

    Args:
        shares: of such voxels, by file.
        total: images that were looked at.
    """
    many = {file: share for file, share in shares.items() if share >= FEW_NEARLY_ZERO}
    if many:
        most = max(many, key=lambda file: many[file])
        tqdm.write(
            f"note: of {len(many):,} of {total:,} images up to {many[most]:.0%} of the voxels ({most}) are nearly but "
            "not exactly 0 (within a millionth of the range): they are not cropped and count in the mean. If they are "
            "background, set them to 0 and save the images again; tools/prepare_data.py scan --quality true names each"
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
    values = whole_numbers(read_image(mask)[0], mask)
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
