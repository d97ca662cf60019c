# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the published names and shapes, made at test time; no published file is at hand here."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parity import golden

CELLS = sorted(path.stem for path in (Path(__file__).parents[1] / "parity").glob("*.json"))
TRAINERS = {
    "mae_resenc_l": "BaseMAETrainer_BS8",
    "mae_primus_m": "BaseEvaMAETrainer_BS8",
    "volumefusion_resenc_l": "VolumeFusionTrainer_BS8_lr_1e3",
    "volumefusion_primus_m": "VolumeFusionEvaTrainer_BS8",
    "models_genesis_resenc_l": "ModelGenesisTrainer_BS8",
    "models_genesis_primus_m": "ModelGenesisEvaTrainer_BS8",
    "voco_resenc_l": "VoCoTrainer_BS8_lr_1e2",
    "voco_primus_m": "VoCoEvaTrainer_BS8",
    "simclr_resenc_l": "SimCLRTrainer_BS32",
    "simclr_primus_m": "SimCLREvaTrainer_BS32",
    "swinunetr_resenc_l": "SwinUNETRTrainer_BS8",
    "swinunetr_primus_m": "SwinUNETREvaTrainer_BS8",
    "spark3d_resenc_l": "VariableSparkMAETrainer_BS8",
    "simmim_primus_m": "SimMIMEvaTrainer_BS8",
}


# of the published files: SimMIM's network ran through the first axis of the image slowest, others through the second
ORDERS = {
    cell: "straight" if cell.startswith("simmim") or cell.endswith("resenc_l") else "swapped" for cell in TRAINERS
}


def fill(key: str, shape: list[int]) -> Tensor:
    """Return a cheap tensor that tells names and places apart: a ramp, its height by the name."""
    numel = int(torch.tensor(shape).prod()) if shape else 1
    height = 0.01 + zlib.crc32(key.encode()) % 997 / 1000
    return torch.linspace(-height, height + 1e-3, numel).reshape(shape)


def weights_of(cell: str) -> dict[str, Tensor]:
    """Return ``network_weights`` of a cell at its published size, its aliases sharing memory as in the reference."""
    recording = golden.read(cell)
    weights: dict[str, Tensor] = {}
    for key, (shape, _) in recording["published_manifest"].items():
        first = recording["aliases"].get(key, key)
        if first not in weights:
            weights[first] = fill(first, shape)
        weights[key] = weights[first]
    return {key: weights[key] for key in recording["published_manifest"]}


def checkpoint_of(cell: str, *, training: bool = False) -> dict[str, Any]:
    """Return a published checkpoint, or one of a training, which holds more."""
    recording = golden.read(cell)
    content: dict[str, Any] = {
        "network_weights": weights_of(cell),
        "init_args": {"pretrain_json": {"collection": {str(index): f"/data/{index}.nii.gz" for index in range(1000)}}},
        "trainer_name": TRAINERS[cell],
        "nnssl_adaptation_plan": recording["adaptation_plan"],
    }
    if training:
        content |= {
            "optimizer_state": {"state": {}, "param_groups": []},
            "current_epoch": 7,
            "logging": {"lrs": [0.01]},
        }
        spark = recording.get("published_spark_manifest", {})
        if spark:
            content["spark_weights"] = {
                key: fill(key, shape) for key, (shape, _) in spark.items() if not key.startswith("architecture.")
            }
            del content["nnssl_adaptation_plan"]
    return content
