# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a study is: arms x data sets x budgets x folds x seeds.

An *arm* is a row of the report: a bundle with weights or from scratch, and with the schedule, length and spacing of its
fine-tuning. A *budget* is the number of labelled cases to train on, or all of them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from common.bundles import read_config
from common.data.listing.members import group_columns

from ..commanding.environment import ROOT

__all__ = [
    "FROZEN_RANDOM",
    "MEAN",
    "NO_FILE",
    "OWN",
    "OWN_INFERENCE",
    "PLAIN",
    "PLAIN_ROWS",
    "PRETRAINING",
    "SCRATCH",
    "Arm",
    "DataSet",
    "Run",
    "Study",
    "bundle_config",
    "cell_of",
    "config_for",
    "digest",
    "plain_name",
]

SCRATCH, PRETRAINING = "scratch", "pretraining"  # weights that are no file
# nor are those of the plain rows: an encoder as drawn, a small plain CNN from scratch, the mean of the training cases
PLAIN_ROWS = FROZEN_RANDOM, PLAIN, MEAN = "frozen_random", "plain", "mean"
NO_FILE = (SCRATCH, PRETRAINING, *PLAIN_ROWS)
# settings of the train configs that a study decides itself
OWN = {
    *("datalist", "dataset_dir", "output_dir", "ckpt_dir", "store_dir", "pretrained", "from_scratch", "labels", "seed"),
    *("fold", "folds", "splits", "groups", "group", "patient", "table", "target", "classes", "regions", "ignore_label"),
    *("strict", "regions_class_order", "task"),
}
# and of the inference configs
OWN_INFERENCE = {
    *("datalist", "dataset_dir", "output_dir", "ckpt_dir", "store_dir", "model", "trained", "channels", "group"),
    *("labels", "regions", "regions_class_order", "strict", "overwrite", "patient"),
}
_CONFIGS = {"settings": "train", "inference": "inference"}  # which of a bundle's configs a level is for


@dataclass(frozen=True)
class Arm:
    """A row of the report: how a network starts and how it is fine-tuned."""

    name: str
    bundle: str
    weights: str  # one of NO_FILE, or the path of a file
    schedule: str | None = None
    epochs: int | None = None
    spacing: str | float | None = None  # as the settings say
    settings: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    inference: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Of the bundle, mae, simclr, ..., unless the weights are said to be of another or of an unknown one."""
        if self.weights in PLAIN_ROWS:
            return ""
        if self.weights in NO_FILE:
            return cell_of(self.bundle)[0]
        from common.weights.origins import method_of_weights  # a list of runs needs no PyTorch

        return method_of_weights(self.bundle, self.weights)

    @property
    def backbone(self) -> str:
        """Of the bundle: resenc_l, primus_m, or another; plain for what is trained without its network."""
        return "plain" if self.weights in (PLAIN, MEAN) else cell_of(self.bundle)[1]


@dataclass
class DataSet:
    """Labelled cases; ``parts[fold]`` has ``training`` and ``validation``, the unseen ones that are tested on."""

    name: str
    card: dict[str, Any]
    parts: list[dict[str, list[dict[str, Any]]]]
    labels: Any
    channels: int = 1
    groups: str | None = None
    group: str | list[str] | None = None
    patient: str | None = None
    target: Any = None
    classes: list[str] | None = None
    pretrain_on: str | None = None  # the data set on whose training images arms pre-train, if not its own
    settings: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    inference: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """Segmentation, classification or regression."""
        return str(self.card["task"])

    @property
    def kept_together(self) -> str | None:
        """The column of groups that folds do not tear apart: a single one without bands, where no patients are told."""
        columns = group_columns(self.group)
        return columns[0].name if not self.patient and len(columns) == 1 and not columns[0].cuts else None


@dataclass(frozen=True)
class Run:
    """One fine-tuning with its predictions and scores."""

    arm: str
    data_set: str
    budget: str  # a number, or all
    fold: int
    seed: int
    cases: int

    @property
    def name(self) -> str:
        """Its folder below runs/."""
        arm = plain_name(self.arm)
        return f"{plain_name(self.data_set)}/{arm}/budget_{self.budget}/fold_{self.fold}/seed_{self.seed}"


@dataclass
class Study:
    """A whole study; ``source`` is the file that says it."""

    name: str
    folder: Path
    arms: dict[str, Arm]
    data_sets: dict[str, DataSet]
    budgets: list[str]
    folds: list[int]
    seeds: list[int]
    settings: dict[str, Any]
    pretraining: dict[str, Any]
    inference: dict[str, Any]
    backbones: dict[str, dict[str, dict[str, Any]]]
    keep: list[str]
    pretrain_each_seed: bool = False  # else all seeds of a fold start from one pre-training
    source: str = ""

    def runs(self) -> list[Run]:
        """Return all runs, seed by seed, so that a cut study has something of every arm."""
        return [
            Run(arm, name, budget, fold, seed, self.count(data, budget, fold))
            for seed in self.seeds
            for budget in self.budgets
            for fold in self.folds
            for name, data in self.data_sets.items()
            for arm, each in self.arms.items()
            if each.weights != MEAN or data.task == "regression"
        ]

    def count(self, data: DataSet, budget: str, fold: int) -> int:
        """Return how many cases a budget is."""
        most = len(data.parts[fold]["training"])
        return most if budget == "all" else int(budget)

    def training_cases(self, run: Run) -> list[dict[str, Any]]:
        """Return the cases to train on, of all arms the same; those of a smaller budget are among those of a larger."""
        data = self.data_sets[run.data_set]
        cases = list(data.parts[run.fold]["training"])
        random.Random(f"{run.fold} {run.seed}").shuffle(cases)
        if data.task == "classification" and run.cases < len(cases):
            cases = _every_class_first(cases, data.target)
        return cases[: run.cases]

    def pretraining_set(self, run: Run) -> DataSet:
        """Return the data set on whose training images a run pre-trains: its own, unless that says another."""
        data = self.data_sets[run.data_set]
        return self.data_sets[data.pretrain_on or data.name]

    def config_of(self, data: DataSet, kind: str) -> str:
        """Return which of a bundle's configs trains or predicts: kind is train or inference."""
        return config_for(kind, data.task)

    def merged(self, level: str, arm: Arm, data: DataSet) -> dict[str, Any]:
        """Return settings of a config: of the study, the backbone, the data set and the arm, each over the former."""
        found: dict[str, Any] = {}
        for one in (
            getattr(self, level),
            self.backbones.get(cell_of(arm.bundle)[1], {}).get(level, {}),
            getattr(data, level),
            getattr(arm, level),
        ):
            found |= one
        if arm.weights == PLAIN and level in _CONFIGS:
            found = _with_plain_network(found, arm.bundle, self.config_of(data, _CONFIGS[level]))
        return found

    def training_settings(self, arm: Arm, data: DataSet) -> dict[str, Any]:
        """Return what a fine-tuning of an arm on a data set is told beyond cases, weights and places."""
        found = self.merged("settings", arm, data)
        if arm.schedule is not None:
            found["schedule"] = arm.schedule
        if arm.epochs is not None:
            found["epochs"] = arm.epochs
        if arm.spacing is not None:
            fixed = bundle_config(arm.bundle, self.config_of(data, "train")).get("spacing_mm")
            told = {"fixed": fixed, "own": None, "card": data.card.get("spacing_mm")}
            found["spacing_mm"] = told.get(arm.spacing, arm.spacing) if isinstance(arm.spacing, str) else arm.spacing
        if data.channels != 1:
            found["channels"] = data.channels
        if arm.weights == FROZEN_RANDOM:
            found["tuning"] = FROZEN_RANDOM
        return found

    def pretraining_settings(self, arm: Arm, data: DataSet) -> dict[str, Any]:
        """Return what a pre-training within the study is told: size of network and spacing as in fine-tuning."""
        known = bundle_config(arm.bundle, "pretrain")
        # a component of pre-training is another than the setting of fine-tuning that is called alike, such as schedule
        shared = {name for name, value in known.items() if name not in OWN and not isinstance(value, Mapping)} - {
            *("epochs", "iterations_per_epoch", "batch_size", "lr", "momentum", "weight_decay", "val_iterations"),
            *("accumulation_steps", "clip_norm", "warmup_epochs", "initialization"),
        }
        found = {k: v for k, v in self.merged("settings", arm, data).items() if k in shared}
        return found | self.merged("pretraining", arm, data)

    def as_plain(self) -> dict[str, Any]:
        """Return what study.json says."""
        return {
            "name": self.name,
            "source": self.source,
            "arms": {
                name: {**asdict(arm), "method": arm.method, "backbone": arm.backbone} for name, arm in self.arms.items()
            },
            "data_sets": {
                name: {
                    "card": data.card,
                    "labels": data.labels,
                    "classes": data.classes,
                    "target": data.target,
                    "group": data.group,
                    "patient": data.patient,
                    "pretrain_on": data.pretrain_on,
                    "cases": [{part: len(cases) for part, cases in fold.items()} for fold in data.parts],
                    "settings": data.settings,
                }
                for name, data in self.data_sets.items()
            },
            "budgets": self.budgets,
            "folds": self.folds,
            "seeds": self.seeds,
            "pretrain_each_seed": self.pretrain_each_seed,
            "settings": self.settings,
            "pretraining": self.pretraining,
            "inference": self.inference,
            "backbones": self.backbones,
            "runs": [{"name": run.name, **asdict(run)} for run in self.runs()],
        }


def config_for(kind: str, task: str) -> str:
    """Return which of a bundle's configs is for a task: of label maps, or of whole volumes.

    Example:
        >>> config_for("train", "segmentation"), config_for("inference", "regression")
        ('train', 'inference_classification')
    """
    return kind if task == "segmentation" else f"{kind}_classification"


@cache
def bundle_config(bundle: str, config: str) -> dict[str, Any]:
    """Return what one of a bundle's configs says, unresolved."""
    return read_config(ROOT / "bundles" / bundle / "configs" / f"{config}.yaml")


@cache
def cell_of(bundle: str) -> tuple[str, str]:
    """Return method and backbone of a bundle; methods are the modules of ``common/methods``.

    Example:
        >>> cell_of("models_genesis_primus_m")
        ('models_genesis', 'primus_m')
    """
    methods = (path.stem for path in (ROOT / "common" / "methods").glob("*.py"))
    method = max((name for name in methods if bundle.startswith(f"{name}_")), key=len, default="")
    return method, bundle.removeprefix(f"{method}_")


def plain_name(name: str) -> str:
    """Return a name that a folder can have.

    Example:
        >>> plain_name("MAE, 1000 epochs")
        'MAE_1000_epochs'
    """
    return re.sub(r"[^\w.+-]+", "_", name).strip("_.")


def _with_plain_network(settings: Mapping[str, Any], bundle: str, config: str) -> dict[str, Any]:
    """Return settings of a config with the small plain CNN in the place of the bundle's network, unless they say one.

    Sizes of the bundle's network are left out.
    """
    name = "plain_classification" if config.endswith("classification") else "plain"
    plain = read_config(ROOT / "common" / "configs" / f"{name}.yaml")
    sizes = bundle_config(bundle, "train")["network_settings"]
    known = bundle_config(bundle, config)
    return {key: plain[key] for key in plain if key in known} | {k: v for k, v in settings.items() if k not in sizes}


def _every_class_first(cases: Sequence[dict[str, Any]], target: Any) -> list[dict[str, Any]]:
    """Order shuffled cases so that any number of the first holds the classes as evenly as it can."""
    columns = [target] if isinstance(target, str) else list(target)
    piles: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        piles.setdefault("+".join(str(case.get(column)) for column in columns), []).append(case)
    ranked = [(index, name, case) for name, pile in piles.items() for index, case in enumerate(pile)]
    return [case for _, _, case in sorted(ranked, key=lambda each: each[:2])]


def digest(content: Any) -> str:
    """Return a short name of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
