# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a study will cost: each distinct kind of run is tried for some steps on this machine; the rest is arithmetic.

Measured are a step, the preprocessing of a case, the prediction and the scoring of one, the start of a process, of
prediction and of scoring, memory and disk; always of the whole network from scratch, so that schedules with a frozen
phase take a little less than told.
"""

from __future__ import annotations

import heapq
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.data.cases import case_name, images_of
from common.engines.budget.parts import number_of_parts
from common.engines.budget.starting import memory_problem
from common.errors import SettingsError
from common.files import read_content, write_json
from common.networks.blocks.recompute import MODES, mode_of
from common.terminal import progress_bar

from ..commanding.environment import ROOT
from .definition import MEAN, PLAIN_ROWS, PRETRAINING, Arm, DataSet, Run, Study, bundle_config, digest
from .execution import machine, peak_gib, predict, pretraining_of, run_config, state, train, write_datalist
from .scheduling import Place

__all__ = ["estimate", "measure", "on_gpu", "write_plan"]

# settings that change how long a run is, not what a step costs
_LENGTH = {"epochs", "iterations_per_epoch", "lr", "schedule", "warmup_epochs", "decoder_epochs", "weight_decay"}
_CASES = 2  # that a measurement prepares, and predicts
_LONG = 60.0  # seconds of a prediction that is not repeated to leave out what only the first one loads
_WAY = 2  # of measuring; costs measured in another are not used


def _kind(study: Study, run: Run, config: str) -> dict[str, Any]:
    """Return what a measurement is of: runs that share it cost the same."""
    arm, data = study.arms[run.arm], _data(study, run, config)
    settings = study.pretraining_settings(arm, data) if config == "pretrain" else study.training_settings(arm, data)
    return {
        "bundle": arm.bundle,
        "config": config,
        "data_set": data.name,
        "settings": {name: value for name, value in settings.items() if name not in _LENGTH},
        "inference": study.merged("inference", arm, data) if config != "pretrain" else {},
        "labels": data.labels if config == "train" else data.classes,
    }


def _data(study: Study, run: Run, config: str) -> DataSet:
    return study.pretraining_set(run) if config == "pretrain" else study.data_sets[run.data_set]


def _needs(study: Study, run: Run) -> list[str]:
    """Return the configs that a run trains with; a mean of numbers is none."""
    if study.arms[run.arm].weights == MEAN:
        return []
    own = study.config_of(study.data_sets[run.data_set], "train")
    return [*(["pretrain"] if study.arms[run.arm].weights == PRETRAINING else []), own]


def measure(study: Study, run: Run, config: str, *, steps: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Try one kind of run in this process, in a folder that is removed again.

    Args:
        study: that the run is of.
        run: of that kind.
        config: train, train_classification or pretrain.
        steps: of training that are timed, after as many that are not.
        changes: of its settings, for less memory.

    Returns:
        seconds of a ``step`` (of classification, of a ``sample``), of ``prepare``, ``predict`` and ``score`` for each
        case, of the ``start``, and of ``predict_start`` and ``score_start``, once in each run; ``peak_gib``; bytes of
        ``store`` for each case and of the ``models``.
    """
    arm, data = study.arms[run.arm], _data(study, run, config)
    with tempfile.TemporaryDirectory(prefix="measured_", dir=study.folder) as name:
        folder = Path(name)
        by_size = sorted(data.parts[run.fold]["training"], key=lambda case: os.path.getsize(images_of(case)[0]))
        cases = by_size[max(min(len(by_size) // 2, len(by_size) - _CASES), 0) :][:_CASES]
        shown = [*cases, *data.parts[run.fold]["validation"]][:_CASES]
        short: dict[str, Any] = {
            "epochs": 2,
            "iterations_per_epoch": steps,
            "store_dir": str(folder / "store"),
            **changes,
        }
        if config == "pretrain":
            images = [{"image": file} for case in cases for file in images_of(case)]
            datalist = write_datalist(folder / "list.json", training=images, validation=images)

            def fit(length: Mapping[str, Any]) -> None:
                places = {"output_dir": str(folder / "train"), "ckpt_dir": str(folder / "models"), "datalist": datalist}
                told = {**study.pretraining_settings(arm, data), "warmup_epochs": 0}
                run_config(arm.bundle, "pretrain", folder / "log.txt", told=told, **{**places, **length})
        else:
            whole: dict[str, Any] = {"schedule": "default"}
            samples = 1
            if data.task != "segmentation":
                samples = _micro_batch(study, run, changes)
                whole = {"batch_size": samples, "accumulation_steps": 1}
                cases = (cases * samples)[: max(samples, _CASES)]

            def fit(length: Mapping[str, Any]) -> None:
                here = {"from_scratch": True, "pretrained": "", "output_dir": str(folder / "train")}
                train(study, run, folder, cases, cases[:1], **{**whole, **here, **length})

        first = _timed(lambda: fit({**short, "epochs": 1, "iterations_per_epoch": 1}))
        prepared = _epochs(folder)
        shutil.rmtree(folder / "models", ignore_errors=True)
        shutil.rmtree(folder / "train", ignore_errors=True)
        second = _timed(lambda: fit(short))
        epochs = _epochs(folder)
        timed = epochs[-1] / (steps if config != "train_classification" else len(cases))
        start = max(second - sum(epochs), 0.0)
        found: dict[str, Any] = {
            "step": timed,
            "start": start,
            "prepare": max(first - sum(prepared) - start, 0.0) / len(cases),
            "store": _size(folder / "store") / len(cases),
            "models": _size(folder / "models"),
            **dict.fromkeys(("predict_start", "predict", "score_start", "score"), 0.0),
        }
        if config != "pretrain":

            def predicted(some: Sequence[Any]) -> None:
                write_datalist(folder / "datalist.json", test=some)
                predict(study, run, folder, store_dir=str(folder / "store"))

            def scored(some: Sequence[Any]) -> None:
                places = {"predictions": str(folder / "predictions"), "output_dir": str(folder / "evaluation")}
                places["datalist"] = write_datalist(folder / "list.json", validation=some)
                told = {"labels": data.labels, "split": "validation", "resamples": 0, **places}
                run_config(arm.bundle, "evaluate", folder / "log.txt", **told)

            found["predict_start"], found["predict"] = _by_case(predicted, shown)
            if config == "train":
                found["score_start"], found["score"] = _by_case(scored, shown)
        found["peak_gib"] = peak_gib()
        return found


def _by_case(function: Callable[[Sequence[Any]], object], cases: Sequence[Any]) -> tuple[float, float]:
    """Return the seconds of a start, and of each case: those that a second case adds.

    What is loaded by the first call alone, in this process as in a run's, is part of the start.
    """
    first = _timed(lambda: function(cases[:1]))
    if len(cases) < 2:
        return 0.0, first
    again = first if first > _LONG else _timed(lambda: function(cases[:1]))
    each = min(max(_timed(lambda: function(cases[:2])) - again, 0.0), again)
    return first - each if first > each else 0.0, each


def _micro_batch(study: Study, run: Run, changes: Mapping[str, Any]) -> int:
    told = {**_defaults(study, run, "train_classification"), **changes}
    return max(1, int(told["batch_size"]) // number_of_parts(told))


def _defaults(study: Study, run: Run, config: str) -> dict[str, Any]:
    """Return the settings of a config as a run uses them."""
    arm, data = study.arms[run.arm], _data(study, run, config)
    given = study.pretraining_settings(arm, data) if config == "pretrain" else study.training_settings(arm, data)
    return {**bundle_config(arm.bundle, config), **given}


def _timed(function: Any) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


def _epochs(folder: Path) -> list[float]:
    return [float(epoch["seconds"]) for epoch in read_content(folder / "train" / "history.json")]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _measured(
    study: Study,
    run: Run,
    config: str,
    place: Place,
    *,
    steps: int,
    changes: Mapping[str, Any] | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Return the costs of a kind of run, from an earlier measurement on this machine if there is one, unless ``again``.

    Raises:
        SettingsError: if the run fails.
    """
    kind = {**_kind(study, run, config), "changes": dict(changes or {}), "steps": steps, "threads": place.threads}
    kind["way"] = _WAY
    here = {name: value for name, value in machine().items() if name in ("device", "cpu", "torch")}
    file = study.folder / "costs" / f"{digest([kind, here['device'], os.cpu_count(), here['torch']])}.json"
    if again or not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        log = file.with_suffix(".txt")
        command = [sys.executable, str(ROOT / "tools" / "study.py"), "measure", study.source, run.name, config]
        command += [str(study.folder), str(file), "--steps", str(steps), "--changes", json.dumps(dict(changes or {}))]
        began = time.monotonic()
        with open(log, "wb") as stream:
            status = subprocess.run(command, env=place.environment(), stdout=stream, stderr=stream, cwd=ROOT).returncode
        if status:
            last = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()][-1:] or [""]
            raise SettingsError(
                f"{config} of {run.arm} on {run.data_set} fails: {last[0].removeprefix('Stopped: ')}; see {log}"
            )
        found = read_content(file)
        found["process"] = time.monotonic() - began
        write_json({**found, "kind": kind, "machine": here}, file)
    found = read_content(file)
    return dict(found)


def estimate(study: Study, run: Run, config: str, cost: Mapping[str, float]) -> float:
    """Return the seconds of one run, or of a pre-training, without the preprocessing, which all runs share.

    Args:
        study: that the run is of.
        run: to estimate.
        config: which of its configs.
        cost: of :func:`measure`.
    """
    told = _defaults(study, run, config)
    if config == "train_classification":
        steps = int(told["epochs"]) * run.cases
    else:
        steps = int(told["epochs"]) * int(told["iterations_per_epoch"])
    seconds = cost["start"] + steps * cost["step"]
    if config == "pretrain":
        validated = int(told.get("val_iterations", 0)) * int(told["epochs"]) / max(int(told.get("val_interval", 1)), 1)
        return seconds + 0.5 * validated * cost["step"]
    unseen = len(study.data_sets[run.data_set].parts[run.fold]["validation"])
    return seconds + cost["predict_start"] + cost["score_start"] + unseen * (cost["predict"] + cost["score"])


@dataclass(frozen=True)
class _Work:
    """A piece of a study with what it takes."""

    name: str
    run: Run
    config: str
    cost: Mapping[str, Any]
    seconds: float
    needs: str  # the pre-training that it waits for, or nothing
    done: bool


def _works(study: Study, costs: Mapping[str, Mapping[str, Any]], *, elsewhere: bool = False) -> list[_Work]:
    """Return all pieces with the costs that were measured; ``elsewhere`` is a folder where nothing is done."""
    found: dict[str, _Work] = {}
    for run in study.runs():
        own = pretraining_of(study, run)
        first = f"pretraining/{own}" if own else ""
        for config in _needs(study, run):
            name = first if config == "pretrain" else f"runs/{run.name}"
            if name not in found:
                cost = costs[digest(_kind(study, run, config))]
                done = not elsewhere and state(study.folder / name) == "finished"
                needs = "" if config == "pretrain" else first
                found[name] = _Work(name, run, config, cost, estimate(study, run, config, cost), needs, done)
    return list(found.values())


def _elapsed(works: Sequence[_Work], count: int) -> float:
    """Return the seconds until all that is left is done, so many at a time: pre-trainings and what needs none first.

    Example:
        >>> run = Run("a", "b", "all", 0, 0, 1)
        >>> three = [_Work(f"runs/{index}", run, "train", {}, 10.0, "", False) for index in range(3)]
        >>> [_elapsed(three, count) for count in (1, 2, 3, 100)]
        [30.0, 20.0, 10.0, 10.0]
    """
    left = [work for work in works if not work.done]
    waited_for = {work.name for work in left}
    free, ended = [0.0] * count, dict[str, float]()
    for work in sorted(left, key=lambda each: (each.config != "pretrain", each.needs in waited_for)):
        ended[work.name] = max(heapq.heappop(free), ended.get(work.needs, 0.0)) + work.seconds
        heapq.heappush(free, ended[work.name])
    return max(ended.values(), default=0.0)


def _hours_left(study: Study, costs: Mapping[str, Mapping[str, Any]], count: int, *, elsewhere: bool = False) -> float:
    """Return the hours until all that is left is done, so many at a time."""
    works = _works(study, costs, elsewhere=elsewhere)
    fresh = not any(work.done for work in works)  # what is prepared stays
    prepare = _preprocessing(study, study.runs(), costs)[1] if fresh else 0.0
    return (_elapsed(works, count) + prepare / count) / 3600


def write_plan(
    study: Study,
    where: Sequence[Place],
    *,
    hours: float = 0.0,
    memory_gib: float = 0.0,
    shards: int = 1,
    steps: int = 6,
    again: bool = False,
) -> dict[str, Any]:
    """Measure every kind of run, print the table and write plan.json.

    Args:
        study: to plan.
        where: one piece at a time runs at each.
        hours: that there are; 0 for no limit.
        memory_gib: that there is for each process; 0 for no limit.
        shards: machines like this one.
        steps: of training that are measured.
        again: measure once more what was measured before.

    Returns:
        what plan.json says.
    """
    place = where[0]
    runs = study.runs()
    kinds = _kinds(study)
    costs: dict[str, dict[str, Any]] = {}
    for key, (run, config) in progress_bar(kinds.items(), desc="measuring", unit="kind"):
        costs[key] = _measured(study, run, config, place, steps=steps, again=again)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    works = _works(study, costs)
    for work in works:
        row = rows.setdefault(
            (work.run.arm if work.config != "pretrain" else f"pre-training of {work.run.arm}", work.run.data_set),
            {"runs": 0, "done": 0, "seconds": 0.0, "step": work.cost["step"], "peak_gib": work.cost["peak_gib"]},
        )
        row["runs"] += 1
        row["seconds"] += work.seconds
        row["done"] += work.done
    waiting = sum(work.seconds for work in works)
    left = sum(work.seconds for work in works if not work.done)
    count = len(where) * max(shards, 1)
    store_bytes, prepare = _preprocessing(study, runs, costs)
    disk = store_bytes + count * max(cost["models"] for cost in costs.values()) + len(runs) * 2**20
    hours_left = (left + prepare * (not any(work.done for work in works))) / 3600  # what is prepared stays
    plan = {
        "rows": [{"what": what, "data_set": name, **row} for (what, name), row in rows.items()],
        "runs": len(runs),
        "hours": (waiting + prepare) / 3600,
        "hours_left": hours_left,
        "at_a_time": count,
        "hours_left_here": _hours_left(study, costs, count),
        "plain_hours": sum(work.seconds for work in works if study.arms[work.run.arm].weights in PLAIN_ROWS) / 3600,
        "peak_gib": max(cost["peak_gib"] for cost in costs.values()),
        "disk_gib": disk / 2**30,
        "machine": machine(),
    }
    print(_table(plan, study))
    free = shutil.disk_usage(study.folder).free
    if disk > free:
        print(f"the disk of {study.folder} has {free / 2**30:.1f} GiB free, less than the study needs")
    for line in _shorter(study, costs, plan, hours):
        print(line)
    if memory_gib:
        for line in _leaner(study, kinds, costs, place, memory_gib, steps, again):
            print(line)
    write_json(plan, study.folder / "plan.json")
    return plan


def _kinds(study: Study) -> dict[str, tuple[Run, str]]:
    """Return a run and its config for each kind that is measured."""
    kinds: dict[str, tuple[Run, str]] = {}
    for run in study.runs():
        for config in _needs(study, run):
            kinds.setdefault(digest(_kind(study, run, config)), (run, config))
    return kinds


def on_gpu(study: Study, gib: float) -> list[str]:
    """Return what does not fit GPUs of so much memory, by the budget; this machine need not have one."""
    lines = []
    for run, config in _kinds(study).values():
        where = f"{config} of {run.arm} on {run.data_set}"
        told = {"bundle_root": str(ROOT / "bundles" / study.arms[run.arm].bundle), "amp": True, "amp_dtype": "bfloat16"}
        data = study.data_sets[run.data_set]
        told |= {"train": {"labels": data.labels}, "train_classification": {"classes": data.classes}}.get(config, {})
        problem = memory_problem({**_defaults(study, run, config), **told}, gib)
        if problem is not None:
            lines.append(f"{where}: {problem['text']}")
    return lines or [f"Every run fits GPUs of {gib:g} GiB, by the estimate of tools/budget.py."]


def _preprocessing(study: Study, runs: Sequence[Run], costs: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Return the bytes of all data sets as they are prepared, and the seconds of it."""
    stores: dict[str, tuple[int, float, float]] = {}
    for run in runs:
        data = study.data_sets[run.data_set]
        for config in _needs(study, run):
            cost = costs[digest(_kind(study, run, config))]
            told = _defaults(study, run, config)
            way = [data.name, config == "pretrain", told.get("spacing_mm"), told.get("normalization"), told.get("fit")]
            cases = len({case_name(case) for part in data.parts for cases in part.values() for case in cases})
            stores[digest(way)] = (cases, cases * cost["store"], cases * cost["prepare"])
    return sum(each[1] for each in stores.values()), sum(each[2] for each in stores.values())


def _table(plan: Mapping[str, Any], study: Study) -> str:
    lines = [["", "data set", "runs", "done", "s/step", "h/run", "hours", "peak GiB"]]
    for row in plan["rows"]:
        each = row["seconds"] / row["runs"] / 3600
        numbers = [row["runs"], row["done"], f"{row['step']:.3g}", f"{each:.2g}", f"{row['seconds'] / 3600:.2f}"]
        lines.append([row["what"], row["data_set"], *map(str, numbers), f"{row['peak_gib']:.1f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            part.ljust(width) if column < 2 else part.rjust(width)
            for column, (part, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    what = "GPU" if plan["machine"]["device"] != "cpu" else "process"
    text.append(
        f"{plan['runs']} runs: {plan['hours']:.2f} hours of one {what}, {plan['hours_left']:.2f} of them left; "
        f"{plan['hours_left_here']:.2f} hours with {plan['at_a_time']} at a time. Memory {plan['peak_gib']:.1f} GiB "
        f"each, disk {plan['disk_gib']:.2f} GiB."
    )
    if rows := [name for name, arm in study.arms.items() if arm.weights in PLAIN_ROWS]:
        text.append(f"{plan['plain_hours']:.2f} of the hours are of the plain rows ({', '.join(rows)}); leave them out")
        text[-1] += " with plain_rows: false"
    text.append(f"measured on {plan['machine']['device']} ({plan['machine']['cpu']}), torch {plan['machine']['torch']}")
    return "\n".join(text)


def _shorter(study: Study, costs: Mapping[str, Mapping[str, Any]], plan: Mapping[str, Any], hours: float) -> list[str]:
    """Return changes that would keep within the hours; each was estimated with the costs that were measured."""
    need, count = plan["hours_left_here"], int(plan["at_a_time"])
    if not hours or need <= hours:
        return [f"That is within the {hours:g} hours."] if hours else []

    def told(changed: Study, *, elsewhere: bool = False) -> float:
        return _hours_left(changed, costs, count, elsewhere=elsewhere)

    found: list[str] = []
    runs_left = sum(not work.done for work in _works(study, costs) if work.config != "pretrain")
    more = bisect_left(range(count + 1, runs_left + 1), True, key=lambda each: _hours_left(study, costs, each) <= hours)
    if count + 1 + more <= runs_left:
        how = "on more cores (--jobs), or slurm" if plan["machine"]["device"] == "cpu" else "--gpus, --jobs, or slurm"
        found.append(f"{count + 1 + more} runs at a time ({how})")
    for some in range(len(study.seeds) - 1, 0, -1):
        if told(replace(study, seeds=study.seeds[:some])) <= hours:
            found.append(f"seeds: {study.seeds[:some]}, {some} instead of {len(study.seeds)}")
            break
    for some in range(len(study.folds) - 1, 0, -1):
        if told(replace(study, folds=study.folds[:some])) <= hours:
            found.append(f"folds: {_folds(study, study.folds[:some])}, {some} instead of {len(study.folds)}")
            break
    found += _fewer_epochs(study, costs, count, hours)
    own = {name: arm for name, arm in study.arms.items() if arm.weights not in PLAIN_ROWS}
    if 0 < len(own) < len(study.arms) and told(replace(study, arms=own)) <= hours:
        found.append("plain_rows: false, without what the arms have to beat")
    arms, each = dict(study.arms), {name: told(replace(study, arms={name: arm})) for name, arm in study.arms.items()}
    while len(arms) > 2:
        del arms[max(reversed(arms), key=lambda name: each[name])]
        if told(replace(study, arms=arms)) <= hours:
            found.append(f"{len(arms)} of the {len(study.arms)} arms: {'; '.join(arms)}")
            break
    over = f"That is {need / hours:.1f} times the {hours:g} hours."
    if not found:
        return [f"{over} Neither more runs at a time nor fewer seeds, folds, epochs or arms alone would do."]
    return [f"{over} Any one of these would do:", *(f"  {line}" for line in found)]


def _folds(study: Study, use: Sequence[int]) -> str:
    """Return how a study's file says which of the same folds are used."""
    counts = {len(data.parts) for data in study.data_sets.values()}
    if len(counts) == 1:
        return f"{{of: {counts.pop()}, use: {list(use)}}}"
    return f"{{use: {list(use)}}}, with the same of"


def _fewer_epochs(study: Study, costs: Mapping[str, Mapping[str, Any]], count: int, hours: float) -> list[str]:
    """Return where to say how many epochs at most, so that the study keeps within the hours."""
    longest = max(_epochs_of(study, arm, data) for arm in study.arms.values() for data in study.data_sets.values())
    # what is done has other epochs and would be refused
    elsewhere = any(work.done for work in _works(study, costs))

    def over(most: int) -> bool:
        return _hours_left(_at_most(study, most)[0], costs, count, elsewhere=elsewhere) > hours

    most = bisect_left(range(1, longest), True, key=over)
    if not 1 <= most < longest or over(most):
        return []
    where = "; ".join(_at_most(study, most)[1])
    then = ", with another output, as runs that are done have other epochs" if elsewhere else ""
    return [f"{where} instead of up to {longest}{then}; short runs favour what starts well"]


def _epochs_of(study: Study, arm: Arm, data: DataSet) -> int:
    told = study.training_settings(arm, data)
    return int(told.get("epochs") or bundle_config(arm.bundle, study.config_of(data, "train"))["epochs"])


def _at_most(study: Study, most: int) -> tuple[Study, list[str]]:
    """Return the study with no more epochs than that, and what its file has to say for it."""
    settings, own = {"epochs": most}, list[str]()
    changed = replace(study, arms=dict(study.arms), data_sets=dict(study.data_sets), backbones=dict(study.backbones))
    places: list[str] = []
    for name, arm in study.arms.items():
        for data in study.data_sets.values():
            if _epochs_of(study, arm, data) <= most:
                continue
            backbone = study.backbones.get(arm.backbone, {})
            if arm.epochs is not None:
                changed.arms[name] = replace(arm, epochs=most)
                own += [name] * (name not in own)
            elif "epochs" in arm.settings:
                changed.arms[name] = replace(arm, settings=arm.settings | settings)
                places.append(f"settings: {{epochs: {most}}} of the arm {name}")
            elif "epochs" in data.settings:
                changed.data_sets[data.name] = replace(data, settings=data.settings | settings)
                places.append(f"settings: {{epochs: {most}}} of the data set {data.name}")
            elif "epochs" in backbone.get("settings", {}):
                told = {**backbone, "settings": backbone["settings"] | settings}
                changed.backbones = changed.backbones | {arm.backbone: told}
                places.append(f"settings: {{epochs: {most}}} of the backbone {arm.backbone}")
            else:
                changed.settings = changed.settings | settings
                places.append(f"settings: {{epochs: {most}}}")
    if own:
        places.append(f"epochs: {most} of {', '.join(own)} (of the arm, or in lengths)")
    return changed, list(dict.fromkeys(places))


def _smaller(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what of a config would take less memory: twice the parts, more that is computed again, and both.

    Example:
        >>> list(_smaller({"batch_size": 2, "accumulation_steps": 1, "checkpointing": "selective"}))[:2]
        [{'accumulation_steps': 2}, {'checkpointing': 'full'}]
    """
    parts, own = number_of_parts(told), mode_of(told.get("checkpointing"))
    splits = int(told["batch_size"]) % (2 * parts) == 0
    for mode in MODES[MODES.index(own) :]:
        changes = {"checkpointing": mode} if mode != own else {}
        if changes:
            yield changes
        if splits:
            yield {"accumulation_steps": 2 * parts, **changes}


def _leaner(
    study: Study,
    kinds: Mapping[str, tuple[Run, str]],
    costs: Mapping[str, Mapping[str, Any]],
    place: Place,
    memory_gib: float,
    steps: int,
    again: bool = False,
) -> list[str]:
    """Measure settings that need less memory for what does not fit."""
    lines = []
    large = [(key, *kind) for key, kind in kinds.items() if costs[key]["peak_gib"] > memory_gib]
    for key, run, config in large:
        told = _defaults(study, run, config)
        where = f"{config} of {run.arm} on {run.data_set} needs {costs[key]['peak_gib']:.1f} GiB"
        tried = []
        for changes in _smaller(told):
            found = _measured(study, run, config, place, steps=steps, changes=changes, again=again)
            slower = found["step"] / costs[key]["step"]
            words = ", ".join(f"{name}: {json.dumps(value)}" for name, value in changes.items())
            tried.append((found["peak_gib"], words, slower))
            if found["peak_gib"] <= memory_gib:
                break
        if tried and tried[-1][0] <= memory_gib:
            peak, words, slower = tried[-1]
            lines.append(f"{where}; settings: {{{words}}} needs {peak:.1f}, at {slower:.2f} of the time")
        else:
            lines.append(f"{where}; none of the settings that keep its results fits: make patch_size smaller")
    return lines or [f"Every run fits into {memory_gib:g} GiB."]
