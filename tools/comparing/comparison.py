# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Train nnU-Net itself and this collection on the same cases, arm after arm, and say how far apart they are."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from common.data.cases import Case, case_name
from common.data.listing.descriptions import check_names_of_classes, segmentation_task
from common.data.listing.labelled import labelled_lists
from common.errors import SettingsError
from common.files import write_record
from common.settings import unknown_settings
from common.tasks import SegmentationTask

from ..benchmarking.witness import nnunet_python
from ..commanding.ending import end, tool_command
from ..commanding.environment import ROOT
from ..studies.contents import contents_of
from ..studies.definition import OWN, bundle_config, plain_name
from ..studies.results import read_json
from .planning import prepare
from .report import write_report
from .running import Comparison, check_arms, piece
from .settings import OURS, BesideNnunet

__all__ = ["beside_nnunet"]

_DRAW = 0  # of the cases
# what may change from one call to the next: more seeds and arms, and where the table goes
_MAY_GROW = {"seeds", "trainers", "variants", "output", "page"}


def beside_nnunet(asked: BesideNnunet) -> None:
    """Train and score what is not yet, and write the tables.

    Raises:
        SettingsError: if the folder holds another comparison, or a setting does not fit.
        SystemExit: if nnU-Net or a run of ours fails.
    """
    import torch

    _check_settings(asked)
    data, folder = asked.data.absolute(), asked.output.absolute()
    page = None if asked.page is None else asked.page.absolute()
    task = _task(asked, data)
    training, unseen = _cases(asked, data)
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder, asked, data, [*training, *unseen])
    torch.set_num_threads(1)
    os.chdir(ROOT)  # relative to which bundles are run
    python = nnunet_python()
    given: dict[str, Any] = {"task": task, "training": training, "unseen": unseen, "python": python}
    planned = prepare(folder / "nnunet", asked, **given)
    comparison = Comparison(folder=folder, asked=asked, planned=planned, **given)
    check_arms(comparison)
    elsewhere = [
        f"{arm}, seed {seed}"
        for seed in range(asked.seeds)
        for arm in comparison.arms
        if piece(comparison, arm, seed) == "elsewhere"
    ]
    if elsewhere:
        raise SystemExit(f"Stopped: another process works on {'; '.join(elsewhere)}; the same command ends with it")
    write_report(comparison, page)
    end(folder / "comparison.md", following=tool_command("beside_nnunet", asked.data, "--variants", "VARIANTS"))


def _check_settings(asked: BesideNnunet) -> None:
    """Refuse settings that train.yaml does not have, or that the comparison decides, and names that share a folder."""
    known = bundle_config(asked.bundle, "train")
    for own in (asked.settings, *asked.variants.values()):
        if wrong := unknown_settings(own, known):
            raise SettingsError(wrong)
        if taken := OWN & own.keys():
            raise SettingsError(f"--{min(taken)} is decided by the comparison itself; leave it out")
    if not all(map(plain_name, asked.variants)):
        raise SettingsError(f"--variants names {list(asked.variants)}; use letters or digits")
    folders = [plain_name(name).casefold() for name in (*asked.trainers, OURS, *asked.variants)]
    if twice := next((name for name in folders if folders.count(name) > 1), None):
        raise SettingsError(f"two arms would share the folder {twice}; rename one of --variants")


def _task(asked: BesideNnunet, data: Path) -> SegmentationTask:
    labels: Any = asked.labels
    if labels is None:
        if not (data / "dataset.json").is_file():
            raise SettingsError("name the classes: --labels \"['background','lesion']\", or a dataset.json")
        labels = str(data / "dataset.json")
    check_names_of_classes(labels, data)
    return segmentation_task(list(labels) if isinstance(labels, tuple) else labels)


def _cases(asked: BesideNnunet, data: Path) -> tuple[list[Case], list[Case]]:
    """Draw the cases to learn from and those to score, none in both.

    Raises:
        SettingsError: if there are too few.
    """
    cases = labelled_lists(str(data), channels=None, fold="all")["training"]
    if len(cases) < asked.train + asked.test:
        raise SettingsError(
            f"{data} has {len(cases)} labelled cases, fewer than --train {asked.train} and --test {asked.test} together"
        )
    cases.sort(key=case_name)
    random.Random(_DRAW).shuffle(cases)
    return cases[: asked.train], cases[asked.train : asked.train + asked.test]


def _check_folder(folder: Path, asked: BesideNnunet, data: Path, cases: list[Case]) -> None:
    """Refuse a folder of another comparison, or of other files of the same names."""
    told = {name: value for name, value in vars(asked).items() if name not in _MAY_GROW}
    told = json.loads(json.dumps({**told, "data": data, "contents": contents_of(cases, folder)}, default=str))
    before = read_json(folder / "asked.json")
    if before not in (None, told):
        other = [name for name in told if before is not None and before.get(name) != told[name]]
        raise SettingsError(f"{folder} holds a comparison of other {', '.join(other)}; give another --output")
    write_record(told, folder / "asked.json")
