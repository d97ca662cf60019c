# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Look at every file before a long run begins, and say in a sentence what is wrong with the bad ones."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from nibabel.openers import Opener
from tqdm import tqdm

from ..errors import DataError, SettingsError
from ..transforms import check_affine, check_values
from .datalists import Case, stem

__all__ = [
    "check_case",
    "check_header",
    "check_labels",
    "check_mask",
    "explain",
    "pending_cases",
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


def check_header(path: str) -> None:
    """Refuse a file whose header already says that it is no usable volume, before its voxels are read.

    Raises:
        DataError: if the file is missing, not NIfTI, not 3-D or of zero or absurd spacing.
    """
    try:
        image = nib.load(path)
        if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
            raise DataError(f"{path} is a {type(image).__name__}, not NIfTI; convert it")
        check_affine(path, image.shape, image.affine)
        if image.get_data_dtype().kind not in "iuf":
            raise DataError(f"{path} holds {image.get_data_dtype()} voxels; save plain numbers, one per voxel")
        with Opener(path) as stream:  # nibabel repairs a zero spacing to 1 mm with only a log line
            stored = type(image.header).from_fileobj(stream, check=False)["pixdim"][1:4]
    except Exception as error:
        raise explain(path, error) from error
    if (stored == 0).any():
        printed = " x ".join(f"{value:g}" for value in stored)
        raise DataError(f"{path} says its voxels are {printed} mm; correct its header")


def read_nifti(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read and check one image.

    Returns:
        the voxels as stored order ``(X, Y, Z)`` and the affine to millimetres.

    Raises:
        DataError: if the file is missing, damaged, not NIfTI, not 3-D or of absurd spacing.
    """
    try:
        check_header(path)
        image = nib.load(path)
        return np.asanyarray(image.dataobj), image.affine
    except Exception as error:
        raise explain(path, error) from error


def check_case(case: Case, *, labels: Sequence[str] = ()) -> None:
    """Read a case and refuse it if anything is wrong.

    Args:
        case: ``image`` and, where labelled, ``label``.
        labels: names of the classes, background first; a label map may hold ``0`` to ``len(labels) - 1``.

    Raises:
        DataError: naming the file, the value and the remedy.
    """
    values, affine = read_nifti(case["image"])
    check_values(case["image"], values)
    if "label" not in case:
        return
    marks, label_affine = read_nifti(case["label"])
    if marks.shape != values.shape or not np.allclose(affine, label_affine, atol=1e-2):
        raise DataError(
            f"{case['label']} {marks.shape} and {case['image']} {values.shape} do not share one grid "
            "(shape or affine differ); resample the label onto the image"
        )
    found = np.unique(marks)
    outside = (
        [float(value) for value in found if not (value == int(value) and 0 <= value < len(labels))]
        if np.isfinite(found).all()
        else [float("nan")]
    )
    if outside:
        named = ", ".join(f"{value:g}" for value in outside[:5])
        raise DataError(
            f"{case['label']} holds the values {named}, but the classes are "
            f"{dict(enumerate(labels))}; renumber the label or list its classes with --labels"
        )
    if found.max() == 0:
        raise DataError(f"{case['label']} is empty: it marks no voxel; label the image or leave the case out")


def check_mask(image: str, mask: str) -> None:
    """Refuse a mask that is not of 0 and 1 or not on the grid of its image.

    Raises:
        DataError: naming the file, the value and the remedy.
    """
    values, affine = read_nifti(mask)
    volume = nib.load(image)
    if values.shape != volume.shape or not np.allclose(affine, volume.affine, atol=1e-2):
        raise DataError(
            f"{mask} {values.shape} and {image} {volume.shape} do not share one grid (shape or affine differ); "
            "resample the mask onto the image"
        )
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


def check_labels(labels: object) -> None:
    """Refuse class names that are not a list, background first.

    Raises:
        SettingsError: showing how to write them.
    """
    if not isinstance(labels, (list, tuple)) or len(labels) < 2 or len({str(name) for name in labels}) != len(labels):
        raise SettingsError(
            f"labels is {labels!r}; list all classes, background first: --labels \"['background','lesion']\""
        )


def usable_cases(cases: Sequence[Case], *, labels: Sequence[str] | None = None, strict: bool = False) -> list[Case]:
    """Return the cases whose files are in order; report the others.

    Raises:
        DataError: with ``strict`` and a bad case, or if none is usable.
    """
    if labels is not None:
        check_labels(labels)
    problems = attempt(lambda case: check_case(case, labels=labels or ()), cases)
    good = [case for case, problem in zip(cases, problems, strict=True) if problem is None]
    settle([problem for problem in problems if problem is not None], len(good), strict=strict)
    return good


def pending_cases(cases: Sequence[Case], *, output_dir: str, overwrite: bool = False) -> list[Case]:
    """Return the cases whose prediction ``output_dir/<case>.nii.gz`` is not there yet; with ``overwrite``, all.

    Raises:
        DataError: if two cases would write the same file.
    """
    names = Counter(stem(case["image"]) for case in cases)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise DataError(
            f"several images are called {twice[0]}, and their predictions would replace each other; rename them"
        )
    pending = [case for case in cases if overwrite or not (Path(output_dir) / f"{stem(case['image'])}.nii.gz").exists()]
    if len(pending) < len(cases):
        done = len(cases) - len(pending)
        tqdm.write(
            f"{done} of {len(cases)} predictions are in {output_dir} already and are kept; --overwrite true redoes them"
        )
    return pending
