# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Lists of cases to pre-train on or to predict: from a source of any form, image folders, or a MONAI datalist."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...paths import as_path
from ..cases import INVERTED, MASKS, PROBABILITIES, Case, images_of, stem
from ..problems import report
from .folders import existing_folder, named_below, volumes_in
from .sources import Polarity, detect, read_source
from .splits import split_by_subject, subjects_of

__all__ = ["channel_cases", "every_image", "image_list", "pretraining_lists", "read_datalist"]

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def _texts(value: Any) -> list[str]:
    """Return a list of texts as it is, anything else as no such list."""
    return value if isinstance(value, list) and all(isinstance(each, str) for each in value) else ["?"]


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
    path = as_path(path)
    try:
        content: Any = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise DataError(f"the datalist {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the datalist {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f'{path} holds a {type(content).__name__}; a datalist is an object with a "training" list')
    here = os.path.abspath(path.parent)
    there = os.path.abspath(as_path(base or path.parent))

    def absolute(value: str) -> str:
        value = os.path.expanduser(value)
        beside = str(Path(here, value))  # an absolute path stays as it is
        if here == there or os.path.isabs(value) or os.path.exists(beside):
            return beside
        other = str(Path(there, value))
        return other if os.path.exists(other) else beside

    def paths(value: str | list[str]) -> str | list[str]:
        return [absolute(file) for file in value] if isinstance(value, list) else absolute(value)

    lists: dict[str, list[Case]] = {}
    for name in ("training", "validation", "test"):
        entries = content.get(name, [])
        if not isinstance(entries, list):
            raise DataError(f'{path}: "{name}" must be a list of entries')
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
            if not set(_texts(case.get(INVERTED, []))) <= set(MASKS):
                raise DataError(f'{path}: "{INVERTED}" of "{name}" must be a list of {", ".join(MASKS)}')
        lists[name] = [
            {
                key: paths(value) if key in keys else value
                for key, value in case.items()
                if key in keys or isinstance(value, (str, int, float)) or key == INVERTED
            }
            for case in cases
        ]
    if not any(lists.values()):
        raise DataError(f'{path} has no entries under "training", "validation" or "test"')
    return lists


def pretraining_lists(
    dataset_dir: str = "",
    datalist: str | None = None,
    *,
    seed: int = 12345,
    least: int = 1,
    source: str | None = None,
    mask_polarity: Polarity = "as_named",
) -> dict[str, list[Case]]:
    """List the volumes to pre-train on and to validate on.

    Without a validation list in the datalist, subjects are drawn by ``seed`` as :func:`split_by_subject` says: 1 % of
    them, at least 5 and at most 1000 as published, but never more than a fifth. Volumes whose subject is not known are
    subjects of their own.

    Args:
        dataset_dir: folder of volumes, or anything else that :func:`read_source` reads.
        datalist: MONAI datalist JSON, or another index that :func:`read_source` reads, to use instead.
        seed: of the split.
        least: volumes that both parts must hold, if there are enough.
        source: what it is, if it cannot be found out.
        mask_polarity: of the masks of a source that has masks; a datalist says it itself.

    Raises:
        DataError: if folder or list is missing, empty or unreadable.
    """
    if datalist and (source or detect(datalist)) == "datalist":
        lists = read_datalist(datalist, dataset_dir, keys=("image", *MASKS))
        if lists["training"] and lists["validation"]:
            return {name: _plain_cases(lists[name]) for name in ("training", "validation")}
        cases = lists["training"] or lists["validation"] or lists["test"]
        root = as_path(datalist).absolute().parent
    else:
        place = as_path(datalist) if datalist else existing_folder(dataset_dir)
        found = read_source(place, source, mask_polarity=mask_polarity)
        report(found.left_out)
        cases, root = found.cases, place.absolute()
    parts = split_by_subject(cases, subjects_of(cases, root), seed=seed, least=least)
    return {name: _plain_cases(part) for name, part in parts.items()}


def _plain_cases(cases: Sequence[Case]) -> list[Case]:
    """Keep what is trained on: a label that an entry has too is nothing to pre-train on."""
    keys = ("image", *MASKS, INVERTED)
    return [{key: case[key] for key in keys if key in case} for case in cases]


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
    numbered: dict[tuple[str, str], dict[int, Path]] = {}
    alone = len({stem(file).casefold() for file in files}) == len(files)  # else a case's channels share its folder
    for file, match in zip(files, matches, strict=True):
        if match:
            numbered.setdefault(("" if alone else str(file.parent), match[1]), {})[int(match[2])] = file
    if channels is None:
        channels = len(next(iter(numbered.values()), {0: None}))
    wanted = set(range(channels))
    if files and all(matches):
        lacking = {name: found for name, found in numbered.items() if found.keys() != wanted}
        if not lacking:
            return [
                {"image": str(found[0]) if channels == 1 else [str(found[n]) for n in range(channels)], "name": name}
                for (_, name), found in sorted(numbered.items())
            ]
        if channels > 1:
            (_, name), found = next(iter(lacking.items()))
            there = ", ".join(f"_{number:04d}" for number in sorted(found))
            raise DataError(
                f"{next(iter(found.values())).parent}/{name} has the channels {there}, but --channels is {channels}; "
                "add what is missing or correct --channels"
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
        written = as_path(output_dir).absolute()
        inside = inner.absolute() in written.parents  # then in its folders too, of cases with folders in their names
        ours = {written, written / PROBABILITIES}
        before = [file for file in files if (written in file.parents if inside else file.parent in ours)]
        files = [file for file in files if file not in before]
        if not files or (before and written.resolve() == inner.resolve()):
            raise DataError(f"the images lie in output_dir {output_dir} itself; give another --output_dir")
    return named_below(channel_cases(files, channels=channels), inner)


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
        for case in named_below(
            channel_cases([path.absolute() for path in volumes_in(images)], channels=channels), images
        )
    ]
