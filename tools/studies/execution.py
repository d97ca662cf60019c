# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Do one piece of a study: pre-train an encoder for a fold, or fine-tune, predict and score.

Every step is a bundle's own config, run as ``monai.bundle run`` runs it, and written down beside what it made as one
complete JSON. A piece that was cut goes on where it was; one that another process works on is left to it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.data.cases import Case, case_name, images_of
from common.data.listing.members import group_columns
from common.errors import SettingsError, causes, sentence
from common.files import is_as_recorded, read_content, sha256, write_json, write_record
from common.literals import as_data
from common.paths import output_file
from common.tables import read_table

from .contents import contents_of, sizes_of
from .definition import (
    MEAN,
    NO_FILE,
    PRETRAINING,
    Arm,
    DataSet,
    Run,
    Study,
    bundle_config,
    digest,
    plain_name,
)
from .results import read_json

__all__ = [
    "FAILED",
    "RESULT",
    "check_results",
    "do",
    "logged",
    "machine",
    "note",
    "pieces",
    "pretraining_of",
    "run_config",
    "runs_by_piece",
    "state",
    "write_datalist",
]

RESULT, FAILED = "result.json", "failed.json"
_LOG, _STATE, _ENCODER = "log.txt", "pretraining_state.pt", "pretrained_encoder.pt"
_SCORES = ("dice", "nsd", "hd95_mm")


@contextmanager
def logged(log: Path) -> Iterator[None]:
    """Send all output to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        yield


def run_config(
    bundle: str,
    config: str,
    log: Path,
    *,
    told: Mapping[str, Any] | None = None,
    record: Path | None = None,
    added: Sequence[Path] = (),
    **data: Any,
) -> None:
    """Run a config of a bundle in this process, with those of the settings that it knows, and its output in a file.

    Args:
        bundle: name.
        config: train, inference, ...
        log: file that the output is added to.
        told: settings as somebody wrote them for the config, in which a text may be an expression.
        record: where the complete config is written; it can be run again with ``monai.bundle run``.
        added: further config files, which are no part of the record.
        data: further settings, which are what they are: names, paths and numbers; None is null.
    """
    from monai.bundle import ConfigParser, run

    file = f"bundles/{bundle}/configs/{config}.yaml"
    known = bundle_config(bundle, config)
    # MONAI drops an override that is None
    settings = {name: "$None" if value is None else value for name, value in (told or {}).items()}
    settings |= {name: as_data(value) for name, value in data.items()}
    chosen = {name: value for name, value in settings.items() if name in known}
    with logged(log):
        if record is not None:
            parser = ConfigParser(deepcopy(known))
            parser.update({"bundle_root": f"bundles/{bundle}", **deepcopy(chosen)})
            parser.resolve_macro_and_relative_ids()
            write_json(parser.get(), record)
        files = [file, *map(str, added)] if added else file
        run(config_file=files, bundle_root=f"bundles/{bundle}", logging_file=False, **chosen)


def write_datalist(path: Path, **parts: Sequence[Mapping[str, Any]]) -> str:
    """Write a datalist and return its path."""
    write_json({name: list(cases) for name, cases in parts.items()}, path)
    return str(path)


def note(log: Path, error: BaseException) -> str:
    """Add an error to a log and return its sentence."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as stream:
        traceback.print_exception(error, file=stream)
    *_, first = causes(error)  # MONAI wraps what a config ends with
    return sentence(error) or f"{type(first).__name__}: {first}"


def machine(device: Any = None) -> dict[str, Any]:
    """Return what this runs on, and when."""
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else str(where),
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "monai")},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_gib() -> float:
    """Return the most memory that this process has held: of its GPU if it used one, else of its own."""
    import torch

    from common.memory import peak_bytes

    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved() / 2**30
    return peak_bytes() / 2**30


def pretraining_of(study: Study, run: Run) -> str | None:
    """Return the name of the pre-training that a run starts from, None if it needs none of the study's own."""
    arm, data = study.arms[run.arm], study.pretraining_set(run)
    if arm.weights != PRETRAINING:
        return None
    which = digest([arm.bundle, study.pretraining_settings(arm, data)])[:8]
    own = f"{plain_name(data.name)}/{arm.bundle}_{which}/fold_{run.fold}"
    return f"{own}/seed_{run.seed}" if study.pretrain_each_seed else own


def pieces(study: Study, runs: Sequence[Run] | None = None) -> dict[str, list[str]]:
    """Return all pieces of a study, pre-trainings first, and those that each waits for."""
    runs = study.runs() if runs is None else runs
    needed = {_piece(run): pretraining_of(study, run) for run in runs}
    first = {f"pretraining/{name}": list[str]() for name in needed.values() if name}
    return first | {piece: [f"pretraining/{name}"] if name else [] for piece, name in needed.items()}


def _piece(run: Run) -> str:
    return f"runs/{run.name}"


def state(folder: Path) -> str:
    """Return finished, failed or missing; a result that cannot be read is missing."""
    if read_json(folder / RESULT) is not None:
        return "finished"
    return "failed" if (folder / FAILED).exists() else "missing"


def do(study: Study, piece: str) -> str:
    """Do one piece unless it is done.

    Args:
        study: that it is of.
        piece: a name from :func:`pieces`.

    Returns:
        finished, or elsewhere if another process works on it.

    Raises:
        SettingsError: if its folder holds a result of other settings.
        Exception: whatever the run ended with; its sentence is in failed.json.
    """
    folder = study.folder / piece
    folder.mkdir(parents=True, exist_ok=True)
    kind, run = runs_by_piece(study)[piece]
    about = _about(study, run, kind)
    try:
        with FileLock(folder / ".lock", timeout=0):
            check_same(folder, about)
            if state(folder) == "finished" and (kind != "pretraining" or is_as_recorded(folder / _ENCODER)):
                (folder / _STATE).unlink(missing_ok=True)  # of a process that was killed just before that
                return "finished"
            (folder / FAILED).unlink(missing_ok=True)
            write_record(about, folder / "run.json")
            try:
                content = (_pretrain if kind == "pretraining" else _measure)(study, run, folder)
            except BaseException as error:
                if isinstance(error, Exception):
                    told = note(folder / _LOG, error)
                    write_json({"why": told, "when": datetime.now(UTC).isoformat(timespec="seconds")}, folder / FAILED)
                raise
            write_record({**content, "machine": machine()}, folder / RESULT)
            (folder / _STATE).unlink(missing_ok=True)
            (folder / FAILED).unlink(missing_ok=True)
            return "finished"
    except Timeout:
        return "elsewhere"


def runs_by_piece(study: Study) -> dict[str, tuple[str, Run]]:
    """Return kind and run of every piece, of a pre-training one of the runs that need it."""
    found: dict[str, tuple[str, Run]] = {}
    for run in study.runs():
        if own := pretraining_of(study, run):
            found.setdefault(f"pretraining/{own}", ("pretraining", run))
        found[_piece(run)] = ("runs", run)
    return found


def check_results(study: Study) -> None:
    """Refuse a study whose folder holds results of other settings.

    Raises:
        SettingsError: naming the folders, and what differs.
    """
    told = []
    for piece, (kind, run) in runs_by_piece(study).items():
        if (study.folder / piece / "run.json").exists():
            try:
                check_same(study.folder / piece, _about(study, run, kind))
            except SettingsError as error:
                told.append(str(error))
    if told:
        raise SettingsError(told[0] + (f"; and {len(told) - 1} more folders" if told[1:] else ""))


def check_same(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse to mix a result with one of other settings.

    Raises:
        SettingsError: naming what differs.
    """
    file = folder / "run.json"
    made = ("models", "trained.json", RESULT, _STATE)
    if not file.exists() or not any((folder / name).exists() for name in made):
        return  # nothing was trained, so a mistake may be corrected
    content = read_json(file)
    if content is None:
        raise SettingsError(f"{file} cannot be read, so nothing tells what {folder} holds; remove that folder")
    before, now = (_flat(each) for each in (content, json.loads(json.dumps(about))))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if "contents" not in before and "contents" in changed:  # of an earlier version
        changed.remove("contents")
        print(f"note: {folder} tells its files by their sizes alone; if one was replaced since, remove that folder")
    if not changed:
        return
    raise SettingsError(
        f"{folder} was run with other {', '.join(changed)}; give the study another output, or remove "
        "that folder to run it again"
    )


def _flat(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested settings by their path: settings#lr."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{above}{name}#") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def _about(study: Study, run: Run, kind: str) -> dict[str, Any]:
    """Return what a piece is, for its folder: whatever changes its result."""
    arm = study.arms[run.arm]
    data = study.pretraining_set(run) if kind == "pretraining" else study.data_sets[run.data_set]
    part = data.parts[run.fold]
    unseen = sorted(case_name(case) for case in part["validation"])
    if kind == "pretraining":
        return {
            "bundle": arm.bundle,
            "data_set": data.name,
            "fold": run.fold,
            **_pretraining_seed(study, run),
            "settings": study.pretraining_settings(arm, data),
            "unseen": unseen,
            "files": sizes_of(part["training"]),
            "contents": contents_of(part["training"], study.folder),
        }
    task = {name: data.card.get(name) for name in ("regions", "ignore_label")}
    if order := data.card.get("regions_class_order"):
        task["regions_class_order"] = order
    if data.task == "regression":
        task["regression"] = True
    cases = [*study.training_cases(run), *part["validation"]]
    return {
        **asdict(run),
        "bundle": arm.bundle,
        "weights": arm.weights,
        "weights_sha256": _digest_of(arm),
        "pretraining": pretraining_of(study, run),
        "task": {**task, "target": data.target, "classes": data.classes, "group": data.group, **_patient(data)},
        "files": sizes_of(cases),
        "contents": contents_of(cases, study.folder),
        "settings": study.training_settings(arm, data),
        "inference": study.merged("inference", arm, data),
        "labels": data.labels,
        "training": sorted(case_name(case) for case in study.training_cases(run)),
        "unseen": unseen,
    }


_DIGESTS: dict[tuple[str, float], str] = {}


def _digest_of(arm: Arm) -> str | None:
    if arm.weights in NO_FILE:
        return None
    key = (arm.weights, os.stat(arm.weights).st_mtime)
    if key not in _DIGESTS:
        _DIGESTS[key] = sha256(arm.weights)
    return _DIGESTS[key]


def _pretrain(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Pre-train on the training images of a fold."""
    arm, data = study.arms[run.arm], study.pretraining_set(run)
    images = [{"image": file} for case in data.parts[run.fold]["training"] for file in images_of(case)]
    began = time.monotonic()
    run_config(
        arm.bundle,
        "pretrain",
        folder / _LOG,
        told=study.pretraining_settings(arm, data),
        record=folder / "pretrain.json",
        datalist=write_datalist(folder / "datalist.json", training=images),
        strict=True,
        store_dir=str(study.folder / "store"),
        output_dir=str(folder / "pretrain"),
        ckpt_dir=str(folder),
        resume=(folder / _STATE).exists(),  # without it, what an encoder there is of cannot be told
        **_pretraining_seed(study, run),
    )
    return {"seconds": {"training": time.monotonic() - began}, "peak_gib": round(peak_gib(), 2)}


def _pretraining_seed(study: Study, run: Run) -> dict[str, Any]:
    return {"seed": run.seed} if study.pretrain_each_seed else {}


def starting_weights(study: Study, run: Run) -> dict[str, Any]:
    """Return the settings of the train config that say where a run starts."""
    arm = study.arms[run.arm]
    own = pretraining_of(study, run)
    file = "" if arm.weights in NO_FILE else arm.weights
    if own:
        file = str(study.folder / "pretraining" / own / _ENCODER)
    return {"from_scratch": not file, "pretrained": file}


def _measure(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Fine-tune, predict the unseen cases and score them."""
    data = study.data_sets[run.data_set]
    cases, unseen = study.training_cases(run), data.parts[run.fold]["validation"]
    about = {"name": run.name, **asdict(run), "task": data.task}
    if study.arms[run.arm].weights == MEAN:
        return {"run": about, **_mean_of_training(data, cases, unseen), "seconds": {}, "train_loss": None}
    seconds: dict[str, float] = {}
    trained = folder / "trained.json"  # a run that was cut after its training goes on from there
    if trained.exists() and (folder / "models").is_dir():
        before = read_content(trained)
        seconds["training"], peak = before["seconds"], before["peak_gib"]
    else:
        with _timed(seconds, "training"):
            train(study, run, folder, cases, unseen)
        peak = peak_gib()
        write_json({"seconds": seconds["training"], "peak_gib": peak}, trained)
    with _timed(seconds, "inference"):
        predict(study, run, folder)
    with _timed(seconds, "evaluation"):
        content = _GATHER[data.task](study, run, folder, unseen)
    history = read_content(folder / "train" / "history.json")
    trained.unlink()
    if "models" not in study.keep:
        shutil.rmtree(folder / "models", ignore_errors=True)
    return {
        "run": about,
        **content,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_gib": round(max(peak, peak_gib()), 2),
        "train_loss": history[-1].get("train_loss"),
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def train(
    study: Study,
    run: Run,
    folder: Path,
    cases: Sequence[Case],
    unseen: Sequence[Case],
    **changes: Any,
) -> None:
    """Fine-tune on cases; the last epoch is the model, as published, so that nothing is chosen by the unseen ones."""
    arm, data = study.arms[run.arm], study.data_sets[run.data_set]
    own: dict[str, Any] = {"val_iterations": 0, "picture_interval": 0}
    settings: dict[str, Any] = {}
    if data.task != "segmentation":
        own["val_interval"] = 10**6
        settings = {"task": data.task, "target": data.target, "group": data.kept_together, **_patient(data)}
        if data.card.get("units"):
            settings["units"] = data.card["units"]
        if data.task == "classification" and not isinstance(data.target, list):
            settings["classes"] = data.classes
    else:
        settings["labels"] = data.labels
        told = ("regions", "ignore_label", "regions_class_order")
        settings |= {name: data.card[name] for name in told if data.card.get(name)}
    if data.channels != 1:
        settings["channels"] = data.channels
    known = bundle_config(arm.bundle, study.config_of(data, "train"))
    # said, so that arms do not differ by the crop and spacing with which their encoders were made
    own |= {name: known[name] for name in ("patch_size", "spacing_mm", "reorient") if name in known}
    run_config(
        arm.bundle,
        study.config_of(data, "train"),
        folder / _LOG,
        told={**own, **study.training_settings(arm, data)},
        record=folder / "train.json",
        **{
            **settings,
            **starting_weights(study, run),
            "datalist": write_datalist(folder / "datalist.json", training=cases, validation=cases[:1], test=unseen),
            "seed": run.seed,
            "strict": True,
            "store_dir": str(study.folder / "store"),
            "output_dir": str(folder / "train"),
            "ckpt_dir": str(folder / "models"),
            **changes,
        },
    )


def predict(study: Study, run: Run, folder: Path, **changes: Any) -> None:
    """Predict the test entries of the run's datalist."""
    arm, data = study.arms[run.arm], study.data_sets[run.data_set]
    trained = study.training_settings(arm, data)
    told: dict[str, Any] = {name: trained[name] for name in ("num_workers", "device", "amp") if name in trained}
    if data.task != "segmentation":
        told["resamples"] = 0
        model = "classifier.pt"
    else:
        told |= {"pictures": 0, "channels": data.channels}
        model = "model_final.pt"
    run_config(
        arm.bundle,
        study.config_of(data, "inference"),
        folder / _LOG,
        told={**told, **study.merged("inference", arm, data)},
        record=folder / "inference.json",
        **{
            "model": str(folder / "models" / model),
            "datalist": str(folder / "datalist.json"),
            "store_dir": str(study.folder / "store"),
            "output_dir": str(folder / "predictions"),
            "overwrite": True,
            "strict": True,
            **changes,
        },
    )


def _segmented(study: Study, run: Run, folder: Path, unseen: Sequence[Case]) -> dict[str, Any]:
    """Score label maps and keep those of the best, the median and the worst case."""
    arm, data = study.arms[run.arm], study.data_sets[run.data_set]
    settings: dict[str, Any] = {"tolerance_mm": 1.0}
    settings |= {name: data.card[name] for name in ("regions", "ignore_label") if data.card.get(name)}
    run_config(
        arm.bundle,
        "evaluate",
        folder / _LOG,
        record=folder / "evaluate.json",
        **settings,
        datalist=write_datalist(folder / "unseen.json", validation=unseen),
        split="validation",
        labels=data.labels,
        predictions=str(folder / "predictions"),
        output_dir=str(folder / "evaluation"),
        resamples=0,
        strict=True,
        report=False,
    )
    files = {case_name(case): case for case in unseen}
    found: dict[str, dict[str, Any]] = {}
    for _, row in read_table(folder / "evaluation" / "scores.csv", exact=True):
        case = files[row["case"]]
        one = found.setdefault(
            row["case"],
            {**_belonging(data, case), "image": images_of(case), "label": case["label"], "scores": {}},
        )
        one["scores"][row["class"]] = {name: _number(row[name]) for name in _SCORES}
    os.replace(folder / "evaluation" / "scores.csv", folder / "scores.csv")
    means = {name: _mean([scores["dice"] for scores in one["scores"].values()]) for name, one in found.items()}
    ranked = sorted((name for name, mean in means.items() if mean is not None), key=lambda name: means[name] or 0.0)
    kept = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]} if ranked else {}
    if "predictions" not in study.keep:
        _keep(folder / "predictions", {output_file(folder / "predictions", name, ".nii.gz") for name in kept.values()})
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    return {"cases": found, "kept": kept, "tolerance_mm": settings["tolerance_mm"]}


def _classified(study: Study, run: Run, folder: Path, unseen: Sequence[Case]) -> dict[str, Any]:
    """Gather probabilities and the truth."""
    data = study.data_sets[run.data_set]
    columns = data.target if isinstance(data.target, list) else None
    names = [str(name) for name in columns or data.classes or []]
    found: dict[str, dict[str, Any]] = {}
    rows = {row["case"]: row for _, row in read_table(folder / "predictions" / "predictions.csv", exact=True)}
    cases = {case_name(case): case for case in unseen}
    for name, row in rows.items():
        truth: Any = [int(row[f"true_{each}"]) for each in names] if columns else names.index(row["true"])
        found[name] = {
            **_belonging(data, cases[name]),
            "truth": truth,
            "probabilities": [float(row[f"probability_{each}"]) for each in names],
        }
    return {"cases": found, "classes": names, "target": data.target}


def _regressed(study: Study, run: Run, folder: Path, unseen: Sequence[Case]) -> dict[str, Any]:
    """Gather predicted and true numbers."""
    data = study.data_sets[run.data_set]
    cases = {case_name(case): case for case in unseen}
    found: dict[str, dict[str, Any]] = {}
    for _, row in read_table(folder / "predictions" / "predictions.csv", exact=True):
        found[row["case"]] = {
            **_belonging(data, cases[row["case"]]),
            "truth": float(row["true"]),
            "predicted": [float(row["predicted"])],
        }
    return {"cases": found, "classes": [data.target], "target": data.target}


def _mean_of_training(data: DataSet, cases: Sequence[Case], unseen: Sequence[Case]) -> dict[str, Any]:
    """Tell of every unseen case the mean of the cases to train on."""
    mean = sum(float(case[data.target]) for case in cases) / len(cases)
    found = {
        case_name(case): {**_belonging(data, case), "truth": float(case[data.target]), "predicted": [mean]}
        for case in unseen
    }
    return {"cases": found, "classes": [data.target], "target": data.target}


_GATHER = {"segmentation": _segmented, "classification": _classified, "regression": _regressed}


def _patient(data: DataSet) -> dict[str, str]:
    """Return the column of the patients as a setting, where one is told; runs without one are recorded as ever."""
    return {"patient": data.patient} if data.patient else {}


def _belonging(data: DataSet, case: Case) -> dict[str, Any]:
    """Return the group of a case, by column where there are several, and its patient where one is told."""
    own = {
        column.name: column.group_of(case.get(column.name), case_name(case)) or None
        for column in group_columns(data.group)
    }
    alone = next(iter(own.values())) if len(own) == 1 else None
    patient = {"patient": str(case[data.patient])} if data.patient else {}
    return {"group": alone, **({"groups": own} if len(own) > 1 else {}), **patient}


def _keep(folder: Path, kept: Collection[Path]) -> None:
    """Remove all files of a folder and below but these, and folders that are left empty."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()


def _number(text: str) -> float | None:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
