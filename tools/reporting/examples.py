# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The parts of a study's report to look at: training curves, and predictions of good and bad cases."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.filebasedimages import ImageFileError

from common.document import Heading, Part, Picture, Table, Text
from common.drawing import draw_planes
from common.engines.pages import label_names, volume_part
from common.paths import output_file

from ..studies.definition import plain_name
from ..studies.results import Block, Results
from .cells import best_and_worst
from .comparison import baseline, case_scores
from .outcome import budget_words, main_budget, order_of_arms
from .pictures import Look, draw_curves, png
from .tables import number

__all__ = ["curves_part", "predictions_part"]

_MOST_COLUMNS = 3  # predictions beside each other


def curves_part(results: Results, own: Mapping[str, Look]) -> list[Part]:
    """Return the training curves of each data set and budget."""
    parts: list[Part] = []
    for data_set in results.about["data_sets"]:
        for budget in map(str, results.about["budgets"]):
            found = [
                (run["arm"], _history(results.folder / "runs" / run["name"]))
                for run in results.planned(data_set=data_set, budget=budget)
            ]
            histories = [(arm, history) for arm, history in found if history]
            if histories:
                title = f"{data_set}, {budget_words(budget)}"
                name = f"curves_{plain_name(data_set)}_{budget}.png"
                parts.append(Heading(title, 3))
                parts.append(Picture(name, draw_curves(histories, own), f"training curves, {title}"))
    told = "A thin line for each run (fold and seed), one colour for each arm; runs that were cut as far as they came."
    head = Heading("Training curves", short="Curves")
    return [head, Text(told, "note"), *parts] if parts else [head, Text("No run has written a history yet.")]


def _history(folder: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads((folder / "train" / "history.json").read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return [e for e in content if isinstance(e, dict) and "epoch" in e] if isinstance(content, list) else []


def predictions_part(results: Results, blocks: Sequence[Block]) -> list[Part]:
    """Return, for each data set, the best, median and worst kept case of its leading arm, and a table of cases."""
    parts: list[Part] = [Heading("Predictions to look at", short="Predictions")]
    for block in blocks:
        largest = main_budget([other for other in blocks if other.data_set == block.data_set])
        if block.task == "segmentation" and block.budget == largest:
            order = order_of_arms(results, [block]) or block.arms
            parts.append(Heading(f"{block.data_set}: cases of {order[0]}", 3))
            parts += _pictures(results, block, order)
            parts.append(_case_table(results, block, order[0]))
    if len(parts) == 1:
        parts.append(Text("No segmentation is finished, so there is nothing to draw."))
    return parts


def _pictures(results: Results, block: Block, order: Sequence[str]) -> list[Part]:
    """Show the best, the worst and the median of the cases that the leading arm's runs kept."""
    values = case_scores(block, order[0])
    middle = float(np.nanmedian(values)) if not np.isnan(values).all() else math.nan
    place = {row: index for index, row in enumerate(block.rows)}
    against = baseline(results.about["arms"], order[0])
    arms = list(dict.fromkeys([order[0], *(arm for arm in order if arm == against), *order]))
    kept: dict[str, list[tuple[float, Mapping[str, Any], str]]] = {"best": [], "worst": [], "median": []}
    for run in results.planned(arm=order[0], data_set=block.data_set, budget=block.budget):
        result = results.finished.get(run["name"], {})
        for kind, case in (result.get("kept") or {}).items():
            value = values[place[run["fold"], case]] if (run["fold"], case) in place else math.nan
            if kind in kept and not math.isnan(value):
                kept[kind].append((float(value), run, case))
    parts: list[Part] = []
    for kind, found in kept.items():
        if found:
            far = [-one[0] if kind == "best" else one[0] if kind == "worst" else abs(one[0] - middle) for one in found]
            parts += _picture(results, block, kind, found[int(np.argmin(far))], arms)
    return parts or [Text("This arm kept no prediction.")]


def _picture(
    results: Results, block: Block, kind: str, chosen: tuple[float, Mapping[str, Any], str], arms: Sequence[str]
) -> list[Part]:
    value, run, case = chosen
    entry = results.finished[run["name"]]["cases"][case]
    files: dict[str, Path] = {}
    without = []
    for arm in arms:
        same = results.planned(arm=arm, data_set=block.data_set, budget=block.budget, fold=str(run["fold"]))
        same.sort(key=lambda other: other["seed"] != run["seed"])
        runs = results.folder / "runs"
        there = [output_file(runs / other["name"] / "predictions", case, ".nii.gz") for other in same]
        there = [file for file in there if file.is_file()]
        if not there:
            without.append(arm)
        elif len(files) < _MOST_COLUMNS:
            files[arm] = there[0]
    title = f"{kind} kept case, {case}, DSC {number(value)} % over seeds, fold {run['fold']}"
    missing = f" Not kept by {', '.join(without)}." if without else ""
    if not files:
        return [Text(f"The {title}: its prediction is gone.", "note")]
    names = label_names(results.about["data_sets"][block.data_set].get("labels"))
    try:
        maps = {"label": entry["label"], **files}
        content = png(draw_planes(entry["image"][0], maps, labels=names, planes=("axial", "coronal")))
    except (OSError, ValueError, KeyError, IndexError, ImageFileError) as error:
        return [Text(f"The {title}, cannot be drawn: {error}", "note")]
    name = f"case_{plain_name(block.data_set)}_{kind}.png"
    told = f"The {title}: scan, label, and predictions of {', '.join(files)}.{missing}"
    parts: list[Part] = [Picture(name, content, told, caption=True)]
    if kind != "median":
        leading = dict(list(files.items())[:1])
        parts.append(volume_part(entry["image"][0], {"label": entry["label"], **leading}, labels=names, title=title))
    return parts


def _case_table(results: Results, block: Block, arm: str) -> Part:
    """Return where the best and the worst cases are, to be opened in a viewer."""
    entries: dict[tuple[int, str], Any] = {}
    for run in results.planned(arm=arm, data_set=block.data_set, budget=block.budget):
        cases = results.finished.get(run["name"], {}).get("cases", {})
        entries |= {(run["fold"], case): entry for case, entry in cases.items()}
    rows = []
    for kind, row, value in best_and_worst(block, arm):
        files = ", ".join(map(str, entries[block.rows[row]].get("image", [])))
        rows.append([kind, block.rows[row][1], number(value), str(block.groups[row] or ""), files])
    caption = "best and worst unseen cases, over all seeds"
    return Table(["", "case", "DSC, %", "group", "file"], rows, caption, words=True)
