# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The bundles, and what weights and models of them are at hand; needs nothing but Python."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..commanding.ending import config_command, end, model_command
from ..commanding.environment import kept
from .options import BUNDLES
from .settings import ListBundles
from .weights import ENCODER, address

__all__ = ["list_bundles"]


def list_bundles(settings: ListBundles) -> None:
    """Print a line for each bundle, and one for each encoder and model that is here."""
    rows = [("bundle", "method and network", "published weights", "encoder here")]
    for path in sorted(BUNDLES.glob("*/configs/metadata.json")):
        bundle = path.parent.parent.name
        name = json.loads(path.read_text("utf-8"))["name"]
        source = address(bundle)
        there = "/".join(source.split("/")[3:5]) if source else "none: to be pre-trained here"
        rows.append((bundle, name, there, _here(kept(bundle) / "models" / ENCODER)))
    print(_table(rows))
    for line in _runs(settings.folder):
        print(line)
    end(following=_following(settings.folder))


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _here(file: Path) -> str:
    if not file.is_file():
        return "no"
    about = _beside(file)
    source = str(about.get("source") or "")
    return f"{file.stat().st_size / 1e6:.0f} MB" + (f", {source}" if source else "")


def _beside(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _following(folder: Path) -> str:
    """Return what is done with the newest model or encoder of the runs, or with a kept encoder, or first of all."""
    models = [file for file in folder.glob("*/models/model.pt") if _beside(file).get("settings", {}).get("bundle")]
    if models:
        newest = max(models, key=_changed)
        return model_command(_beside(newest)["settings"]["bundle"], newest, "IMAGES")
    known = [path.parent.parent.name for path in sorted(BUNDLES.glob("*/configs/metadata.json"))]
    runs = [bundle for bundle in known if (folder / bundle / "models" / ENCODER).is_file()]
    if runs:
        newest_run = max(runs, key=lambda bundle: _changed(folder / bundle / "models" / ENCODER))
        return config_command(newest_run, "train", "LABELLED_FOLDER", "--labels", "background,NAMES")
    for bundle in known:
        if (kept(bundle) / "models" / ENCODER).is_file():
            return config_command(bundle, "train", "LABELLED_FOLDER", "--labels", "background,NAMES")
    return config_command("mae_resenc_l", "pretrain", "FOLDER")


def _changed(file: Path) -> float:
    return file.stat().st_mtime


def _runs(folder: Path) -> Iterator[str]:
    """Yield what was made in runs."""
    for file in sorted(folder.glob("*/models/*.pt")):
        if file.name == ENCODER:
            yield f"{file}: {_here(file)}"
        elif file.name == "model.pt":
            told = _beside(file).get("settings", {})
            labels = told.get("labels", [])
            yield f"{file}: {told.get('bundle', 'unknown bundle')}, segments {', '.join(map(str, labels))}"
        elif file.name == "classifier.pt":
            told = _beside(file).get("settings", {})
            yield f"{file}: {told.get('bundle', 'unknown bundle')}, tells {told.get('target', 'classes')}"
