# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands that draw curves."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from common.errors import SettingsError

from ..commanding.settings import Bundle, Existing, From, Labels, Reads, Rests, read, settings

__all__ = ["LabelCurve", "Schedules"]


def _count(value: object) -> int | str:
    return "all" if value == "all" else read(Annotated[int, From(1)], value)


Count = Annotated[int | str, Reads(_count, "numbers of cases, or all")]


@settings
class LabelCurve:
    """What ``label_curve`` is told."""

    bundle: Bundle
    """Any of the folders in bundles/."""
    data: Existing | Literal["mni"]
    """Folder or datalist of labelled cases, or mni."""
    cases: tuple[Count, ...] = (2, 4, 8, 16, "all")
    """Numbers of labelled cases to fine-tune on; all means the whole training part of a fold."""
    labels: Labels | None = None
    """Class names, background first, or the path of a dataset.json."""
    table: Existing | None = None
    """CSV with a column case and a number for each, to be told of whole volumes instead of label maps."""
    target: str | None = None
    """Its column; --units names what it is in."""
    seeds: Annotated[int, From(1)] = 3
    """Draws of cases, patches and networks for every number and fold."""
    folds: Annotated[int, From(2)] = 2
    """Every case is unseen in one of them."""
    pretrained: Existing | None = None
    """Encoder to start from; without one, it is pre-trained on the images of each training part."""
    output: Path | None = None
    """Where everything goes; default label_curve/<bundle>."""
    splits: Existing | None = None
    """JSON list of train and val names instead of folds; val is unseen."""
    groups: Existing | None = None
    """CSV with a column case and further columns."""
    group: str | None = None
    """The column that folds do not tear apart."""
    patient: str | None = None
    """The column of the patients, whom folds do not tear apart and intervals count."""
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Factors on the learning rate that are tried for each way to start."""
    plain_rows: bool = True
    """Also train what has to be beaten: the network with its encoder random and frozen, and a small plain CNN."""
    small: bool | None = None
    """Narrow network and short runs; default is true without a GPU."""
    settings: Rests = field(default_factory=dict)
    """Of the bundle's configs; those of pre-training alone begin with pretrain_."""

    def __post_init__(self) -> None:
        if bool(self.table) != bool(self.target):
            raise SettingsError("a table needs both: --table FILE.csv with numbers and --target COLUMN")
        if self.target and (self.labels is not None or self.data == "mni"):
            given = "--data mni" if self.data == "mni" else "--labels"
            raise SettingsError(
                f"--target {self.target} is of whole volumes, which {given} says nothing of; leave one out"
            )


@settings
class Schedules:
    """What ``schedules`` is told."""

    epochs: Annotated[int, From(1)] = 150
    """Length of the run."""
    lr: Annotated[float, From(0, above=True)] = 1e-3
    """Peak learning rate."""
    warmup_epochs: Annotated[int, From(0)] | None = None
    """Of all but the default schedule; 15 of 150 and 50 of 1000 unless given."""
    decoder_epochs: Annotated[int, From(0)] | None = None
    """Of sawtooth and valley; the same unless given."""
    output: Path = Path("schedules.png")
    """Picture to write."""
