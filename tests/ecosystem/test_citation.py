# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""CITATION.cff, which GitHub and Zenodo read."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from common.weights.cells import describe

from ..conftest import BUNDLES, ROOT


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


def test_it_names_this_version(citation: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= citation.keys()


def test_it_names_the_papers_that_the_collection_rests_on(citation: dict[str, Any]) -> None:
    papers = {entry["url"].rsplit("/", 1)[1]: entry for entry in citation["references"]}
    assert papers.keys() == {"2412.17041", "2410.23132", "2503.01835", "2404.09556"}
    for number, paper in papers.items():
        assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]
        assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    cited = {line for bundle in BUNDLES for line in describe(bundle)[2]} | {(ROOT / "README.md").read_text("utf-8")}
    for number, paper in papers.items():
        named = [line for line in cited if number in line]
        assert named
        first = paper["authors"][0]["family-names"]
        assert all(re.search(rf"{first} et al\.", line) for line in named)
        assert any(paper["title"].split(":")[0].lower() in line.lower() for line in named)


def test_it_is_valid() -> None:
    cffconvert = pytest.importorskip("cffconvert")
    cffconvert.Citation((ROOT / "CITATION.cff").read_text("utf-8")).validate()
