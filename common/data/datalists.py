# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which files are there: a folder of NIfTI, image and label folders, or a MONAI datalist in JSON."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = [
    "ANONYMISED",
    "LABEL",
    "LABELLED",
    "MASKS",
    "PROBABILITIES",
    "Case",
    "case_name",
    "channel_cases",
    "every_image",
    "existing_folder",
    "image_list",
    "images_of",
    "pretraining_lists",
    "read_datalist",
    "stem",
    "volumes_in",
]

Case = dict[str, Any]  # image: a path, or one for each channel; label, masks: a path; name; columns such as centre
ANONYMISED = "anonymization_mask"  # 1 where a volume was altered by defacing or brain extraction
MASKS = (ANONYMISED, "anatomy_mask")
LABEL = "label"
_SUFFIXES = (".nii", ".nii.gz")
PROBABILITIES = "probabilities"  # folder beside predictions
LABELLED = (("images", "labels"), ("imagesTr", "labelsTr"))


_CHANNEL = re.compile(r"(.+)_(\d{4})")


def stem(path: str | Path) -> str:
    """Return a volume's name without its endings.

    Example:
        >>> stem("/data/sub-01_T1w.nii.gz")
        'sub-01_T1w'
    """
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def images_of(case: Case) -> list[str]:
    """Return the image files of a case: one, or one for each channel."""
    return [case["image"]] if isinstance(case["image"], str) else list(case["image"])


def case_name(case: Case) -> str:
    """Return the name under which a case is split, predicted and scored.

    Example:
        >>> case_name({"image": "/data/a.nii.gz"}), case_name({"image": ["a_0000.nii", "a_0001.nii"], "name": "a"})
        ('a', 'a')
    """
    return case.get("name") or stem(images_of(case)[0])


def existing_folder(folder: str | Path) -> Path:
    """Return the folder of the user's files.

    Raises:
        DataError: if none is given or it is not there.
    """
    path = Path(folder).expanduser()
    if not str(folder):
        raise DataError("no data given; add --dataset_dir FOLDER with your NIfTI files")
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; give --dataset_dir the folder that holds your NIfTI files")
    return path


def volumes_in(folder: Path) -> list[Path]:
    """Return all NIfTI files below ``folder``, sorted, leaving out hidden files and folders."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(_SUFFIXES) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder} holds no file ending in .nii or .nii.gz; check the folder or convert your images")
    return found


def read_datalist(
    path: str | Path, base: str | Path, *, keys: Sequence[str] = ("image", "label"), channels: bool = False
) -> dict[str, list[Case]]:
    """Read the lists ``training``, ``validation`` and ``test``; relative paths start at the datalist or ``base``.

    Args:
        path: of the JSON file.
        base: where relative paths start that are not beside it.
        keys: that hold paths; of the others, texts and numbers are kept (a centre, an age).
        channels: an ``image`` may be a list of files, one for each channel.

    Raises:
        DataError: if the file is not such a datalist.
    """
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

    def paths(value: str | list[str]) -> str | list[str]:
        return [absolute(file) for file in value] if isinstance(value, list) else absolute(value)

    if not isinstance(content, dict):
        raise DataError(f'{path} holds a {type(content).__name__}; a datalist is an object with a "training" list')
    lists: dict[str, list[Case]] = {}
    for name in ("training", "validation", "test"):
        entries = content.get(name, [])
        cases = [entry if isinstance(entry, dict) else {"image": entry} for entry in entries]
        if any("image" not in case for case in cases):
            raise DataError(f'{path}: every entry of {name!r} needs an "image"')
        for case in cases:
            for key in keys:
                several = channels and key == "image" and isinstance(case.get(key), list) and case[key]
                if not all(isinstance(value, str) for value in (case[key] if several else [case.get(key, "")])):
                    raise DataError(
                        f"{path}: every {', '.join(keys)} of {name!r} must be one path"
                        + (", an image also a list of paths, one for each channel" if channels else "")
                    )
        lists[name] = [
            {
                key: paths(value) if key in keys else value
                for key, value in case.items()
                if key in keys or isinstance(value, (str, int, float))
            }
            for case in cases
        ]
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
        keys = ("image", *MASKS)  # a label that an entry has too is nothing to pre-train on
        read = read_datalist(datalist, dataset_dir, keys=keys)
        lists = {name: [{k: case[k] for k in keys if k in case} for case in cases] for name, cases in read.items()}
        if lists["training"] and lists["validation"]:
            return {name: lists[name] for name in ("training", "validation")}
        cases = lists["training"] or lists["validation"] or lists["test"]
    else:
        folder = existing_folder(dataset_dir)
        maps = {folder / labels for images, labels in LABELLED if (folder / images).is_dir()}
        found = [path for path in volumes_in(folder) if maps.isdisjoint(path.parents)]
        cases = [{"image": str(path.absolute())} for path in found]
    count = min(1000, max(len(cases) // 100, 5), len(cases) // 5) or min(1, len(cases) - 1)
    count = max(count, least) if len(cases) >= 2 * least else count
    split = _split(cases, count, seed)
    return split if count else {"training": cases, "validation": cases}


def channel_cases(files: Sequence[Path], *, channels: int | None = 1) -> list[Case]:
    """Make cases of image files, those of several channels by nnU-Net's names ``<case>_0000``, ``<case>_0001``, ...

    Args:
        files: one for each case, or one for each case and channel.
        channels: of each case. Names are taken apart only if they fit it, so that ``scan_0001`` and ``scan_0002`` stay
            two cases of one channel; one file for a case of several channels is four-dimensional. None takes as many
            as there are of the first case.

    Raises:
        DataError: if names end in channel numbers, but a case lacks one.

    Example:
        >>> [case["name"] for case in channel_cases([Path("a_0000.nii"), Path("a_0001.nii")], channels=2)]
        ['a']
    """
    files = sorted(files)
    matches = [_CHANNEL.fullmatch(stem(file)) for file in files]
    numbered: dict[str, dict[int, Path]] = {}
    for file, match in zip(files, matches, strict=True):
        if match:
            numbered.setdefault(match[1], {})[int(match[2])] = file
    if channels is None:
        channels = len(next(iter(numbered.values()), {0: None}))
    wanted = set(range(channels))
    if files and all(matches):
        lacking = {name: found for name, found in numbered.items() if found.keys() != wanted}
        if not lacking:
            return [
                {"image": str(found[0]) if channels == 1 else [str(found[n]) for n in range(channels)], "name": name}
                for name, found in sorted(numbered.items())
            ]
        if channels > 1:
            name, found = next(iter(lacking.items()))
            there = ", ".join(f"_{number:04d}" for number in sorted(found))
            raise DataError(
                f"{files[0].parent}/{name} has the channels {there}, but --channels is {channels}; add what is "
                "missing or correct --channels"
            )
    return [{"image": str(file)} for file in files]


def image_list(
    dataset_dir: str = "", datalist: str | None = None, *, channels: int = 1, output_dir: str | None = None
) -> list[Case]:
    """List the cases to predict: all of a folder, or the ``test`` (else ``validation``) entries of a datalist.

    Args:
        dataset_dir: folder of images; of one that holds ``imagesTs`` or ``images``, these.
        datalist: MONAI datalist JSON to use instead.
        channels: of each case.
        output_dir: folder of predictions, which are no images even if it lies in ``dataset_dir``.

    Raises:
        DataError: if there are none.
    """
    if datalist:
        lists = read_datalist(datalist, dataset_dir, channels=True)
        cases = lists["test"] or lists["validation"] or lists["training"]
        return [{key: value for key, value in case.items() if key != "label"} for case in cases]
    folder = existing_folder(dataset_dir)
    inner = next((folder / name for name in ("imagesTs", "images", "imagesTr") if (folder / name).is_dir()), folder)
    files = [path.absolute() for path in volumes_in(inner)]
    if output_dir is not None:
        written = Path(output_dir).expanduser().absolute()
        before = [file for file in files if file.parent in (written, written / PROBABILITIES)]
        files = [file for file in files if file not in before]
        if not files or (before and written.resolve() == inner.resolve()):
            raise DataError(f"the images lie in output_dir {output_dir} itself; give another --output_dir")
    return channel_cases(files, channels=channels)


def every_image(dataset_dir: str = "", datalist: str | None = None, *, channels: int = 1) -> list[Case]:
    """List all cases, whatever part of a split they are in: of a folder, or of all lists of a datalist, each once.

    Args:
        dataset_dir: folder of images; of one that holds ``images``, ``imagesTr`` or ``imagesTs``, these.
        datalist: MONAI datalist JSON to use instead.
        channels: of each case.

    Raises:
        DataError: if there are none.
    """
    if datalist:
        found = [case for cases in read_datalist(datalist, dataset_dir, channels=True).values() for case in cases]
        unique = {tuple(images_of(case)): case for case in found}
        return [{key: value for key, value in case.items() if key != "label"} for case in unique.values()]
    folder = existing_folder(dataset_dir)
    inner = [folder / name for name in ("images", "imagesTr", "imagesTs") if (folder / name).is_dir()] or [folder]
    return [
        case
        for images in inner
        for case in channel_cases([path.absolute() for path in volumes_in(images)], channels=channels)
    ]
