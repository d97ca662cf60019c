# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A config of the clone runs from any folder, also from Python, and its bundle is where results go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ..conftest import NETWORK, ROOT
from ..starts import python

BUNDLE = "mae_resenc_l"
_LOAD = """
import sys, monai.bundle, torch
where, name = sys.argv[1:]
kept = torch.load(f"{where}/{name}/models/model.pt", weights_only=True)
for kind in ("train", "inference"):
    network = monai.bundle.load(
        name, bundle_dir=where, workflow_type=kind, device="cpu", net_override={"dropout": 0.25}
    )
    state = network.state_dict()
    same = "as in the file" if all(torch.equal(state[key], kept[key]) for key in state) else "others"
    rates = {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout3d)}
    print(f"{type(network).__name__}, {same}, {len(next(iter(state.values())))} features")
    print("dropout", *rates)
"""


@pytest.mark.parametrize("how", ["command line", "python"])
def test_a_clone_is_used_from_any_folder(how: str, images: Path, labelled: Path, tmp_path: Path) -> None:
    """Only what is shared is copied: code, configs, one bundle. Nothing tells Python or the config where it is."""
    clone, here = tmp_path / "clone", tmp_path / "notebooks"
    here.mkdir()
    shutil.copytree(ROOT / "common", clone / "common", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "bundles" / BUNDLE, clone / "bundles" / BUNDLE, symlinks=True)
    shutil.copyfile(ROOT / "LICENSE", clone / "LICENSE")
    names = [name.removeprefix("--") for name in NETWORK[BUNDLE][::2]]
    tiny = dict(zip(names, map(json.loads, NETWORK[BUNDLE][1::2]), strict=True))
    tiny |= {"patch_size": [16, 16, 16], "num_workers": 0, "epochs": 1, "iterations_per_epoch": 1, "val_iterations": 1}
    tiny |= {"batch_size": 2}
    runs = [
        ("pretrain", {"dataset_dir": str(images), "block_size": 8, **tiny}),
        ("train", {"dataset_dir": str(labelled), "labels": ["background", "ball"], **tiny}),
        ("inference", {"dataset_dir": str(labelled / "images")}),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for kind, settings in runs:
        config = os.path.relpath(clone / "bundles" / BUNDLE / "configs" / f"{kind}.yaml", here)
        if how == "python":
            call = f"from monai.bundle import run; run(config_file={config!r}, **{settings!r})"
            command = [python(), "-W", "ignore", "-c", call]
        else:
            given = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
            command = [python(), "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", config, *given]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    found = clone / "bundles" / BUNDLE
    assert (found / "models" / "pretrained_encoder.pt").is_file()
    assert (found / "models" / "model.pt").is_file()
    assert len(list((found / "output" / "predictions").glob("*.nii.gz"))) == len(list((labelled / "images").iterdir()))
    assert not list(here.iterdir())
    loaded = subprocess.run(
        [python(), "-W", "ignore", "-c", _LOAD, os.path.relpath(clone / "bundles", here), BUNDLE],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.count("ResEncUNet, as in the file, 4 features") == 2
    assert "dropout 0.25" in loaded.stdout
