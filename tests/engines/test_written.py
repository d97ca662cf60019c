# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings mean what was written, however they are given: on the command line, in a file, from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow
from monai.bundle import run as run_bundle

from common.bundles import read_config
from common.engines.written import PATHS, path_settings, typed_settings
from common.errors import SettingsError

from ..conftest import BUNDLES, ROOT

CONFIG = """
imports: [$import json]
bundle_root: .
dataset_dir: ""
datalist: null
output_dir: "$@bundle_root + '/output'"
ckpt_dir: 20_24
model: "$@ckpt_dir + '/model.pt'"
store_dir: "a#b"
labels: [a, b]
shown:
  _target_: builtins.dict
  bundle_root: "@bundle_root"
  dataset_dir: "@dataset_dir"
  datalist: "@datalist"
  output_dir: "@output_dir"
  ckpt_dir: "@ckpt_dir"
  model: "@model"
  store_dir: "@store_dir"
  labels: "@labels"
settings_check:
  _target_: common.engines.check_settings
  bundle_root: "@bundle_root"
run:
- "@settings_check"
- "$print('RESULT', json.dumps(@shown))"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(CONFIG)
    return tmp_path / "x.yaml"


def shown(text: str) -> dict[str, Any]:
    (line,) = [line for line in text.splitlines() if line.startswith("RESULT ")]
    return dict(json.loads(line.removeprefix("RESULT ")))


def test_on_the_command_line(config: Path) -> None:
    Path("args.yaml").write_text("store_dir: 2024-01-01\nmodel: [~/m.pt, 'n#.pt']\n")
    arguments = [
        *("--dataset_dir=20_24", "--output_dir", "~/my results", "--bundle-root", "a,b", "--datalist", "None"),
        *("--labels", "['a #1','b']", "--args_file", "args.yaml"),
    ]
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(config), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert shown(found.stdout) == {
        "bundle_root": "a,b",
        "dataset_dir": "20_24",
        "datalist": None,
        "output_dir": "/home/me/my results",
        "ckpt_dir": "20_24",
        "model": ["/home/me/m.pt", "n#.pt"],
        "store_dir": "2024-01-01",
        "labels": ["a #1", "b"],
    }


def test_from_python(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bundle(config_file=str(config), dataset_dir="~/run#1", output_dir=2024, labels="~/dataset.json")
    found = shown(capsys.readouterr().out)
    assert (found["dataset_dir"], found["output_dir"], found["ckpt_dir"]) == ("/home/me/run#1", "2024", "20_24")
    assert (found["store_dir"], found["labels"]) == ("a#b", "/home/me/dataset.json")
    workflow = ConfigWorkflow(config_file=str(config), dataset_dir="~/x", bundle_root="~")
    workflow.initialize()
    workflow.run()
    found = shown(capsys.readouterr().out)
    assert (found["dataset_dir"], found["output_dir"]) == ("/home/me/x", "/home/me/output")
    with pytest.raises(SettingsError, match=r"^--dataset_dir is True; it must be a path$"):
        run_bundle(config_file=str(config), dataset_dir=True)


def test_every_setting_that_is_a_path_is_known() -> None:
    found = set()
    for bundle in BUNDLES:
        for file in (ROOT / "bundles" / bundle / "configs").glob("*.yaml"):
            config = {name: value for name, value in read_config(file).items() if isinstance(value, str | None)}
            found |= {name for name in config if name.endswith(("_dir", "_root"))}
            found |= {name for name, value in config.items() if "_root +" in str(value) or "_dir +" in str(value)}
            found |= {"datalist", "table", "splits", "groups", "probe_data", "probe_table"} & config.keys()
    assert found == PATHS - {"labels", "probe_labels"}


def test_expressions_and_what_is_no_path_are_left_alone() -> None:
    config = {"output_dir": "$@x", "model": "@y", "labels": ["a"], "seed": 3, "datalist": None, "store_dir": "s"}
    assert path_settings(config, {}) == {}
    assert path_settings(config, {"store_dir": "$@z", "datalist": "null"}) == {"store_dir": "$@z"}
    assert typed_settings(["run", "--lr", "-1", "-x=3", "--store_dir=a=b", "--resume"]) == {
        "lr": "-1",
        "x": "3",
        "store_dir": "a=b",
    }
