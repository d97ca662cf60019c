# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other people: however the encoder is wrapped, named and stored, the same tensors arrive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import WeightsError
from common.weights import Told, export_network_weights, import_checkpoint, inspect, read_checkpoint
from tools.checkpoints.cells import bundle_cell

from ..conftest import small_settings

Weights = dict[str, Tensor]


def encoder_of(bundle: str) -> tuple[Any, Weights]:
    """Return a narrow cell, and its backbone under the reference's names, drawn at random."""
    cell, _ = bundle_cell(bundle, small_settings(bundle))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(v.shape, generator=generator) for name, v in cell.backbone.state_dict().items()}
    return cell, export_network_weights(state)


def under(prefix: str) -> Callable[[Weights], Any]:
    return lambda weights: {prefix + key: value for key, value in weights.items()}


def alone(weights: Weights) -> Any:
    return {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}


def training(weights: Weights) -> Any:
    """A file in the middle of a training: optimizer, scaler, log with NumPy's numbers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    return {
        "network_weights": weights,
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": {"scale": 65536.0},
        "logging": {"train_losses": [np.float64(0.3), np.float32(0.2)], "all": np.array([0.1, 0.2])},
        "_best_ema": np.float64(0.3),
        "current_epoch": 3,
    }


def with_heads(weights: Weights) -> Any:
    heads = {"head.mlp.0.weight": torch.randn(8, 8), "head.last_layer.weight": torch.randn(8, 8)}
    return {"teacher": {**under("backbone.")(weights), **heads}, "epoch": 260, "arch": "resenc"}


def one_name(weights: Weights) -> Any:
    """Each tensor once, under the shorter of its names, as a network without aliases would be saved."""
    return {key: value for key, value in weights.items() if ".all_modules." not in key and "decoder.encoder" not in key}


UNET: dict[str, Callable[[Weights], Any]] = {
    "module": under("module."),
    "compiled": under("_orig_mod.module."),
    "lightning": lambda weights: {"state_dict": under("model.net.")(weights), "epoch": 3},
    "student": under("student.backbone."),
    "encoder in encoder": lambda weights: under("encoder.")({k: v for k, v in weights.items() if "decoder" not in k}),
    "encoder alone": alone,
    "encoder alone, wrapped": lambda weights: {"model": under("module.")(alone(weights))},
    "training": training,
    "heads": with_heads,
    "one name": one_name,
    "half": lambda weights: {key: value.half() for key, value in weights.items()},
    "brain": lambda weights: {key: value.bfloat16() for key, value in weights.items()},
}


@pytest.mark.parametrize("how", UNET)
def test_an_encoder_of_the_unet_is_found_in_any_wrapping(how: str, tmp_path: Path) -> None:
    cell, weights = encoder_of("simclr_resenc_l" if "alone" in how else "mae_resenc_l")
    path = tmp_path / "c.pth"
    torch.save(UNET[how](weights), path)
    arrived(path, cell, weights, tmp_path)
    text = "\n".join(inspect(path))
    assert "ResEnc-L encoder, method unknown" in text


PRIMUS: dict[str, Callable[[Weights], Any]] = {
    "module": under("module."),
    "backbone": under("student.backbone."),
    "contrastive": under("encoder."),
    "contrastive, wrapped": under("module.encoder."),
}


@pytest.mark.parametrize("how", PRIMUS)
def test_an_encoder_of_primus_is_found_in_any_wrapping(how: str, tmp_path: Path) -> None:
    cell, weights = encoder_of("mae_primus_m")
    if "contrastive" in how:
        weights = {key: value for key, value in weights.items() if not key.startswith("up_projection")}
    torch.save(PRIMUS[how](weights), tmp_path / "c.pth")
    arrived(tmp_path / "c.pth", cell, weights, tmp_path)


@pytest.mark.parametrize("how", ["safetensors", "safetensors called pth", "before torch 1.6"])
def test_an_encoder_is_read_from_any_format(how: str, tmp_path: Path) -> None:
    cell, weights = encoder_of("mae_resenc_l")
    path = tmp_path / ("c.safetensors" if how == "safetensors" else "c.pth")
    if how == "before torch 1.6":
        torch.save({"network_weights": weights}, path, _use_new_zipfile_serialization=False)
    else:
        save_file({key: value.clone() for key, value in weights.items()}, path)
    arrived(path, cell, weights, tmp_path)


def arrived(path: Path, cell: Any, weights: Weights, folder: Path) -> None:
    """Import a file, and compare its encoder with what was put into it."""
    order = "straight" if cell.num_heads else "auto"
    receipt, _ = import_checkpoint(path, cell, output=folder / "e.pt", told=Told(), token_order=order)
    assert receipt.encoder_share == 1.0
    assert receipt.method == "unknown"
    found = read_checkpoint(folder / "e.pt")
    plain = folder / "plain.pth"
    torch.save({"network_weights": weights}, plain)
    import_checkpoint(plain, cell, output=folder / "plain.pt", told=Told(), token_order=order)
    expected = read_checkpoint(folder / "plain.pt")
    half = any(value.dtype != torch.float32 for value in read_checkpoint(path).values() if isinstance(value, Tensor))
    for name in [name for name in expected if name.startswith("encoder.")]:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2 if half else 0, atol=1e-2 if half else 0)


def test_two_encoders_in_a_file_are_taken_only_if_they_are_one(tmp_path: Path) -> None:
    cell, weights = encoder_of("mae_resenc_l")
    path = tmp_path / "c.pth"
    both = under("student.")(weights) | under("teacher.")({key: value.clone() for key, value in weights.items()})
    torch.save(both, path)
    arrived(path, cell, weights, tmp_path)
    both["teacher.encoder.stem.convs.0.all_modules.0.weight"] += 1
    for content in (both, {"student": weights, "teacher": {k: v + 1 for k, v in weights.items()}}):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=r"holds several encoders .*'student\.?', 'teacher\.?'; .*save the one"):
            import_checkpoint(path, cell, output=tmp_path / "none.pt")
        assert "holds several encoders" in "\n".join(inspect(path))
    assert not (tmp_path / "none.pt").exists()
