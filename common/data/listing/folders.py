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

from ...errors import DataError
from ...paths import as_path
from ...transforms import ENDINGS, file_kind, files_behind, may_be_dicom, series_in, volume_format, without_ending
from ..cases import Case, case_name, images_of
from ..problems import LeftOut, report

__all__ = [
    "LABELLED",
    "behind",
    "existing_folder",
    "is_series",
    "labelled_folders",
    "named_below",
    "named_series",
    "path_below",
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
    path = as_path(folder)
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


def walk(folder: Path, left_out: LeftOut) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder below ``folder`` with the names of its files, sorted; hidden ones are left out.

    Links to files are followed. Links to folders are followed once all real folders are done, and each folder is read
    once, whatever leads to it; a link back to a folder that it lies in is not followed.

    Args:
        folder: to look into.
        left_out: counts folders that cannot be read, and links that are not followed.
    """
    read: set[tuple[int, int]] = set()
    rounds = [str(folder)]
    while rounds:
        links: list[str] = []
        waiting = rounds[::-1]
        while waiting:
            here = waiting.pop()
            try:
                status = os.stat(here)
                if (status.st_dev, status.st_ino) in read:
                    left_out.add("link(s) to folders that are listed already", here, "nothing is lost")
                    continue
                read.add((status.st_dev, status.st_ino))
                folders, linked, names = _entries(here, left_out)
            except OSError as error:
                left_out.add(f"folder(s) that cannot be read ({error.strerror})", here, "correct their rights")
                continue
            waiting += folders[::-1]
            links += linked
            yield Path(here), names
        rounds = sorted(links)


def _entries(folder: str, left_out: LeftOut) -> tuple[list[str], list[str], list[str]]:
    """Return the paths of the folders in a folder, those of links to folders, and the names of its files, sorted."""
    if not os.access(folder, os.X_OK):  # its names can be listed and nothing else
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
    folders: list[str] = []
    links: list[str] = []
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_folder = _is_folder(entry)
            if not entry.is_symlink():
                (folders if is_folder else names).append(entry.path if is_folder else entry.name)
            elif is_folder:
                around, inside = os.path.realpath(entry.path), os.path.realpath(folder)
                if os.path.commonpath([around, inside]) == around:
                    left_out.add("link(s) back to a folder that they lie in", entry.path, "nothing is lost")
                else:
                    links.append(entry.path)
            elif entry.name.lower().endswith(ENDINGS) or may_be_dicom(entry.name) or os.path.exists(entry.path):
                names.append(entry.name)  # a volume that is not there is told when it is read
            else:
                left_out.add(*_nowhere(entry.path))
    return sorted(folders), links, sorted(names)


def _nowhere(path: str) -> tuple[str, str, str]:
    return "link(s) that lead nowhere", path, "restore what they lead to, or remove them"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def labelled_folders(folder: Path) -> set[Path]:
    """Return the folders of label maps, of a data set that has folders of images beside them."""
    return {folder / labels for images, labels in LABELLED if (folder / images).is_dir()}


def volumes_below(folder: Path, left_out: LeftOut) -> list[tuple[Path, Any]]:
    """Return all volumes below ``folder``, sorted, leaving out hidden files and folders.

    A DICOM series is named by its folder, or by its first file where a folder holds several.

    Args:
        folder: to look into.
        left_out: counts volumes of formats that are not read, and what :func:`walk` and DICOM files leave out.

    Returns:
        paths, each with the header of the first file of a DICOM series, else None.

    Raises:
        DataError: if there are none.
    """
    found: list[tuple[Path, Any]] = []
    for here, names in walk(folder, left_out):
        for name in names:
            kind = None if may_be_dicom(name) else file_kind(here / name)
            if kind is not None and kind.remedy:
                left_out.add(f"file(s) of {kind.name}, which are not read", here / name, kind.remedy)
            elif kind is not None:
                found.append((here / name, None))
        slices = [here / name for name in names if may_be_dicom(name)]
        series = series_in(slices)
        for problem in map(str, series.problems):
            left_out.note(problem)
        for file in slices:
            if not os.path.lexists(file) or os.path.exists(file):
                continue
            if not any(str(file) in str(problem) for problem in series.problems):
                left_out.add(*_nowhere(str(file)))
        alone = len(series.files) == 1
        found += [(here if alone else files[0][0], files[0][1]) for files in series.files.values()]
    if not found:
        others = "".join(f"; it holds {sentence}" for sentence in left_out.told(1))
        raise DataError(
            f"{folder} holds no file ending in {', '.join(ENDINGS)} and no DICOM series{others}; check the folder or "
            "convert your images"
        )
    return sorted(found, key=lambda each: each[0])


def named_series(cases: list[Case], folder: Path) -> list[Case]:
    """Call each DICOM series by its path below ``folder``, since its files and folders are called alike everywhere."""
    for case in cases:
        if is_series(case):
            case["name"] = path_below(case, folder).replace("/", "_")
    return cases


def is_series(case: Case) -> bool:
    """Return whether the image of a case is a DICOM series."""
    return not images_of(case)[0].lower().endswith(ENDINGS)


def path_below(case: Case, folder: Path) -> str:
    """Return where a case lies below a folder: the folders between, with ``/``, and what its files are called."""
    inner = Path(images_of(case)[0]).relative_to(folder.absolute())
    if is_series(case):
        return without_ending(inner.as_posix()) if inner.parts else folder.absolute().name
    return inner.with_name(case_name(case).rpartition("/")[2]).as_posix()


def named_below(cases: list[Case], folder: Path) -> list[Case]:
    """Call cases by their paths below a folder if two of them are called alike, DICOM series always."""
    paths = [path_below(case, folder) for case in cases]
    named_series(cases, folder)
    if len({case_name(case).casefold() for case in cases}) < len(cases):
        for case, path in zip(cases, paths, strict=True):
            case["name"] = path
    return cases


def volumes_in(folder: Path) -> list[Path]:
    """Return the paths of :func:`volumes_below`, and print what is left out."""
    left_out = LeftOut()
    found = [path for path, _ in volumes_below(folder, left_out)]
    report(left_out)
    return found
