# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The page about the architecture names what is there."""

from __future__ import annotations

import itertools
import re

from .conftest import ROOT
from .test_imports import DATA, LAYERS

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
FOLDERS = [ROOT, ROOT / "bundles" / "mae_resenc_l", *(ROOT / "common" / name for name in ("weights", "data/listing"))]
WRITTEN = {"models/pretrained_encoder.pt", "models/model.pt", "model.json", "train.yaml"}  # by runs, or of a bundle


def test_every_path_is_there() -> None:
    named = re.findall(r"`([\w.*/-]+)`", PAGE)
    paths = {name for name in named if "/" in name or re.search(r"\.(py|md|yaml|json|pt)$", name)}
    assert len(paths) > 50
    assert paths > WRITTEN
    lost = [name for name in paths - WRITTEN if not any(list(folder.glob(name)) for folder in FOLDERS)]
    assert lost == []
    assert "docs/architecture.md" in (ROOT / "README.md").read_text("utf-8")


def test_it_is_two_pages_and_answers_ten_questions() -> None:
    lines = PAGE.splitlines()
    assert len(lines) <= 110
    assert sum(max(1, len(line) / 120) for line in lines) <= 130
    questions = PAGE.partition("## Ten questions")[2].strip().splitlines()[2:]
    assert len(questions) == 10
    for question in questions:
        assert re.search(r"`[\w/]+\.(py|yaml)`", question), question


def test_the_order_of_imports_is_the_one_that_is_held() -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith("    engines >"))
    levels = [[name.strip() for name in level.split(",")] for level in line.split(">")]
    places = [[LAYERS.index(name) for name in level] for level in reversed(levels)]
    for lower, higher in itertools.pairwise(places):
        assert max(lower) < min(higher)
    way = re.findall(r"^\d\. \*\*\w+\*\*, `common/data/(\w+)/`", PAGE, re.M)
    assert way == [name for name in DATA if name in way]
    assert len(way) == 5
