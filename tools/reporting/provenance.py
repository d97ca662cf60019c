# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The part of a study's report that says how it was run: settings, weights, machine, time, and what is missing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.document import Heading, Part, Table, Text
from common.weights.cells import describe
from common.weights.receipt import origin_words

from ..studies.results import Results, read_json
from .tables import BACKBONES

__all__ = ["counts_sentence", "provenance_part"]

_LIBRARIES = ("numpy", "scipy", "statsmodels", "scikit-posthocs", "matplotlib")
_ALWAYS = ("bundle", "weights")
_OWN = {"schedule": None, "epochs": None, "spacing": None}  # what an arm may have of its own, and what says nothing


def counts_sentence(results: Results) -> str:
    """Return how many runs there are and how they ended."""
    planned, done = len(results.about["runs"]), len(results.finished)
    told = f"{done} of {planned} runs are finished"
    if done == planned:
        return f"{told}."
    return f"{told}, {len(results.failed)} failed and {len(results.missing)} are not there yet."


def provenance_part(results: Results) -> list[Part]:
    """Return all of it; what no run has written is left out or said to be missing."""
    about = results.about
    parts: list[Part] = [Heading("How it was run", short="Runs and settings"), Text(counts_sentence(results))]
    parts.append(Text(f"python tools/study.py run {about.get('source') or 'FILE'}", "code"))
    parts.append(Text("It does what is not done yet; with another output it repeats the whole study.", "note"))
    columns = [*_ALWAYS, *(key for key in _OWN if any(arm.get(key) != _OWN[key] for arm in about["arms"].values()))]
    arms = [
        [name, BACKBONES.get(arm["backbone"], arm["backbone"]), *(_shown(arm.get(key)) for key in columns)]
        for name, arm in about["arms"].items()
    ]
    parts.append(Table(["arm", "backbone", *columns], arms, "Arms", words=True))
    parts += [_data_sets(about), *_settings(results), *_receipts(results), *_machines(results), *_times(results)]
    stopped = [[name, why] for name, why in results.failed.items()]
    stopped += [[name, "not started, or cut before its end"] for name in results.missing]
    if stopped:
        parts.append(Table(["run", "why there is no result"], stopped, "Failed and missing runs", words=True))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    parts.append(Text(f"This report was computed with {versions}.", "note"))
    return parts


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items()) or "–"
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _data_sets(about: Mapping[str, Any]) -> Part:
    rows = []
    for name, data in about["data_sets"].items():
        card = data.get("card", {})
        told = [card.get(key) for key in ("name", "group", "modality", "licence", "source")]
        labels = data.get("labels") or data.get("classes") or "–"
        rows.append([name, *("" if value is None else _shown(value) for value in told), _shown(labels)])
    heads = ["data set", "name", "ID or OOD", "modality", "licence", "source", "labels or classes"]
    return Table(heads, rows, "Data sets", words=True)


def _settings(results: Results) -> list[Part]:
    """Return what each run was told, where all runs of an arm agree in one line."""
    arms = list(results.about["arms"])
    told_of: dict[str, list[dict[str, str]]] = {arm: [] for arm in arms}  # of each run that has started
    for run in results.about["runs"]:
        if content := read_json(results.folder / "runs" / run["name"] / "run.json"):
            own = {name: _shown(value) for name, value in (content.get("settings") or {}).items()}
            own |= {f"inference: {name}": _shown(value) for name, value in (content.get("inference") or {}).items()}
            told_of[run["arm"]].append(own)
    names = sorted({name for runs in told_of.values() for own in runs for name in own})
    if not names:
        told = _shown(results.about.get("settings") or {})
        return [Text(f"Settings of all arms beyond those of their bundles: {told}.")]
    rows = []
    for name in names:
        values = ({own.get(name, "default") for own in told_of[arm]} or {"not started"} for arm in arms)
        rows.append([name, *(" or ".join(sorted(each)) for each in values)])
    same = [row for row in rows if len(set(row[1:])) == 1]
    other = [row for row in rows if len(set(row[1:])) > 1]
    parts: list[Part] = []
    if same:
        parts.append(Table(["setting", "value"], [row[:2] for row in same], "Settings of all arms", words=True))
    if other:
        parts.append(Table(["setting", *arms], other, "Settings in which arms differ", words=True))
    parts.append(
        Text(
            "Where values are joined by 'or', data sets, folds or budgets differ; run.json of each run has its own. "
            "All else is the default of the bundles' configs.",
            "note",
        )
    )
    return parts


def _receipts(results: Results) -> list[Part]:
    rows: dict[tuple[str, ...], int] = {}
    for run in results.about["runs"]:
        receipt = read_json(results.folder / "runs" / run["name"] / "train" / "weights_receipt.json")
        if receipt:
            share = receipt.get("encoder_share")
            covered = f"{100 * share:.1f} %" if isinstance(share, (int, float)) else "not said"
            notes = "; ".join([*_stranger(run["arm"], receipt, results), *map(str, receipt.get("notes") or [])])
            key = (run["arm"], str(receipt.get("source")), str(receipt.get("sha256"))[:16], covered, notes)
            rows[key] = rows.get(key, 0) + 1
    if not rows:
        return [Text("No run has written a receipt of loaded weights.", "note")]
    lines = [[*key[:4], str(count), key[4]] for key, count in rows.items()]
    heads = ["arm", "weights from", "sha256 (begins)", "encoder covered", "runs", "notes"]
    return [Table(heads, lines, "Weights, from the receipts of the runs", words=True)]


def _stranger(arm: str, receipt: Mapping[str, Any], results: Results) -> list[str]:
    """Return what weights are if they are not of the method of their bundle, which the name of an arm may suggest."""
    about = results.about["arms"].get(arm, {})
    method = str(receipt.get("method", ""))
    if not method or method == describe(str(about.get("bundle")))[0]:
        return []
    name = f" ({receipt['name']})" if receipt.get("name") else ""
    return [f"{origin_words(method, str(receipt.get('backbone')))}{name}, licence {receipt.get('licence', 'unknown')}"]


def _machines(results: Results) -> list[Part]:
    rows: dict[str, int] = {}
    for result in results.finished.values():
        machine = {key: value for key, value in (result.get("machine") or {}).items() if key != "when"}
        if machine:
            rows[_shown(machine)] = rows.get(_shown(machine), 0) + 1
    if not rows:
        return []
    return [Table(["machine", "runs"], [[told, str(count)] for told, count in rows.items()], "Machines", words=True)]


def _times(results: Results) -> list[Part]:
    lines = []
    total = 0.0
    for data_set in results.about["data_sets"]:
        for arm in results.about["arms"]:
            own = [
                results.finished[run["name"]]
                for run in results.planned(arm=arm, data_set=data_set)
                if run["name"] in results.finished
            ]
            if not own:
                continue
            seconds = [result.get("seconds") or {} for result in own]
            total += sum(sum(each.values()) for each in seconds)
            parts = [_mean([each[key] for each in seconds if each.get(key) is not None]) for key in _PARTS]
            peak = max((result["peak_gib"] for result in own if result.get("peak_gib") is not None), default=None)
            lines.append([data_set, arm, str(len(own)), *parts, "–" if peak is None else f"{peak:.2f}"])
    if not lines:
        return []
    heads = ["data set", "arm", "runs", *(f"{part}, s" for part in _PARTS), "peak memory, GiB"]
    return [
        Table(heads, lines, "Seconds of a run on average"),
        Text(
            f"{total / 3600:.2f} hours of runs in all, added up over runs that may have been at the same time.", "note"
        ),
    ]


_PARTS = ("training", "inference", "evaluation")


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.0f}" if values else "–"
