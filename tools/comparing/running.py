# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Train one arm from one seed, predict the unseen cases and score them; the same evaluation for both sides."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.data.cases import Case, case_name
from common.engines.evaluation import Pair, evaluate_pairs
from common.errors import SettingsError
from common.files import read_content, write_json, write_record
from common.paths import output_file
from common.tasks import SegmentationTask
from common.weights import PlannedConfiguration

from ..studies.definition import plain_name
from ..studies.execution import logged, note, run_config, write_datalist
from ..studies.results import read_json
from .planning import CONFIGURATION, DATASET, NARROW, NnunetFolders, run_nnunet
from .settings import OURS, BesideNnunet

__all__ = ["RESULT", "SECONDS", "Comparison", "check_arms", "our_settings", "piece"]

RESULT = "result.json"
_CLOCK, _PEER = (Path(__file__).with_name(name) for name in ("clock.yaml", "peer.py"))
SECONDS = "processor_seconds"


@dataclass(frozen=True)
class Comparison:
    """What all arms share.

    Attributes:
        folder: of the comparison.
        asked: what the command was told.
        task: classes.
        training: cases to learn from.
        unseen: cases to score.
        planned: what nnU-Net's narrow plan says.
        python: of nnU-Net's environment.
    """

    folder: Path
    asked: BesideNnunet
    task: SegmentationTask
    training: Sequence[Case]
    unseen: Sequence[Case]
    planned: PlannedConfiguration
    python: Path

    @property
    def nnunet(self) -> NnunetFolders:
        """Where nnU-Net's raw and prepared cases are."""
        return NnunetFolders(self.folder / "nnunet")

    @property
    def arms(self) -> list[str]:
        """Names, nnU-Net's first."""
        return [*self.asked.trainers, OURS, *self.asked.variants]

    def place(self, arm: str, seed: int) -> Path:
        """Return the folder of one arm and seed."""
        return self.folder / "runs" / plain_name(arm) / f"seed_{seed}"


def our_settings(comparison: Comparison, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what train.yaml is told: what the plan says, nnU-Net's schedule, and what an arm has of its own."""
    asked, planned = comparison.asked, comparison.planned
    return {
        **planned.data,
        **planned.network,
        "patch_size": planned.patch_size,
        "batch_size": asked.batch_size,
        "epochs": asked.epochs,
        "iterations_per_epoch": asked.iterations,
        "schedule": "default",
        **{name: getattr(asked, name) for name in ("lr", "momentum") if getattr(asked, name) is not None},
        "val_iterations": 0,
        "picture_interval": 0,
        "save_interval": asked.epochs,
        "num_workers": 0,
        "device": "cpu",
        **asked.settings,
        **own,
    }


def check_arms(comparison: Comparison) -> None:
    """Refuse an arm that was run with other settings.

    Raises:
        SettingsError: naming the folder.
    """
    for arm in comparison.arms:
        folder, about = comparison.place(arm, 0).parent, {"arm": arm, "own": comparison.asked.variants.get(arm)}
        before = read_json(folder / "arm.json")
        if before not in (None, about):
            raise SettingsError(f"{folder} was run with other settings of {arm!r}; give the arm another name")
        write_record(about, folder / "arm.json")


def piece(comparison: Comparison, arm: str, seed: int) -> str:
    """Do one arm and seed unless it is done.

    Returns:
        finished, or elsewhere if another process works on it.

    Raises:
        SystemExit: if it fails, with its log.
    """
    folder = comparison.place(arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if read_json(folder / RESULT) is None:
                print(f"{arm}, seed {seed}", flush=True)
                write_record(_measure(comparison, arm, seed, folder), folder / RESULT)
            return "finished"
    except Timeout:
        return "elsewhere"


def _measure(comparison: Comparison, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    theirs = arm in comparison.asked.trainers
    trained = folder / "trained.json"  # what was cut after its training goes on from there
    if (report := read_json(trained)) is None:
        for name in ("results", "models", "train"):  # of a training that was cut
            shutil.rmtree(folder / name, ignore_errors=True)
        report = (_train_theirs if theirs else _train_ours)(comparison, arm, seed, folder)
        write_record(report, trained)
    shutil.rmtree(folder / "predictions", ignore_errors=True)
    (_predict_theirs if theirs else _predict_ours)(comparison, report, folder)
    names = [case_name(case) for case in comparison.unseen]
    files = [f"case_{number:03d}" for number in range(len(names))] if theirs else names
    pairs = [
        Pair(name, str(output_file(folder / "predictions", file, ".nii.gz")), str(case["label"]))
        for name, file, case in zip(names, files, comparison.unseen, strict=True)
    ]
    task = comparison.task
    with logged(folder / "log.txt"):
        evaluate_pairs(
            pairs,
            output_dir=folder / "evaluation",
            structures=dict(zip(task.names, task.values, strict=True)),
            known=task.label_values,
            num_workers=1,
            strict=True,
            resamples=0,
            report=False,
        )
    scores = read_content(folder / "evaluation" / "scores.json")["cases"]
    return {**report, "cases": {case["case"]: {"scores": case["scores"]} for case in scores}}


def _train_theirs(comparison: Comparison, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    asked, report = comparison.asked, folder / "nnunet_report.json"
    job = {
        "trainer": arm,
        "seed": seed,
        "dataset": DATASET,
        "plans": NARROW,
        "configuration": CONFIGURATION,
        "epochs": asked.epochs,
        "iterations": asked.iterations,
        "lr": asked.lr,
        "momentum": asked.momentum,
        "report": str(report),
    }
    _ask(comparison, "train", job, folder)
    return dict(read_content(report))


def _predict_theirs(comparison: Comparison, report: Mapping[str, Any], folder: Path) -> None:
    job = {
        "model": report["model"],
        "images": str(comparison.nnunet.unseen),
        "output": str(folder / "predictions"),
        "mirror": comparison.asked.mirror,
    }
    _ask(comparison, "predict", job, folder)


def _ask(comparison: Comparison, what: str, job: Mapping[str, Any], folder: Path) -> None:
    file = folder / f"nnunet_{what}.json"
    write_json(job, file)
    environment = comparison.nnunet.environment(folder / "results")
    command: list[str | Path] = [comparison.python, "-W", "ignore", _PEER, what, file]
    run_nnunet(command, environment=environment, log=folder / "log.txt")


def _train_ours(comparison: Comparison, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    import torch

    cases, unseen = comparison.training, comparison.unseen
    _run_ours(
        comparison,
        "train",
        folder,
        told=our_settings(comparison, comparison.asked.variants.get(arm, {})),
        added=[_CLOCK],
        datalist=write_datalist(folder / "datalist.json", training=cases, validation=cases[:1], test=unseen),
        labels=comparison.task.plain_labels,
        from_scratch=True,
        pretrained="",
        seed=seed,
        strict=True,
        store_dir=str(comparison.folder / "store"),
        output_dir=str(folder / "train"),
        ckpt_dir=str(folder / "models"),
    )
    model = folder / "models" / "model_final.pt"
    weights = torch.load(model, map_location="cpu", weights_only=True)
    return {
        SECONDS: read_content(folder / "train" / f"{SECONDS}.json"),
        "model": str(model),
        "parameters": sum(weight.numel() for weight in weights.values()),
    }


def _predict_ours(comparison: Comparison, report: Mapping[str, Any], folder: Path) -> None:
    _run_ours(
        comparison,
        "inference",
        folder,
        told={"pictures": 0, "num_workers": 0, "device": "cpu"},
        model=report["model"],
        mirror_axes=[0, 1, 2] if comparison.asked.mirror else [],
        datalist=str(folder / "datalist.json"),
        store_dir=str(comparison.folder / "store"),
        output_dir=str(folder / "predictions"),
        overwrite=True,
        strict=True,
    )


def _run_ours(comparison: Comparison, config: str, folder: Path, **told: Any) -> None:
    """Run a config of ours, whose error ends the command with its sentence."""
    log = folder / "log.txt"
    logging.disable(logging.WARNING)  # MONAI repeats every setting
    try:
        run_config(comparison.asked.bundle, config, log, record=folder / f"{config}.json", **told)
    except Exception as error:
        raise SystemExit(f"Stopped: {config} of ours failed, see {log}: {note(log, error)}") from error
    finally:
        logging.disable(logging.NOTSET)
