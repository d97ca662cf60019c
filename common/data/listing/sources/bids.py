# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""BIDS: one data set, or a folder of several, by the names that the standard's own validator accepts.

Anatomical images and PET are taken. Series of images (functional, diffusion, perfusion), derivatives and names that the
standard does not know are left out and counted.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from sys import intern

from ....errors import DataError
from ...cases import Case, stem
from ..folders import walk
from .base import Found

__all__ = ["DESCRIPTION", "bids_roots", "read_bids"]

DESCRIPTION = "dataset_description.json"
_TAKEN = ("anat", "pet")
_NO_SCANS = ("defacemask",)
_BESIDE = ("derivatives", "sourcedata", "code", "stimuli")


def bids_roots(path: Path, *, problems: list[str] | None = None) -> list[Path]:
    """Return the data set that a folder is, or those that it holds if it holds nothing else.

    Folders that cannot be read do not count; ``problems`` gathers a sentence for each.
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
            if problems is not None:
                problems.append(f"the folder {each} cannot be read ({error.strerror}) and is left out")
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
    found, left_out, examples = Found(), Counter[str](), dict[str, str]()
    roots = bids_roots(path, problems=found.problems)
    if not roots:
        raise DataError(f"{path} is no BIDS data set: there is no {DESCRIPTION}; add it, or take --source folder")
    for root in roots:
        dataset = intern("" if root == path else root.name)
        for here, names in walk(root):
            inner = here.relative_to(root)
            if inner.parts and inner.parts[0] in _BESIDE:
                continue
            for name in names:
                if not name.lower().endswith((".nii", ".nii.gz")):
                    continue
                entities = BIDSValidator.parse(f"/{(inner / name).as_posix()}")
                kind = entities.get("datatype") or "a name that BIDS does not know"
                if kind not in _TAKEN or entities["suffix"] in _NO_SCANS:
                    kind = entities.get("suffix", kind) if kind in _TAKEN else kind
                    left_out[kind] += 1
                    examples.setdefault(kind, str(here / name))
                    continue
                case: Case = {"image": str((here / name).absolute()), "name": f"{dataset}_{stem(name)}".lstrip("_")}
                case |= {"dataset": dataset, "subject": intern(f"sub-{entities['subject']}")}
                if "session" in entities:
                    case["session"] = intern(f"ses-{entities['session']}")
                found.cases.append(case | {"modality": intern(entities["suffix"])})
    found.problems += [
        f"{count} file(s) are {kind}, such as {examples[kind]}; only {' and '.join(_TAKEN)} are taken"
        for kind, count in left_out.items()
    ]
    return found
