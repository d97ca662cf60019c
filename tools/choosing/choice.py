# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One question: which of some encoders for some cases; asked by probes, and by a study of short fine-tunings."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.data import preprocessing_settings
from common.engines.probing import compare_probes
from common.errors import DataError, SettingsError, WeightsError, causes, sentence
from common.files import write_json, write_record
from common.literals import as_data
from common.settings import unknown_settings
from common.terminal import progress_bar
from common.weights.receipt import SPACING_CAVEAT, spacing_warning
from common.weights.transfer import origin_receipt

from ..commanding.environment import ROOT
from ..reporting.comparison import compare, interval, resampled, score
from ..reporting.plain import plain_rows_of
from ..studies.definition import MEAN, OWN, PLAIN, PLAIN_ROWS, bundle_config, plain_name
from ..studies.execution import check_results
from ..studies.plain import NAMES
from ..studies.reading import read_study, study_from, write_yaml
from ..studies.results import blocks_of, every_run, read_json, read_results, shared_runs
from ..studies.scheduling import places, run_pieces
from .candidates import backbone_of
from .data import Data
from .probes import (
    NETWORK_SETTINGS,
    Encoder,
    Rules,
    check_classes,
    paired_difference,
    probe_cases,
    probe_encoder,
    probe_mean,
)
from .verdicts import Difference

__all__ = ["Choice", "check_settings"]

_STUDY = "data"  # name of the data set in the study


def _known(bundle: str, *configs: str) -> set[str]:
    return {name for config in configs for name in bundle_config(bundle, config)}


def check_settings(settings: Mapping[str, Any], bundles: Sequence[str], train: str) -> None:
    """Refuse a setting that no config of any of these bundles knows, or that is decided here."""
    if taken := next((name for name in settings if name in OWN), None):
        raise SettingsError(
            f"--{taken} is no setting here: cases come from --data (a folder or a datalist), encoders from --bundles "
            "and --weights, and scratch is always compared with; leave it out"
        )
    told = unknown_settings(settings, set().union(*(_known(bundle, "features", train) for bundle in bundles)))
    if told:
        raise SettingsError(told)


def _in_numbers(settings: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """Return settings for the probes, with what train configs find out by themselves: median spacing and CT windows."""
    told = dict(settings)
    if told.get("spacing_mm") == "pretrained":
        del told["spacing_mm"]  # as the probes do anyway
    schemes = told.get("normalization", "zscore")
    if data.kind == "segmentation" and (
        "ct" in ([schemes] if isinstance(schemes, str) else schemes) or told.get("spacing_mm") == "median"
    ):
        found = preprocessing_settings(
            data.cases,
            spacing_mm=told.get("spacing_mm", 1.0),
            normalization=schemes,
            channels=data.channels,
            reorient=told.get("reorient", True),
            ignore_label=data.task.ignore_label,
        )
        told |= {name: found[name] for name in ("spacing_mm", "normalization") if name in told}
    return told


class Choice:
    """One question: which of these encoders for these cases. Everything is in one folder."""

    def __init__(
        self, data: Data, candidates: Mapping[str, Encoder], folder: Path, *, settings: Mapping[str, Any], seed: int
    ) -> None:

        self.data, self.folder, self.seed = data, folder, seed
        self.settings = _in_numbers(settings, data)
        self.candidates = {
            name: replace(encoder, settings={**encoder.settings, **self.settings})
            for name, encoder in candidates.items()
        }
        self.left_out: dict[str, str] = {}
        self.far: list[str] = []
        self.warnings: list[str] = []
        self.receipts = {
            name: origin_receipt(encoder.weights) for name, encoder in self.candidates.items() if encoder.weights
        }
        theirs = {name: receipt.spacing_mm for name, receipt in self.receipts.items()}
        self.far = [name for name, spacing in theirs.items() if spacing_warning(spacing or 1.0, data.spacing_mm)]
        if self.far:
            own = " x ".join(f"{side:g}" for side in data.spacing_mm or [])
            self.warnings.append(
                f"Your files have {own} mm voxels (median), far from the pre-training spacing of "
                f"{', '.join(self.far)}. {SPACING_CAVEAT} Fine-tuning is therefore compared with that too."
            )

    @property
    def metric(self) -> str:
        """The score of the probes."""
        return "R2" if self.data.kind == "regression" else "AP"

    def has_to_beat(self, name: str) -> list[str]:
        """Return what the probe of an encoder has to beat: a random one of its backbone, of a number also the mean."""
        mean = [NAMES[MEAN]] if self.data.kind == "regression" else []
        return [f"random {backbone_of(self.candidates[name].bundle)}", *mean]

    def random_encoders(self) -> dict[str, Encoder]:
        """Return an untrained encoder of each backbone and size, as a baseline."""
        found: dict[str, Encoder] = {}
        for encoder in self.candidates.values():
            backbone = backbone_of(encoder.bundle)
            resolved = encoder.resolved()
            names = (*NETWORK_SETTINGS, "spacing_mm")
            own = {name: resolved[name] for name in names if name in resolved}
            found.setdefault(f"random {backbone}", Encoder(encoder.bundle, None, self.seed, {**self.settings, **own}))
        return found

    def place(self, name: str) -> Path:
        """Return the folder of one encoder."""
        return self.folder / "probes" / plain_name(name)

    def probe(self, *, folds: int, resamples: int) -> tuple[dict[str, dict[str, Any]], Any]:
        """Probe all encoders; one whose weights do not fit is left out.

        Returns:
            by name ``estimate``, ``interval`` and ``notes``; and a function of two names that compares them.

        Raises:
            WeightsError: if none fits.
            DataError: if a fold has no two classes to tell apart.
        """
        if self.data.kind == "segmentation":
            check_classes(self.data.cases, self.data.task, group=self.data.patient, folds=folds, seed=self.seed)
        encoders = {**self.candidates, **self.random_encoders()}
        found: dict[str, dict[str, Any]] = {}
        held: dict[str, Any] = {}
        names = list(self.data.task.names) if self.data.task else []
        groups = [str(case[self.data.patient]) for case in self.data.cases] if self.data.patient else None
        metric = self.metric
        rules = Rules(group=self.data.patient, folds=folds, resamples=resamples, seed=self.seed)
        with progress_bar(encoders.items(), desc="probing", unit="encoder") as bar:
            for name, encoder in bar:
                bar.set_postfix_str(name)
                place = self.place(name)
                try:
                    if self.data.kind == "segmentation":
                        result = probe_encoder(
                            encoder,
                            self.data.cases,
                            task=self.data.task,
                            folder=place,
                            rules=rules,
                            name=name,
                        )
                        held[name] = np.array(
                            [
                                [math.nan if row[key] is None else row[key] for key in names]
                                for row in result["cases"].values()
                            ]
                        )
                        found[name] = {key: result[key] for key in ("estimate", "interval", "notes", "settings")}
                    else:
                        told = probe_cases(
                            encoder,
                            self.data.cases,
                            target=str(self.data.target),
                            task=self.data.kind,
                            folder=place,
                            rules=rules,
                        )
                        held[name] = told
                        own = told.metrics["linear"][metric]
                        found[name] = {"estimate": own["estimate"], "interval": own["interval"], "notes": told.notes}
                except Exception as error:
                    if not any(isinstance(each, WeightsError) for each in causes(error)):
                        raise
                    self.left_out[name] = str(sentence(error))
                    tqdm.write(f"left out: {name}: {self.left_out[name]}")
        if not any(name in found for name in self.candidates):
            raise WeightsError(next(iter(self.left_out.values())))
        if self.data.kind == "regression":
            held[NAMES[MEAN]] = told = probe_mean(next(iter(held.values())).target, rules)
            own = told.metrics["linear"][metric]
            found[NAMES[MEAN]] = {"estimate": own["estimate"], "interval": own["interval"], "notes": []}

        def difference(first: str, second: str) -> Difference | None:
            if self.data.kind == "segmentation":
                gap = paired_difference(held[first], held[second], groups=groups, resamples=resamples, seed=self.seed)
            else:
                try:
                    gap = compare_probes(
                        held[first], held[second], metric=metric, resamples=min(resamples, 500), seed=self.seed
                    )
                except ValueError as error:
                    raise DataError(f"{first} and {second}: {error}; give files that all encoders can read") from error
            low, high = gap["interval"] or (math.nan, math.nan)
            return Difference(gap["estimate"], low, high).widened(gap["units"])

        return found, difference

    def study(
        self, chosen: Sequence[str], *, settings: Mapping[str, Any], seeds: int, folds: int, plain: bool = True
    ) -> Path:
        """Write the study that fine-tunes these and from scratch at equal budget, and return its file.

        With ``plain`` it has a small plain CNN and the mean of the training cases too; random encoders are probed.

        Raises:
            SettingsError: if its folder holds runs of other settings or cases; it is then left as it is.
        """
        arms, scratches = self._arms(chosen)
        card, entry = self._card()
        content: dict[str, Any] = {
            "name": "fine-tuning",
            "output": ".",
            "arms": {**arms, **scratches},
            "data_sets": {_STUDY: entry},
            "folds": folds,
            "seeds": [*range(seeds)],
            "backbones": self._backbones(arms, settings),
            "plain_rows": [PLAIN, MEAN] if plain else False,
        }
        if self.data.kind == "segmentation":
            content["inference"] = {"tiles_per_step": 4}
        place = self.folder / "fine-tuning"
        columns = ("image", "label", "name", "case", self.data.target, self.data.patient)
        entries = [{key: case[key] for key in columns if key and key in case} for case in self.data.cases]
        listed = json.loads(json.dumps({"training": entries}))

        def write(folder: Path) -> None:
            write_json(listed, folder / "cases.json")
            write_yaml(card, folder / "card.yaml")
            write_yaml(content, folder / "study.yaml")

        with tempfile.TemporaryDirectory() as trial:
            write(Path(trial))
            check_results(study_from(content, base=Path(trial), output=place))
        before = read_json(place / "cases.json")
        if before not in (None, listed) and any(place.glob("runs/**/run.json")):
            raise SettingsError(
                f"{place} holds fine-tunings of other cases, or with other labels; name another folder with --output"
            )
        write(place)
        return place / "study.yaml"

    @property
    def _config(self) -> str:
        return "train" if self.data.kind == "segmentation" else "train_classification"

    def _arms(self, chosen: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arms of encoders, and those from scratch that they are compared with."""
        arms: dict[str, Any] = {}
        scratches: dict[str, Any] = {}
        for name in chosen:
            encoder = self.candidates[name]
            resolved = encoder.resolved()
            known = _known(encoder.bundle, self._config)
            names = [key for key in (*NETWORK_SETTINGS, "spacing_mm") if key in resolved and key in known]
            own = {key: as_data(resolved[key]) for key in names}  # what is written beside weights is no command
            arms[name] = {"bundle": encoder.bundle, "weights": encoder.weights, "settings": own}
            backbone = backbone_of(encoder.bundle)
            scratch = {"bundle": encoder.bundle, "weights": "scratch"}
            scratches.setdefault(f"scratch {backbone}", {**scratch, "settings": own})
            if name in self.far:
                without = {key: value for key, value in own.items() if key != "spacing_mm"}
                scratches.setdefault(
                    f"scratch {backbone}, own spacing", {**scratch, "spacing": "median", "settings": without}
                )
        return arms, scratches

    def _backbones(self, arms: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of each backbone: those that a bundle of it knows."""
        known: dict[str, set[str]] = {}
        for arm in arms.values():
            known.setdefault(backbone_of(arm["bundle"]), set()).update(_known(arm["bundle"], self._config))
        return {
            backbone: {"settings": {key: value for key, value in settings.items() if key in names}}
            for backbone, names in known.items()
        }

    def _card(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the card of the data, and what a study says of them."""
        card: dict[str, Any] = {"name": "data", "task": self.data.kind}
        entry: dict[str, Any] = {"card": "card.yaml", "datalist": "cases.json", "channels": self.data.channels}
        if self.data.patient:
            entry["patient"] = self.data.patient
        if self.data.kind == "segmentation":
            card["labels"] = self.data.task.plain_labels
            if self.data.task.regions:
                card["regions"] = {key: list(values) for key, values in self.data.task.regions.items()}
            for name in ("ignore_label", "regions_class_order"):
                if (value := getattr(self.data.task, name)) is not None:
                    card[name] = value
        else:
            card["target"] = entry["target"] = self.data.target
        return card, entry

    def fine_tune(self, file: Path, *, gpus: str, jobs: int) -> tuple[dict[str, dict[str, Any]], Any, list[str]]:
        """Run the study.

        Returns:
            of every arm ``estimate``, ``interval``, how many ``runs`` are planned and ``finished``, whether it is
            ``complete``: all cases were unseen once, and whether it is a ``plain_row``, or which of them it
            ``has_to_beat``; a function that compares two complete arms; and what failed.
        """
        study = read_study(file, output=file.parent)
        write_record(study.as_plain(), study.folder / "study.json")
        before = Path.cwd()
        os.chdir(ROOT)
        try:
            failed = run_pieces(study, places(gpus, jobs))
        finally:
            os.chdir(before)
        told = [f"{name}: {why}" for name, why in failed.items()]
        block = next(iter(blocks_of(read_results(study.folder))), None)
        each = len(study.folds) * len(study.seeds)
        scores: dict[str, dict[str, Any]] = {
            arm: {"estimate": None, "interval": None, "runs": each, "finished": 0, "complete": False}
            for arm in dict.fromkeys(run.arm for run in study.runs())
        }
        about = {arm: found for arm, found in study.as_plain()["arms"].items() if arm in scores}
        for arm, found in about.items():
            plain = found["weights"] in PLAIN_ROWS
            scores[arm] |= {"plain_row": True} if plain else {"has_to_beat": plain_rows_of(about, arm)}
        if block is None:
            return scores, None, told
        for arm in block.arms:
            low, high = interval(resampled(block, arm)[:, 0])
            scores[arm] |= {
                "estimate": float(score(block, arm)[0]),
                "interval": None if math.isnan(low) else [low, high],
                "finished": int(every_run(block, arm).sum()),
                "complete": block.has(arm) and len(block.folds) == len(study.folds),
            }

        def difference(first: str, second: str) -> Difference | None:
            if shared_runs(block, first, second).sum(1).min() < min(len(study.seeds), 2):
                return None  # of other cases, or of one run each
            gap = compare(block, first, second)
            if gap is None:
                return None
            return Difference(float(gap["difference"][0]), float(gap["low"][0]), float(gap["high"][0]))

        return scores, difference, told
