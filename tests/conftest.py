# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Small volumes and narrow runs that the tests share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BUNDLES = sorted(path.name for path in (ROOT / "bundles").iterdir() if (path / "configs" / "metadata.json").exists())
NETWORK = {
    "mae_resenc_l": ["--features_per_stage", "[4,8,8]", "--blocks_per_stage", "[1,1,1]"],
    "mae_primus_m": ["--embed_dim", "24", "--depth", "2", "--num_heads", "2"],
}
PRETRAIN = {"mae_resenc_l": ["--block_size", "8"], "mae_primus_m": ["--warmup_epochs", "0"]}


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(2)


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


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder with images/ and labels/ of five cases."""
    for index in range(5):
        image, mask = blobs(index)
        write_volume(tmp_path / "labelled" / "images" / f"case_{index}.nii.gz", image)
        write_volume(tmp_path / "labelled" / "labels" / f"case_{index}.nii.gz", mask)
    return tmp_path / "labelled"


def command(bundle: str, config: str, *arguments: str | Path) -> list[str]:
    """Return the command line of one config of a bundle, narrow where it has a network."""
    root = f"bundles/{bundle}"
    narrow = {"pretrain": [*NETWORK[bundle], *PRETRAIN[bundle]], "evaluate": []}.get(config, NETWORK[bundle])
    size = [] if config == "evaluate" else ["--patch_size", "[16,16,16]", "--num_workers", "0"]
    base = ["-m", "monai.bundle", "run", "--config_file", f"{root}/configs/{config}.yaml", "--bundle_root", root]
    return [sys.executable, "-W", "ignore", *base, *narrow, *size, *map(str, arguments)]


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
