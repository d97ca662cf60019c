# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What docs/security.md says: which files are programs, which cannot be, and how to look without running."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import blosc2
import monai.bundle
import numpy as np
import pytest
import torch
from torch import nn

from common.data.storing.checksums import checksums_beside
from common.data.storing.stored import StoredVolume
from common.errors import DataError, WeightsError, causes
from tools.checkpoints.importing import import_checkpoint
from tools.checkpoints.settings import ImportCheckpoint
from tools.commanding.settings import filled
from tools.exporting.distribution import write_bundle

from ..conftest import NETWORK, ROOT

BUNDLE = "mae_resenc_l"


class Command:
    """An object whose unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def malicious(file: Path, mark: Path) -> Path:
    """Write a checkpoint that makes ``mark`` when it is loaded without care, which is shown first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"encoder.weight": Command(mark)}, file)
    torch.load(file, weights_only=False)
    assert mark.is_file()
    mark.unlink()
    return file


def bundle_run(config: str, folder: Path, **settings: Any) -> None:
    narrow = {
        name.removeprefix("--"): json.loads(value) for name, value in zip(*[iter(NETWORK[BUNDLE])] * 2, strict=True)
    }
    narrow |= {"patch_size": [16, 16, 16], "num_workers": 0, "output_dir": str(folder / "out")} | settings
    narrow |= {} if config in ("inference", "features") else {"store_dir": str(folder / "store"), "epochs": 1}
    narrow |= {} if config == "features" else {"ckpt_dir": str(folder)}
    root = f"bundles/{BUNDLE}"
    monai.bundle.run(config_file=f"{root}/configs/{config}.yaml", bundle_root=root, logging_file=False, **narrow)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model.pt", "inference"),
        ("pretrained_encoder.pt", "train"),
        ("finetuning_state.pt", "train"),
        ("pretraining_state.pt", "pretrain"),
        ("pretrained_encoder.pt", "features"),
    ],
)
def test_a_checkpoint_cannot_execute_anything(
    name: str, config: str, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file, mark = malicious(tmp_path / "models" / name, tmp_path / "executed"), tmp_path / "executed"
    settings: dict[str, Any] = {"dataset_dir": str(labelled if config == "train" else labelled / "images")}
    settings |= {"pretrained": str(file)} if name == "pretrained_encoder.pt" else {}
    settings |= {"from_scratch": True} if name == "finetuning_state.pt" else {}
    settings |= {"block_size": 8} if config == "pretrain" else {}
    with pytest.raises((RuntimeError, WeightsError), match=r"Failed to \w+|tensors") as failed:
        bundle_run(config, tmp_path / "models", **settings)
    told = [str(cause) for cause in causes(failed.value) if isinstance(cause, WeightsError)]
    assert f"{file} holds other things than tensors and plain values (posix.system)" in told[0]
    assert not mark.exists()


def test_nor_can_a_checkpoint_to_be_imported(tmp_path: Path) -> None:
    file, mark = malicious(tmp_path / "checkpoint_final.pth", tmp_path / "executed"), tmp_path / "executed"
    with pytest.raises(WeightsError, match="other things than tensors and plain values"):
        import_checkpoint(filled(ImportCheckpoint, BUNDLE, source=str(file), output=str(tmp_path / "encoder.pt")))
    assert not mark.exists()


def test_nor_can_a_store_of_volumes(tmp_path: Path) -> None:
    stored = blosc2.asarray(np.zeros((4, 4, 4)), urlpath=str(tmp_path / "a.b2nd"), mode="w")
    (stored + 1).save(urlpath=str(tmp_path / "lazy.b2nd"), mode="w")
    volume = StoredVolume(path=str(tmp_path / "lazy.b2nd"), shape=(4, 4, 4), source="a.nii.gz")
    with pytest.raises(DataError, match="is damaged"):  # without the JSON of a volume it is none
        volume.read((0, 0, 0), (2, 2, 2))
    (tmp_path / "lazy.json").write_text('{"masks": {}}')
    with pytest.raises(DataError, match="is damaged") as refused:
        volume.read((0, 0, 0), (2, 2, 2))
    assert "deserialize" in str(refused.value.__cause__)
    checksums_beside.cache_clear()
    (tmp_path / "lazy.crc").unlink()
    np.save(tmp_path / "lazy.voxels.npy", np.array([Command(tmp_path / "executed")], dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        StoredVolume(path=str(tmp_path / "lazy.b2nd"), shape=(4, 4, 4), source="a.nii.gz", places={1: (0, 1)}).voxel(
            [1], np.random.default_rng(0)
        )
    assert not (tmp_path / "executed").exists()
    checksums_beside.cache_clear()


def strange_bundle(folder: Path, network: dict[str, Any]) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    torch.save(nn.Linear(1, 1).state_dict(), folder / "models" / "model.pt")
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "0.1.0", "monai_version": "1.6.1"}))
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": network}))
    return folder


def test_looking_at_a_network_runs_what_the_config_says(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = strange_bundle(tmp_path / "strange", {"_target_": "os.system", "command": f"touch {mark}"})
    given = {"bundle_dir": str(tmp_path), "source": "monaihosting", "version": "0.1.0", "device": "cpu"}
    monai.bundle.load(folder.name, model=nn.Linear(1, 1), **given)
    assert not mark.exists(), "with a network of one's own no config is read"
    with pytest.raises(AttributeError):  # an exit status is no network
        monai.bundle.load(folder.name, workflow_type="inference", **given)
    assert mark.exists()


def test_a_logging_conf_may_name_no_function(tmp_path: Path) -> None:
    folder, mark = strange_bundle(tmp_path / "strange", {"_target_": "torch.nn.Identity"}), tmp_path / "executed"
    (folder / "configs" / "inference.json").write_text('{"run": []}')
    (folder / "configs" / "logging.conf").write_text(
        "[loggers]\nkeys=root\n[handlers]\nkeys=one\n[formatters]\nkeys=\n[logger_root]\nlevel=INFO\nhandlers=one\n"
        f"[handler_one]\nclass=os.system\nargs=('touch {mark}',)\n"
    )
    with pytest.raises(ValueError, match="refusing to apply logging config"):
        monai.bundle.run(config_file=str(folder / "configs" / "inference.json"))
    assert not mark.exists()


def listed(folder: Path) -> list[list[str]]:
    """Run the listing of the page inside a bundle."""
    page = (ROOT / "docs" / "security.md").read_text()
    script = re.findall(r"^```\n(python - configs.*?)^```$", page, re.M | re.S)[0]
    command = ["bash", "-c", script.replace("python", sys.executable, 1)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_the_listing_shows_what_would_run(tmp_path: Path) -> None:
    folder = strange_bundle(tmp_path / "strange", {})
    (folder / "configs" / "inference.json").write_text(
        '{"network_def": {"_targ\\u0065t_": "os.system", "command": ["a", "\\u0024__import__(\'os\')"]}}'
    )
    assert [what for _, what in listed(folder)] == ["os.system", "$__import__('os')"]
    ours = write_bundle(BUNDLE, tmp_path / BUNDLE, settings={})
    classes = {what for where, what in listed(ours) if where.endswith("::_target_")}
    assert len(classes) > 50
    assert {name.split(".")[0] for name in classes if "." in name} == {"scripts", "torch", "ignite"}


def test_the_comparison_shows_what_was_changed_and_not_what_using_it_leaves(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    command = re.findall(r"^diff -rq.*$", page, re.M)[0].replace("FOLDER", "fetched")
    for folder in ("again", "fetched"):
        write_bundle(BUNDLE, tmp_path / folder / BUNDLE, settings={})
    fetched = tmp_path / "fetched" / BUNDLE
    for left in (".cache/huggingface/a.lock", "scripts/__pycache__/a.pyc", "large_files.yml", "models/model.pt"):
        (fetched / left).parent.mkdir(parents=True, exist_ok=True)
        (fetched / left).write_text("")

    def differing() -> str:
        return subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, text=True).stdout

    assert differing() == ""
    (fetched / "scripts" / "errors.py").write_text("changed")
    assert f"again/{BUNDLE}/scripts/errors.py and fetched/{BUNDLE}/scripts/errors.py differ" in differing()
