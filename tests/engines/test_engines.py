# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from monai.bundle import run as run_bundle
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from common.engines.settings import elsewhere
from common.errors import SettingsError
from common.handlers import GradientClip, SetLearningRate
from common.optimizers import Poly
from common.settings import OWN_SETTINGS, unknown_settings


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1e-2), (500, 1e-2 * 0.5**0.9), (999, 1.995e-5)])
def test_published_schedule_of_resenc(epoch: int, rate: float) -> None:
    assert Poly(1e-2, epochs=1000)(epoch) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 6e-6), (24, 1.5e-4), (49, 3e-4), (50, 3e-4), (525, 3e-4 * 0.5**0.9)])
def test_published_schedule_of_primus(epoch: int, rate: float) -> None:
    assert Poly(3e-4, epochs=1000, warmup_epochs=50)(epoch) == pytest.approx(rate)


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(SettingsError, match="less than epochs 10"):
        Poly(1.0, epochs=10, warmup_epochs=10)


def test_the_rate_is_set_from_the_epoch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    SetLearningRate(optimizer, lambda epoch: epoch / 10)(SimpleNamespace(state=SimpleNamespace(epoch=3)))
    assert optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize(("iteration", "steps", "clipped"), [(1, 1, True), (1, 2, False), (2, 2, True), (5, 2, True)])
def test_gradients_are_clipped_when_the_optimizer_steps(iteration: int, steps: int, clipped: bool) -> None:
    """The last micro-batch of an epoch steps too, whether or not it completes a group."""
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 10.0)
    state = SimpleNamespace(iteration=iteration, epoch_length=5)
    engine = SimpleNamespace(state=state, accumulation_steps=steps, amp=False, scaler=None)
    GradientClip(torch.optim.SGD([weight]), 1.0)(engine)
    assert float(weight.grad.norm()) == pytest.approx(1.0 if clipped else 20.0, rel=1e-5)


def test_unknown_settings_name_the_nearest() -> None:
    known = ["epochs", "lr", "train", "batch_size"]
    assert unknown_settings(["lr", "train#trainer#max_epochs", "+epochs", "tracking", "config_file"], known) is None
    sentence = unknown_settings(["batchsize", "zzz"], known)
    assert sentence is not None
    assert "--batchsize (did you mean --batch_size?), --zzz;" in sentence


def test_settings_of_monai_itself_are_known() -> None:
    assert inspect.signature(run_bundle).parameters.keys() - {"override"} <= OWN_SETTINGS
    assert DEFAULT_EXP_MGMT_SETTINGS["mlflow"]["configs"].keys() <= OWN_SETTINGS


def test_the_folder_of_another_bundle_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "configs" / "metadata.json").write_text("{}")
    (tmp_path / "shared" / "configs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    train, shared = str(tmp_path / "one" / "configs" / "train.json"), "shared/configs/multi_gpu.yaml"
    told = elsewhere([shared, train], "two")
    assert told is not None
    assert told.endswith(f"--bundle_root {tmp_path / 'two'}; leave --bundle_root out, or write {tmp_path / 'one'}")
    assert elsewhere(f"{shared},{train}", "two") == told
    for root in ("one", "link", str(tmp_path / "one")):
        assert elsewhere([train, shared], root) is None
    assert elsewhere("link/configs/train.json", "one") is None
    assert elsewhere(train, str(tmp_path / "results")) is None, "results may go anywhere"
    assert elsewhere(shared, ".") is None
    assert elsewhere([{"a": 1}, "mine.json"], ".") is None
