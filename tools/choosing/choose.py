# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Ask a few labelled cases which encoder suits them: probe all at hand, then fine-tune the best shortly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import SettingsError
from common.files import write_json
from common.terminal import near

from ..commanding.ending import end, tool_command
from ..commanding.environment import ROOT
from ..reporting.plain import by_arm, outcome_of, plain_sentence
from ..studies.results import METRICS, read_json
from ..studies.scheduling import places
from .candidates import find_candidates, not_at_hand, origin
from .choice import Choice, check_settings
from .data import Data, read_data
from .probes import FEW_CASES
from .settings import Choose
from .showing import show
from .verdicts import Difference, Verdict, judge

__all__ = ["choose"]

_SHORT = {"epochs": 20}
_SHORTER = {"epochs": 10, "iterations_per_epoch": 25, "num_workers": 0}  # without a GPU
_PATCH = {
    "segmentation": {"patch_size": [64, 64, 64]},
    "classification": {"input_size": [64, 64, 64]},
    "regression": {"input_size": [64, 64, 64]},
}
_SCORES = {"segmentation": "Dice", "classification": "average precision", "regression": "R2"}  # of fine-tuning


def choose(settings: Choose) -> None:
    """Rank the encoders at hand for one's own task, and recommend one, or say that it is too close to call."""
    if settings.best:
        places(settings.gpus, settings.jobs)  # a GPU that is not there is told now, not after the probes
    candidates = find_candidates(settings.bundles, settings.weights)
    source = settings.data.absolute()
    folder = settings.output.absolute() if settings.output else ROOT / "choose" / source.stem
    _check_folder(folder, str(source))
    train = "train_classification" if settings.table else "train"
    check_settings(settings.settings, [encoder.bundle for encoder in candidates.values()], train)
    data = read_data(settings)
    counted = f"{len(candidates)} encoder{'s' if len(candidates) > 1 else ''}"
    print(f"choosing among {counted} for {_told(data)}; the answer goes to {near(folder)}", flush=True)
    given = {**settings.settings, "channels": settings.channels}
    choice = Choice(data, candidates, folder, settings=given, seed=settings.seed)
    for warning in choice.warnings:
        print(f"warning: {warning}")
    content, verdict, ranked = _probed(choice, settings)
    if settings.best:
        verdict = _tuned(choice, settings, ranked[: settings.best], content, verdict)
    write_json(content, folder / "choose.json")
    show(content, folder, candidates, verdict)
    end(
        folder / "choose.md",
        look=folder / "choose.png",
        following=tool_command("new_task", "BUNDLE", "--labels", "NAMES"),
    )


def _told(data: Data) -> str:
    """Say what the task is, as it was understood."""
    if data.task is not None:
        labels = ", ".join(f"{value} {name}" for value, name in data.task.by_value.items())
        return f"the segmentation of {labels} in {len(data.cases)} cases"
    return f"the {data.kind} of {data.target} in {len(data.cases)} cases"


def _check_folder(folder: Path, source: str) -> None:
    """Refuse to write over the answer for other data."""
    before = (read_json(folder / "choose.json") or {}).get("data", source)
    if before != source:
        raise SettingsError(
            f"{folder} holds the answer for {before}, not for {source}; name another folder with --output"
        )


def _probed(choice: Choice, settings: Choose) -> tuple[dict[str, Any], Verdict, list[str]]:
    """Probe all; return what choose.json holds, the verdict by probes alone, and the encoders, the best first."""
    data, candidates = choice.data, choice.candidates
    probes, difference = choice.probe(folds=settings.folds, resamples=settings.resamples)
    pretrained = {name: found["estimate"] for name, found in probes.items() if name in candidates}
    ranked = sorted(pretrained, key=lambda name: -pretrained[name])
    compared = {(name, row): difference(name, row) for name in ranked for row in choice.has_to_beat(name)}
    what = "average precision of the probe" if choice.metric == "AP" else "R2 of the probe"
    verdict = judge(pretrained, difference, units=data.units, what=what)
    _tell_plain_rows(verdict, compared, units=data.units)
    content: dict[str, Any] = {
        "data": str(settings.data.absolute()),
        "task": data.kind,
        "cases": len(data.cases),
        "units": data.units,
        "spacing_mm": data.spacing_mm,
        "metric": {"probe": choice.metric, "fine_tuning": METRICS[data.kind][0]},
        "weights": {name: encoder.weights for name, encoder in candidates.items()},
        "origins": {name: origin(receipt) for name, receipt in choice.receipts.items()},
        "not_asked": not_at_hand(choice.receipts.values(), [encoder.bundle for encoder in candidates.values()]),
        "settings": settings.settings,
        "warnings": choice.warnings,
        "left_out": choice.left_out,
        "probes": {
            name: {
                **found,
                "over_random": _plain(compared.get((name, choice.has_to_beat(name)[0])))
                if name in candidates
                else None,
                **_over_plain(name, compared),
                "to_best": None if name == verdict.best else _plain(difference(verdict.best, name)),
            }
            for name, found in probes.items()
        },
        "fine_tuning": None,
        "verdict": {**vars(verdict), "by": "probes"},
    }
    return content, verdict, ranked


def _tuned(
    choice: Choice, settings: Choose, chosen: Sequence[str], content: dict[str, Any], verdict: Verdict
) -> Verdict:
    """Fine-tune the best and from scratch; put what is found into ``content``, and return the verdict then."""
    data = choice.data
    short = _SHORT if torch.cuda.is_available() else {**_SHORTER, **_PATCH[data.kind]}
    used = {**short, **settings.settings}
    folds = min(settings.tuning_folds, data.units)
    file = choice.study(chosen, settings=used, seeds=settings.seeds, folds=folds, plain=settings.plain_rows)
    tuned, difference, failed = choice.fine_tune(file, gpus=settings.gpus, jobs=settings.jobs)
    content["fine_tuning"] = {"settings": used, "seeds": settings.seeds, "arms": tuned, "failed": failed}
    complete = {n: found["estimate"] for n, found in tuned.items() if found["complete"] and not found.get("plain_row")}
    compared: dict[tuple[str, str], Difference | None] = {}
    if complete:
        verdict = judge(
            complete,
            difference,
            units=data.units,
            what=_SCORES[data.kind],
            scratch=[name for name in tuned if name.startswith("scratch")],
            seeds=settings.seeds,
        )
        pairs = [(name, row) for name in complete for row in tuned[name]["has_to_beat"] if tuned[row]["complete"]]
        compared = {pair: difference(*pair) for pair in pairs}
        _tell_plain_rows(verdict, compared, units=data.units, seeds=settings.seeds)
    if lacking := [name for name, found in tuned.items() if not found["complete"]]:
        verdict.sentences.append(
            f"{'Not compared' if complete else 'No fine-tuning is compared'}, since not all of their unseen cases "
            f"are scored: {', '.join(lacking)}; the same command tries again what failed."
        )
    content["verdict"] = {**vars(verdict), "by": "fine-tuning" if complete else "probes"}
    for name, found in tuned.items():
        compared_too = bool(complete) and found["complete"] and name != verdict.best
        found["to_best"] = _plain(difference(verdict.best, name)) if compared_too else None
        found |= _over_plain(name, compared)
    return verdict


def _tell_plain_rows(
    verdict: Verdict, compared: Mapping[tuple[str, str], Difference | None], *, units: int, seeds: int = 0
) -> None:
    """Add to a verdict which arms beat their plain rows, where there are cases enough to say so.

    Args:
        verdict: that is added to.
        compared: difference of an arm and a row, by both names.
        units: cases, or patients, that they were judged on.
        seeds: of the fine-tunings; 0 for probes.
    """
    known = {pair: gap for pair, gap in compared.items() if gap is not None and units >= FEW_CASES}
    outcomes = by_arm((*pair, outcome_of(gap.low, gap.high)) for pair, gap in known.items())
    if sentence := plain_sentence(outcomes, one_run=seeds == 1):
        verdict.sentences.append(sentence)


def _over_plain(arm: str, compared: Mapping[tuple[str, str], Difference | None]) -> dict[str, Any]:
    """Return how much better an arm is than each of its plain rows, for choose.json."""
    found = {row: _plain(gap) for (name, row), gap in compared.items() if name == arm}
    return {"over_plain_rows": found} if found else {}


def _plain(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    interval = None if math.isnan(difference.low) else [difference.low, difference.high]
    return {"estimate": difference.estimate, "interval": interval}
