# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Published numbers of the data sets and arms of a study, to be shown in tables of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.document import Heading, Part, Table, Text

from ..studies.cards import PUBLISHED, Published, published
from .cells import Cell
from .tables import BACKBONES, TITLES, number

__all__ = ["published_part"]

_NOT_COMPARABLE = (
    "These are not measured here and not comparable with the tables above: other splits of the cases, other releases "
    "of the data, other lengths of training and, unless the settings below say otherwise, larger networks and patches. "
    "They enter no mean, rank or test of this report."
)


def published_part(about: Mapping[str, Any], cells: Sequence[Cell] = (), path: Path = PUBLISHED) -> list[Part]:
    """Return the published rows of the study's methods and backbones on its data sets, or a sentence if there are none.

    Args:
        about: content of study.json.
        cells: of the main tables, for the columns of what was measured here.
        path: of the published numbers.
    """
    parts: list[Part] = [Heading("Published numbers", short="Published")]
    known = published(path)
    arms = {_identity(arm) for arm in about["arms"].values()}
    tables: list[Part] = []
    for told in known.tables.values():
        if told.kind != "data_set":
            continue
        columns = {
            name: own for name in told.columns if (own := _data_set(name, known, about["data_sets"])) is not None
        }
        rows = [
            row
            for row in told.rows
            if (row.method, row.backbone) in arms and any(row.values[name] is not None for name in columns)
        ]
        if not rows:
            continue
        metric = TITLES.get(told.metric, told.metric)
        heads = ["published", "network", "epochs", "grade"]
        for name, own in columns.items():
            heads += [f"{known.about(name)['name'] or name}, {metric}, published", f"{own}, here"]
        lines = []
        for row in rows:
            line = [row.label + (f", {row.variant}" if row.variant else ""), BACKBONES.get(str(row.backbone), "")]
            line += [str(row.epochs or "not said"), row.grade]
            for name, own in columns.items():
                value = row.values[name]
                here = _measured(about, cells, (row.method, row.backbone), own, told.metric)
                line += ["–" if value is None else f"{value:g}", here]
            lines.append(line)
        source = known.sources[told.source]["citation"]
        note = " ".join(told.note.split())
        tables.append(Table(heads, lines, caption=told.title))
        tables.append(Text(f"{source}. Grade {told.grade}: {known.grades[told.grade]} {note}".strip(), "note"))
    if not tables:
        return [*parts, Text("For the data sets and arms of this study, no published number is known.")]
    return [*parts, Text(_NOT_COMPARABLE), *tables]


def _identity(arm: Mapping[str, Any]) -> tuple[str, str]:
    return "scratch" if arm["weights"] == "scratch" else str(arm["method"]), str(arm["backbone"])


def _data_set(column: str, known: Published, data_sets: Mapping[str, Any]) -> str | None:
    """Return the study's data set that a column is about, by the code of its card or its own name."""
    names = {column.lower(), str(known.about(column)["card"] or column).lower()}
    for name, data in data_sets.items():
        if names & {name.lower(), str(data.get("card", {}).get("code") or name).lower()}:
            return name
    return None


def _measured(
    about: Mapping[str, Any], cells: Sequence[Cell], who: tuple[str | None, str | None], data_set: str, metric: str
) -> str:
    """Return what the study's own arms of a method and backbone reach with the budget that has most cases."""
    own = [c for c in cells if c.column == data_set and c.metric == metric and _identity(about["arms"][c.arm]) == who]
    if not own:
        return "–"
    most = max((cell.budget for cell in own), key=lambda name: math.inf if name == "all" else float(name))
    return "; ".join(f"{number(cell.value)} ({cell.arm})" for cell in own if cell.budget == most)
