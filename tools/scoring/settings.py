# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands that score what is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from common.errors import SettingsError

from ..commanding.settings import Existing, From, Labels, settings

__all__ = ["Evaluate", "Probe"]


@settings
class Evaluate:
    """What ``evaluate`` is told."""

    predictions: Existing
    """Folder of label maps, or one file."""
    references: Existing
    """Folder of label maps of the same names, or one file."""
    labels: Labels | None = None
    """Names of the label values 0, 1, 2, ..., background first; the value of each name; or a dataset.json."""
    regions: dict[str, tuple[int, ...]] | None = None
    """Sets of label values to score instead of the classes."""
    ignore_label: int | None = None
    """Value of the references whose voxels count nowhere."""
    tolerance_mm: Annotated[float, From(0)] = 1.0
    """Distance up to which NSD takes two surfaces as equal."""
    groups: Existing | None = None
    """CSV with a column "case" and others, or the participants.tsv of a BIDS data set."""
    group: str | None = None
    """Columns of it by whose values to report too; of a quantity with the ends of its bands: site,sex,age:40,60."""
    patient: str | None = None
    """Column of it with the patients, who are then resampled instead of cases."""
    output: Path = Path("evaluation")
    """Folder to write to."""
    resamples: Annotated[int, From(1)] = 2000
    """Of the bootstrap."""
    seed: Annotated[int, From(0)] = 12345
    """Of the bootstrap."""
    num_workers: Annotated[int, From(0)] = 2
    """Cases that are scored at a time."""
    strict: bool = False
    """Stop if a case cannot be scored."""
    report: bool = True
    """Write report.html, with the best and the worst case to look through."""

    def __post_init__(self) -> None:
        if self.predictions.is_dir() != self.references.is_dir():
            raise SettingsError(f"{self.predictions} and {self.references} must both be folders, or both files")
        if bool(self.groups) != bool(self.group or self.patient):
            raise SettingsError("groups and group (or patient) belong together: --groups cases.csv --group centre")
        if self.regions is not None and self.labels is None:
            raise SettingsError("regions need the names of the label values: --labels background,edema,core")


@settings
class Probe:
    """What ``probe`` is told."""

    RENAMED: ClassVar[dict[str, str]] = {"group": "patient"}

    features: Existing
    """Folder that the features config wrote, or its features.csv."""
    table: Existing
    """CSV with the columns case and target."""
    target: str
    """Column to tell."""
    patient: str | None = None
    """Column of the patients, whom splits do not tear apart and intervals count."""
    task: Literal["classification", "regression"] | None = None
    """By the values unless given."""
    folds: Annotated[int, From(2)] = 5
    """Of the outer cross-validation."""
    repeats: Annotated[int, From(1)] = 3
    """Of it, with other folds."""
    resamples: Annotated[int, From(1)] = 2000
    """Of the bootstrap."""
    seed: Annotated[int, From(0)] = 0
    """Of everything random."""
    output: Path | None = None
    """Folder to write; default probe_<target> beside the features."""
