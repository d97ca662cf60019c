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

from common.bundles import read_config, read_metadata
from common.data import ClassificationTask

from ..conftest import BUNDLES, ROOT, method_of

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
METHODS = ["dino", "jepa", "mae", "models_genesis", "simclr", "simmim", "spark3d", "swinunetr", "voco", "volumefusion"]
EXPERIMENTAL = {"dino_primus_m", "dino_resenc_l", "jepa_primus_m", "jepa_resenc_l"}
OURS = {"simmim_resenc_l", "spark3d_primus_m"} | EXPERIMENTAL
SIZES = {"resenc_l": {"features_per_stage", "blocks_per_stage"}, "primus_m": {"embed_dim", "depth", "num_heads"}}


def backbone_of(bundle: str) -> str:
    return bundle.removeprefix(method_of(bundle) + "_")


def test_the_matrix_is_complete() -> None:
    assert sorted(f"{method}_{backbone}" for method in METHODS for backbone in SIZES) == BUNDLES
    found = {path.stem for path in (ROOT / "common" / "methods").glob("*.py")} - {"__init__"}
    assert found == set(METHODS), "one file for each method, named like its bundles"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_cell_without_published_counterpart_says_so(bundle: str) -> None:
    header = (ROOT / "bundles" / bundle / "configs" / "pretrain.yaml").read_text().split("imports:")[0]
    metadata = read_metadata(ROOT / "bundles" / bundle)
    readme = (ROOT / "bundles" / bundle / "docs" / "README.md").read_text()
    files = yaml.safe_load((ROOT / "bundles" / bundle / "large_files.yml").read_text())["large_files"]
    ours = bundle in OURS
    assert ("no published counterpart" in header) == ours
    assert ("no published counterpart" in metadata["description"]) == ours
    assert ("no published counterpart" in readme) == ours
    assert (files == []) == ours
    for text in (header.lower(), readme):
        assert ("experimental: not compared yet" in text) == (bundle in EXPERIMENTAL)


SECTIONS = [
    *("### Authors", "### Tags", "## Model Description", "## Data", "### Preprocessing", "## Recipe", "## Performance"),
    *("## Additional Usage Steps", "## System Configuration", "## Limitations", "## What to look at"),
    *("## Citation Info", "## References"),
]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_its_page_says_what_a_user_needs(bundle: str) -> None:
    page = (ROOT / "bundles" / bundle / "docs" / "README.md").read_text()
    lines = page.splitlines()
    found = [lines.index(section) for section in SECTIONS]
    assert found == sorted(found), "the sections of the Model Zoo's template, in order"
    plain = " ".join(page.split())
    assert "made to be fine-tuned and not recommended as they are" in plain
    assert "data far from 1 mm do better at their own spacing" in plain
    assert f"bundles/{bundle}/configs/pretrain.yaml" in page
    assert "pre-training: epoch 1/" in page, "real output"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page):
        assert (ROOT / "bundles" / bundle / "docs" / link).exists(), link
    known = {"config_file", "bundle_root", "bundle"}
    for file in (ROOT / "bundles" / bundle / "configs").glob("*.yaml"):
        known |= {*config(bundle, file.stem)}
        assert f"bundles/{bundle}/configs/{file.name}" in page, "a command for each config"
    used = set(re.findall(r"--([a-z_]+)", page))
    assert used <= known, used - known


def config(bundle: str, name: str) -> dict:
    return read_config(ROOT / "bundles" / bundle / "configs" / f"{name}.yaml")


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
    sizes = SIZES[backbone_of(bundle)]
    assert config(bundle, "pretrain").keys() >= SAME_EVERYWHERE | sizes
    assert config(bundle, "train").keys() >= SAME_EVERYWHERE - {"val_iterations", "store_dir"} | sizes
    assert config(bundle, "inference").keys() >= sizes | {"labels", "mirror_axes", "model"}
    assert config(bundle, "train_classification").keys() >= (
        SAME_EVERYWHERE - {"iterations_per_epoch", "val_iterations", "patch_size"} | sizes | {"tuning", "pretrained"}
    )
    assert config(bundle, "inference_classification").keys() >= sizes | {"model", "table", "overwrite", "store_dir"}
    in_features = {"stages", "pooling", "dense", "pretrained", "from_scratch", "overwrite", "channels", "normalization"}
    assert config(bundle, "features").keys() >= sizes | in_features
    names = [
        "pretrain",
        "train",
        "inference",
        "evaluate",
        "features",
        "train_classification",
        "inference_classification",
    ]
    for name in names:
        assert config(bundle, name)["run"][0] == "@settings_check"


REGION = {"voco": [256, 256, 64], "simclr": [192, 192, 64]}
VIEWS = {
    "dino": {
        "crop_size": 96,
        "local_size": 64,
        "local_crops": 4,
        "hidden_ratio": [0.1, 0.5],
        "prototypes": 512,
        "teacher_momentum": [0.9995, 1.0],
        "teacher_temperature": [0.04, 0.04],
    },
    "jepa": {
        "hidden_ratio": 0.6,
        "box_share": [0.1, 0.2],
        "flip_probability": 0.5,
        "predictor_dim": 384,
        "predictor_depth": 6,
        "teacher_momentum": [0.996, 1.0],
        "isotropy_weight": 0.0,
    },
    "mae": {"hidden_ratio": 0.75, "rotation_probability": 0.2, "zoom_probability": 0.2, "flip_probability": 0.5}
    | {"contrast_weight": 0.0},
    "simmim": {"hidden_ratio": 0.75, "rotation_probability": 0.2, "zoom_probability": 0.2, "flip_probability": 0.5},
    "spark3d": {"hidden_ratio": [0.6, 0.9], "rotation_probability": 0.2, "flip_probability": 0.5},
    "models_genesis": {
        "flip_probability": 0.4,
        "shuffle_probability": 0.5,
        "shuffle_boxes": 10000,
        "intensity_probability": 0.9,
        "paint_probability": 0.9,
        "inpaint_share": 0.2,
    },
    "volumefusion": {"classes": 5, "boxes": [10, 39], "volumes_per_sample": 2, "augment": True},
    "swinunetr": {"cut_share": 0.3, "temperature": 0.5, "negatives": "global", "embedding_features": 512},
    "voco": {"grid": [4, 4, 1], "targets": 4, "crop_size": 64, "teacher_momentum": None, "embedding_features": 2048},
    "simclr": {"pairs": 2, "crop_size": 64, "temperature": 0.5, "negatives": "global", "embedding_features": 2048},
}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_defaults_are_the_published_recipe(bundle: str) -> None:
    method, pretrain, train = method_of(bundle), config(bundle, "pretrain"), config(bundle, "train")
    budget = {"epochs": 1000, "iterations_per_epoch": 250, "val_iterations": 50, "spacing_mm": 1.0}
    budget |= {"batch_size": 32 if method == "simclr" else 8, "patch_size": REGION.get(method, [160] * 3)}
    optimizer = pretrain["optimizer"]
    if bundle in EXPERIMENTAL and bundle.endswith("resenc_l"):  # the paper's optimizer
        budget |= {"weight_decay": 5e-2, "momentum": 0.9, "warmup_epochs": 10, "lr": 5e-4, "clip_norm": 3}
        budget |= {"block_size": 16}
        assert optimizer["_target_"] == "torch.optim.AdamW"
    elif bundle.endswith("resenc_l"):
        budget |= {"weight_decay": 3e-5, "momentum": 0.99, "warmup_epochs": 0}
        budget |= {"lr": 1e-3 if method == "volumefusion" else 1e-2}
        budget |= {"clip_norm": {"simclr": 0.1, "voco": None}.get(method, 12)}
        if method in ("mae", "simmim", "spark3d"):
            budget |= {"block_size": 16}
        assert optimizer["_target_"] == "torch.optim.SGD"
        assert optimizer["nesterov"] is True
    else:
        budget |= {"lr": 3e-4, "weight_decay": 5e-2, "clip_norm": 1, "warmup_epochs": 50, "drop_path": 0.2}
        budget |= {"token_size": 8}
        assert optimizer["_target_"] == "torch.optim.AdamW"
        assert optimizer["betas"] == [0.9, 0.98]
        assert train["drop_path"] == 0.0
    expected = budget | VIEWS[method]
    assert {key: pretrain[key] for key in expected} == expected
    assert [train[key] for key in ("epochs", "iterations_per_epoch", "batch_size")] == [150, 250, 2]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_schedule_is_as_long_as_the_training_that_a_tool_asks_for(
    bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parser = ConfigParser(config(bundle, "train"))
    parser.resolve_macro_and_relative_ids()
    parser["train#trainer#max_epochs"] = 20  # what MONAI Label sets, and nothing else
    schedule = parser.get_parsed_content("learning_rate")
    assert (schedule.epochs, schedule.warmup_epochs) == (20, 2)
    assert schedule.decoder_epochs == (2 if bundle.endswith("resenc_l") else 0)
    parser["resume"] = "rounds"  # of a federation, where the same number is the length of a round
    assert parser.get_parsed_content("learning_rate").epochs == 150


def test_of_two_readings_the_header_names_both() -> None:
    for bundle, other in (("volumefusion_resenc_l", "--lr 0.01"), ("spark3d_resenc_l", "--hidden_ratio 0.75")):
        header = (ROOT / "bundles" / bundle / "configs" / "pretrain.yaml").read_text().split("imports:")[0]
        assert "Two ways" in header
        assert other in header


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_is_valid_and_agrees_with_the_configs(bundle: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    metadata = read_metadata(ROOT / "bundles" / bundle)
    schema = json.loads((ROOT / "tests" / "bundles" / "meta_schema_20240725.json").read_text())
    jsonschema.validate(metadata, schema)
    assert metadata["version"] in metadata["changelog"]
    assert all(len(part) == 1 for part in metadata["version"].split("."))
    names = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    for name in ("train", "inference", "evaluate"):
        parser = ConfigParser(
            config(bundle, name) | {"ckpt_dir": "/nowhere"}
        )  # inference asks the model, if there is one
        assert list(names.values()) == parser.get_parsed_content("labels")
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
        parser = ConfigParser(read_config(f"bundles/{bundle}/configs/{name}.yaml"))
        with torch.device("meta"):
            network = parser.get_parsed_content("network_def")
        shapes.append({key: value.shape for key, value in network.state_dict().items()})
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/pretrain.yaml"))
    with torch.device("meta"):
        backbone = parser.get_parsed_content("backbone").state_dict()
    assert shapes[0] == shapes[1]
    for key, value in backbone.items():
        if key.startswith("encoder."):
            # crops of crops have another grid of positions, which fine-tuning interpolates
            assert shapes[0][key][:2] == value.shape[:2] if "position" in key else shapes[0][key] == value.shape


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_classifier_has_the_pre_trained_encoder_and_the_published_recipe(
    bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/train_classification.yaml"))
    parser["target_task"] = ClassificationTask(("a", "b"))
    with torch.device("meta"):
        classifier = {key: value.shape for key, value in parser.get_parsed_content("network_def").state_dict().items()}
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/train.yaml"))
    with torch.device("meta"):
        segmenter = parser.get_parsed_content("network_def").state_dict()
    encoder = {key: value.shape for key, value in segmenter.items() if key.startswith("encoder.")}
    width = 320 if bundle.endswith("resenc_l") else 864
    assert classifier == encoder | {"head.weight": torch.Size([2, width]), "head.bias": torch.Size([2])}
    recipe = {"epochs": 200, "lr": 1e-4, "weight_decay": 1e-2, "clip_norm": None, "head_dropout": 0.2, "fit": "resize"}
    recipe |= {"label_smoothing": 0.0, "batch_size": 96, "rotation_probability": 0.2, "zoom_probability": 0.2}
    own = config(bundle, "train_classification")
    assert {key: own[key] for key in recipe} == recipe
    for name in ("spatial", "augmentation"):
        same = config(bundle, "train")[name]
        expected = same | ({"patch_size": "@input_size", "centred": True} if name == "spatial" else {})
        assert own[name] == expected, "the chain of segmentation, over the whole volume"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_features_come_from_the_encoder_that_is_fine_tuned(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shapes = {}
    for name in ("train", "features"):
        parser = ConfigParser(read_config(f"bundles/{bundle}/configs/{name}.yaml"))
        with torch.device("meta"):
            state = parser.get_parsed_content("network_def").state_dict()
        shapes[name] = {key: value.shape for key, value in state.items() if key.startswith("encoder.")}
        if name == "features":
            assert len(state) == len(shapes[name]), "nothing but the encoder is built"
    assert shapes["train"] == shapes["features"]
    decided = set(config(bundle, "features")["feature_settings"])
    assert decided >= SIZES[backbone_of(bundle)] | {"bundle", "spacing_mm", "reorient", "normalization", "patch_size"}


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("name", ["pretrain", "train", "train_classification"])
def test_handlers_are_dictionaries_as_monai_reads_them(bundle: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/{name}.yaml"))
    parser.resolve_macro_and_relative_ids()
    for part in ("train", "validate"):
        assert all(isinstance(handler, dict) and "_target_" in handler for handler in parser[f"{part}::handlers"])
