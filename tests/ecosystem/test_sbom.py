# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The list of packages and weights in an export: valid, complete, and the same for the same bundle."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from common.files import sha256
from tools.commanding.locks import normal
from tools.exporting.configs import Derived
from tools.exporting.distribution import Carried, write_bundle
from tools.exporting.sbom import SBOM

from .conftest import narrow_settings, write_encoder

BUNDLE = "mae_resenc_l"


def read(folder: Path) -> dict[str, Any]:
    text = (folder / SBOM).read_text("utf-8")
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert problem is None, str(problem.data.message)
    return json.loads(text)


def test_the_weights_are_listed_with_digest_and_licence(exported: Callable[[str], Path]) -> None:
    folder = exported(BUNDLE)
    content = read(folder)
    models = [part for part in content["components"] if part["type"] == "machine-learning-model"]
    assert {part["name"] for part in models} == {"models/model.pt", "models/pretrained_encoder.pt"}
    for part in models:
        assert part["hashes"] == [{"alg": "SHA-256", "content": sha256(folder / part["name"])}]
        assert part["licenses"][0]["license"]["name"] in (
            "yours: trained on your data",  # as the JSON beside the encoder says
            "that of whoever trained them, not stated here",
        )
    assert content["metadata"]["component"]["name"] == BUNDLE
    assert "timestamp" not in content["metadata"]


def test_the_packages_are_those_that_the_bundle_requires_and_all_that_these_need(
    exported: Callable[[str], Path],
) -> None:
    folder = exported(BUNDLE)
    content = read(folder)
    needs = {part["ref"]: part["dependsOn"] for part in content["dependencies"]}
    packages = {part["purl"]: part for part in content["components"] if part["type"] == "library"}
    assert len(packages) > 50
    assert {ref for refs in needs.values() for ref in refs} == {*needs} - {BUNDLE} | {
        part["name"] for part in content["components"] if "purl" not in part
    }
    metadata = json.loads((folder / "configs" / "metadata.json").read_text("utf-8"))
    direct = metadata["required_packages_version"] | {"torch": metadata["pytorch_version"], "monai": "1.6.1"}
    assert {f"pkg:pypi/{normal(name)}@{version}" for name, version in direct.items()} < {*needs[BUNDLE]}
    compared = 0
    for reference, part in packages.items():
        try:
            distribution = importlib.metadata.distribution(part["name"])
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.version.split("+")[0] != part["version"]:
            continue
        asked = [Requirement(line) for line in distribution.requires or []]
        here = {normal(one.name) for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})}
        assert here <= {ref.removeprefix("pkg:pypi/").split("@")[0] for ref in needs[reference]}, reference
        compared += 1
    assert compared > 20


def test_a_bundle_of_ones_own_is_listed_under_its_name_and_with_the_time_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    encoder = write_encoder(BUNDLE, tmp_path / "encoder.pt", narrow_settings(BUNDLE))
    about = json.loads(encoder.with_suffix(".json").read_text())
    about |= {"licence": "CC-BY-4.0, Wald et al.", "source": "https://huggingface.co/AnonRes/ResEncL-OpenMind-MAE"}
    encoder.with_suffix(".json").write_text(json.dumps(about))
    for number, moment in enumerate([None, "1000000000", "1000000000"]):
        if moment:
            monkeypatch.setenv("SOURCE_DATE_EPOCH", moment)
        folder = tmp_path / str(number) / "lesions"
        derived = Derived("lesions", ["background", "lesion"])
        write_bundle(
            BUNDLE, folder, settings=narrow_settings(BUNDLE), carried=Carried(encoder=encoder), derived=derived
        )
        content = read(folder)
        assert content["metadata"]["component"]["name"] == "lesions"
        (part,) = (part for part in content["components"] if part["name"] == "models/pretrained_encoder.pt")
        assert part["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]
        assert part["externalReferences"][0]["url"] == "https://huggingface.co/AnonRes/ResEncL-OpenMind-MAE"
        texts.append((folder / SBOM).read_text())
    assert "2001-09-09T01:46:40" in texts[1]
    assert texts[1] == texts[2] != texts[0]
