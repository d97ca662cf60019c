# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Splits for pre-training, by subject, that stay as they are when data are added.

The order in which subjects are taken for validation is that of a digest of (seed, subject), so it depends neither on
the other subjects nor on the order of the list. A subject that an earlier list has in one part stays there; of new ones
as many are validated on as the grown number asks for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import DataError
from ..cases import Case, images_of, subject_of

__all__ = ["kept_parts", "split_by_subject", "subjects_of", "validation_count"]

_PARTS = ("training", "validation")
_WITH_DATA_SET = re.compile(r".+/sub-[A-Za-z0-9+]+")


def validation_count(subjects: int) -> int:
    """Return how many subjects are validated on: 1 %, at least 5, at most 1000 as published; at most a fifth.

    Example:
        >>> [validation_count(n) for n in (1, 2, 6, 30, 1000, 34191, 200000)]
        [0, 1, 1, 5, 10, 341, 1000]
    """
    return min(1000, max(subjects // 100, 5), subjects // 5) or min(1, subjects - 1)


def subjects_of(cases: Sequence[Case], root: str | Path) -> list[str]:
    """Return who each case is of: its data set and subject, by its columns or BIDS names, else the file by itself.

    Args:
        cases: with an ``image``.
        root: of the data; paths below it count from there.
    """
    start = os.path.abspath(root) + os.sep
    found = []
    for case in cases:
        dataset, subject = str(case.get("dataset") or ""), str(case.get("subject") or "")
        if not subject:
            path = images_of(case)[0].removeprefix(start).lstrip("/")
            there, subject = subject_of(path)
            dataset, subject = dataset or there, subject or path
        elif not dataset and _WITH_DATA_SET.fullmatch(subject):  # both in one column
            dataset, _, subject = subject.rpartition("/")
        found.append(f"{dataset}/{subject}")
    return found


def kept_parts(lists: Mapping[str, Sequence[Case]], root: str | Path) -> dict[str, str]:
    """Return the part that each subject of an earlier list is in; none, if all its cases are in both parts.

    Raises:
        DataError: if a subject is in two.
    """
    parts: dict[str, str] = {}
    training, validation = ({tuple(images_of(case)) for case in lists.get(part, [])} for part in _PARTS)
    if training == validation:  # of one subject, which could not be split
        return parts
    for part in _PARTS:
        for subject in subjects_of(lists.get(part, []), root):
            if parts.setdefault(subject, part) != part:
                raise DataError(f"the list has the subject {subject} both in training and in validation; split it anew")
    return parts


def split_by_subject(
    cases: Sequence[Case],
    subjects: Sequence[str],
    *,
    seed: int,
    least: int = 1,
    kept: Mapping[str, str] | None = None,
) -> dict[str, list[Case]]:
    """Split cases into ``training`` and ``validation``, no subject in both.

    Args:
        cases: to split.
        subjects: of each case.
        seed: of the order.
        least: volumes that each part must hold, if there are enough and ``kept`` allows it.
        kept: parts that subjects are in already.

    Returns:
        both parts in the order of ``cases``; all cases in both, if they are of one subject.
    """
    kept = kept or {}
    volumes = Counter(subjects)
    wanted = validation_count(len(volumes))
    chosen = {subject for subject in volumes if kept.get(subject) == "validation"}
    held = sum(volumes[subject] for subject in chosen)
    new = sorted((subject for subject in volumes if subject not in kept), key=lambda subject: _digest(seed, subject))
    enough = len(cases) >= 2 * least
    for subject in new:
        if len(chosen) >= wanted and (held >= least or not enough):
            break
        if len(chosen) + 1 == len(volumes):  # one must be left to train on
            break
        chosen.add(subject)
        held += volumes[subject]
    if not chosen or len(chosen) == len(volumes):
        return {"training": list(cases), "validation": list(cases)}
    return {
        part: [case for case, subject in zip(cases, subjects, strict=True) if (subject in chosen) is inside]
        for part, inside in (("training", False), ("validation", True))
    }


def _digest(seed: int, subject: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{subject}".encode(errors="surrogatepass")).digest()
