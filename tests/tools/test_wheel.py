# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The wheel: one package with real files, whole without the clone; the editable installation; what the metadata ask."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import json
import re
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tools.commanding.locks import normal, pins
from tools.packing import backend

from ..conftest import BUNDLES, ROOT, write_cases
from ..starts import python

ABOUT = "openmind_bundles-0.1.0.dist-info"
# a chain where neither the clone nor its packages are, narrow and brief; the place of the package is an argument
CHAIN = """
import json, os, sys
sys.path = [sys.argv[1], *(path for path in sys.path if path and not os.path.isdir(path + "/bundles"))]
import openmind
assert openmind.__file__.startswith(sys.argv[1]), openmind.__file__
size = {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1]}
small = {**size, "patch_size": [16, 16, 16], "num_workers": 0}
brief = {"epochs": 1, "iterations_per_epoch": 1, "val_iterations": 1, "batch_size": 2}
encoder = openmind.pretrain("task/images", bundle="mae_resenc_l", block_size=8, **small, **brief)
model = openmind.finetune("task", bundle="mae_resenc_l", labels=["background", "ball"], **small, **brief)
masks = openmind.predict(["task/images/case_0.nii.gz"], model=model.parent.parent, output="masks", num_workers=0)
vectors = openmind.embed("task/images", bundle="mae_resenc_l", **small)
try:
    openmind.finetune("task", bundle="mae_resenc_l", labels=["background", "ball"], epoch=3)
except ValueError as error:
    told = type(error).__name__ + ": " + str(error)
try:
    openmind.predict("task/images", model=model, output="task/images", num_workers=0)
except ValueError as error:
    wrapped = type(error).__name__ + ": " + str(error)
from openmind.tools.opening.options import BUNDLES
from openmind.tools.exporting.bundles import export_bundle
from openmind.tools.exporting.settings import ExportBundle
export_bundle(ExportBundle("mae_resenc_l", output="dist", weights="false"))
print("FOUND", json.dumps({
    "encoder": str(encoder), "model": str(model), "masks": {name: str(file) for name, file in masks.items()},
    "vectors": {name: list(map(float, vector)) for name, vector in vectors.items()}, "told": told, "wrapped": wrapped,
    "modules": sorted(name for name in sys.modules if name.split(".")[0] in ("common", "tools")),
    "bundles": str(BUNDLES),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return folder / backend.build_wheel(str(folder))


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    write_cases(tmp_path / "task", 4)
    return tmp_path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def targets(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (each for name, each in value.items() if name == "_target_")
        for each in value.values():
            yield from targets(each)
    elif isinstance(value, list):
        for each in value:
            yield from targets(each)


def test_everything_is_below_one_package(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = archive.read(f"{ABOUT}/RECORD").decode().splitlines()
        for line in record:
            name, digest, size = line.split(",")
            content = archive.read(name)
            found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert name.endswith("RECORD") or (digest, int(size)) == (f"sha256={found}", len(content)), name
    assert {name.split("/")[0] for name in names} == {"openmind", ABOUT}
    assert sorted(line.split(",")[0] for line in record) == sorted(names)
    assert len(names) == len(set(names))
    assert wheel.stat().st_size < 8e6
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".pt"))]
    again = tmp_path / backend.build_wheel(str(tmp_path))
    assert again.read_bytes() == wheel.read_bytes(), "equal files give equal bytes"
    bundles = unpacked / "openmind" / "bundles"
    assert sorted(path.name for path in bundles.iterdir()) == BUNDLES
    for bundle in BUNDLES:
        theirs = {path.name for path in (ROOT / "bundles" / bundle / "configs").iterdir()} - {"monailabel_train.json"}
        assert {path.name for path in (bundles / bundle / "configs").iterdir()} == theirs
        assert (bundles / bundle / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_no_name_of_the_clone_is_left(unpacked: Path) -> None:
    count = 0
    for path in unpacked.rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"common", "tools"}, path
        compile(path.read_text("utf-8"), str(path), "exec")
        assert not re.search(r"""["']common\.[a-z]""", path.read_text("utf-8")), path
        count += "from openmind.common" in path.read_text("utf-8")
    assert count > 50
    named: set[str] = set()
    for path in unpacked.rglob("*.yaml"):
        text = path.read_text("utf-8")
        if "configs" in path.parts:
            named |= set(targets(yaml.safe_load(text)))
        assert not re.search(r"(?<!openmind\.)\bcommon\.[a-z]", text), path
    assert {name.split(".")[0] for name in named if "." in name} <= {"openmind", "torch", "ignite"}
    assert len([name for name in named if name.startswith("openmind.common.")]) > 60


def test_it_works_where_the_clone_is_not(unpacked: Path, task: Path) -> None:
    line = [python(), "-W", "ignore", "-c", CHAIN, str(unpacked)]
    result = subprocess.run(line, cwd=task, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    found = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("FOUND "))[6:])
    assert found["modules"] == []
    assert found["bundles"] == str(unpacked / "openmind" / "bundles")
    assert (task / found["encoder"]).is_file()
    assert found["model"] == "openmind_runs/mae_resenc_l/models/model.pt"
    assert found["masks"] == {"case_0": "masks/case_0.nii.gz"}
    assert sorted(found["vectors"]) == [f"case_{index}" for index in range(4)]
    assert {len(vector) for vector in found["vectors"].values()} == {8}
    assert found["told"].startswith("SettingsError: unknown setting --epoch (did you mean --epochs")
    assert found["wrapped"].startswith(("SettingsError: ", "DataError: "))
    assert "\n" not in found["wrapped"]
    dist = task / "dist" / "mae_resenc_l"
    assert "openmind.common" not in "".join(path.read_text("utf-8") for path in dist.glob("configs/*.json"))
    assert (
        json.loads((dist / "configs" / "inference.json").read_text())["lists"]["_target_"] == "scripts.data.image_list"
    )
    assert not list(dist.rglob("*.yaml"))


def test_an_editable_installation_is_the_clone(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / backend.build_editable(str(tmp_path))) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"openmind", ABOUT}
        archive.extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import openmind; openmind.main()"
    line = [python(), "-c", code, str(tmp_path), "pretrain", "mae_resenc_l", ".", "--epochs", "3", "--show-command"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"--config_file {ROOT}/bundles/mae_resenc_l/configs/pretrain.yaml" in result.stdout
    assert result.stdout.strip().endswith("--bundle_root openmind_runs/mae_resenc_l --dataset_dir . --epochs 3")


def test_the_archive_of_sources_has_what_the_wheel_is_built_from(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        link = archive.getmember("openmind_bundles-0.1.0/bundles/mae_resenc_l/configs/train.yaml")
    assert link.issym()
    assert {"PKG-INFO", "pyproject.toml", "README.md", "tools/packing/backend.py", "common/bundles.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pt")]
    assert [path.name for path in tmp_path.iterdir()] == ["openmind_bundles-0.1.0.tar.gz"]


def test_the_metadata_ask_for_what_was_run(unpacked: Path) -> None:
    (found,) = importlib.metadata.distributions(path=[str(unpacked)])
    assert found.metadata["Name"] == "openmind-bundles"
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert [(each.name, each.value) for each in found.entry_points] == [("openmind", "openmind:main")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [Requirement(each) for each in found.requires or []]
    assert len(needed) == len(project["dependencies"]) + sum(map(len, project["optional-dependencies"].values()))
    runtime, development = pins(ROOT / "requirements.txt"), pins(ROOT / "requirements-dev.txt")
    assert {normal(each.name) for each in needed if each.marker is None} == runtime.keys()
    table = re.findall(
        r"^\| ([\w-]+) \| (\d[\w.]*) \| (\d[\w.]*) \|$", (ROOT / "docs" / "install.md").read_text("utf-8"), re.M
    )
    ends = {normal(name): (lowest, newest) for name, lowest, newest in table}
    assert len(ends) > 5
    assert ends.keys() <= {normal(each.name) for each in needed}
    for each in needed:
        version = (runtime | development)[normal(each.name)]
        assert Version(version) in each.specifier, each
        lowest, newest = ends.get(normal(each.name), (version, version))
        assert Version(newest) in each.specifier, each
        assert Version(newest) >= Version(version), "a pin is not newer than what was run as the newest"
        (bound,) = (Version(one.version) for one in each.specifier if one.operator == ">=")
        if each.name != "torch":  # of which others may be had, though none was run
            assert bound.release == Version(lowest).release[: len(bound.release)], each
