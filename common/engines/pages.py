# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pages of an evaluation and of predictions: volumes to look through first, then tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.listing.descriptions import segmentation_task
from ..document import Heading, Part, Picture, Table, Text, Volume, write_html
from ..errors import SettingsError, disk_is_full
from ..metrics import known_mean
from ..metrics.groups import GROUPS_PICTURE, group_sentences, group_table_rows, group_title
from ..metrics.reports import summary_rows, units_of
from ..viewing import read_scene

__all__ = [
    "PAGE",
    "groups_parts",
    "label_names",
    "volume_part",
    "write_evaluation_page",
    "write_prediction_page",
]

PAGE = "report.html"
_MOST_ROWS = 500  # of the table of cases


def label_names(labels: Any) -> dict[int, str]:
    """Return the names of the values of a label map, none where they are not told."""
    try:
        return segmentation_task(labels or []).by_value
    except SettingsError:
        return {}


def volume_part(
    image: str | Path | None,
    maps: Mapping[str, str | Path],
    *,
    labels: Sequence[str] | Mapping[int, str],
    title: str,
) -> Part:
    """Return a volume to look through, or a sentence on why it cannot be shown.

    Args:
        image: volume; None shows the maps alone.
        maps: label maps on its grid, by name.
        labels: names of their values.
        title: above it.
    """
    try:
        return Volume(read_scene(image, maps, labels=labels, title=title))
    except Exception as error:
        if disk_is_full(error):
            raise
        return Text(f"{title}: cannot be shown ({error})", "note")


def write_evaluation_page(
    folder: Path,
    cases: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    *,
    structures: Mapping[str, Sequence[int]],
    tolerance_mm: float,
    groups: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.html``: the best and the worst case to look through, the means, and every case.

    Args:
        folder: where ``scores.png`` is.
        cases: ``case``, ``prediction``, ``reference``, ``image`` (None if it is not known) and ``scores`` of each.
        summary: of all.
        structures: classes or regions, and the label values of each.
        tolerance_mm: of NSD.
        groups: scores of groups, as :func:`common.metrics.group_scores` returns them.
    """
    means = {one["case"]: float(known_mean(np.array([s["dice"] for s in one["scores"].values()]))) for one in cases}
    told = summary["all"]["mean"]["dice"]
    bounds = "" if told["interval"] is None else " [{:.3f}, {:.3f}]".format(*told["interval"])
    lead = "no class is in any case" if told["mean"] is None else f"mean Dice {told['mean']:.3f}{bounds}"
    ranked = sorted((one for one in cases if not math.isnan(means[one["case"]])), key=lambda one: -means[one["case"]])
    shown = (
        {"best case": ranked[0], "worst case": ranked[-1]}
        if len(ranked) > 1
        else dict(zip(["the case"], cases, strict=False))
    )
    names = {
        value: ", ".join(name for name, own in structures.items() if value in own)
        for values in structures.values()
        for value in values
    }
    parts: list[Part] = [
        Text(f"{len(cases)} case(s): {lead}.", "lead"),
        Heading("Cases to look through", short="Cases"),
    ]
    for what, one in shown.items():
        maps = {"reference": one["reference"], "prediction": one["prediction"]}
        title = f"{what}: {one['case']}, mean Dice {means[one['case']]:.3f}"
        parts.append(volume_part(one["image"], maps, labels=names, title=title))
    heads, *rows = summary_rows(summary, tolerance_mm=tolerance_mm, group=group_title(groups or {}))
    caption = f"in brackets: 95 % bootstrap intervals over {units_of(summary)}"
    parts += [Heading("Scores"), Table(heads, rows, caption)]
    parts.append(Picture("scores.png", (folder / "scores.png").read_bytes(), "Dice and NSD of every case", large=False))
    if groups:
        parts += groups_parts(groups, folder / GROUPS_PICTURE, score="mean Dice")
    ordered = [*reversed(ranked), *(one for one in cases if math.isnan(means[one["case"]]))]
    parts += [Heading("Every case, the worst first", short="Every case"), _case_table(ordered, means, list(structures))]
    write_html("Evaluation", parts, folder / PAGE)
    return folder / PAGE


def groups_parts(groups: Mapping[str, Any], picture: Path, *, score: str) -> list[Part]:
    """Return the scores of groups as parts of a page: what they say, a picture and a table.

    Args:
        groups: as :func:`common.metrics.group_scores` returns them.
        picture: as :func:`common.metrics.draw_groups` drew it.
        score: what the score is called.
    """
    parts: list[Part] = [Heading("Groups of cases", short="Groups")]
    parts += [Text(sentence, "note") for sentence in group_sentences(groups)]
    parts.append(Picture(picture.name, picture.read_bytes(), f"{score} of each group", large=False))
    heads = ["", "cases", "patients", f"{score} [95 %]"]
    return [
        *parts,
        Table(heads, group_table_rows(groups), "intervals: bootstrap over patients; gaps: all pairs at once"),
    ]


def _case_table(cases: Sequence[Mapping[str, Any]], means: Mapping[str, float], names: Sequence[str]) -> Table:
    def cell(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.3f}"

    rows = [
        [one["case"], cell(means[one["case"]]), *(cell(one["scores"][name]["dice"]) for name in names)]
        for one in cases[:_MOST_ROWS]
    ]
    left = len(cases) - len(rows)
    caption = "Dice" + (f"; {left} further cases are in scores.csv" if left else "")
    return Table(["case", "mean", *names], rows, caption)


def write_prediction_page(
    folder: Path, cases: Sequence[tuple[str, str, Path]], *, labels: Sequence[str] | Mapping[int, str], told: str
) -> None:
    """Write ``report.html`` with the first predictions to look through; a case that cannot be shown is named.

    Args:
        folder: of the predictions.
        cases: name, image file and predicted file of each to show.
        labels: names of the label values.
        told: what was predicted, in a sentence.
    """
    parts: list[Part] = [Text(f"{told}.", "lead")]
    parts += [volume_part(image, {"prediction": file}, labels=labels, title=name) for name, image, file in cases]
    parts.append(Text("Nothing here says how good they are: evaluate.yaml scores them where there are labels.", "note"))
    try:
        write_html("Predictions", parts, folder / PAGE)
    except OSError as error:
        if disk_is_full(error):
            raise
        tqdm.write(f"note: no page of the predictions ({error})")
