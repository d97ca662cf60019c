# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Small volumes and narrow runs that the tests share."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # runs this small are slower on several threads, on a busy machine many times

import nibabel as nib
import numpy as np
import pytest
import torch

from .starts import python

ROOT = Path(__file__).resolve().parent.parent
BUNDLES = sorted(path.name for path in (ROOT / "bundles").iterdir() if (path / "configs" / "metadata.json").exists())
# the two whose whole chain is run as a user runs it; fine-tuning, inference and evaluation of the others are the same
WHOLE_CHAIN = ["mae_primus_m", "mae_resenc_l"]
NETWORK = {
    bundle: ["--features_per_stage", "[4,8,8]", "--blocks_per_stage", "[1,1,1]"]
    if bundle.endswith("resenc_l")
    else ["--embed_dim", "24", "--depth", "2", "--num_heads", "2"]
    for bundle in BUNDLES
}
# methods whose teacher is kept, and gets no gradient
WITH_TEACHER = ("dino", "jepa")
# settings of pre-training that fit small crops, by method
SMALL: dict[str, dict[str, Any]] = {
    "voco": {"patch_size": [32, 32, 16], "crop_size": 16, "grid": [2, 2, 1], "targets": 2},
    "simclr": {"patch_size": [24, 24, 16], "crop_size": 16},
}
for _method in SMALL:
    SMALL[_method] |= {"hidden_features": 32, "embedding_features": 16}
SMALL["dino"] = {"patch_size": [24, 24, 24], "crop_size": 16, "local_size": 8, "local_crops": 2}
SMALL["dino"] |= {"hidden_ratio": [0.25, 0.5], "hidden_features": 32, "bottleneck_features": 16, "prototypes": 32}
SMALL["jepa"] = {"predictor_dim": 24, "predictor_depth": 1, "predictor_heads": 2}


def method_of(bundle: str) -> str:
    return bundle.removesuffix("_resenc_l").removesuffix("_primus_m")


def small_settings(bundle: str) -> dict[str, Any]:
    """Return the settings with which a bundle pre-trains a narrow network on small crops."""
    names = [name.removeprefix("--") for name in NETWORK[bundle][::2]]
    settings = dict(zip(names, map(json.loads, NETWORK[bundle][1::2]), strict=True))
    settings |= {"patch_size": [16, 16, 16], "num_workers": 0} | SMALL.get(method_of(bundle), {})
    if bundle.endswith("primus_m") or method_of(bundle) in WITH_TEACHER:
        settings["warmup_epochs"] = 0
    if bundle.endswith("resenc_l") and method_of(bundle) in ("mae", "simmim", "spark3d", *WITH_TEACHER):
        settings["block_size"] = 8
    return settings


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes minutes first, so that several processes end at about the same time."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/parity/", "tests/bundles/", "tests/studies/")))


@pytest.fixture(autouse=True, scope="session")
def _spawned_quickly() -> None:
    multiprocessing.set_executable(python())


def write_volume(path: Path, values: np.ndarray, *, spacing: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([spacing, spacing, spacing, 1.0])), path)
    return path


def blobs(seed: int, shape: tuple[int, int, int] = (24, 28, 26)) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with a bright ball in noise, and the ball's mask."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    centre = np.array([rng.uniform(9, n - 9) for n in shape])
    ball = np.linalg.norm(grid - centre[:, None, None, None], axis=0) < 6
    image = 100 + 10 * rng.standard_normal(shape) + 80 * ball
    return image.astype(np.float32), ball.astype(np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of four volumes."""
    for index in range(4):
        write_volume(tmp_path / "images" / f"case_{index}.nii.gz", blobs(index)[0])
    return tmp_path / "images"


def write_cases(folder: Path, count: int) -> Path:
    """Write images/ and labels/ of some cases."""
    for index in range(count):
        image, mask = blobs(index)
        write_volume(folder / "images" / f"case_{index}.nii.gz", image)
        write_volume(folder / "labels" / f"case_{index}.nii.gz", mask)
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder with images/ and labels/ of five cases."""
    return write_cases(tmp_path / "labelled", 5)


def command(bundle: str, config: str, *arguments: str | Path) -> list[str]:
    """Return the command line of one config of a bundle, narrow where it has a network."""
    root = f"bundles/{bundle}"
    if config == "pretrain":
        narrow = [part for key, value in small_settings(bundle).items() for part in (f"--{key}", json.dumps(value))]
    elif config == "evaluate":
        narrow = []
    elif config.endswith("_classification"):
        narrow = [*NETWORK[bundle], "--input_size", "[16,16,16]", "--num_workers", "0"]
    else:
        narrow = [*NETWORK[bundle], "--patch_size", "[16,16,16]", "--num_workers", "0"]
    base = ["-m", "monai.bundle", "run", "--config_file", f"{root}/configs/{config}.yaml", "--bundle_root", root]
    return [python(), "-W", "ignore", *base, *narrow, *map(str, arguments)]


def run(bundle: str, config: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one config from the repository root, as a user would."""
    result = subprocess.run(command(bundle, config, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=600)
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result


def pretraining(folder: Path, images: Path, *, epochs: int = 2, seed: int = 0) -> list[str]:
    """Return the arguments of a tiny pre-training run that writes under ``folder``."""
    return [
        *("--dataset_dir", str(images), "--output_dir", str(folder / "out"), "--ckpt_dir", str(folder / "models")),
        *("--store_dir", str(folder / "store"), "--epochs", str(epochs), "--iterations_per_epoch", "3"),
        *("--val_iterations", "1", "--batch_size", "2", "--seed", str(seed)),
    ]
