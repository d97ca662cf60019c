# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What every bundle's folder must hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from ..conftest import BUNDLES, ROOT

SAME_EVERYWHERE = {
    *(
        "dataset_dir",
        "datalist",
        "output_dir",
        "epochs",
        "iterations_per_epoch",
        "val_iterations",
        "batch_size",
        "patch_size",
    ),
    *(
        "num_workers",
        "device",
        "amp",
        "seed",
        "accumulation_steps",
        "checkpointing",
        "ckpt_dir",
        "store_dir",
        "strict",
        "lr",
    ),
}
SIZES = {"resenc_l": {"features_per_stage", "blocks_per_stage"}, "primus_m": {"embed_dim", "depth", "num_heads"}}


def config(bundle: str, name: str) -> dict:
    return yaml.safe_load((ROOT / "bundles" / bundle / "configs" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("bundle", BUNDLES)
def test_files_and_names(bundle: str) -> None:
    folder = ROOT / "bundles" / bundle
    for file in ("LICENSE", "docs/README.md", "configs/logging.conf", "large_files.yml"):
        assert (folder / file).is_file(), file
    assert (folder / "common").resolve() == ROOT / "common"
    assert not re.search(r".+_v", bundle), "MONAI would split this name"
    assert not Path((folder / "common").readlink()).is_absolute()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_settings_have_the_same_names_everywhere(bundle: str) -> None:
    sizes = SIZES[bundle.split("_", 1)[1]]
    assert config(bundle, "pretrain").keys() >= SAME_EVERYWHERE | sizes
    assert config(bundle, "train").keys() >= SAME_EVERYWHERE - {"val_iterations", "store_dir"} | sizes
    assert config(bundle, "inference").keys() >= sizes | {"labels", "mirror_axes", "model"}
    for name in ("pretrain", "train", "inference", "evaluate"):
        assert config(bundle, name)["run"][0] == "@settings_check"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_defaults_are_the_published_recipe(bundle: str) -> None:
    pretrain, train = config(bundle, "pretrain"), config(bundle, "train")
    budget = [
        "epochs",
        "iterations_per_epoch",
        "val_iterations",
        "batch_size",
        "patch_size",
        "hidden_ratio",
        "spacing_mm",
    ]
    assert [pretrain[key] for key in budget] == [1000, 250, 50, 8, [160] * 3, 0.75, 1.0]
    assert [train[key] for key in ("epochs", "iterations_per_epoch", "batch_size")] == [150, 250, 2]
    optimizer = pretrain["optimizer"]
    if "resenc" in bundle:
        assert [
            pretrain[k] for k in ("lr", "weight_decay", "momentum", "clip_norm", "warmup_epochs", "block_size")
        ] == [*(1e-2, 3e-5, 0.99, 12, 0, 16)]
        assert optimizer["_target_"] == "torch.optim.SGD"
        assert optimizer["nesterov"] is True
    else:
        assert [
            pretrain[k] for k in ("lr", "weight_decay", "clip_norm", "warmup_epochs", "token_size", "drop_path")
        ] == [*(3e-4, 5e-2, 1, 50, 8, 0.2)]
        assert optimizer["_target_"] == "torch.optim.AdamW"
        assert optimizer["betas"] == [0.9, 0.98]
        assert train["drop_path"] == 0.0


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_is_valid_and_agrees_with_the_configs(bundle: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    metadata = json.loads((ROOT / "bundles" / bundle / "configs" / "metadata.json").read_text())
    schema = json.loads((ROOT / "tests" / "bundles" / "meta_schema_20240725.json").read_text())
    jsonschema.validate(metadata, schema)
    assert metadata["version"] in metadata["changelog"]
    assert all(len(part) == 1 for part in metadata["version"].split("."))
    names = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    for name in ("train", "inference", "evaluate"):
        assert list(names.values()) == config(bundle, name)["labels"]
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    for package, version in metadata["required_packages_version"].items():
        assert pins[package] == version
    assert metadata["monai_version"] == pins["monai"]
    assert metadata["pytorch_version"] == pins["torch"]
    assert metadata["numpy_version"] == pins["numpy"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_train_and_inference_build_one_network(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shapes = []
    for name in ("train", "inference"):
        parser = ConfigParser(ConfigParser.load_config_file(f"bundles/{bundle}/configs/{name}.yaml"))
        with torch.device("meta"):
            network = parser.get_parsed_content("network_def")
        shapes.append({key: value.shape for key, value in network.state_dict().items()})
    parser = ConfigParser(ConfigParser.load_config_file(f"bundles/{bundle}/configs/pretrain.yaml"))
    with torch.device("meta"):
        backbone = parser.get_parsed_content("backbone").state_dict()
    assert shapes[0] == shapes[1]
    for key, value in backbone.items():
        if key.startswith("encoder."):
            assert shapes[0][key] == value.shape


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("name", ["pretrain", "train"])
def test_handlers_are_dictionaries_as_monai_reads_them(bundle: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = ConfigParser(ConfigParser.load_config_file(f"bundles/{bundle}/configs/{name}.yaml"))
    parser.resolve_macro_and_relative_ids()
    for part in ("train", "validate"):
        assert all(isinstance(handler, dict) and "_target_" in handler for handler in parser[f"{part}::handlers"])


def test_the_shared_code_is_imported_one_way() -> None:
    """Imports within common/ are relative, so the package can be renamed, and methods do not import each other."""
    for path in (ROOT / "common").rglob("*.py"):
        text = path.read_text()
        assert "Apache-2.0" in text.splitlines()[0], path
        assert not re.search(r"^\s*(from|import) common\b", text, re.M), path
        assert not re.search(r"^\s*(from|import) (timm|torchvision|nnssl|nnunetv2)\b", text, re.M), path
        if path.parent.name == "methods":
            assert not re.search(r"^from \.(methods|[a-z_]+) import", text, re.M) or "from .." in text, path
