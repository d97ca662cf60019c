# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Each fact of the bundles is written in one place, and what is put together from them is what a run reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow

from common.bundles import bundle_name, check_links, completed, read_config, read_metadata, sources
from common.engines.settings import elsewhere
from common.errors import SettingsError
from tools.curves import label_curve
from tools.exporting import configs, distribution
from tools.linking import links
from tools.starting import quickstart
from tools.starting.settings import Quickstart
from tools.studies import cards, definition

from ..conftest import BUNDLES, ROOT, WHOLE_CHAIN, method_of
from ..starts import python

SOURCES = ROOT / "common" / "configs"
KINDS = ["train", "inference", "evaluate", "features", "train_classification", "inference_classification"]


def page(bundle: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "bundles" / bundle / "configs" / "pretrain.yaml").read_text())
    return content


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_bundle_holds_its_own_and_links_to_the_rest(bundle: str) -> None:
    folder, backbone = ROOT / "bundles" / bundle, bundle.removeprefix(method_of(bundle) + "_")
    linked = {path.relative_to(folder).as_posix(): path.readlink() for path in folder.rglob("*") if path.is_symlink()}
    expected = {"common": "../../common", "LICENSE": "../../LICENSE"}
    expected |= {"configs/logging.conf": "../../../common/configs/logging.conf"}
    for kind in KINDS:
        source = "evaluate.yaml" if kind == "evaluate" else f"{kind}_{backbone}.yaml"
        expected[f"configs/{kind}.yaml"] = f"../../../common/configs/{source}"
    for kind in ("train", "inference"):
        expected[f"configs/{kind}.json"] = f"../../../common/configs/load_{backbone}.json"
    assert linked == {name: Path(target) for name, target in expected.items()}
    own = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    }
    own = {name for name in own if name.split("/")[0] not in ("models", "output", "store", "docs", "common")}
    assert own == {"large_files.yml", "configs/pretrain.yaml", "configs/metadata.json"}
    assert {path: str(target) for path, target in links.expected() if path.is_relative_to(folder)} == {
        folder / name: target for name, target in expected.items()
    }
    assert links.problems() == []


def test_the_files_stay_short() -> None:
    files = [file for folder in ("bundles", "common/configs") for file in (ROOT / folder).rglob("*.y*ml")]
    lines = {file: len(file.read_text().splitlines()) for file in files if not file.is_symlink()}
    assert sum(lines.values()) <= 5900
    for bundle in BUNDLES:
        assert sum(count for file, count in lines.items() if bundle in file.parts) <= 150, bundle
        assert lines[ROOT / "bundles" / bundle / "configs" / "pretrain.yaml"] <= 110, bundle


def mappings(value: Any, where: str = "") -> Iterator[str]:
    """Yield the paths of the mappings that can be reached through mappings."""
    if isinstance(value, Mapping):
        yield where
        for key, inner in value.items():
            yield from mappings(inner, f"{where}#{key}")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_page_says_what_the_method_decides_and_lets_the_rest_be_changed(bundle: str) -> None:
    own = page(bundle)
    shared = completed({"shared": own["shared"]})
    marked = [key for key, value in own.items() if isinstance(value, dict) and "shared" in value]
    repeated = {key for key in own.keys() & shared.keys() - {*marked} if own[key] == shared[key]}
    assert repeated == set(), "shared already"
    for key in marked:
        for inner, value in own[key].items():
            assert inner == "shared" or isinstance(value, (dict, list)) or shared[key].get(inner, "") != value, key
    nested = {*mappings(shared)} - {"#run_settings#bundle"}  # one value, which a function gives
    assert nested <= {*mappings(own)}, "a nested setting of the command line needs the mapping in the page"
    assert own["shared"][0] == "pretraining.yaml"
    assert own["initialize"][0]["_target_"] == "common.bundles.complete"


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{where}#{key}" if where else key)
    else:
        yield where, value


SIZES = [
    "settings_check#presets",
    "features_per_stage",
    "blocks_per_stage",
    "embed_dim",
    "depth",
    "num_heads",
    "token_size",
    "drop_path",
]
APART = {  # what the sources of the two backbones may differ in: names, or paths of names
    "train": [
        *("network_def", "network_settings", "tuning", "local_network#optimizer_states", "schedule", "lr"),
        *("weight_decay", "momentum", "clip_norm", "optimizer", "recipe#drop_path"),
        *("initialization", "recipe#initialization"),  # and what a transformer has not
        *("deep_supervision", "recipe#deep_supervision", "train#trainer#loss_function"),
    ],
    "inference": ["network_def", "network#settings#num_heads"],
    "features": [
        *("network_def", "network#settings#num_heads", "stages", "small_volumes"),
        *(f"feature_settings#{size}" for size in SIZES),
    ],
    "train_classification": [
        *("backbone", "network_settings", "tuning", "lora_rank", "local_network#lora_rank"),
        *("recipe#drop_path", "recipe#lora_rank"),
    ],
    "inference_classification": ["backbone"],
}


@pytest.mark.parametrize("kind", APART)
def test_the_sources_of_two_backbones_differ_in_network_and_recipe_only(kind: str) -> None:
    one, other = (
        dict(leaves(read_config(SOURCES / f"{kind}_{backbone}.yaml"))) for backbone in ("resenc_l", "primus_m")
    )
    differ = {key for key in one.keys() | other.keys() if one.get(key, "") != other.get(key, "")}
    allowed = [*APART[kind], *SIZES]
    assert {key for key in differ if not any(key == path or key.startswith(f"{path}#") for path in allowed)} == set()


def test_what_stands_above_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "low.yaml": "a: 1\nb: {x: 1, y: {z: 1}}\nc: [1]\nd: {x: 1}\n",
        "high.yaml": "a: 2\nb: {shared, y: {shared, w: 2}}\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("common.bundles.FOLDER", tmp_path)
    below = {"shared": ["low.yaml", "high.yaml"]}
    assert completed(below) == {"a": 2, "b": {"x": 1, "y": {"z": 1, "w": 2}}, "c": [1], "d": {"x": 1}}
    own = {"a": None, "b": {"shared": None, "x": 3}, "c": ["shared", 2], "d": {"y": 1}, "e": 5}
    assert completed(below | own) == {
        "a": None,
        "b": {"x": 3, "y": {"z": 1, "w": 2}},
        "c": [1, 2],
        "d": {"y": 1},
        "e": 5,
    }
    (tmp_path / "page.yaml").write_text("shared: [low.yaml, high.yaml]\na: 7\n")
    assert read_config(tmp_path / "page.yaml")["a"] == 7
    assert [path.name for path in sources(tmp_path / "page.yaml")] == ["low.yaml", "high.yaml", "page.yaml"]
    with pytest.raises(SettingsError, match=r"nothing is shared that .* could add to"):
        completed(below | {"f": {"shared": None}})
    assert completed({"b": {"shared": None}}) == {"b": {"shared": None}}, "it names no file"


def nested_of(bundle: str) -> dict[str, Any]:
    """Return overrides of all kinds."""
    return {
        "epochs": 7,
        "train#trainer#max_epochs": 3,
        "train::trainer::amp_kwargs::dtype": "$torch.float32",
        "validate#key_metric#val_loss#output_transform#loss": None,
        "optimizer#weight_decay": 0.5,
        "backbone#in_channels": 2,
        "val_views": {"_target_": "builtins.dict"},
        "schedule": {"_target_": "builtins.dict", "lr": 1},
        "train#sampler": {"_target_": "builtins.dict"},
        "my_own": 3,
    }


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
@pytest.mark.parametrize("overlay", [None, "multi_gpu", "fsdp"])
def test_the_command_line_stands_above_all(
    bundle: str, overlay: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overrides of every depth, from any folder, with configs added; a value takes the whole place of what it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.processes.join_processes", lambda timeout_minutes: None)
    folder, given = ROOT / "bundles" / bundle, nested_of(bundle)
    files = [str(folder / "configs" / "pretrain.yaml"), *([str(SOURCES / f"{overlay}.yaml")] if overlay else [])]
    workflow = ConfigWorkflow(files, logging_file=False, bundle_root=str(folder), **given)
    workflow.initialize()
    found = workflow.parser.get()
    expected = read_config(files[0])
    if overlay:
        expected |= read_config(files[1])
        assert found["initialize"] == expected["initialize"], "that of the added config"
        assert len(found["initialize"]) == 4
    parser = ConfigParser(expected)
    parser.update({"bundle_root": str(folder), **given})
    parser.resolve_macro_and_relative_ids()
    assert found.pop("_meta_") == read_config(folder / "configs" / "metadata.json")
    assert found == {key: value for key, value in parser.get().items() if key != "_meta_"}
    assert found["optimizer"]["lr"] == "@lr"
    assert found["schedule"] == {"_target_": "builtins.dict", "lr": 1}
    assert workflow.parser.get_parsed_content("run_settings")["bundle"] == bundle
    again = workflow.parser.get()
    workflow.initialize()
    assert workflow.parser.get() == again


def test_a_workflow_built_by_hand_has_what_monai_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for kind in ("pretrain", "train"):
        workflow = create_workflow(
            config_file=f"bundles/mae_resenc_l/configs/{kind}.yaml",
            logging_file=False,
            **{"bundle_root": "bundles/mae_resenc_l", "train#trainer#max_epochs": 3, "train#dataset": [], "volumes": {}}
            | {"train#trainer": {"max_epochs": 3}, "validate#evaluator": {}, "validate#dataset": []},
        )
        assert workflow.check_properties() == []
        assert workflow.max_epochs == 3


def test_the_name_is_what_the_metadata_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bundle in BUNDLES:
        assert bundle_name(ROOT / "bundles" / bundle) == bundle
    assert "bundle" not in read_metadata(ROOT / "bundles" / "mae_resenc_l")
    copy = tmp_path / "any name"
    shutil.copytree(ROOT / "bundles" / "mae_resenc_l" / "configs", copy / "configs")  # follows links
    for kind in ("pretrain", "train", "train_classification", "features"):
        for root in (copy, tmp_path / "results"):  # the latter is a folder that the user chose for them
            workflow = ConfigWorkflow(str(copy / "configs" / f"{kind}.yaml"), logging_file=False, bundle_root=str(root))
            if kind == "pretrain":
                workflow.initialize()
            name = "feature_settings" if kind == "features" else "run_settings"
            assert workflow.parser.get_parsed_content(f"{name}::bundle") == "mae_resenc_l", (kind, root)
    with pytest.raises(SettingsError, match="does not say which bundle this is; add --bundle_root"):
        bundle_name(tmp_path / "results")


def test_what_is_shared_is_no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """An added config lies outside the bundle that runs, and weights are not looked for beside it."""
    monkeypatch.chdir(ROOT)
    for overlay in ("multi_gpu", "fsdp", "multi_gpu_train"):
        files = ["bundles/mae_primus_m/configs/pretrain.yaml", f"common/configs/{overlay}.yaml"]
        assert elsewhere(files, "bundles/mae_primus_m") is None


def without_links(folder: Path, *bundles: str) -> Path:
    """Copy the repository's files as Git writes them where there can be no links."""
    for name in ("common", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    for bundle in bundles:
        shutil.copytree(ROOT / "bundles" / bundle, folder / "bundles" / bundle, symlinks=True)
    for path in [*(folder / "bundles").rglob("*")]:
        if path.is_symlink():
            text = str(path.readlink())
            path.unlink()
            path.write_text(text)
    return folder


def test_where_links_are_texts_every_tool_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = without_links(tmp_path, "mae_resenc_l")
    bundle = root / "bundles" / "mae_resenc_l"
    said = "is not a link but the text '.*', as Git writes it .*; run python tools/links.py"
    for kind in KINDS:
        with pytest.raises(SettingsError, match=rf"configs/{kind}.yaml {said}"):
            read_config(bundle / "configs" / f"{kind}.yaml")
    assert read_config(bundle / "configs" / "pretrain.yaml") == read_config(
        ROOT / "bundles" / "mae_resenc_l" / "configs" / "pretrain.yaml"
    )
    for module in (definition, cards, label_curve, quickstart):
        monkeypatch.setattr(module, "ROOT", root)
    for module in (configs, distribution):
        monkeypatch.setattr(module, "BUNDLES", root / "bundles")
    cards._known_settings.cache_clear()
    definition.bundle_config.cache_clear()
    calls: dict[str, Any] = {
        "export, new task": lambda: distribution.write_bundle("mae_resenc_l", root / "out", settings={}),
        "settings of an export": lambda: configs.known_settings("mae_resenc_l"),
        "study, choose, probe": lambda: definition.bundle_config("mae_resenc_l", "train"),
        "cards": cards._known_settings,
        "label curve": lambda: label_curve._published_rate({"bundle": "mae_resenc_l"}, "from scratch"),
        "quickstart": lambda: quickstart.quickstart(Quickstart("mae_resenc_l", output=root / "out")),
        "all of a bundle": lambda: check_links(bundle),
    }
    for name, call in calls.items():
        with pytest.raises(SettingsError, match=said):
            call()
        assert not (root / "out").exists(), name
    (bundle / "LICENSE").write_text((ROOT / "LICENSE").read_text())
    shutil.copytree(ROOT / "bundles" / "mae_resenc_l" / "configs", bundle / "configs", dirs_exist_ok=True)
    with pytest.raises(SettingsError, match=f"mae_resenc_l/common {said}"):
        check_links(bundle)
    cards._known_settings.cache_clear()
    definition.bundle_config.cache_clear()


def test_one_command_puts_copies_in_the_place_of_texts(images: Path, tmp_path: Path) -> None:
    root = without_links(tmp_path / "clone", "mae_resenc_l", "simmim_primus_m")

    def tool(*arguments: str, following: str = "python tools/quickstart.py") -> list[str]:
        line = [sys.executable, "-S", "tools/links.py", *arguments]  # without any package
        done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=True)
        *told, last = done.stdout.splitlines()
        assert last == f"next:    {following}"
        return told

    made = tool("--copies")
    assert len(made) == 22
    assert all(re.match(r"copy: bundles/\w+/\S+ -> \.\./", line) for line in made)
    for path, target in links.expected(root):
        assert not path.is_symlink()
        assert links._same(path, path.parent / target)
    assert tool() == ["all links are in place"]
    # from inside the bundle, with the code and the configs that were copied
    folder = root / "bundles" / "mae_resenc_l"
    narrow = {"patch_size": [16, 16, 16], "features_per_stage": [4, 8], "blocks_per_stage": [1, 1], "block_size": 8}
    narrow |= {"num_workers": 0, "epochs": 1, "iterations_per_epoch": 1, "val_iterations": 1, "batch_size": 2}
    given = [part for name, value in narrow.items() for part in (f"--{name}", json.dumps(value))]
    line = [python(), "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/pretrain.yaml", *given]
    done = subprocess.run([*line, "--dataset_dir", str(images)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "models" / "pretrained_encoder.pt").is_file()
    # a source that changes, and a copy that the user changed
    source, copy = root / "common" / "configs" / "evaluate.yaml", folder / "configs" / "evaluate.yaml"
    source.write_text(source.read_text().replace("resamples: 2000", "resamples: 3000"))
    left = tool(following="python tools/links.py --refresh")
    assert sorted(line.split(": ")[1].split(";")[0] for line in left) == sorted(
        f"bundles/{bundle}/{name}"
        for bundle in ("mae_resenc_l", "simmim_primus_m")
        for name in ("common", "configs/evaluate.yaml")
    )
    assert all("left alone" in line and "--refresh replaces it" in line for line in left)
    assert len(links.problems(root)) == 4
    assert read_config(copy)["resamples"] == 2000
    assert len(tool("--refresh", "--copies")) == 4
    assert read_config(copy)["resamples"] == 3000
    assert links.problems(root) == []
    # back to what Git wrote, and to links where there can be some
    undone = tool("--undo", following="git status")
    assert len(undone) == 22
    assert {path.read_text() for path, _ in links.expected(root)} == {target for _, target in links.expected(root)}
    assert all(line.startswith("link: ") for line in tool())
    assert all(path.is_symlink() and path.exists() for path, _ in links.expected(root))
