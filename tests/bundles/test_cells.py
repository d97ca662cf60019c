# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What every cell of the matrix must do, built from its own pretrain config: contracts, gradients, learning, runs."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle
from torch import Tensor, nn

from common.bundles import read_config
from common.data import CropDataset, StoreSettings, VolumeStore
from common.engines.watching import handler
from common.handlers import PretrainingCheckpoint
from common.views import VisibleBlocks
from common.weights import fine_tuning_network, read_checkpoint
from common.weights.cells import METHODS
from tools.preparing.template import simulate_scan, template

from ..conftest import BUNDLES, WITH_TEACHER, method_of, small_settings, write_cases
from .conftest import Killed

pytestmark = pytest.mark.usefixtures("from_the_root")
WHOLE_BATCH = ("simclr", "swinunetr", "voco", "dino")  # their loss needs the whole batch at once
WATCHED = (*WHOLE_BATCH, "jepa")  # whether their embeddings collapse
FALLS_TO = 0.75  # share of its start that every loss must reach in 30 steps on two samples


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four simulated scans of the MNI152 template; real anatomy, 2 mm when prepared."""
    folder = tmp_path_factory.mktemp("scans")
    image, _, affine = template()
    for index in range(4):
        scan = simulate_scan(image[30:170, 40:190, 30:150], np.random.default_rng(index))
        nib.save(nib.Nifti1Image(scan, affine), folder / f"scan_{index}.nii.gz")
    return folder


@dataclass
class Cell:
    method: nn.Module
    loss: nn.Module
    views: Callable[[dict[str, Any]], dict[str, Any]]
    optimizer: torch.optim.Optimizer
    raw: dict[str, Any]
    batch: dict[str, Any]


def build(bundle: str, scans: Path, *, samples: int = 2, device: str = "cpu", **settings: Any) -> Cell:
    """Build a cell from its config, narrow, with the views of a batch of real crops."""
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/pretrain.yaml"))
    parser.update(small_settings(bundle) | {"device": f"$torch.device('{device}')", "batch_size": samples} | settings)
    torch.manual_seed(0)
    method, loss, views = (parser.get_parsed_content(name) for name in ("method", "loss", "views"))
    method = parser.get_parsed_content("network")
    store = VolumeStore(scans / "store", StoreSettings(spacing_mm=2.0))
    volumes, _ = store.prepare([{"image": str(path)} for path in sorted(scans.glob("*.nii.gz"))])
    count = parser.get_parsed_content("volumes_per_sample")
    data = CropDataset(volumes, spatial=parser.get_parsed_content("spatial"), seed=0, volumes_per_sample=count)
    items = [data[1, index] for index in range(samples)]
    batch = {key: [value for item in items for value in item[key]] for key in items[0]}
    batch["region"] = [region.to(device) for region in batch["region"]]
    with torch.no_grad():
        made = views(batch)
    return Cell(method, loss, views, parser.get_parsed_content("optimizer"), batch, made)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_four_contracts(bundle: str, scans: Path) -> None:
    cell = build(bundle, scans)
    assert all(isinstance(value, (Tensor, int, float, VisibleBlocks)) for value in cell.batch.values()), (
        "views: tensors on the device"
    )
    pred = cell.method(cell.batch)
    assert all(isinstance(value, Tensor) for value in pred.values()), "method: a dictionary of tensors"
    loss = cell.loss(pred, cell.batch)
    assert loss.shape == (), "loss: a scalar"
    assert loss.dtype == torch.float32
    assert all(term.shape == () and not term.requires_grad for term in getattr(cell.loss, "terms", {}).values())
    backbone = cell.method.get_submodule("backbone")
    image = torch.randn(2, 1, 16, 16, 16)
    features = backbone.encode(image)
    assert [f.shape[1] for f in features] == backbone.feature_channels
    assert [16 // f.shape[2] for f in features] == backbone.feature_strides
    if backbone.decoder is not None:
        assert torch.equal(backbone.eval()(image), backbone.decode(backbone.encode(image)))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_what_should_learn_gets_a_gradient_and_nothing_else(bundle: str, scans: Path) -> None:
    settings = {"teacher_momentum": 0.9} if method_of(bundle) == "voco" else {}
    cell = build(bundle, scans, **settings)
    cell.loss(cell.method.train()(cell.batch), cell.batch).backward()
    missing = [name for name, parameter in cell.method.named_parameters() if parameter.grad is None]
    kept = ("backbone.", "teacher_") if method_of(bundle) in WITH_TEACHER else ()
    assert missing == [name for name, _ in cell.method.named_parameters() if name.startswith(("teacher.", *kept))]
    assert bool(missing) == bool(settings or kept)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_what_is_computed_again_gives_the_same_gradients(bundle: str, scans: Path) -> None:
    found = []
    for checkpointing in ("none", "selective", "full"):
        cell = build(bundle, scans, checkpointing=checkpointing)
        torch.manual_seed(1)
        cell.loss(cell.method.train()(cell.batch), cell.batch).backward()
        found.append(torch.cat([p.grad.flatten() for p in cell.method.parameters() if p.grad is not None]))
    plain, *others = found
    assert plain.norm() > 0
    assert all((other - plain).norm() <= 1e-6 * plain.norm() for other in others)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_it_learns_on_a_few_real_crops(bundle: str, scans: Path) -> None:
    wide = {"features_per_stage": [8, 16, 32]} if bundle.endswith("resenc_l") else {"embed_dim": 48, "drop_path": 0.0}
    cell = build(bundle, scans, **wide)
    rate = {"lr": 0.05, "momentum": 0.9} if bundle.endswith("resenc_l") else {"lr": 2e-3}
    for group in cell.optimizer.param_groups:
        group.update(rate)
    cell.method.train()
    losses = []
    for _ in range(30):
        loss = cell.loss(cell.method(cell.batch), cell.batch)
        cell.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cell.method.parameters(), 1.0)
        cell.optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < FALLS_TO * losses[0], losses


@pytest.mark.parametrize("bundle", [bundle for bundle in BUNDLES if method_of(bundle) in WHOLE_BATCH])
def test_accumulation_of_a_whole_batch_loss_is_exact(bundle: str, scans: Path) -> None:
    """Computed in parts, every sample still meets all others: same loss, same gradients."""
    gradients, losses = [], []
    for parts in (1, 2, 4):
        cell = build(bundle, scans, accumulation_steps=parts)
        loss = cell.loss(cell.method.eval()(cell.batch), cell.batch)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in cell.method.parameters() if p.requires_grad]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max()))


def pretrain(bundle: str, folder: Path, scans: Path, **settings: Any) -> dict[str, Any]:
    """Run a bundle's pretrain config in this process, tiny, and return its state."""
    root = f"bundles/{bundle}"
    settings = {
        **small_settings(bundle),
        "dataset_dir": str(scans),
        "store_dir": str(scans / "store"),
        "spacing_mm": 2.0,
        "output_dir": str(folder / "out"),
        "ckpt_dir": str(folder / "models"),
        "batch_size": 2,
        "epochs": 3,
        "iterations_per_epoch": 2,
        "val_iterations": 1,
        "picture_interval": 2,
        **settings,
    }
    run_bundle(config_file=f"{root}/configs/pretrain.yaml", bundle_root=root, logging_file=None, **settings)
    return read_checkpoint(folder / "models" / "pretraining_state.pt")


def assert_same(one: dict[str, Any], other: dict[str, Any], *, tolerance: float = 0.0) -> None:
    assert one["method"].keys() == other["method"].keys()
    for name, value in one["method"].items():
        assert float((value - other["method"][name]).abs().max()) <= tolerance, name


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_run_repeats_resumes_and_is_taken_by_fine_tuning(
    bundle: str, scans: Path, tmp_path: Path, killed: Killed
) -> None:
    whole = pretrain(bundle, tmp_path / "whole", scans)
    history = json.loads((tmp_path / "whole" / "out" / "history.json").read_text())
    assert [record["epoch"] for record in history] == [1, 2, 3]
    for record in history:
        assert np.isfinite(list(record.values())).all()
        assert {"train_loss", "val_loss", "gradient_norm", "lr", "samples_per_second"} <= record.keys()
    page = (tmp_path / "whole" / "out" / "progress.html").read_text("utf-8")
    assert f"<title>{bundle}, pre-training: finished</title>" in page
    assert "Epoch 3 of 3 is done" in page
    assert "Latest picture, epoch 3" in page
    assert METHODS[method_of(bundle)].error in html.unescape(page), "every method its own"
    pictures = sorted(path.name for path in (tmp_path / "whole" / "out" / "pictures").iterdir())
    assert pictures == ["epoch_2.png", "epoch_3.png"]
    assert ("embedding_collapse" in history[-1]) == (method_of(bundle) in WATCHED)

    # stopped after its second epoch was saved, as by a kill, and started again: the same bits
    with killed(PretrainingCheckpoint, 2):
        pretrain(bundle, tmp_path / "cut", scans)
    assert read_checkpoint(tmp_path / "cut" / "models" / "pretraining_state.pt")["epoch"] == 2
    assert_same(whole, pretrain(bundle, tmp_path / "cut", scans))

    other = pretrain(bundle, tmp_path / "other", scans, seed=1)
    assert any(not torch.equal(value, other["method"][name]) for name, value in whole["method"].items())

    # fine-tuning takes the whole encoder
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/train.yaml"))
    names = ("features_per_stage", "blocks_per_stage", "embed_dim", "depth", "num_heads")
    parser.update({name: value for name, value in small_settings(bundle).items() if name in names})
    parser["patch_size"] = [32, 32, 32]
    receipt = tmp_path / "receipt.json"
    fine_tuning_network(
        parser.get_parsed_content("network_def"),
        pretrained=str(tmp_path / "whole" / "models" / "pretrained_encoder.pt"),
        settings={},
        receipt_file=str(receipt),
    )
    assert json.loads(receipt.read_text())["encoder_share"] == 1.0


@pytest.mark.parametrize("bundle", ["simclr_primus_m", "voco_resenc_l"])
def test_looks_at_the_features_change_no_bit(
    bundle: str, scans: Path, tmp_path: Path, killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stochastic depth, whose draws a look must not move, and with a teacher; cut and resumed as well."""
    monkeypatch.setattr(handler, "_SHARE", 1e9)
    labelled = {"probe_data": str(write_cases(tmp_path / "labelled", 4)), "probe_labels": ["background", "ball"]}
    settings = {"teacher_momentum": 0.9} if method_of(bundle) == "voco" else {}
    probed = settings | labelled | {"probe_interval": 1}
    plain = pretrain(bundle, tmp_path / "plain", scans, probe_interval=0, **settings)
    whole = pretrain(bundle, tmp_path / "whole", scans, **probed)
    with killed(PretrainingCheckpoint, 2):
        pretrain(bundle, tmp_path / "cut", scans, **probed)
    resumed = pretrain(bundle, tmp_path / "cut", scans, **probed)
    for other in (whole, resumed):
        assert_same(plain, other)
        for index, own in plain["optimizer"]["state"].items():
            theirs = other["optimizer"]["state"][index]
            assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[n])) for n, value in own.items())
        assert [r["train_loss"] for r in plain["history"]] == [r["train_loss"] for r in other["history"]]
    scores = [
        [{name: value for name, value in r.items() if "probe_" in name} for r in state["history"]]
        for state in (whole, resumed)
    ]
    assert scores[0] == scores[1]
    assert all("probe_linear" in each for each in scores[0])
    assert "start_probe_linear" in scores[0][0]
    page = (tmp_path / "cut" / "out" / "progress.html").read_text("utf-8")
    assert "Frozen features, on unseen labelled cases" in page
    assert "linear probe of voxels of background, ball (balanced accuracy, chance 0.5)" in page
    best = read_checkpoint(tmp_path / "whole" / "models" / "pretrained_encoder_probe.pt")
    again = read_checkpoint(tmp_path / "cut" / "models" / "pretrained_encoder_probe.pt")
    assert all(torch.equal(value, again[name]) for name, value in best.items())
