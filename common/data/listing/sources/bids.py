# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""BIDS: one data set, or a folder of several, by the names that the standard's own validator accepts.

Anatomical images and PET are taken. Series of images (functional, diffusion, perfusion), derivatives and names that the
standard does not know are left out and counted.
"""

from __future__ import annotations

import os
from pathlib import Path
from sys import intern

from ....errors import DataError
from ....transforms import file_kind
from ...cases import Case, stem
from ...problems import LeftOut
from ..folders import walk
from .base import Found

__all__ = ["DESCRIPTION", "bids_roots", "read_bids"]

DESCRIPTION = "dataset_description.json"
_TAKEN = ("anat", "pet")
_NO_SCANS = ("defacemask",)
_NOT_OF_BIDS = "BIDS has NIfTI only; convert them, or read the folder with --source folder"
_BESIDE = ("derivatives", "sourcedata", "code", "stimuli")


def bids_roots(path: Path, left_out: LeftOut | None = None) -> list[Path]:
    """Return the data set that a folder is, or those that it holds if it holds nothing else.

    Folders that cannot be read do not count, but in ``left_out``.
    """
    if os.path.isfile(path / DESCRIPTION):
        return [path]
    try:
        inner = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError:
        return []
    roots = []
    for each in inner:
        try:
            if not (each / DESCRIPTION).is_file():
                return []
            roots.append(each)
        except OSError as error:
            if left_out is not None:
                left_out.add(f"folder(s) that cannot be read ({error.strerror})", each, "correct their rights")
    return roots


def read_bids(path: Path) -> Found:
    """List the three-dimensional images, without looking at them.

    Raises:
        DataError: if the package ``bids-validator`` is missing or this is no BIDS data set.
    """
    try:
        from bids_validator import BIDSValidator
    except ImportError as error:
        raise DataError(
            "BIDS is read with the package bids-validator, which is not installed; pip install bids-validator, or read "
            "the folder as it is with --source folder"
        ) from error
    found = Found()
    left_out = found.left_out
    roots = bids_roots(path, left_out)
    if not roots:
        raise DataError(f"{path} is no BIDS data set: there is no {DESCRIPTION}; add it, or take --source folder")
    for root in roots:
        dataset = intern("" if root == path else root.name)
        for here, names in walk(root, left_out):
            inner = here.relative_to(root)
            beside = inner.parts[0] if inner.parts and inner.parts[0] in _BESIDE else ""
            for name in names:
                if beside or not name.lower().endswith((".nii", ".nii.gz")):
                    if found_kind := file_kind(here / name):
                        where = f" in {beside}" if beside else ""
                        how = (
                            "read their folder with --source folder if they are wanted" if beside else found_kind.remedy
                        )
                        left_out.add(f"file(s) of {found_kind.name}{where}", here / name, how or _NOT_OF_BIDS)
                    continue
                entities = BIDSValidator.parse(f"/{(inner / name).as_posix()}")
                kind = entities.get("datatype") or "a name that BIDS does not know"
                if kind not in _TAKEN or entities["suffix"] in _NO_SCANS:
                    kind = entities.get("suffix", kind) if kind in _TAKEN else kind
                    left_out.add(f"file(s) of {kind}", here / name, f"only {' and '.join(_TAKEN)} are taken")
                    continue
                case: Case = {"image": str((here / name).absolute()), "name": f"{dataset}_{stem(name)}".lstrip("_")}
                case |= {"dataset": dataset, "subject": intern(f"sub-{entities['subject']}")}
                if "session" in entities:
                    case["session"] = intern(f"ses-{entities['session']}")
                found.cases.append(case | {"modality": intern(entities["suffix"])})
    return found
