# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which files are there: a folder of NIfTI, image and label folders, or a MONAI datalist in JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["Case", "image_list", "labelled_lists", "pretraining_lists", "stem"]

Case = dict[str, str]
ANONYMISED = "anonymization_mask"  # 1 where a volume was altered by defacing or brain extraction
MASKS = (ANONYMISED, "anatomy_mask")
_SUFFIXES = (".nii", ".nii.gz")
_LABELLED = (("images", "labels"), ("imagesTr", "labelsTr"))


def stem(path: str | Path) -> str:
    """Return a volume's name without its endings.

    Example:
        >>> stem("/data/sub-01_T1w.nii.gz")
        'sub-01_T1w'
    """
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def _existing(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not str(folder):
        raise DataError("no data given; add --dataset_dir FOLDER with your NIfTI files")
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; give --dataset_dir the folder that holds your NIfTI files")
    return path


def _volumes(folder: Path) -> list[Path]:
    """Return all NIfTI files below ``folder``, sorted, leaving out hidden files and folders."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(_SUFFIXES) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder} holds no file ending in .nii or .nii.gz; check the folder or convert your images")
    return found


def _read_datalist(
    path: str | Path, base: str | Path, *, keys: Sequence[str] = ("image", "label")
) -> dict[str, list[Case]]:
    """Read ``keys`` of ``training``, ``validation`` and ``test``; relative paths start at the datalist or ``base``."""
    path = Path(path).expanduser()
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"the datalist {path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"the datalist {path} is not JSON: {error}") from error

    def absolute(value: str) -> str:
        file = Path(value).expanduser()
        here, there = (
            path.parent / file,
            Path(base or path.parent).expanduser() / file,
        )  # an absolute path stays as it is
        return str((here if here.exists() or not there.exists() else there).absolute())

    if not isinstance(content, dict):
        raise DataError(f'{path} holds a {type(content).__name__}; a datalist is an object with a "training" list')
    lists: dict[str, list[Case]] = {}
    for name in ("training", "validation", "test"):
        entries = content.get(name, [])
        cases = [entry if isinstance(entry, dict) else {"image": entry} for entry in entries]
        if any("image" not in case for case in cases):
            raise DataError(f'{path}: every entry of "{name}" needs an "image"')
        if any(not isinstance(case[key], str) for case in cases for key in keys if key in case):
            raise DataError(
                f'{path}: every {", ".join(keys)} of "{name}" must be one path; several channels are not read yet'
            )
        lists[name] = [{key: absolute(case[key]) for key in keys if key in case} for case in cases]
    if not any(lists.values()):
        raise DataError(f'{path} has no entries under "training", "validation" or "test"')
    return lists


def _split(cases: list[Case], count: int, seed: int) -> dict[str, list[Case]]:
    chosen = set(random.Random(seed).sample(range(len(cases)), count))
    return {
        "training": [case for index, case in enumerate(cases) if index not in chosen],
        "validation": [case for index, case in enumerate(cases) if index in chosen],
    }


def pretraining_lists(
    dataset_dir: str = "", datalist: str | None = None, *, seed: int = 12345, least: int = 1
) -> dict[str, list[Case]]:
    """List the volumes to pre-train on and to validate on.

    Without a validation list in the datalist, volumes are drawn by ``seed``: 1 % of them, at least 5 and at most 1000
    as published, but never more than a fifth.

    Args:
        dataset_dir: folder searched for NIfTI at any depth, but for the labels beside a folder of images; a single
            volume is both trained and validated on.
        datalist: MONAI datalist JSON to use instead; an entry may name an ``anonymization_mask`` and an
            ``anatomy_mask`` beside its ``image``, volumes of 0 and 1 on the image's grid.
        seed: of the split.
        least: volumes that a sample needs, and so at least in both parts, if there are enough.

    Raises:
        DataError: if folder or list is missing, empty or unreadable.
    """
    if datalist:
        lists = _read_datalist(datalist, dataset_dir, keys=("image", *MASKS))
        if lists["training"] and lists["validation"]:
            return {name: lists[name] for name in ("training", "validation")}
        cases = lists["training"] or lists["validation"] or lists["test"]
    else:
        folder = _existing(dataset_dir)
        maps = {folder / labels for images, labels in _LABELLED if (folder / images).is_dir()}
        found = [path for path in _volumes(folder) if maps.isdisjoint(path.parents)]
        cases = [{"image": str(path.absolute())} for path in found]
    count = min(1000, max(len(cases) // 100, 5), len(cases) // 5) or min(1, len(cases) - 1)
    count = max(count, least) if len(cases) >= 2 * least else count
    split = _split(cases, count, seed)
    return split if count else {"training": cases, "validation": cases}


def labelled_lists(
    dataset_dir: str = "", datalist: str | None = None, *, validation_share: float = 0.2, seed: int = 12345
) -> dict[str, list[Case]]:
    """List image and label pairs for training and validation.

    Args:
        dataset_dir: folder with ``images`` and ``labels`` (or ``imagesTr`` and ``labelsTr``) holding files of the same
            name.
        datalist: MONAI datalist JSON to use instead; also a Decathlon ``dataset.json``.
        validation_share: share drawn for validation where the datalist has no validation list; at least one case.
        seed: of the split.

    Raises:
        DataError: if folder or list is missing or empty, or an image has no label.
    """
    if datalist:
        lists = _read_datalist(datalist, dataset_dir)
        cases = lists["training"]
        for case in cases + lists["validation"]:
            if "label" not in case:
                raise DataError(f'{datalist}: {case["image"]} has no "label"')
        if lists["validation"]:  # an empty training list is fine for evaluation
            return {name: lists[name] for name in ("training", "validation")}
        if not cases:
            raise DataError(f'{datalist} has no entries under "training"')
    else:
        cases = _pairs(_existing(dataset_dir))
    if len(cases) < 2:
        return {"training": cases, "validation": cases}
    return _split(cases, max(1, round(validation_share * len(cases))), seed)


def _pairs(folder: Path) -> list[Case]:
    for images, labels in _LABELLED:
        if (folder / images).is_dir():
            cases = []
            for image in _volumes(folder / images):
                names = [image.name, image.name.removesuffix(".gz"), f"{image.name}.gz"]
                label = next((folder / labels / name for name in names if (folder / labels / name).is_file()), None)
                if label is None:
                    raise DataError(
                        f"{image} has no label: {folder / labels / image.name} is missing; add it or move the "
                        "image away"
                    )
                cases.append({"image": str(image.absolute()), "label": str(label.absolute())})
            return cases
    expected = " or ".join(f"{a}/ and {b}/" for a, b in _LABELLED)
    raise DataError(
        f"{folder} holds no labelled data: it needs {expected} with files of the same name, or a --datalist"
    )


def image_list(dataset_dir: str = "", datalist: str | None = None) -> list[Case]:
    """List the volumes to predict: all of a folder, or the ``test`` (else ``validation``) entries of a datalist.

    Raises:
        DataError: if there are none.
    """
    if datalist:
        lists = _read_datalist(datalist, dataset_dir)
        return [{"image": case["image"]} for case in lists["test"] or lists["validation"] or lists["training"]]
    folder = _existing(dataset_dir)
    inner = next((folder / name for name in ("imagesTs", "images", "imagesTr") if (folder / name).is_dir()), folder)
    return [{"image": str(path.absolute())} for path in _volumes(inner)]
