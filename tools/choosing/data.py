# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The labelled cases that encoders are chosen for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.data import labelled_lists, segmentation_task
from common.data.cases import Case, images_of
from common.data.checking.checks import usable_cases
from common.data.listing.classified import classified_cases
from common.data.listing.descriptions import check_names_of_classes
from common.engines.probing import is_missing, task_of
from common.errors import DataError, SettingsError
from common.transforms import read_header
from common.transforms.grids import prepared_sides

from .settings import Choose

__all__ = ["Data", "read_data"]

CASES = 40  # labelled cases that segmentation is probed and fine-tuned on


@dataclass
class Data:
    """Labelled cases of the user."""

    kind: str  # segmentation, classification or regression
    cases: list[Case]
    task: Any = None
    target: str | None = None
    patient: str | None = None
    channels: int = 1
    spacing_mm: list[float] | None = None

    @property
    def units(self) -> int:
        """How many cases, or patients."""
        return len({str(case[self.patient]) for case in self.cases}) if self.patient else len(self.cases)


def read_data(settings: Choose) -> Data:
    """Read and check the labelled cases.

    Raises:
        DataError: if they cannot be read, or are too few.
        SettingsError: if the labels are not said.
    """
    found = _classified(settings) if settings.table else _labelled(settings)
    patient = settings.patient
    if patient:
        lacking = [case for case in found.cases if not str(case.get(patient, ""))]
        if lacking:
            raise DataError(f"{lacking[0]['image']} has no {patient!r}; add it to the table, or drop --patient")
    most = settings.cases or (len(found.cases) if settings.table else CASES)
    if len(found.cases) > most:
        kept = set(random.Random(settings.seed).sample(range(len(found.cases)), most))
        print(f"{most} of {len(found.cases)} labelled cases are used; --cases takes more")
        found.cases = [case for index, case in enumerate(found.cases) if index in kept]
    found.cases = usable_cases(found.cases, task=found.task, channels=settings.channels)
    if found.units < 2:
        what = f"patient ({patient})" if patient else "labelled case"
        raise DataError(
            f"{settings.data} has {found.units} usable {what}; what is learned from one cannot be judged on it: give "
            "at least 2, better 20"
        )
    found.spacing_mm = _own_spacing(found.cases, reorient=settings.settings.get("reorient", True))
    return found


def _classified(settings: Choose) -> Data:
    """Return images with a column of the table."""
    table, channels = str(settings.table), settings.channels
    cases = classified_cases(str(settings.data.absolute()), table=table, channels=channels)["training"]
    for column in (settings.target, settings.patient):
        if column and cases and column not in cases[0]:
            raise DataError(f"{table} has no column {column!r}; correct --target or --patient")
    target = str(settings.target)
    texts = [str(case[target]).strip() for case in cases if not is_missing(str(case.get(target, "")))]
    kind: str | None = settings.task
    if kind is None and texts:
        kind, told = task_of(texts, target)
        print(told)
    return Data(kind or "classification", cases, target=target, patient=settings.patient, channels=channels)


def _labelled(settings: Choose) -> Data:
    """Return images with label maps."""
    data, beside = str(settings.data.absolute()), settings.data / "dataset.json"
    labels = settings.labels or (str(beside) if beside.is_file() else None)
    if labels is None:
        raise SettingsError(
            "name the classes, background first: --labels \"['background','lesion']\", or the path of a "
            "dataset.json; for classification or regression give --table and --target"
        )
    check_names_of_classes(labels, settings.data)
    task = segmentation_task(labels)
    place = ("", data) if data.endswith(".json") else (data, None)
    groups = None if settings.groups is None else str(settings.groups)
    cases = labelled_lists(*place, channels=settings.channels, groups=groups, fold="all")["training"]
    return Data("segmentation", cases, task=task, patient=settings.patient, channels=settings.channels)


def _own_spacing(cases: Sequence[Case], *, reorient: bool) -> list[float]:
    """Return the median spacing of the files, ``(slice, row, column)`` as they are prepared."""
    sides = [prepared_sides(read_header(images_of(case)[0]).affine, reorient=reorient) for case in cases]
    return [round(float(side), 4) for side in np.median(np.array(sides), axis=0)]
