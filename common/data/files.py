# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a case is, and which volumes lie below a folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import DataError
from ..transforms import ENDINGS, files_behind, is_dicom, series_in, volume_format, without_ending

__all__ = [
    "ANATOMY",
    "ANONYMISED",
    "INVERTED",
    "LABEL",
    "LABELLED",
    "MASKS",
    "Case",
    "behind",
    "case_name",
    "existing_folder",
    "images_of",
    "labelled_folders",
    "named_series",
    "stem",
    "subject_of",
    "volumes_below",
    "volumes_in",
    "walk",
]

# image: a path, or one for each channel; label, masks: a path; name; columns such as subject, modality or centre
Case = dict[str, Any]
ANONYMISED = "anonymization_mask"  # 1 where a volume was altered by defacing or brain extraction
ANATOMY = "anatomy_mask"  # 1 where there is anatomy
MASKS = (ANONYMISED, ANATOMY)
INVERTED = "inverted_masks"  # key of the names of masks whose file says 0 where it should say 1
LABEL = "label"
LABELLED = (("images", "labels"), ("imagesTr", "labelsTr"))
_SUBJECT = re.compile(r"(sub-[A-Za-z0-9+]+)(?:_.*)?")


def stem(path: str | Path) -> str:
    """Return a volume's name without its endings.

    Example:
        >>> stem("/data/sub-01_T1w.nii.gz")
        'sub-01_T1w'
    """
    return without_ending(Path(path).name)


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


def subject_of(path: str) -> tuple[str, str]:
    """Return data set and subject of a path with BIDS names, empty where it does not say.

    The data set is what comes before the subject's folder; derivatives belong to the data set that they come from.

    Example:
        >>> subject_of("ds000001/sub-01/anat/sub-01_T1w.nii.gz"), subject_of("T2/sub-01_T2w.nii.gz")
        (('ds000001', 'sub-01'), ('', 'sub-01'))
        >>> subject_of("ds1/derivatives/prep/sub-01/anat/sub-01_T1w.nii.gz"), subject_of("patient 3/T1.nii.gz")
        (('ds1', 'sub-01'), ('', ''))
    """
    parts = path.split("/")
    for place, part in enumerate(parts[:-1]):
        if _SUBJECT.fullmatch(part) and "_" not in part:
            before = parts[:place]
            if "derivatives" in before:
                before = before[: before.index("derivatives")]
            return "/".join(before), part
    found = _SUBJECT.fullmatch(without_ending(parts[-1]))
    return "", found[1] if found else ""


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
        slices = [here / name for name in names if not name.lower().endswith(ENDINGS) and is_dicom(here / name)]
        if slices:
            series, wrong = series_in(slices)
            for problem in wrong:
                tqdm.write(f"left out: {problem}") if problems is None else problems.append(str(problem))
            alone = len(series) == 1
            found += [(here if alone else files[0][0], files[0][1]) for files in series.values()]
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
