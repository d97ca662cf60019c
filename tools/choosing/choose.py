# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Ask a few labelled cases which encoder suits them: probe all at hand, then fine-tune the best shortly."""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commanding.commands import whole
from ..commanding.environment import ROOT

if TYPE_CHECKING:
    from common.data.cases import Case

    from .probes import Encoder
    from .verdicts import Difference, Verdict

__all__ = ["choose"]

CASES = 40  # labelled cases that segmentation is probed and fine-tuned on
_SHORT = {"epochs": 20}
_SHORTER = {"epochs": 10, "iterations_per_epoch": 25, "num_workers": 0}  # without a GPU
_PATCH = {"segmentation": {"patch_size": [64, 64, 64]}, "classification": {"input_size": [64, 64, 64]}}
_COLOURS = {"resenc_l": "#0077bb", "primus_m": "#cc6677", None: "#888888"}
_LEAST_RESAMPLES = 100  # fewer have no 95 %
_STUDY = "data"  # name of the data set in the study


def _words(value: Any) -> list[str]:
    """Return the parts of what the command line gives: a text with commas, or what it made of it."""
    if value is None:
        return []
    listed = [value] if isinstance(value, (str, int, float)) else list(value)
    return [part.strip() for word in listed for part in str(word).split(",") if part.strip()]


def backbone_of(bundle: str) -> str:
    """Return resenc_l or primus_m."""
    from ..studies.definition import cell_of

    return cell_of(bundle)[1]


def find_candidates(bundles: Any = None, weights: Any = None) -> dict[str, Encoder]:
    """Return the encoders to ask, by name.

    Args:
        bundles: whose own weights are asked; None for all that have some, none for none.
        weights: NAME=PATH, with commas.

    Raises:
        SettingsError: if a bundle is unknown, or a name is given twice.
        WeightsError: if a bundle that was named has no weights, a file is missing, or there is nothing to ask.
    """
    from common.errors import SettingsError, WeightsError

    from ..studies.definition import plain_name
    from .probes import Encoder

    own = {
        path.parent.parent.name: path.parent.parent / "models" / "pretrained_encoder.pt"
        for path in sorted(ROOT.glob("bundles/*/configs/features.yaml"))
    }
    named = _words(bundles)
    found: dict[str, Encoder] = {}
    for bundle in own if not named else [name for name in named if name != "none"]:
        if bundle not in own:
            raise SettingsError(f"--bundles names {bundle!r}; choose from {', '.join(own)}")
        if own[bundle].is_file():
            found[bundle] = Encoder(bundle, str(own[bundle]))
        elif named:
            raise WeightsError(
                f"{bundle} has no weights {own[bundle]}; fetch or translate them with tools/import_checkpoint.py, "
                f"pre-train with its pretrain config, or name a file: --weights {bundle}=FILE"
            )
    files: dict[str, Encoder] = {}
    for entry in _words(weights):
        name, equals, path = entry.partition("=")
        bundle = name.split("/")[0]
        if not equals or bundle not in own:
            raise SettingsError(
                f"--weights has {entry!r}; write NAME=PATH with commas, where NAME is a bundle, or one with a name of "
                f"yours as in mae_resenc_l/mine=encoder.pt; bundles are {', '.join(own)}"
            )
        file = Path(path).expanduser().absolute()
        if not file.is_file():
            raise WeightsError(f"--weights names {file} for {name}, which does not exist; correct the path")
        if twice := next((other for other in files if plain_name(other) == plain_name(name)), None):
            raise SettingsError(
                f"--weights names {name} twice; write {bundle}/other={path} for one of them"
                if twice == name
                else f"--weights names {twice} and {name}, which would share a folder; rename one"
            )
        files[name] = Encoder(bundle, str(file))
    found |= files
    if not found:
        raise WeightsError(
            "there are no pre-trained encoders to choose from: no bundle has models/pretrained_encoder.pt; fetch the "
            "published ones with tools/import_checkpoint.py, or name a file: --weights mae_resenc_l=FILE"
        )
    return found


@dataclass
class Data:
    """Labelled cases of the user."""

    kind: str  # segmentation or classification
    cases: list[Case]
    labels: Any = None
    task: Any = None
    target: str | None = None
    group: str | None = None
    channels: int = 1
    spacing_mm: list[float] | None = None

    @property
    def units(self) -> int:
        """How many cases, or groups of cases."""
        return len({str(case[self.group]) for case in self.cases}) if self.group else len(self.cases)


def read_data(
    data: str,
    *,
    labels: Any,
    table: str | None,
    target: str | None,
    groups: str | None,
    group: str | None,
    channels: int,
    most: int | None,
    seed: int,
) -> Data:
    """Read and check the labelled cases.

    Raises:
        DataError: if they cannot be read, or are too few.
        SettingsError: if the labels are not said.
    """
    from common.data import labelled_lists, segmentation_task
    from common.data.checking.checks import usable_cases
    from common.data.listing.classified import classified_cases
    from common.errors import DataError, SettingsError

    if table is not None or target is not None:
        if not (table and target):
            raise SettingsError("classification needs both: --table FILE.csv with the classes and --target COLUMN")
        cases = classified_cases(data, table=table, channels=channels)["training"]
        for column in (target, group):
            if column and cases and column not in cases[0]:
                raise DataError(f"{table} has no column {column!r}; correct --target or --group")
        found = Data("classification", cases, target=target, group=group, channels=channels)
    else:
        beside = Path(data) / "dataset.json"
        if labels is None and beside.is_file():
            labels = str(beside)
        if labels is None:
            raise SettingsError(
                "name the classes, background first: --labels \"['background','lesion']\", or the path of a "
                "dataset.json; for classification give --table and --target"
            )
        task = segmentation_task(labels)
        place = ("", data) if data.endswith(".json") else (data, None)
        cases = labelled_lists(*place, channels=channels, groups=groups, fold="all")["training"]
        found = Data("segmentation", cases, labels=labels, task=task, group=group, channels=channels)
    if group:
        lacking = [case for case in found.cases if not str(case.get(group, ""))]
        if lacking:
            raise DataError(f"{lacking[0]['image']} has no {group!r}; add it to the table, or drop --group")
    if most is not None and len(found.cases) > most:
        kept = set(random.Random(seed).sample(range(len(found.cases)), most))
        print(f"{most} of {len(found.cases)} labelled cases are used; --cases takes more")
        found.cases = [case for index, case in enumerate(found.cases) if index in kept]
    found.cases = usable_cases(found.cases, task=found.task, channels=channels)
    if found.units < 2:
        what = f"group ({group})" if group else "labelled case"
        raise DataError(
            f"{data} has {found.units} usable {what}; what is learned from one cannot be judged on it: give at least "
            "2, better 20"
        )
    found.spacing_mm = _own_spacing(found.cases)
    return found


def _own_spacing(cases: Sequence[Case]) -> list[float]:
    """Return the median spacing of the files, ``(slice, row, column)``."""
    import numpy as np

    from common.data.cases import images_of
    from common.transforms import read_header

    sides = [read_header(images_of(case)[0]).spacing_mm[:3][::-1] for case in cases]
    return [round(float(side), 4) for side in np.median(np.array(sides), axis=0)]


def _write_yaml(content: Mapping[str, Any], path: Path) -> None:
    import yaml

    from common.files import replace_file

    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True)
    replace_file(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))


def _known(bundle: str, *configs: str) -> set[str]:
    from ..studies.definition import bundle_config

    return {name for config in configs for name in bundle_config(bundle, config)}


def _check_settings(settings: Mapping[str, Any], bundles: Sequence[str], train: str) -> None:
    """Refuse a setting that no config of any of these bundles knows, or that is decided here."""
    from common.errors import SettingsError
    from common.settings import unknown_settings

    from ..studies.definition import OWN

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
    from common.data import preprocessing_settings

    told = dict(settings)
    if told.get("spacing_mm") == "pretrained":
        del told["spacing_mm"]  # as the probes do anyway
    schemes = told.get("normalization", "zscore")
    if data.kind == "segmentation" and ("ct" in _words(schemes) or told.get("spacing_mm") == "median"):
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


def _check_folder(folder: Path, source: str) -> None:
    """Refuse to write over the answer for other data."""
    from common.errors import SettingsError

    from ..studies.results import read_json

    before = (read_json(folder / "choose.json") or {}).get("data", source)
    if before != source:
        raise SettingsError(
            f"{folder} holds the answer for {before}, not for {source}; name another folder with --output"
        )


class Choice:
    """One question: which of these encoders for these cases. Everything is in one folder."""

    def __init__(
        self, data: Data, candidates: Mapping[str, Encoder], folder: Path, *, settings: Mapping[str, Any], seed: int
    ) -> None:
        from common.weights.receipt import SPACING_CAVEAT, spacing_warning
        from common.weights.transfer import origin_receipt

        self.data, self.folder, self.seed = data, folder, seed
        self.settings = _in_numbers(settings, data)
        self.candidates = {
            name: replace(encoder, settings={**encoder.settings, **self.settings})
            for name, encoder in candidates.items()
        }
        self.left_out: dict[str, str] = {}
        self.far: list[str] = []
        self.warnings: list[str] = []
        theirs = {
            name: origin_receipt(encoder.weights).spacing_mm
            for name, encoder in self.candidates.items()
            if encoder.weights
        }
        self.far = [name for name, spacing in theirs.items() if spacing_warning(spacing or 1.0, data.spacing_mm)]
        if self.far:
            own = " x ".join(f"{side:g}" for side in data.spacing_mm or [])
            self.warnings.append(
                f"Your files have {own} mm voxels (median), far from the pre-training spacing of "
                f"{', '.join(self.far)}. {SPACING_CAVEAT} Fine-tuning is therefore compared with that too."
            )

    def random_encoders(self) -> dict[str, Encoder]:
        """Return an untrained encoder of each backbone and size, as a baseline."""
        from .probes import NETWORK_SETTINGS, Encoder

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
        from ..studies.definition import plain_name

        return self.folder / "probes" / plain_name(name)

    def probe(self, *, folds: int, resamples: int) -> tuple[dict[str, dict[str, Any]], Any]:
        """Probe all encoders; one whose weights do not fit is left out.

        Returns:
            by name ``estimate``, ``interval`` and ``notes``; and a function of two names that compares them.

        Raises:
            WeightsError: if none fits.
            DataError: if a fold has no two classes to tell apart.
        """
        import numpy as np
        from tqdm import tqdm

        from common.engines.probing import compare_probes
        from common.errors import DataError, WeightsError, causes, sentence

        from .probes import check_classes, paired_difference, probe_cases, probe_encoder
        from .verdicts import Difference

        if self.data.kind == "segmentation":
            check_classes(self.data.cases, self.data.task, group=self.data.group, folds=folds, seed=self.seed)
        encoders = {**self.candidates, **self.random_encoders()}
        found: dict[str, dict[str, Any]] = {}
        held: dict[str, Any] = {}
        names = list(self.data.task.names) if self.data.task else []
        groups = [str(case[self.data.group]) for case in self.data.cases] if self.data.group else None
        metric = "AP"
        with tqdm(encoders.items(), desc="probing", unit="encoder") as bar:
            for name, encoder in bar:
                bar.set_postfix_str(name)
                common: dict[str, Any] = {
                    "folder": self.place(name),
                    "group": self.data.group,
                    "folds": folds,
                    "resamples": resamples,
                    "seed": self.seed,
                }
                try:
                    if self.data.kind == "segmentation":
                        result = probe_encoder(encoder, self.data.cases, task=self.data.task, name=name, **common)
                        held[name] = np.array(
                            [
                                [math.nan if row[key] is None else row[key] for key in names]
                                for row in result["cases"].values()
                            ]
                        )
                        found[name] = {key: result[key] for key in ("estimate", "interval", "notes", "settings")}
                    else:
                        told = probe_cases(encoder, self.data.cases, target=str(self.data.target), **common)
                        held[name] = told
                        metric = "AP" if told.target.classes else "R2"
                        own = told.metrics["linear"][metric]
                        found[name] = {"estimate": own["estimate"], "interval": own["interval"], "notes": told.notes}
                except Exception as error:
                    if not any(isinstance(each, WeightsError) for each in causes(error)):
                        raise
                    self.left_out[name] = str(sentence(error))
                    tqdm.write(f"left out: {name}: {self.left_out[name]}")
        if not any(name in found for name in self.candidates):
            raise WeightsError(next(iter(self.left_out.values())))
        self.metric = metric

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

    def study(self, chosen: Sequence[str], *, settings: Mapping[str, Any], seeds: int, folds: int) -> Path:
        """Write the study that fine-tunes these and from scratch at equal budget, and return its file.

        Raises:
            SettingsError: if its folder holds runs of other settings or cases; it is then left as it is.
        """
        from common.errors import SettingsError
        from common.files import write_json
        from common.literals import as_data

        from ..studies.execution import check_results
        from ..studies.reading import study_from
        from ..studies.results import read_json
        from .probes import NETWORK_SETTINGS

        config = "train" if self.data.kind == "segmentation" else "train_classification"
        arms: dict[str, Any] = {}
        scratches: dict[str, Any] = {}
        for name in chosen:
            encoder = self.candidates[name]
            resolved = encoder.resolved()
            known = _known(encoder.bundle, config)
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
        backbones = {
            backbone: {
                "settings": {
                    key: value
                    for key, value in settings.items()
                    if any(
                        key in _known(arm["bundle"], config)
                        for arm in arms.values()
                        if backbone_of(arm["bundle"]) == backbone
                    )
                }
            }
            for backbone in {backbone_of(arm["bundle"]) for arm in arms.values()}
        }
        place = self.folder / "fine-tuning"
        columns = ("image", "label", "name", "case", self.data.target, self.data.group)
        entries = [{key: case[key] for key in columns if key and key in case} for case in self.data.cases]
        listed = json.loads(json.dumps({"training": entries}))
        card: dict[str, Any] = {"name": "data", "task": self.data.kind}
        entry: dict[str, Any] = {"card": "card.yaml", "datalist": "cases.json", "channels": self.data.channels}
        if self.data.group:
            entry["group"] = self.data.group
        if self.data.kind == "segmentation":
            card["labels"] = self.data.task.plain_labels
            if self.data.task.regions:
                card["regions"] = {key: list(values) for key, values in self.data.task.regions.items()}
            for name in ("ignore_label", "regions_class_order"):
                if (value := getattr(self.data.task, name)) is not None:
                    card[name] = value
        else:
            card["target"] = entry["target"] = self.data.target
        content: dict[str, Any] = {
            "name": "fine-tuning",
            "output": ".",
            "arms": {**arms, **scratches},
            "data_sets": {_STUDY: entry},
            "folds": folds,
            "seeds": [*range(seeds)],
            "backbones": backbones,
        }
        if self.data.kind == "segmentation":
            content["inference"] = {"tiles_per_step": 4}

        def write(folder: Path) -> None:
            write_json(listed, folder / "cases.json")
            _write_yaml(card, folder / "card.yaml")
            _write_yaml(content, folder / "study.yaml")

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

    def fine_tune(self, file: Path, *, gpus: str, jobs: int) -> tuple[dict[str, dict[str, Any]], Any, list[str]]:
        """Run the study.

        Returns:
            of every arm ``estimate``, ``interval``, how many ``runs`` are planned and ``finished``, and whether it is
            ``complete``: all cases were unseen once; a function that compares two complete arms; and what failed.
        """
        from common.files import write_json

        from ..reporting.comparison import compare, interval, resampled, score
        from ..studies.reading import read_study
        from ..studies.results import blocks_of, every_run, read_results, shared_runs
        from ..studies.scheduling import places, run_pieces
        from .verdicts import Difference

        study = read_study(file, output=file.parent)
        write_json(study.as_plain(), study.folder / "study.json")
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
            for arm in study.arms
        }
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
            found = Difference(float(gap["difference"][0]), float(gap["low"][0]), float(gap["high"][0]))
            return found.widened(self.data.units)

        return scores, difference, told


def choose(
    data: str,
    labels: Any = None,
    bundles: Any = None,
    weights: Any = None,
    best: int = 2,
    table: str | None = None,
    target: str | None = None,
    groups: str | None = None,
    group: str | None = None,
    cases: int | None = None,
    channels: int = 1,
    folds: int = 5,
    tuning_folds: int = 2,
    seeds: int = 3,
    seed: int = 0,
    resamples: int = 2000,
    gpus: str = "",
    jobs: int = 0,
    output: str | None = None,
    **settings: Any,
) -> None:
    """Rank the encoders at hand for one's own task, and recommend one, or say that it is too close to call.

    Args:
        data: folder of labelled cases as train.yaml reads them, or a datalist; for classification one of images.
        labels: class names, background first, or the path of a dataset.json.
        bundles: whose own weights are asked, with commas; default all that have some; none for none.
        weights: NAME=PATH of further encoders, with commas.
        best: how many go on from the probes to fine-tuning; 0 ends after the probes.
        table: CSV with a column case and the target, for classification.
        target: its column.
        groups: CSV with a column case and further columns.
        group: column whose values are never torn apart, such as the patient.
        cases: labelled cases to use at most, drawn at random; default 40 in segmentation, all in classification.
        channels: images of a case.
        folds: of the probes.
        tuning_folds: of fine-tuning; every case is unseen in one.
        seeds: of every fine-tuning; for a recommendation at least 2.
        seed: of everything random here.
        resamples: of the bootstrap, at least 100.
        gpus: to fine-tune on, numbers with commas; all by default.
        jobs: fine-tunings at a time on each GPU, or on the CPU.
        output: where everything goes; default choose/<name of the data>. The answer for other data is never replaced.
        settings: of the bundles' configs.
    """
    import torch

    from common.errors import end_in_a_sentence
    from common.files import write_json

    from ..studies.scheduling import places
    from .verdicts import judge

    end_in_a_sentence()
    for name, value, least in (
        *(("best", best, 0), ("seeds", seeds, 1), ("seed", seed, 0), ("jobs", jobs, 0), ("channels", channels, 1)),
        *(("folds", folds, 2), ("tuning_folds", tuning_folds, 2), ("resamples", resamples, _LEAST_RESAMPLES)),
        *([] if cases is None else [("cases", cases, 2)]),
    ):
        whole(name, value, least=least)
    if best:
        places(gpus, jobs)  # a GPU that is not there is told now, not after the probes
    candidates = find_candidates(bundles, weights)
    source = str(Path(str(data)).expanduser().absolute())
    if isinstance(labels, str) and labels.endswith(".json"):
        labels = str(Path(labels).expanduser().absolute())
    table, groups = (path and str(Path(str(path)).expanduser().absolute()) for path in (table, groups))
    folder = Path(str(output)).expanduser().absolute() if output else ROOT / "choose" / Path(source).stem
    _check_folder(folder, source)
    most = cases if cases is not None else None if table else CASES
    train = "train_classification" if table else "train"
    _check_settings(settings, [encoder.bundle for encoder in candidates.values()], train)
    read = read_data(
        source,
        labels=labels,
        table=table,
        target=target,
        groups=groups,
        group=group,
        channels=channels,
        most=most,
        seed=seed,
    )
    given = {**settings, "channels": channels}
    choice = Choice(read, candidates, folder, settings=given, seed=seed)
    for warning in choice.warnings:
        print(f"warning: {warning}")
    probes, difference = choice.probe(folds=folds, resamples=resamples)
    pretrained = {name: found["estimate"] for name, found in probes.items() if name in candidates}
    ranked = sorted(pretrained, key=lambda name: -pretrained[name])
    compared = {name: difference(name, f"random {backbone_of(candidates[name].bundle)}") for name in ranked}
    what = "average precision of the probe" if choice.metric == "AP" else "R2 of the probe"
    verdict = judge(pretrained, difference, units=read.units, what=what)
    gap = compared[verdict.best]
    if gap is None or not gap.low > 0:
        told = "" if gap is None else f" ({gap})"
        verdict.sentences.append(f"Frozen, {verdict.best} is not shown to tell more than a random encoder{told}.")
    content: dict[str, Any] = {
        "data": source,
        "task": read.kind,
        "cases": len(read.cases),
        "units": read.units,
        "spacing_mm": read.spacing_mm,
        "metric": {"probe": choice.metric, "fine_tuning": "dice" if read.kind == "segmentation" else "ap"},
        "weights": {name: encoder.weights for name, encoder in candidates.items()},
        "settings": settings,
        "warnings": choice.warnings,
        "left_out": choice.left_out,
        "probes": {
            name: {
                **found,
                "over_random": _plain(compared.get(name)),
                "to_best": None if name == verdict.best else _plain(difference(verdict.best, name)),
            }
            for name, found in probes.items()
        },
        "fine_tuning": None,
        "verdict": {**vars(verdict), "by": "probes"},
    }
    tuned: dict[str, Any] = {}
    if best and choice.metric == "AP":
        short = _SHORT if torch.cuda.is_available() else {**_SHORTER, **_PATCH[read.kind]}
        used = {**short, **settings}
        file = choice.study(ranked[:best], settings=used, seeds=seeds, folds=min(tuning_folds, read.units))
        tuned, tuned_difference, failed = choice.fine_tune(file, gpus=gpus, jobs=jobs)
        content["fine_tuning"] = {"settings": used, "seeds": seeds, "arms": tuned, "failed": failed}
        complete = {name: found["estimate"] for name, found in tuned.items() if found["complete"]}
        if complete:
            verdict = judge(
                complete,
                tuned_difference,
                units=read.units,
                what="Dice" if read.kind == "segmentation" else "average precision",
                scratch=[name for name in tuned if name.startswith("scratch")],
                seeds=seeds,
            )
        if lacking := [name for name in tuned if name not in complete]:
            verdict.sentences.append(
                f"{'Not compared' if complete else 'No fine-tuning is compared'}, since not all of their unseen cases "
                f"are scored: {', '.join(lacking)}; the same command tries again what failed."
            )
        content["verdict"] = {**vars(verdict), "by": "fine-tuning" if complete else "probes"}
        for name, found in tuned.items():
            compared_too = name in complete and name != verdict.best
            found["to_best"] = _plain(tuned_difference(verdict.best, name)) if compared_too else None
    write_json(content, folder / "choose.json")
    _show(content, folder, candidates, verdict)


def _plain(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    interval = None if math.isnan(difference.low) else [difference.low, difference.high]
    return {"estimate": difference.estimate, "interval": interval}


def _show(content: Mapping[str, Any], folder: Path, candidates: Mapping[str, Encoder], verdict: Verdict) -> None:
    """Print the tables and the recommendation, and write choose.md and choose.png."""
    from common.files import replace_file

    from .verdicts import cell, draw, markdown_table

    probes, tuning = content["probes"], content["fine_tuning"]
    tuned = (tuning or {}).get("arms", {})

    def gap(found: Mapping[str, Any] | None) -> str:
        return cell(found["estimate"], found["interval"], sign=True) if found else ""

    def ranked(scores: Mapping[str, Any]) -> list[str]:
        return sorted(
            scores, key=lambda name: (not scores[name].get("complete", True), -(scores[name]["estimate"] or 0))
        )

    def tuned_row(name: str) -> list[str]:
        found = tuned[name]
        if found["complete"]:
            return [name, cell(found["estimate"], found["interval"]), gap(found["to_best"])]
        return [name, f"incomplete: {found['finished']} of {found['runs']} runs", ""]

    metric = {"AP": "average precision", "R2": "R2"}[content["metric"]["probe"]]
    lines = [
        "**Recommendation**, by " + content["verdict"]["by"] + ": " + " ".join(verdict.sentences),
        "",
        *[f"**Warning**: {warning}\n" for warning in content["warnings"]],
        markdown_table(
            ["frozen encoder", f"{metric} of the probe", "over a random one"],
            [
                [name, cell(found["estimate"], found["interval"]), gap(found["over_random"])]
                for name, found in ((name, probes[name]) for name in ranked(probes))
            ],
        ),
    ]
    score = {"dice": "Dice", "ap": "average precision"}[content["metric"]["fine_tuning"]]
    if tuned:
        lines += [
            "",
            markdown_table(
                ["fine-tuned shortly", score, "the best minus this"], [tuned_row(name) for name in ranked(tuned)]
            ),
        ]
    groups = "" if content["units"] == content["cases"] else f" of {content['units']} groups"
    lines += [
        "",
        f"{content['cases']} labelled cases{groups}; in brackets 95 % of a bootstrap over cases"
        + (", and over the runs of fine-tuning" if tuned and tuning["seeds"] > 1 else "")
        + "; differences are paired case by case, their intervals widened for few cases.",
    ]
    if tuning:
        told = ", ".join(f"{name} {value}" for name, value in tuning["settings"].items())
        lines += [
            "",
            f"Fine-tuning was short, the same for all: {told}; {tuning['seeds']} seed(s). A longer one may end in "
            "another order; probes of frozen encoders all the more.",
            *[f"\nFailed: {why}" for why in tuning["failed"]],
        ]
    notes = dict.fromkeys(note for found in probes.values() for note in found["notes"])
    lines += [f"\nNote: {note}" for note in notes]
    lines += [f"\nLeft out: {name}: {why}" for name, why in content["left_out"].items()]
    text = "\n".join(lines) + "\n"
    replace_file(folder / "choose.md", lambda temporary: Path(temporary).write_text(text, "utf-8"))

    def colour(name: str) -> str:
        bundle = candidates[name].bundle if name in candidates else None
        return _COLOURS[backbone_of(bundle) if bundle else None]

    draw(
        {
            f"frozen: {metric} of the probe": {
                name: (probes[name]["estimate"], probes[name]["interval"], colour(name)) for name in ranked(probes)
            },
            f"fine-tuned shortly: {score}": {
                name: (tuned[name]["estimate"], tuned[name]["interval"], colour(name))
                for name in ranked(tuned)
                if tuned[name]["complete"]
            },
        },
        folder / "choose.png",
    )
    print("\n" + text.replace("**", "") + f"\nwritten: {folder}/choose.json, choose.md, choose.png")
