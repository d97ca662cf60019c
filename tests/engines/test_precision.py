# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Mixed precision means the same on every device: bfloat16 where a CPU has it, float32 and a word where it has not."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer
from torch import nn

from common.engines import AtPrecision, GaussianSlidingWindow, Precision, precision
from common.engines.precision import cpu_has_bfloat16
from common.errors import SettingsError
from common.networks import Convolution, ResEncUNet

from ..conftest import pretraining, run


def meant(monkeypatch: pytest.MonkeyPatch, *, has: bool, amp: bool, dtype: str | None = None) -> Precision:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has)
    monkeypatch.setattr(precision, "runs_for_a_user", lambda: True)
    return Precision(amp, "cpu", dtype)


@pytest.mark.parametrize(
    ("has", "amp", "mixed", "told"),
    [
        (True, True, True, ""),
        (True, False, False, "this CPU computes in bfloat16 too: --amp true takes"),
        (False, True, False, "note: this CPU has no instructions for bfloat16"),
        (False, False, False, ""),
    ],
)
def test_what_amp_means_on_a_cpu(
    has: bool, amp: bool, mixed: bool, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = meant(monkeypatch, has=has, amp=amp)
    assert (found.mixed, found.on_cpu, found.on_gpu, found.dtype) == (mixed, mixed, False, torch.bfloat16)
    said = capsys.readouterr().out
    assert said.startswith(told)
    assert said.count("\n") == bool(told)


def test_one_of_several_processes_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not meant(monkeypatch, has=True, amp=False).mixed
    assert not capsys.readouterr().out


def test_what_a_cpu_cannot_mean_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="amp_dtype is float16"):
        meant(monkeypatch, has=True, amp=True, dtype="float16")
    with pytest.raises(SettingsError, match="amp_dtype is 'half'"):
        meant(monkeypatch, has=True, amp=True, dtype="half")
    assert not meant(monkeypatch, has=True, amp=False, dtype="float16").mixed


@pytest.mark.parametrize(("gpu_has", "dtype", "expected"), [(True, None, "bfloat16"), (False, None, "float16")])
def test_a_gpu_is_left_to_the_engine(
    gpu_has: bool, dtype: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has)
    found = Precision(True, "cuda:0", dtype)
    assert (found.on_gpu, found.on_cpu, found.mixed) == (True, False, True)
    assert found.dtype is getattr(torch, expected)
    assert Precision(True, "cuda", "float16").dtype is torch.float16
    assert not Precision(False, "cuda").mixed


@pytest.mark.parametrize("mixed", [False, True])
def test_the_network_computes_in_it_and_sums_stay_float32(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    at = meant(monkeypatch, has=True, amp=mixed)
    network = nn.Conv3d(1, 2, 3, padding=1)
    image = torch.rand(1, 1, 12, 9, 8)
    expected = torch.bfloat16 if mixed else torch.float32
    assert AtPrecision(SimpleInferer(), at)(image, network).dtype is expected
    window = GaussianSlidingWindow(8)
    whole, exact = AtPrecision(window, at)(image, network), window(image, network)
    assert whole.dtype is torch.float32
    assert torch.equal(whole, exact) is not mixed
    torch.testing.assert_close(whole, exact, atol=0.02, rtol=0)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_thin_maps_have_the_gradients_of_float32(checkpointing: str) -> None:
    """PyTorch 2.13.0 has garbage there, or ends the process: maps of two planes under a kernel of three."""
    torch.manual_seed(0)
    network = ResEncUNet(
        1, 2, features_per_stage=[16, 32, 48], blocks_per_stage=[1, 1, 2], checkpointing=checkpointing
    ).train()
    image = torch.randn(4, 1, 8, 8, 8)  # 2^3 at the coarsest, and 4^3, where the decoder joins maps
    gradients = []
    for mixed in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = network(image)
        logits.float().square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    for exact, half in zip(*gradients, strict=True):
        assert float((half - exact).norm()) <= 0.4 * float(exact.norm()) + 1e-4


def test_thin_maps_alone_are_computed_in_float32() -> None:
    network = Convolution(8, 8, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        kinds = [network(torch.randn(1, 8, depth, 4, 4)).dtype for depth in (1, 2, 3, 4)]
    assert kinds == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("bundle", ["mae_resenc_l", "volumefusion_primus_m"])
def test_every_workflow_takes_it(bundle: str, images: Path, labelled: Path, tmp_path: Path) -> None:
    """Each differs a little from float32 where the CPU has bfloat16, and not at all where it has not."""
    differs = cpu_has_bfloat16()
    losses: dict[str, list[list[float]]] = {"pretrain": [], "train": []}
    volumes, features = [], []
    for name, amp in (("single", "false"), ("half", "true")):
        where = tmp_path / name
        told = run(bundle, "pretrain", *pretraining(where, images), "--amp", amp).stdout
        assert ("--amp true takes" in told) == (differs and amp == "false")
        assert ("no instructions for bfloat16" in told) == (not differs and amp == "true")
        places = ("--ckpt_dir", where / "seg", "--output_dir", where / "train", "--store_dir", where / "store")
        labels = ("--labels", "['background','ball']")
        run(
            *(bundle, "train", "--dataset_dir", labelled, *labels, *places, "--from_scratch", "true", "--amp", amp),
            *("--epochs", "2", "--iterations_per_epoch", "2", "--warmup_epochs", "0"),
        )
        for config, folder in (("pretrain", where / "out"), ("train", where / "train")):
            losses[config].append(
                [record["train_loss"] for record in json.loads((folder / "history.json").read_text())]
            )
        model = ("--ckpt_dir", tmp_path / "single" / "seg")  # the same for both
        run(
            *(bundle, "inference", "--dataset_dir", labelled, *model, "--output_dir", where / "predictions"),
            *("--probabilities", "true", "--amp", amp),
        )
        written = where / "predictions" / "probabilities" / "case_0_probabilities.nii.gz"
        volumes.append(np.asarray(nib.load(written).dataobj, np.float32))
        encoder = tmp_path / "single" / "models" / "pretrained_encoder.pt"
        run(
            *(bundle, "features", "--dataset_dir", images, "--pretrained", encoder),
            *("--output_dir", where / "features", "--amp", amp),
        )
        features.append(np.load(where / "features" / "case_0.npz")["embedding"])
    pairs = [*losses.values(), volumes, features]
    for single, half in pairs:
        assert (not np.array_equal(single, half)) == differs
        np.testing.assert_allclose(half, single, rtol=0.05, atol=0.05)
