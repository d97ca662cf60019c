# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pages and model cards of distributed bundles: true where the bundle is, and nothing else is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from monai.bundle import ConfigParser

from common.files import sha256, write_json
from common.networks import ResEncUNet
from common.settings import unknown_settings
from common.weights import write_checkpoint
from tools.exporting.configs import Derived
from tools.exporting.distribution import Carried, write_bundle

from ..conftest import BUNDLES, ROOT

SIZES: dict[str, Any] = {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1]}


def front_matter(folder: Path) -> dict[str, Any]:
    """Return what the Hub indexes, after its client has read it and written it again."""
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert str(card) == text
    return dict(card.data.to_dict())


def commands(text: str) -> list[list[str]]:
    """Return the commands of the code blocks, cut into words."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if re.match(r"(python|torchrun|pip|cd) ", line)]


def check_commands(text: str, folder: Path) -> None:
    """Every command names files of the folder and settings that its configs have."""
    found = commands(text)
    assert len(found) > 8
    for words in found:
        if words[0] in ("pip", "cd"):
            continue
        start = words.index("monai.bundle")
        verb = words[start + 1]
        assert words[start - 1] == "-m"
        assert verb in ("run", "download", "download_large_files"), words
        if verb != "run":
            continue
        options = dict(zip(words[start + 2 :: 2], words[start + 3 :: 2], strict=False))
        files = re.findall(r"[\w./]+\.\w+", options["--config_file"])
        assert files
        for file in files:
            assert (folder / file).is_file(), file
        known = ConfigParser.load_config_files([str(folder / file) for file in files])
        given = [word.removeprefix("--") for word in words[start + 2 :] if word.startswith("--")]
        assert unknown_settings(given, known) is None, words


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_page_is_true_where_the_bundle_is(bundle: str, tmp_path: Path) -> None:
    folder = write_bundle(bundle, tmp_path / bundle, settings={})
    about = front_matter(folder)
    assert about["license"] == "apache-2.0", "no weights are in here"
    assert (about["library_name"], about["pipeline_tag"], about["language"]) == ("monai", "image-segmentation", "en")
    assert "base_model" not in about
    assert len(about["tags"]) == len(set(about["tags"])) > 6
    for page in ("README.md", "docs/README.md", "docs/settings.md"):
        text = (folder / page).read_text()
        for link in re.findall(r"\]\((?!https://arxiv\.org/abs/\d{4}\.\d{5}\))([^)]*)\)", text):
            assert ((folder / page).parent / link).is_file(), f"{page}: {link}"
        for absent in (f"bundles/{bundle}", "../", ".yaml", "common/", "repository root"):
            assert absent not in text, f"{page}: {absent}"
        for tool in re.finditer(r"tools/\w+\.py[^`|]*`?", text):
            assert text[tool.end() :].lstrip().startswith("(of the collection)") or "of the collection" in tool[0]
        for file in re.findall(r"configs/\w+\.json", text):
            assert (folder / file).is_file(), f"{page}: {file}"
    card, page = ((folder / name).read_text() for name in ("README.md", "docs/README.md"))
    assert card.split("---\n", 2)[2].lstrip().splitlines()[0] == page.splitlines()[0]
    check_commands(card, folder)
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    pins = {f"{name}=={version}" for name, version in metadata["required_packages_version"].items()}
    assert {"monai==1.6.1", "huggingface_hub", *pins} <= set(commands(card)[0])
    published = yaml.safe_load((ROOT / "bundles" / bundle / "large_files.yml").read_text())["large_files"]
    assert ("import_checkpoint.py" in card) == bool(published)


def encoder(folder: Path, **about: Any) -> Path:
    file = folder / "encoder.pt"
    write_checkpoint(ResEncUNet(**SIZES).state_dict(), file)
    write_json(
        {"sha256": sha256(file), "settings": {"bundle": "mae_resenc_l", **SIZES}} | about, file.with_suffix(".json")
    )
    return file


def model(folder: Path) -> Path:
    file = folder / "model.pt"
    write_checkpoint(ResEncUNet(1, 2, **SIZES).state_dict(), file)
    write_json({"settings": {"labels": ["background", "foreground"], **SIZES}}, file.with_suffix(".json"))
    return file


ADDRESS = "https://huggingface.co/AnonRes/ResEncL-OpenMind-MAE/resolve/main/checkpoint_final.pth"
PUBLISHED = {"licence": "CC-BY-4.0, Wald et al.", "source": f"/home/me/checkpoint_final.pth (for {ADDRESS})"}
UNKNOWN = {"licence": "that of its source (published OpenMind weights: CC-BY-4.0)", "source": "/home/me/final.pth"}
OWN = {"licence": "yours: trained on your data"}


def test_a_card_says_of_a_strangers_encoder_what_it_is(tmp_path: Path) -> None:
    source = "https://huggingface.co/MIC-DKFZ/nnFoundationCNN"
    about = {"method": "unknown", "backbone": "ResEnc-L", "name": "nnFoundation", "licence": "CC-BY-SA-4.0"}
    carried = Carried(encoder=encoder(tmp_path, **about, source=source, citation=[]))
    folder = write_bundle("mae_resenc_l", tmp_path / "mae_resenc_l", settings=SIZES, carried=carried)
    found, card = front_matter(folder), (folder / "README.md").read_text()
    assert (found["license"], found["base_model"]) == ("cc-by-sa-4.0", "MIC-DKFZ/nnFoundationCNN")
    assert "datasets" not in found
    assert "mae" not in found["tags"]
    assert "not pre-trained by MAE, as far as is known: ResEnc-L encoder, method unknown (nnFoundation)" in card
    stated = (folder / "docs" / "data_license.txt").read_text()
    assert "demands share-alike" in stated
    assert "https://creativecommons.org/licenses/by-sa/4.0/" in stated
    receipt = json.loads((folder / "models" / "pretrained_encoder.json").read_text())
    assert (receipt["method"], receipt["licence"], receipt["name"]) == ("unknown", "CC-BY-SA-4.0", "nnFoundation")


@pytest.mark.parametrize(
    ("about", "trained", "licence", "told", "origin"),
    [
        (PUBLISHED, False, "cc-by-4.0", "CC-BY-4.0, Wald et al", ADDRESS),
        (UNKNOWN, False, "other", "that of its source (published OpenMind weights: CC-BY-4.0)", "final.pth"),
        (OWN, False, "other", "that of whoever trained them, not stated here", "encoder.pt"),
        (
            *(PUBLISHED, True, "other"),
            "that of whoever trained them, not stated here; of the pre-trained encoder CC-BY-4.0, Wald et al",
            ADDRESS,
        ),
        (None, True, "other", "that of whoever trained them, not stated here", None),
    ],
)
def test_code_and_weights_have_licences_of_their_own(
    about: dict[str, Any] | None, trained: bool, licence: str, told: str, origin: str | None, tmp_path: Path
) -> None:
    """Nobody's weights are given away under the licence of the code."""
    folder = write_bundle(
        "mae_resenc_l",
        tmp_path / "mae_resenc_l",
        settings=SIZES,
        carried=Carried(
            encoder=encoder(tmp_path, **about) if about else None,
            model=model(tmp_path) if trained else None,
            address="https://host.example/weights",
        ),
    )
    found, card = front_matter(folder), (folder / "README.md").read_text()
    assert found["license"] == licence
    assert ("license_name" in found) == (licence == "other")
    assert found.get("datasets") == (["MIC-DKFZ/OpenMind"] if about is PUBLISHED else None)
    assert found.get("base_model") == ("MIC-DKFZ/ResEncL-OpenMind-MAE" if about is PUBLISHED else None)
    assert f"Licence of the weights: {told}." in card
    assert "Licence of the code: Apache-2.0 (`LICENSE`)" in card
    assert "python -m monai.bundle download_large_files --bundle_path .\n" in card
    stated = (folder / "docs" / "data_license.txt").read_text()
    assert f"Licence of the weights in models/: {told}.\n" in stated
    assert ("was translated from" in stated) == (about is PUBLISHED)
    assert ".." not in stated + card.replace("...", "")
    assert ("fine-tune before you predict" in card) == (not trained)
    if about:
        receipt = (folder / "models" / "pretrained_encoder.json").read_text()
        assert str(tmp_path) not in receipt + card
        assert "/home/me" not in receipt
        assert json.loads(receipt)["source"] == origin


def test_the_page_of_a_task_takes_its_labels_as_they_are_set(tmp_path: Path) -> None:
    derived = Derived("gliomas", ["background", "edema", "core"], ["T1", "FLAIR"])
    settings = SIZES | {"labels": derived.labels, "channels": 2}
    folder = write_bundle(
        "mae_resenc_l", tmp_path / "gliomas", settings=settings, carried=Carried(from_scratch=True), derived=derived
    )
    card = (folder / "README.md").read_text()
    assert front_matter(folder)["license"] == "apache-2.0", "a random network is nobody's work"
    assert "# gliomas: edema, core\n" in card
    assert "is a random network: train before you predict" in card
    assert not [words for words in commands(card) if "--labels" in words]
    check_commands(card, folder)
