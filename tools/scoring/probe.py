# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""See what the frozen features of a bundle's features config tell about your own question, before you trust them."""

from __future__ import annotations

import json
from typing import Any

from common.engines.features import FROZEN_CAVEAT, read_features
from common.engines.probing import ProbeResult, probe_features, read_target
from common.files import write_json
from common.paths import file_name
from common.tables import write_table

from ..commanding.ending import end, tool_command
from .feature_map import draw_map
from .settings import Probe

__all__ = ["probe"]


def probe(settings: Probe) -> None:
    """Probe features."""
    source = settings.features
    beside = source if source.is_dir() else source.parent
    folder = settings.output or beside / f"probe_{file_name(settings.target)}"
    cases, values = read_features(source)
    wanted = read_target(str(settings.table), cases, target=settings.target, group=settings.patient, task=settings.task)
    classes = f"{len(wanted.classes)} classes" if wanted.classes else "numbers"
    print(
        f"probing {wanted.name} ({classes}) of {len(wanted.cases)} cases, {values.shape[1]} features each", flush=True
    )
    how_often = {name: getattr(settings, name) for name in ("folds", "repeats", "resamples", "seed")}
    result = probe_features(values, wanted, **how_often)
    how = draw_map(folder / "map.png", values[wanted.rows], wanted, seed=settings.seed)
    about = beside / "features.json"
    write_json(
        {
            "features": str(source.absolute()),
            "table": str(settings.table.absolute()),
            "target": wanted.name,
            "task": wanted.task,
            "classes": wanted.classes,
            "cases": len(wanted.cases),
            "patients": None if wanted.groups is None else len(set(wanted.groups.tolist())),
            "settings": {**how_often, "patient": settings.patient},
            "folds_used": result.folds,
            "scores": result.metrics,
            "chosen": result.chosen,
            "notes": result.notes,
            "map": how,
            "provenance": json.loads(about.read_text("utf-8")) if about.is_file() else None,
        },
        folder / "probe.json",
    )
    write_table(folder / "probe.csv", *_predictions(result))
    for note in result.notes:
        print(f"note: {note}")
    print(_table(result, settings.repeats))
    print(f"{FROZEN_CAVEAT.split('. ')[0]}.\nwritten: {folder}/probe.json, probe.csv, map.png ({how})")
    following = tool_command("choose", "--data", "LABELLED_FOLDER")
    end(folder / "probe.json", look=folder / "map.png", following=following)


def _table(result: ProbeResult, repeats: int) -> str:
    """Return the scores as text, one line for each model, with intervals."""
    target = result.target
    if target.classes:
        counts = [int((target.values == index).sum()) for index in range(len(target.classes))]
        what = ", ".join(f"{count} {name}" for count, name in zip(counts, target.classes, strict=True))
    else:
        what = f"{target.values.min():g} to {target.values.max():g}, mean {target.values.mean():.4g}"
    whose = "" if target.groups is None else f" of {len(set(target.groups.tolist()))} patients"
    metrics = list(next(iter(result.metrics.values())))
    said = {"baseline": "baseline (most frequent)" if target.classes else "baseline (mean)"}
    rows = [["", *metrics]]
    for name, found in result.metrics.items():
        rows.append([said.get(name, name), *(_cell(found[metric]) for metric in metrics)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    head = (
        f"{target.name} of {len(target.cases)} cases{whose} ({what}); {result.folds} folds, {repeats} time(s); [95 %]"
    )
    return "\n".join([head, *lines])


def _cell(score: dict[str, Any]) -> str:
    if score["estimate"] is None:
        return "undefined"
    interval = score["interval"]
    return f"{score['estimate']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _predictions(result: ProbeResult) -> tuple[list[str], list[list[Any]]]:
    """Return the names of the columns, and a row for every out-of-fold prediction."""
    target = result.target
    columns = ["case", *(["patient"] if target.groups is not None else []), "model", "repeat", "fold", "target"]
    columns += ["prediction", *(f"p_{name}" for name in target.classes)]
    rows: list[list[Any]] = []

    def named(value: Any) -> str:
        return target.classes[int(value)] if target.classes else str(float(value))

    for model, decisions in result.decisions.items():
        for repeat in range(decisions.shape[1]):
            for index, case in enumerate(target.cases):
                member = [target.groups[index]] if target.groups is not None else []
                said = [named(target.values[index]), named(decisions[index, repeat])]
                likely = [f"{p:.6g}" for p in result.scores[model][index, repeat]] if target.classes else []
                rows.append([case, *member, model, repeat, int(result.fold[index, repeat]), *said, *likely])
    return columns, rows
