# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Did pre-training help, and with how many labelled cases? Fine-tune both ways on few and on many, and compare."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..commanding.environment import ROOT
from .settings import LabelCurve

__all__ = ["label_curve"]

ARMS = ("pre-trained", "from scratch")
# what fits a CPU in minutes; on a GPU the bundle's own defaults are used
_SMALL: dict[str, dict[str, Any]] = {
    "resenc_l": {"features_per_stage": [8, 16, 32, 64], "blocks_per_stage": [1, 1, 1, 1], "momentum": 0.9},
    "primus_m": {"embed_dim": 96, "depth": 4, "num_heads": 4, "token_size": 4},
}
_SMALL_RATES = {"resenc_l": {"pretrain": 0.1, "train": 0.3}, "primus_m": {"pretrain": 2e-3, "train": 2e-3}}
_SMALL_RUN = {"patch_size": [32, 32, 32], "epochs": 10, "iterations_per_epoch": 25, "num_workers": 0}
_SMALL_PRETRAINING = {"epochs": 10, "iterations_per_epoch": 50, "batch_size": 4, "block_size": 8}
_SETTINGS = ("spacing_mm", "reorient", "patch_size", "num_workers", "channels", "device", "amp")


@dataclass(frozen=True)
class Run:
    """One fine-tuning: which fold is unseen, how many cases and which draw of them, and how it starts."""

    fold: int
    cases: int
    seed: int
    arm: str

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"fold_{self.fold}/cases_{self.cases}/seed_{self.seed}/{self.arm.replace(' ', '_')}"


class Curve:
    """All runs of one curve, in one folder."""

    def __init__(
        self,
        bundle: str,
        folder: Path,
        *,
        folds: list[dict[str, list[dict[str, Any]]]],
        labels: Sequence[str] | str,
        settings: Mapping[str, Any],
        pretraining: Mapping[str, Any],
        pretrained: str | None,
    ) -> None:
        self.bundle, self.folder, self.folds, self.labels = bundle, folder, folds, labels
        self.settings, self.pretraining, self.pretrained = dict(settings), dict(pretraining), pretrained
        self.rates: dict[str, float] = {}

    def run(self, config: str, log: Path, *, told: Mapping[str, Any] | None = None, **data: Any) -> None:
        """Run a config of the bundle in this process, see :func:`tools.studies.execution.run_config`."""
        from ..studies.execution import run_config

        run_config(self.bundle, config, log, told=told, **data)

    def datalist(self, path: Path, **parts: Sequence[dict[str, Any]]) -> str:
        """Write a datalist and return its path."""
        from ..studies.execution import write_datalist

        return write_datalist(path, **parts)

    def encoder(self, fold: int) -> str:
        """Return the pre-trained encoder for a fold, pre-training it if none was given."""
        if self.pretrained:
            return self.pretrained
        from common.data.cases import images_of

        folder = self.folder / f"fold_{fold}" / "pre-training"
        if not (folder / "finished").exists():
            images = [{"image": file} for case in self.folds[fold]["training"] for file in images_of(case)]
            self.run(
                "pretrain",
                folder / "log.txt",
                told={**self.settings, **self.pretraining},
                datalist=self.datalist(folder / "datalist.json", training=images),
                store_dir=str(self.folder / "store"),
                output_dir=str(folder),
                ckpt_dir=str(folder),
            )
            (folder / "finished").touch()
        return str(folder / "pretrained_encoder.pt")

    def subset(self, fold: int, count: int, seed: int) -> list[dict[str, Any]]:
        """Draw cases to train on; those of a smaller number are among those of a larger one."""
        cases = list(self.folds[fold]["training"])
        random.Random(f"{fold} {seed}").shuffle(cases)
        return cases[:count]

    def fine_tune(self, folder: Path, fold: int, arm: str, **settings: Any) -> None:
        """Fine-tune once."""
        self.run(
            "train",
            folder / "log.txt",
            told=self.settings,
            **settings,
            labels=self.labels,
            from_scratch=arm == "from scratch",
            pretrained="" if arm == "from scratch" else self.encoder(fold),
            store_dir=str(self.folder / "store"),
            output_dir=str(folder),
            ckpt_dir=str(folder / "models"),
        )

    def tune(self, arm: str, factors: Sequence[float], count: int, base: float) -> float:
        """Return the best of some learning rates on held-out cases of the first fold's training part.

        Where the best is at an end of those tried, up to two more are tried beyond it.
        """
        file = self.folder / "rates" / f"{arm.replace(' ', '_')}.json"
        found: dict[str, float] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        cases = self.subset(0, len(self.folds[0]["training"]), seed=-1)
        held = cases[count : count + 20] or cases[:1]
        wanted = sorted({float(f"{base * factor:.6g}") for factor in factors})
        most = len(wanted) + (2 if len(wanted) > 1 else 0)
        while wanted:
            for rate in wanted:
                if str(rate) not in found:
                    found[str(rate)] = self._score(arm, rate, cases[:count], held)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(found, indent=1), "utf-8")
            tried = sorted(map(float, found))
            best = max(tried, key=lambda rate: found[str(rate)])
            wanted = []
            if len(tried) < most and best == tried[-1]:
                wanted = [float(f"{best * best / tried[-2]:.6g}")]
            elif len(tried) < most and best == tried[0]:
                wanted = [float(f"{best * best / tried[1]:.6g}")]
        return best

    def _score(self, arm: str, rate: float, cases: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> float:
        """Return the Dice on held-out cases at one learning rate, 0 if the loss was not finite."""
        from ..studies.execution import note

        folder = self.folder / "rates" / arm.replace(" ", "_") / f"{rate:g}"
        datalist = self.datalist(folder / "datalist.json", training=cases, validation=held)
        try:
            self.fine_tune(folder, 0, arm, datalist=datalist, lr=rate, seed=0, val_iterations=20, val_interval=10**6)
            score = float(json.loads((folder / "history.json").read_text("utf-8"))[-1].get("val_dice", 0.0))
        except Exception as error:
            if "not finite" not in note(folder / "log.txt", error):
                raise
            score = 0.0  # it came apart
        shutil.rmtree(folder / "models", ignore_errors=True)
        return score if score == score else 0.0

    def measure(self, run: Run) -> None:
        """Fine-tune, predict the unseen fold and score it; leaves result.json."""
        from common.tables import read_table

        folder = self.folder / run.name
        result = folder / "result.json"
        if result.exists():
            return
        cases, unseen = self.subset(run.fold, run.cases, run.seed), self.folds[run.fold]["validation"]
        datalist = self.datalist(folder / "datalist.json", training=cases, validation=cases[:1], test=unseen)
        began = time.monotonic()
        rate = self.rates[run.arm]
        self.fine_tune(folder, run.fold, run.arm, datalist=datalist, lr=rate, seed=run.seed, val_iterations=0)
        seconds = time.monotonic() - began
        self.run(
            "inference",
            folder / "log.txt",
            told={k: v for k, v in self.settings.items() if k in ("num_workers", "device", "amp", "channels")},
            datalist=datalist,
            model=str(folder / "models" / "model_final.pt"),
            output_dir=str(folder / "predictions"),
            overwrite=True,
            pictures=0,
            tiles_per_step=4,  # on a CPU several small tiles at once are several times faster than one by one
            strict=True,
        )
        self.run(
            "evaluate",
            folder / "log.txt",
            datalist=self.datalist(folder / "unseen.json", validation=unseen),
            split="validation",
            labels=self.labels,
            predictions=str(folder / "predictions"),
            output_dir=str(folder),
            resamples=0,
            strict=True,
        )
        rows = [(row["case"], row["class"], row["dice"]) for _, row in read_table(folder / "scores.csv", exact=True)]
        scores: dict[str, dict[str, float]] = {}
        for case, name, dice in rows:
            if dice not in ("", "nan"):
                scores.setdefault(case, {})[name] = float(dice)
        loss = json.loads((folder / "history.json").read_text("utf-8"))[-1]["train_loss"]
        content = {"seconds": round(seconds, 1), "lr": rate, "train_loss": loss, "dice": scores}
        temporary = result.with_suffix(".part")
        temporary.write_text(json.dumps(content), "utf-8")
        os.replace(temporary, result)
        for name in ("models", "predictions"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _folds(
    data: str, folder: Path, *, folds: int, group: str | None, groups: str | None, splits: str | None, channels: int
) -> list[dict[str, list[dict[str, Any]]]]:
    """Return the parts of every fold, as lists of cases."""
    from common.data import labelled_lists, split_cases
    from common.data.cases import case_name

    if data == "mni":
        from ..preparing.template import write_template_data

        if not (folder / "mni" / "datalist.json").exists():
            write_template_data(folder / "mni", train=16, validation=0, test=4)
        lists = json.loads((folder / "mni" / "datalist.json").read_text("utf-8"))
        where = {
            name: [{k: str(folder / "mni" / v) for k, v in case.items()} for case in lists[name]] for name in lists
        }
        return [{"training": where["training"], "validation": where["test"]}]
    place = ("", data) if data.endswith(".json") else (data, None)
    cases = labelled_lists(*place, channels=channels, groups=groups, fold="all")["training"]
    if group:
        names = {case_name(case): str(case.get(group, "unknown")) for case in cases}
        (folder / "groups.json").write_text(json.dumps(names, indent=1), "utf-8")
    if splits:
        count = len(json.loads(Path(splits).read_text("utf-8")))
        return [split_cases(cases, splits=splits, fold=fold) for fold in range(count)]
    return [split_cases(cases, fold=fold, folds=folds, group=group) for fold in range(folds)]


def _counts(cases: Sequence[int | str], folds: Sequence[Mapping[str, Sequence[Any]]]) -> list[int]:
    """Return the numbers of cases to train on."""
    most = min(len(fold["training"]) for fold in folds)
    counts = sorted({most if count == "all" else int(count) for count in cases})
    wrong = [count for count in counts if count > most]
    if wrong:
        raise SystemExit(f"Stopped: --cases names {wrong[0]}, but a fold has {most} cases to train on")
    return counts


def label_curve(given: LabelCurve) -> None:
    """Measure the curve and draw it."""
    bundle, cases, seeds, folds, group, small = (
        *(given.bundle, given.cases, given.seeds, given.folds, given.group, given.small),
    )
    settings, rates = given.settings, list(given.rates)
    folder = given.output.absolute() if given.output else ROOT / "label_curve" / bundle
    data = "mni" if given.data == "mni" else str(Path(given.data).absolute())
    pretrained, splits, groups = (
        None if path is None else str(path.absolute()) for path in (given.pretrained, given.splits, given.groups)
    )
    labels: Any = list(given.labels) if isinstance(given.labels, tuple) else given.labels
    import torch
    from tqdm import tqdm

    from common.errors import DataError, SettingsError

    from ..studies.contents import contents_of
    from ..studies.execution import note

    backbone = "resenc_l" if bundle.endswith("resenc_l") else "primus_m"
    if small if small is not None else not torch.cuda.is_available():
        if data == "mni":
            settings = {"spacing_mm": 2.0, **settings}
        pretraining = {**_SMALL_PRETRAINING, "lr": _SMALL_RATES[backbone]["pretrain"]}
        settings = {**_SMALL[backbone], **_SMALL_RUN, "lr": _SMALL_RATES[backbone]["train"], **settings}
    else:
        from common.bundles import read_config

        read = read_config(ROOT / "bundles" / bundle / "configs" / "pretrain.yaml")
        pretraining = {"lr": read["lr"]}
    pretraining |= {
        name.removeprefix("pretrain_"): settings.pop(name) for name in [*settings] if name[:9] == "pretrain_"
    }
    if "epochs" in pretraining:
        pretraining.setdefault("warmup_epochs", int(pretraining["epochs"]) // 10)
    base = settings.pop("lr", None)
    asked = {
        "bundle": bundle,
        "data": data,
        "labels": labels,
        "folds": folds,
        "pretrained": pretrained,
        "splits": splits,
        "groups": groups,
        "group": group,
        "rates": rates,
        "settings": settings,
        "pretraining": pretraining,
        "lr": base,
    }
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "settings.json"
    before = json.loads(marker.read_text("utf-8")) if marker.exists() else None
    contents = before.pop("contents", None) if before else None
    if before not in (None, json.loads(json.dumps(asked))):
        raise SystemExit(f"Stopped: {folder} holds a curve of other settings; give another --output")
    os.chdir(ROOT)
    logging.getLogger("monai").setLevel(logging.WARNING)
    try:
        parts = _folds(
            data,
            folder,
            folds=folds,
            group=group,
            groups=groups,
            splits=splits,
            channels=int(settings.get("channels", 1)),
        )
    except (DataError, SettingsError) as error:
        raise SystemExit(f"Stopped: {error}") from error
    found = contents_of([case for part in parts for cases in part.values() for case in cases], folder)
    if contents not in (None, found):
        raise SystemExit(f"Stopped: {folder} holds a curve of other images or labels; give another --output")
    if before and contents is None:
        print(f"note: nothing tells of which files the runs in {folder} are, which an earlier version made")
    marker.write_text(json.dumps(asked | {"contents": found}, indent=1), "utf-8")
    if labels is None:
        if data == "mni":
            from ..preparing.template import LABELS

            labels = LABELS
        else:
            raise SystemExit("Stopped: name the classes: --labels \"['background','lesion']\", or a dataset.json")
    counts = _counts(cases, parts)
    curve = Curve(
        bundle,
        folder,
        folds=parts,
        labels=labels,
        settings=settings,
        pretraining=pretraining,
        pretrained=pretrained,
    )
    plan = [
        Run(fold, count, seed, arm)
        for count in counts
        for seed in range(seeds)
        for fold in range(len(parts))
        for arm in ARMS
    ]
    failed: dict[str, str] = {}
    with tqdm(total=len(ARMS) * len(rates) + len(plan), desc="label curve", unit="run") as bar:
        for arm in ARMS:
            start = base if base is not None else _published_rate(bundle, arm)
            bar.set_postfix_str(f"rates, {arm}")
            try:
                curve.rates[arm] = curve.tune(arm, rates, counts[len(counts) // 2], start)
            except Exception as error:
                why = note(folder / "log.txt", error)
                raise SystemExit(f"Stopped: {why}; the log is {folder / 'log.txt'}") from error
            bar.update(len(rates))
        for run in plan:
            bar.set_postfix_str(f"{run.cases} cases, {run.arm}")
            try:
                curve.measure(run)
            except Exception as error:
                failed[run.name] = note(folder / run.name / "log.txt", error)
            bar.update()
    from .curve_report import write_curve

    write_curve(folder, plan=[(r.fold, r.cases, r.seed, r.arm, r.name) for r in plan], rates=curve.rates, asked=asked)
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    if failed:
        raise SystemExit(f"Stopped: {len(failed)} of {len(plan)} runs failed; their logs are in {folder}")


def _published_rate(bundle: str, arm: str) -> float:
    """Return the learning rate of the bundle's recipe."""
    from monai.bundle import ConfigParser

    from common.bundles import read_config

    parser = ConfigParser(read_config(ROOT / "bundles" / bundle / "configs" / "train.yaml"))
    parser["from_scratch"] = arm == "from scratch"
    return float(parser.get_parsed_content("lr"))
