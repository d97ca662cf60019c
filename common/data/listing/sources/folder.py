# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Any folder: NIfTI, NRRD and MGH files and DICOM series at any depth."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from sys import intern

from ...cases import Case, stem, subject_of
from ..folders import labelled_folders, named_series, volumes_below
from .base import Found

__all__ = ["read_folder"]

_SESSION = re.compile(r"(?:^|[/_])(ses-[A-Za-z0-9+]+)(?=[/_])")


def read_folder(path: Path) -> Found:
    """List the volumes; subject, session and modality where names follow BIDS or a DICOM header says them.

    Label maps of a data set with ``images`` and ``labels`` are left out. Patients of DICOM files are named by a digest,
    so that their identity does not get into a list.

    Raises:
        DataError: if there are none.
    """
    found = Found()
    maps = labelled_folders(path)
    for file, dicom in volumes_below(path, found.left_out):
        if not maps.isdisjoint(file.parents):
            found.left_out.add("label map(s)", file, "only images are listed")
            continue
        inner = file.relative_to(path).as_posix()
        case: Case = {"image": str(file.absolute())}
        dataset, subject = subject_of(inner)
        if subject:
            case |= {"dataset": intern(dataset), "subject": intern(subject)}
            if session := _SESSION.search(inner):
                case["session"] = intern(session[1])
            if "_" in (name := stem(file)):
                case["modality"] = intern(name.rsplit("_", 1)[1])
        if dicom is not None:
            patient = str(dicom.get("PatientID") or dicom.get("StudyInstanceUID") or inner)
            case.setdefault("subject", "dicom-" + hashlib.sha256(patient.encode()).hexdigest()[:12])
            case["modality"] = intern(str(dicom.get("Modality") or ""))
            if description := str(dicom.get("SeriesDescription") or ""):
                case["series"] = intern(description)
        found.cases.append(case)
    named_series(found.cases, path)
    return found
