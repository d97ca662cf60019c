# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the command that chooses."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from common.errors import SettingsError

from ..commanding.settings import Existing, From, Labels, Rests, settings

__all__ = ["Choose"]


@settings
class Choose:
    """What ``choose`` is told."""

    RENAMED: ClassVar[dict[str, str]] = {"group": "patient"}

    data: Existing
    """Folder of labelled cases as train.yaml reads them, or a datalist; or, with a table, one of images."""
    labels: Labels | None = None
    """Class names, background first, or the path of a dataset.json."""
    bundles: tuple[str, ...] = ()
    """Whose own weights are asked; default all that have some; none for none."""
    weights: tuple[str, ...] = ()
    """NAME=PATH of further encoders."""
    best: Annotated[int, From(0)] = 2
    """How many go on from the probes to fine-tuning; 0 ends after the probes."""
    plain_rows: bool = True
    """Also fine-tune a small plain CNN from scratch and, of a number, tell the mean of the cases to train on."""
    table: Existing | None = None
    """CSV with a column case and the target, for classification and regression."""
    target: str | None = None
    """Its column."""
    task: Literal["classification", "regression"] | None = None
    """Of the table; default regression if the target holds many different numbers, or fractions."""
    groups: Existing | None = None
    """CSV with a column case and further columns."""
    patient: str | None = None
    """Column of the patients, whom folds do not tear apart and intervals count."""
    cases: Annotated[int, From(2)] | None = None
    """Labelled cases to use at most, drawn at random; default 40 in segmentation, all of a table."""
    channels: Annotated[int, From(1)] = 1
    """Images of a case."""
    folds: Annotated[int, From(2)] = 5
    """Of the probes."""
    tuning_folds: Annotated[int, From(2)] = 2
    """Of fine-tuning; every case is unseen in one."""
    seeds: Annotated[int, From(1)] = 3
    """Of every fine-tuning; for a recommendation at least 2."""
    seed: Annotated[int, From(0)] = 0
    """Of everything random here."""
    resamples: Annotated[int, From(100)] = 2000  # fewer have no 95 %
    """Of the bootstrap."""
    gpus: str = ""
    """To fine-tune on, numbers with commas; all by default."""
    jobs: Annotated[int, From(0)] = 0
    """Fine-tunings at a time on each GPU, or on the CPU."""
    output: Path | None = None
    """Where everything goes; default choose/<name of the data>. The answer for other data is never replaced."""
    settings: Rests = field(default_factory=dict)
    """Of the bundles' configs."""

    def __post_init__(self) -> None:
        if bool(self.table) != bool(self.target):
            raise SettingsError("a table needs both: --table FILE.csv with classes or numbers and --target COLUMN")
        if self.task and not self.table:
            raise SettingsError(
                f"task is {self.task!r}, which needs --table FILE.csv and --target COLUMN; add them, or drop it"
            )
