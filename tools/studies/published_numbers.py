# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Published numbers of the data sets and arms of a study, to be shown in tables of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .document import Heading, Part, Table, Text

__all__ = ["published_part"]

_FILE = Path(__file__).parent / "published.yaml"
_NOT_COMPARABLE = (
    "These are not measured here and not comparable with the tables above: other splits of the cases, other releases "
    "of the data, other lengths of training and, unless the settings below say otherwise, larger networks and patches. "
    "They enter no mean, rank or test of this report."
)


def published_part(about: Mapping[str, Any], path: Path = _FILE) -> list[Part]:
    """Return the published rows of the study's methods and backbones on its data sets, or a sentence if there are none.

    Args:
        about: content of study.json.
        path: of the published numbers.
    """
    parts: list[Part] = [Heading("Published numbers", short="Published")]
    if not path.is_file():
        return [*parts, Text("No file of published numbers is there.")]
    content = yaml.safe_load(path.read_text("utf-8"))
    arms = {("scratch" if a["weights"] == "scratch" else a["method"], a["backbone"]) for a in about["arms"].values()}
    tables: list[Part] = []
    for told in content["tables"].values():
        if told["kind"] != "data_set":
            continue
        columns = {name: i for i, name in enumerate(told["columns"]) if _is_here(name, content, about["data_sets"])}
        rows = [
            row
            for row in told["rows"]
            if (row.get("method"), row.get("backbone")) in arms
            and any(row["values"][i] is not None for i in columns.values())
        ]
        if not columns or not rows:
            continue
        grade = content["grades"][told["grade"]].strip()
        source = content["sources"][told["source"]]["citation"]
        tables.append(
            Table(
                [
                    "published",
                    "network",
                    "epochs",
                    *(f"{_name(name, content)}, {told['metric']}" for name in columns),
                    "grade",
                ],
                [
                    [
                        row["label"] + (f", {row['variant']}" if row.get("variant") else ""),
                        str(row.get("backbone") or ""),
                        str(row.get("epochs") or "not said"),
                        *("–" if row["values"][i] is None else f"{row['values'][i]:g}" for i in columns.values()),
                        str(row.get("grade") or told["grade"]),
                    ]
                    for row in rows
                ],
                caption=told["title"],
            )
        )
        note = " ".join(str(told.get("note") or "").split())
        tables.append(Text(f"{source} Grade {told['grade']}: {grade} {note}".strip(), "note"))
    if not tables:
        return [*parts, Text("For the data sets and arms of this study, no published number is known.")]
    return [*parts, Text(_NOT_COMPARABLE), *tables]


def _is_here(column: str, content: Mapping[str, Any], data_sets: Mapping[str, Any]) -> bool:
    """Return whether a column is one of the study's data sets, by the code or the name of its card."""
    names = {column.lower(), str(content["data_sets"].get(column, {}).get("card") or column).lower()}
    here = [{name.lower(), str(data.get("card", {}).get("code") or name).lower()} for name, data in data_sets.items()]
    return any(names & own for own in here)


def _name(column: str, content: Mapping[str, Any]) -> str:
    return str(content["data_sets"].get(column, {}).get("name") or column)
