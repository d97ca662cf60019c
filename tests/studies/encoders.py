# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Encoders of known quality: one task, whose answer no intensity tells, and a narrow network trained for it or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from common.files import write_json
from common.networks import Primus, ResEncUNet
from common.weights import write_checkpoint

LABELS = ["background", "along", "across"]
NARROW: dict[str, dict[str, Any]] = {
    "resenc_l": {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1]},
    "primus_m": {"embed_dim": 24, "depth": 2, "num_heads": 2, "token_size": 8},
}
SIDE = 24


def textured(rng: np.random.Generator, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of smoothed noise, and where it runs along one axis or across it, within balls.

    All three kinds have the same mean and spread, so that intensities tell nothing.
    """
    noise = rng.standard_normal((3, side, side, side))
    kinds = [gaussian_filter(noise[0], 1.0), gaussian_filter(noise[1], (2.5, 0.5, 0.5))]
    kinds.append(gaussian_filter(noise[2], (0.5, 2.5, 0.5)))
    kinds = [(kind - kind.mean()) / kind.std() for kind in kinds]
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"))
    image, labels = kinds[0].copy(), np.zeros((side, side, side), np.uint8)
    for value in (1, 2):
        middle = rng.uniform(6, side - 6, 3)
        ball = np.linalg.norm(grid - middle[:, None, None, None], axis=0) < 6
        image[ball], labels[ball] = kinds[value][ball], value
    return image.astype(np.float32), labels


def write_task(folder: Path, cases: int, *, seed: int = 0, spacing: float = 1.0) -> Path:
    """Write labelled cases as a folder of pairs."""
    rng = np.random.default_rng(seed)
    for index in range(cases):
        for name, values in zip(("images", "labels"), textured(rng), strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            affine = np.diag([spacing, spacing, spacing, 1.0])
            nib.save(nib.Nifti1Image(values, affine), folder / name / f"case_{index:02d}.nii.gz")
    return folder


def network(backbone: str, *, decoder: bool = True) -> ResEncUNet | Primus:
    """Return the narrow network."""
    kind: dict[str, Any] = dict(NARROW[backbone])
    if backbone == "resenc_l":
        return ResEncUNet(out_channels=3, with_decoder=decoder, **kind)
    kind["patch_size"] = kind.pop("token_size")
    return Primus(out_channels=3, input_size=SIDE, with_decoder=decoder, **kind)


def train(path: Path, *, backbone: str = "resenc_l", steps: list[int], bundle: str, seed: int = 0) -> list[Path]:
    """Train a narrow network for the task, and write its encoder after each of some numbers of steps.

    Args:
        path: folder to write ``<steps>.pt`` to, with what pre-training writes beside.
        backbone: resenc_l or primus_m.
        steps: after which, ascending.
        bundle: that the weights are said to be of.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 99])
    model = network(backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    volumes = [textured(rng) for _ in range(24)]
    written = []
    path.mkdir(parents=True, exist_ok=True)
    for step in range(steps[-1] + 1):
        if step in steps:
            file = path / f"{step}.pt"
            write_checkpoint({k: v.clone() for k, v in model.state_dict().items() if k.startswith("encoder.")}, file)
            about = {"bundle": bundle, "spacing_mm": 1.0, **NARROW[backbone]}
            write_json({"settings": about}, file.with_suffix(".json"))
            written.append(file)
        if step == steps[-1]:
            break
        chosen = rng.integers(0, len(volumes), 2)
        images = torch.from_numpy(np.stack([volumes[index][0] for index in chosen]))[:, None]
        labels = torch.from_numpy(np.stack([volumes[index][1] for index in chosen])).long()
        loss = F.cross_entropy(model(images), labels, weight=torch.tensor([1.0, 5.0, 5.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return written
