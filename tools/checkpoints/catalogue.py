# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The catalogue of known public checkpoints, catalogue.yaml beside this: read, searched and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.weights import Known
from common.weights.cells import backbone_of
from common.weights.origins import licence_terms

from ..commanding.environment import ROOT

__all__ = ["by_digest", "by_repository", "checkpoints", "table", "told"]

_FILE = Path(__file__).with_name("catalogue.yaml")
_SEEN = {
    "page": "its page was seen",
    "reported": "others name it",
    "pattern": "its name follows from others",
}


@cache
def checkpoints() -> tuple[Known, ...]:
    """Return all entries."""
    content = yaml.safe_load(_FILE.read_text("utf-8"))
    found = []
    for entry in content["checkpoints"]:
        shared: dict[str, Any] = content["groups"].get(entry.get("group"), {})
        whole = {**shared, **entry}
        whole.pop("group", None)
        lists = {name: tuple(whole[name]) for name in ("citation", "inferred") if name in whole}
        found.append(Known(**{**whole, **lists}))
    return tuple(found)


def by_repository(repository: str, file: str = "") -> Known | None:
    """Return the entry of a file in a repository of the hub, by its present or an earlier name."""
    for known in checkpoints():
        same = repository in (known.repository, known.former)
        if same and (not file or known.file is None or fnmatchcase(file, known.file)):
            return known
    return None


def by_digest(digest: str) -> Known | None:
    """Return the entry of a file, by what others reported of it or the digest of the first that a bundle imported."""
    for known in checkpoints():
        if digest == known.sha256:
            return known
    for path in sorted(ROOT.glob("bundles/*/large_files.yml")):
        for file in yaml.safe_load(path.read_text("utf-8"))["large_files"]:
            if file.get("hash_val") == digest:
                return next((known for known in checkpoints() if f"/{known.repository}/" in file["url"]), None)
    return None


def told(known: Known) -> list[str]:
    """Return the cells of an entry in a table."""
    terms = " and ".join(term.split(" ", 2)[2].split(":")[0] for term in licence_terms(known.licence))
    certainty = _SEEN[known.seen] + (f"; inferred: {', '.join(known.inferred)}" if known.inferred else "")
    order = "" if known.backbone != "primus_m" else known.token_order or "not known"
    return [
        known.repository
        if known.file == "checkpoint_final.pth"
        else f"{known.repository}, {known.file or 'file not known'}",
        known.backbone if known.backbone != "other" else f"none here: {known.note}",
        known.method,
        known.data,
        known.licence + (f" ({terms})" if terms else ""),
        order,
        certainty + (f"; {known.note}" if known.note and known.backbone != "other" else ""),
    ]


def table(bundle: str | None = None) -> Iterator[str]:
    """Yield the catalogue as lines of a Markdown table, all of it or what fits a bundle."""
    heads = [
        "checkpoint",
        "backbone",
        "method, in its authors' words",
        "trained on",
        "licence",
        "token order",
        "certainty",
    ]
    yield _row(heads)
    yield "|" + "---|" * len(heads)
    for known in checkpoints():
        if bundle is None or known.backbone == backbone_of(bundle):
            yield _row(told(known))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
