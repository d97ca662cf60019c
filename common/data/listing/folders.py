# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which volumes lie below a folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import DataError
from ...transforms import ENDINGS, files_behind, may_be_dicom, series_in, volume_format, without_ending
from ..cases import Case, images_of

__all__ = [
    "LABELLED",
    "behind",
    "existing_folder",
    "labelled_folders",
    "named_series",
    "volumes_below",
    "volumes_in",
    "walk",
]

LABELLED = (("images", "labels"), ("imagesTr", "labelsTr"))


def existing_folder(folder: str | Path) -> Path:
    """Return the folder of the user's files.

    Raises:
        DataError: if none is given or it is not there.
    """
    path = Path(folder).expanduser()
    if not str(folder):
        raise DataError("no data given; add --dataset_dir FOLDER with your volumes")
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; give --dataset_dir the folder that holds your volumes")
    return path


def behind(file: str, seen: dict[str, str]) -> str:
    """Return a digest of the names, sizes and times of the other files that a volume is read from, empty if none.

    Args:
        file: of a volume.
        seen: remembers the digests of folders with several DICOM series.
    """
    dicom = volume_format(file) == "DICOM"
    key = (file if os.path.isdir(file) else os.path.dirname(file)) if dicom else file
    if key not in seen:
        found = []
        for other in files_behind(file):
            status = os.stat(other)
            found.append([os.path.basename(other), status.st_size, status.st_mtime_ns])
        seen[key] = hashlib.sha256(json.dumps(found).encode()).hexdigest() if found else ""
        if not dicom:
            return seen.pop(key)
    return seen[key]


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder below ``folder`` with the names of its files, both sorted.

    Hidden ones are left out. Links to files are followed, links to folders are not, so that no loop is walked; folders
    that cannot be read or searched are told.
    """

    def unreadable(error: OSError) -> None:
        tqdm.write(f"the folder {error.filename} cannot be read ({error.strerror}) and is left out")

    for here, folders, names in os.walk(folder, onerror=unreadable):
        if not os.access(here, os.X_OK):  # its names can be listed and nothing else
            unreadable(PermissionError(errno.EACCES, os.strerror(errno.EACCES), here))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(here), sorted(name for name in names if not name.startswith("."))


def labelled_folders(folder: Path) -> set[Path]:
    """Return the folders of label maps, of a data set that has folders of images beside them."""
    return {folder / labels for images, labels in LABELLED if (folder / images).is_dir()}


def volumes_below(folder: Path, *, problems: list[str] | None = None) -> list[tuple[Path, Any]]:
    """Return all volumes below ``folder``, sorted, leaving out hidden files and folders.

    A DICOM series is named by its folder, or by its first file where a folder holds several.

    Args:
        folder: to look into.
        problems: gathers a sentence for each DICOM file that cannot be read; printed if not given.

    Returns:
        paths, each with the header of the first file of a DICOM series, else None.

    Raises:
        DataError: if there are none.
    """
    found: list[tuple[Path, Any]] = []
    for here, names in walk(folder):
        found += [(here / name, None) for name in names if name.lower().endswith(ENDINGS)]
        series = series_in(here / name for name in names if not name.lower().endswith(ENDINGS) and may_be_dicom(name))
        for problem in series.problems:
            tqdm.write(f"left out: {problem}") if problems is None else problems.append(str(problem))
        alone = len(series.files) == 1
        found += [(here if alone else files[0][0], files[0][1]) for files in series.files.values()]
    if not found:
        raise DataError(
            f"{folder} holds no file ending in {', '.join(ENDINGS)} and no DICOM series; check the folder or convert "
            "your images"
        )
    return sorted(found, key=lambda each: each[0])


def named_series(cases: list[Case], folder: Path) -> list[Case]:
    """Call each DICOM series by its path below ``folder``, since its files and folders are called alike everywhere."""
    for case in cases:
        file = Path(images_of(case)[0])
        if not file.name.lower().endswith(ENDINGS):
            inner = file.relative_to(folder.absolute())
            case["name"] = "_".join([*inner.parts[:-1], without_ending(inner.name)]) or folder.absolute().name
    return cases


def volumes_in(folder: Path) -> list[Path]:
    """Return the paths of :func:`volumes_below`."""
    return [path for path, _ in volumes_below(folder)]
