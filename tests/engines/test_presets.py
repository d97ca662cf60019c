# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Presets change what nobody said; what an encoder was made with need not be said, and is not contradicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from common.bundles import FOLDER, bundle_name, read_config
from common.engines.presets import chosen_settings, preset_settings
from common.errors import SettingsError
from common.files import write_record

from ..conftest import BUNDLES, ROOT

NARROW = {
    "resenc_l": {"features_per_stage": [8, 16], "blocks_per_stage": [1, 1]},
    "primus_m": {"embed_dim": 24, "depth": 1},
}


def parser(kind: str, backbone: str, method: str = "mae", **settings: Any) -> tuple[ConfigParser, Any]:
    config = read_config(ROOT / "bundles" / f"{method}_{backbone}" / "configs" / f"{kind}.yaml")
    found = ConfigParser(config | {"bundle_root": str(ROOT / "bundles" / f"{method}_{backbone}")} | settings)
    return found, config["settings_check"]["presets"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_published_is_what_the_configs_say_and_small_changes_what_they_have(bundle: str) -> None:
    backbone = "primus_m" if bundle.endswith("primus_m") else "resenc_l"
    for kind in ("pretrain", "train", "train_classification", "features"):
        config = read_config(ROOT / "bundles" / bundle / "configs" / f"{kind}.yaml")
        assert config["settings_check"]["presets"] == [kind, backbone]
        published = preset_settings(kind, backbone, "published", bundle)
        own = {name: value for name, value in published.items() if name in config}
        assert own == {name: config[name] for name in own}
        assert published.keys() - own.keys() <= {"block_size"}
        if kind == "features":
            continue
        small = preset_settings(kind, backbone, "small", bundle)
        assert small.keys() <= published.keys(), "else nobody could see whether it was changed"
        given = ConfigParser(
            config | {"preset": "small", "bundle_root": str(ROOT / "bundles" / bundle), "pretrained": "none.pt"}
        )
        chosen = chosen_settings(given, [kind, backbone], set())
        assert chosen == {name: value for name, value in small.items() if name in config}
    assert len(list(FOLDER.glob("preset_*.yaml"))) == 4
    assert bundle_name(ROOT / "bundles" / bundle) == bundle


def test_what_is_said_stands_above_a_preset() -> None:
    found, presets = parser("pretrain", "resenc_l", preset="small", patch_size=[32, 32, 32])
    chosen = chosen_settings(found, presets, {"batch_size"})
    assert {"patch_size", "batch_size"} & chosen.keys() == set(), "by the config that somebody changed, and by the call"
    assert chosen["epochs"] == 10
    assert chosen_settings(found, json.dumps({"small": {"epochs": 3}, "published": {"epochs": 1000}}), set()) == {
        "epochs": 3
    }
    assert chosen_settings(*parser("pretrain", "resenc_l"), set()) == {}
    with pytest.raises(SettingsError, match="there is no preset 'smal'; did you mean small"):
        chosen_settings(*parser("pretrain", "resenc_l", preset="smal"), set())


@pytest.mark.parametrize("backbone", NARROW)
@pytest.mark.parametrize("kind", ["train", "train_classification", "features"])
def test_an_encoder_says_how_it_was_made(
    backbone: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = NARROW[backbone] | {"patch_size": [64, 64, 32], "spacing_mm": 2.0, "reorient": False}
    write_record({"settings": made}, tmp_path / "encoder.json")
    encoder = str(tmp_path / "encoder.pt")
    network = NARROW[backbone]
    crop = {} if kind == "train_classification" else {"patch_size": [64, 64, 32]}
    expected = network | crop | {"spacing_mm": 2.0, "reorient": False}
    found, presets = parser(kind, backbone, pretrained=encoder)
    assert chosen_settings(found, presets, set()) == expected
    assert f"as {encoder} was made, by the JSON beside it: " in capsys.readouterr().out
    assert chosen_settings(found, presets, {"spacing_mm"}) == {
        name: each for name, each in expected.items() if name != "spacing_mm"
    }
    name, value = next(iter(network.items()))
    other = [value[0] * 2, *value[1:]] if isinstance(value, list) else value * 2
    with pytest.raises(SettingsError, match=rf"was made with {name} .* and --{name} says .*; leave it out"):
        chosen_settings(*parser(kind, backbone, pretrained=encoder, **{name: other}), set())
    assert chosen_settings(*parser(kind, backbone, pretrained=encoder, **expected), set()) == {}
    assert chosen_settings(*parser(kind, backbone, pretrained=encoder, from_scratch=True), set()) == {}
    if kind == "train":
        assert network.keys().isdisjoint(
            chosen_settings(*parser(kind, backbone, pretrained=encoder, allow_partial=True), set())
        )
        small = chosen_settings(*parser(kind, backbone, pretrained=encoder, preset="small"), set())
        assert (small["patch_size"], small["epochs"]) == ([48, 48, 48], 20), "crops and budget are the preset's"
        assert {name: small[name] for name in network} == network, "the network is the encoder's"


def test_a_published_crop_leaves_that_of_fine_tuning(tmp_path: Path) -> None:
    for method, crop in (("voco", [256, 256, 64]), ("simclr", [192, 192, 64]), ("mae", [160, 160, 160])):
        write_record({"settings": {"patch_size": crop, "crop_size": 64}}, tmp_path / "encoder.json")
        assert (
            chosen_settings(*parser("train", "resenc_l", method, pretrained=str(tmp_path / "encoder.pt")), set()) == {}
        )
