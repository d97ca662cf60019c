# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a case is: its files and what is known of them, as a plain dictionary."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..transforms import without_ending

__all__ = [
    "ANATOMY",
    "ANONYMISED",
    "INVERTED",
    "LABEL",
    "MASKS",
    "PROBABILITIES",
    "Case",
    "case_name",
    "images_of",
    "inverted_of",
    "masks_of",
    "stem",
    "subject_of",
]

# image: a path, or one for each channel; label, masks: a path; name; columns such as subject, modality or centre
Case = dict[str, Any]
ANONYMISED = "anonymization_mask"  # 1 where a volume was altered by defacing or brain extraction
ANATOMY = "anatomy_mask"  # 1 where there is anatomy
MASKS = (ANONYMISED, ANATOMY)
INVERTED = "inverted_masks"  # key of the names of masks whose file says 0 where it should say 1
LABEL = "label"
PROBABILITIES = "probabilities"  # folder beside predictions
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
    return str(case.get("name") or stem(images_of(case)[0]))


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


def inverted_of(case: Case) -> list[str]:
    """Return which of a case's masks are to be exchanged, sorted.

    Raises:
        DataError: if it names something else.
    """
    names = sorted(case.get(INVERTED, ()))
    for name in names:
        if name not in MASKS:
            raise DataError(f"{INVERTED} of {images_of(case)[0]} names {name!r}; the masks are {', '.join(MASKS)}")
    return [name for name in names if name in case]


def masks_of(case: Case) -> list[str]:
    """Return the names of the masks that come with a case."""
    return [name for name in (*MASKS, LABEL) if name in case]
