# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Did pre-training help, and with how many labelled cases? A study whose arms have the learning rate best for each.

All is in one folder. ``study.yaml`` is the curve, as any study: its budgets are the numbers of cases. ``rates.yaml`` is
the search for the learning rates: an arm for each rate and start, tested on held-out cases of the first fold's training
part. What is done is not done again, by either.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from common.data.cases import Case, case_name
from common.errors import SettingsError
from common.files import write_json, write_record
from common.settings import unknown_settings
from common.terminal import near

from ..commanding.environment import ROOT
from ..studies.definition import MEAN, OWN, PRETRAINING, SCRATCH, Study, bundle_config, cell_of, config_for
from ..studies.execution import FAILED, RESULT, check_results, pretraining_of, write_datalist
from ..studies.reading import read_study, study_from, write_yaml
from ..studies.results import read_json
from ..studies.scheduling import Place, places, run_pieces
from .curve_report import ARMS, MEAN_ROW, ROWS, scores_of, task_of, write_curve
from .settings import LabelCurve

__all__ = ["label_curve"]

_DATA, _HELD = "data", "held out"  # data sets of the two studies
_MOST_HELD = 20
_BEYOND = 2  # learning rates that are tried beyond those asked for
# what fits a CPU in minutes; on a GPU the bundle's own defaults are used
_SMALL: dict[str, dict[str, Any]] = {
    "resenc_l": {"features_per_stage": [8, 16, 32, 64], "blocks_per_stage": [1, 1, 1, 1], "momentum": 0.9},
    "primus_m": {"embed_dim": 96, "depth": 4, "num_heads": 4, "token_size": 4},
}
_SMALL_RATES = {"resenc_l": {"pretrain": 0.1, "train": 0.3}, "primus_m": {"pretrain": 2e-3, "train": 2e-3}}
_SMALL_RUN = {"patch_size": [32, 32, 32], "epochs": 10, "iterations_per_epoch": 25, "num_workers": 0}
# and of numbers of whole volumes
_SMALL_NUMBERS = {"input_size": [32, 32, 32], "epochs": 60, "batch_size": 4, "accumulation_steps": 1, "num_workers": 0}
_SMALL_NUMBERS_RATES = {"resenc_l": 3e-3, "primus_m": 1e-3}
_SMALL_PRETRAINING = {"epochs": 10, "iterations_per_epoch": 50, "batch_size": 4, "block_size": 8}


def label_curve(given: LabelCurve) -> None:
    """Measure the curve and draw it.

    Raises:
        SettingsError: if the folder holds another curve, or an option does not fit.
    """
    folder = given.output.absolute() if given.output else ROOT / "label_curve" / given.bundle
    asked = _asked(given)
    _check_folder(folder, asked)
    content, parts = _study(asked, folder)
    counts = _counts(given.cases, parts)
    content |= {"budgets": counts, "seeds": [*range(given.seeds)]}
    write_json(asked, folder / "settings.json")
    told = f"{', '.join(map(str, counts))} labelled cases, {given.seeds} draws of each, {len(parts)} folds"
    print(f"fine-tuning {given.bundle} pre-trained and from scratch with {told}; into {near(folder)}", flush=True)
    starts = [*ARMS, *(ROWS if given.plain_rows else ())]
    if given.plain_rows:
        each = len(counts) * given.seeds * len(parts)
        print(
            f"{len(ROWS) * each} of the {len(starts) * each} runs, and as large a share of the search for learning "
            f"rates, are of the plain rows ({', '.join(ROWS)}); --plain_rows false leaves them out",
            flush=True,
        )
    where = places()
    rates = _rates(asked, folder, content, parts[0]["training"], where, starts)
    alone = [MEAN_ROW] if given.plain_rows and given.target else []  # which nothing is trained for
    content["arms"] = {start: _arm(asked, start, rates.get(start)) for start in [*starts, *alone]}
    study = _written(content, folder / "study.yaml")
    check_results(study)
    write_record(study.as_plain(), folder / "study.json")
    failed = run_pieces(study, where)
    results = [(run, read_json(folder / "runs" / run.name / RESULT)) for run in study.runs()]
    write_curve(folder, results=[(run, found) for run, found in results if found], rates=rates, asked=asked)
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    if failed:
        raise SystemExit(
            f"Stopped: {len(failed)} failed; their logs are in {folder}; the same command tries them again"
        )


def _asked(given: LabelCurve) -> dict[str, Any]:
    """Return all that is asked for but how many runs, as plain values.

    Raises:
        SettingsError: if no config of the bundle has a setting.
    """
    import torch

    bundle, backbone = given.bundle, cell_of(given.bundle)[1]
    train, inference = (
        bundle_config(bundle, config_for(name, task_of(given.target))) for name in ("train", "inference")
    )
    pretrain = bundle_config(bundle, "pretrain")
    told, prefix = given.settings, "pretrain_"
    settings = {name: value for name, value in told.items() if not name.startswith(prefix)}
    own = {name.removeprefix(prefix): value for name, value in told.items() if name.startswith(prefix)}
    if wrong := unknown_settings(settings, {**train, **pretrain, **inference}) or unknown_settings(own, pretrain):
        raise SettingsError(wrong)
    if given.small if given.small is not None else not torch.cuda.is_available():
        small = {**_SMALL[backbone], **_SMALL_RUN, "lr": _SMALL_RATES[backbone]["train"]}
        if given.target:
            small = {**_SMALL[backbone], **_SMALL_NUMBERS, "lr": _SMALL_NUMBERS_RATES[backbone]}
            own = {"patch_size": settings.get("input_size", small["input_size"]), **own}
        settings = {**({"spacing_mm": 2.0} if given.data == "mni" else {}), **small, **settings}
        alone = {name: value for name, value in settings.items() if name not in train}
        own = {**_SMALL_PRETRAINING, "lr": _SMALL_RATES[backbone]["pretrain"], **alone, **own}
    if "epochs" in own:
        own.setdefault("warmup_epochs", int(own["epochs"]) // 10)
    rate = settings.pop("lr", None)
    shared = {name: value for name, value in settings.items() if name in pretrain and name not in OWN}
    paths = {name: getattr(given, name) for name in ("pretrained", "splits", "groups")}
    return {
        "bundle": bundle,
        "data": "mni" if given.data == "mni" else str(Path(given.data).absolute()),
        **({"table": str(given.table.absolute()), "target": given.target} if given.table else {}),
        "labels": list(given.labels) if isinstance(given.labels, tuple) else given.labels,
        "folds": given.folds,
        **{name: None if path is None else str(path.absolute()) for name, path in paths.items()},
        "group": given.group,
        **({"patient": given.patient} if given.patient else {}),
        "rates": list(given.rates),
        "settings": settings,
        "pretraining": {name: value for name, value in {**shared, **own}.items() if name in pretrain},
        "lr": rate,
    }


def _check_folder(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuse a folder of another curve."""
    before = read_json(folder / "settings.json")
    if before not in (None, json.loads(json.dumps(asked))):
        raise SettingsError(
            f"{folder} holds a curve of other settings, or of an earlier version; give another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _study(asked: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[dict[str, list[Case]]]]:
    """Return what the study's file says, as yet with all cases, and the parts of every fold that is used."""
    settings, entry, card = dict(asked["settings"]), dict[str, Any](), dict[str, Any](name="data", task="segmentation")
    labels, folds, target = asked["labels"], asked["folds"], asked.get("target")
    entry["channels"] = int(settings.pop("channels", 1))
    card |= {
        name: settings.pop(name) for name in ("regions", "ignore_label", "regions_class_order") if name in settings
    }
    if asked["data"] == "mni":
        from ..preparing.template import LABELS, write_template_task

        entry["datalist"], entry["splits"] = write_template_task(folder / "data" / "mni", back=16, front=4)
        labels, folds = labels or LABELS, {"use": [0]}
    else:
        entry["datalist" if asked["data"].endswith(".json") else "folder"] = asked["data"]
        entry |= {name: asked[name] for name in ("splits", "groups", "group", "patient") if asked.get(name)}
    if target:
        card |= {"task": "regression", "target": target}
        card |= {"units": settings["units"]} if settings.get("units") else {}
        entry |= {"card": "card.yaml", "table": asked["table"]}
    elif labels is None:
        raise SettingsError("name the classes: --labels \"['background','lesion']\", or a dataset.json")
    else:
        entry |= {"labels": labels, "card": "card.yaml"}
        card |= {} if isinstance(labels, str) else {"labels": labels}
    write_yaml(card, folder / "card.yaml")
    train, inference = (
        bundle_config(asked["bundle"], config_for(name, task_of(target))) for name in ("train", "inference")
    )
    content = {
        "name": f"label curve of {asked['bundle']}",
        "output": ".",
        "arms": {start: _arm(asked, start, asked["lr"]) for start in ARMS},
        "data_sets": {_DATA: entry},
        "plain_rows": False,  # those of the curve have learning rates of their own
        "folds": folds,
        "settings": {name: value for name, value in settings.items() if name in train},
        "pretraining": asked["pretraining"],
        # on a CPU several small tiles at once are several times faster than one by one
        "inference": ({} if target else {"tiles_per_step": 4})
        | {name: value for name, value in settings.items() if name in inference and name not in train},
    }
    study = study_from(content, base=folder, output=folder)
    return content, [study.data_sets[_DATA].parts[fold] for fold in study.folds]


def _arm(asked: Mapping[str, Any], start: str, rate: float | None, *, weights: str | None = None) -> dict[str, Any]:
    weights = (
        {"from scratch": SCRATCH, MEAN_ROW: MEAN, **ROWS}.get(start) or weights or asked["pretrained"] or PRETRAINING
    )
    return {"bundle": asked["bundle"], "weights": weights, "settings": {} if rate is None else {"lr": rate}}


def _written(content: Mapping[str, Any], file: Path) -> Study:
    write_yaml(content, file)
    return read_study(file)


def _counts(cases: Sequence[int | str], parts: Sequence[Mapping[str, Sequence[Any]]]) -> list[int]:
    """Return the numbers of cases to train on."""
    most = min(len(part["training"]) for part in parts)
    counts = sorted({most if count == "all" else int(count) for count in cases})
    if wrong := [count for count in counts if count > most]:
        raise SettingsError(f"--cases names {wrong[0]}, but a fold has {most} cases to train on")
    return counts


def _hold_out(folder: Path, cases: Sequence[Case], count: int) -> None:
    """Write once which of a fold's training cases learning rates are tried with, and which they are judged on."""
    if (folder / "rates_splits.json").exists():
        return
    if len(cases) < 2:
        raise SettingsError(
            "a fold has one case to train on, so none is left to judge learning rates on; give more cases, or --rates 1"
        )
    drawn = list(cases)
    random.Random("0 -1").shuffle(drawn)
    count = min(count, len(drawn) - max(len(drawn) // 4, 1))
    drawn = drawn[: count + _MOST_HELD]
    names = [case_name(case) for case in drawn]
    write_datalist(folder / "rates_cases.json", training=drawn)
    write_json([{"train": names[:count], "val": names[count:]}], folder / "rates_splits.json")


def _rates(
    asked: Mapping[str, Any],
    folder: Path,
    content: Mapping[str, Any],
    cases: Sequence[Case],
    where: Sequence[Place],
    starts: Sequence[str],
) -> dict[str, float]:
    """Return the best learning rate of each start on held-out cases; one that is alone is taken as it is.

    Where the best is at an end of those tried, up to two more are tried beyond it.
    """
    tried = {}
    for start in starts:
        usual = asked["lr"] if asked["lr"] is not None else _published_rate(asked, start)
        tried[start] = sorted({float(f"{usual * factor:.6g}") for factor in asked["rates"]})
    most = len(tried[ARMS[0]]) + _BEYOND
    if most == 1 + _BEYOND:
        return {start: rates[0] for start, rates in tried.items()}
    _hold_out(folder, cases, content["budgets"][len(content["budgets"]) // 2])
    weights = None if asked["pretrained"] else _first_encoder(folder, content, where)
    while True:
        scores = _scores(asked, folder, content, tried, weights=weights, where=where)
        best = {start: max(rates, key=scores[start].__getitem__) for start, rates in tried.items()}
        further = {start: _beyond(best[start], rates) for start, rates in tried.items() if len(rates) < most}
        if not any(further.values()):
            return best
        for start, rate in further.items():
            tried[start] = sorted({*tried[start], rate or best[start]})


def _beyond(best: float, tried: Sequence[float]) -> float | None:
    """Return the learning rate to try next, a step beyond the best if that is at an end of those tried."""
    beside = {tried[0]: tried[1], tried[-1]: tried[-2]}.get(best)
    return None if beside is None else float(f"{best * best / beside:.6g}")


def _first_encoder(folder: Path, content: Mapping[str, Any], where: Sequence[Place]) -> str:
    """Pre-train for the first fold, as the curve needs it anyway."""
    study = _written(content, folder / "study.yaml")
    name = next(name for run in study.runs() if run.fold == 0 and (name := pretraining_of(study, run)))
    for piece, why in run_pieces(study, where, wanted=[f"pretraining/{name}"]).items():
        raise SystemExit(f"Stopped: {why}; the log is {folder / piece / 'log.txt'}")
    return str(folder / "pretraining" / name / "pretrained_encoder.pt")


def _scores(
    asked: Mapping[str, Any],
    folder: Path,
    content: Mapping[str, Any],
    tried: Mapping[str, Sequence[float]],
    *,
    weights: str | None,
    where: Sequence[Place],
) -> dict[str, dict[float, float]]:
    """Return the score of each start at each learning rate, the worst where the loss was not finite."""
    arms = {f"{start}, lr {rate:g}": (start, rate) for start, rates in tried.items() for rate in rates}
    entry = {
        name: value for name, value in content["data_sets"][_DATA].items() if name in ("channels", "labels", "card")
    }
    study = _written(
        {
            **content,
            "name": f"learning rates of {asked['bundle']}",
            "arms": {name: _arm(asked, *told, weights=weights) for name, told in arms.items()},
            "data_sets": {_HELD: {**entry, "datalist": "rates_cases.json", "splits": "rates_splits.json"}},
            "folds": 1,
            "budgets": ["all"],
            "seeds": [0],
        },
        folder / "rates.yaml",
    )
    check_results(study)
    runs = {f"runs/{run.name}": run for run in study.runs()}
    whole = [piece for piece in runs if not _came_apart(str((read_json(folder / piece / FAILED) or {}).get("why")))]
    for piece, why in run_pieces(study, where, wanted=whole).items():
        if not _came_apart(why):
            raise SystemExit(f"Stopped: {why}; the log is {folder / piece / 'log.txt'}")
    worst = -math.inf if asked.get("target") else 0.0
    scores: dict[str, dict[float, float]] = {start: {} for start in tried}
    for piece, run in runs.items():
        start, rate = arms[run.arm]
        cases = [np.mean([*own.values()]) for own in scores_of(read_json(folder / piece / RESULT) or {}).values()]
        scores[start][rate] = float(np.mean(cases)) if cases else worst
    return scores


def _came_apart(why: str) -> bool:
    return "not finite" in why


def _published_rate(asked: Mapping[str, Any], arm: str) -> float:
    """Return the learning rate of the bundle's recipe."""
    from monai.bundle import ConfigParser

    parser = ConfigParser(deepcopy(bundle_config(asked["bundle"], config_for("train", task_of(asked.get("target"))))))
    parser["from_scratch"] = arm != ARMS[0]
    return float(parser.get_parsed_content("lr"))
