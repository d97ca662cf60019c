# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""An encoder that a pre-training lost is written again, and a run can be started again without losing the old one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import SettingsError
from common.handlers import PretrainingCheckpoint, check_resume
from common.handlers import checkpoints as module
from common.ownership import release
from common.weights import read_checkpoint


class Method(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        nn.init.constant_(self.backbone.weight, value)


def handler(folder: Path, *, value: float = 1.0, resume: bool = True, epoch: int = 0) -> tuple[Any, Any]:
    method = Method(value)
    progress = SimpleNamespace(history=[], remarks={}, history_file=folder / "out" / "history.json")
    made = PretrainingCheckpoint(
        method,
        torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9),
        ckpt_dir=str(folder),
        settings={"lr": 0.1},
        recipe={"loss.class": "MSE"},
        progress=progress,  # type: ignore[arg-type]
        volumes={},
        resume=resume,
    )
    return made, SimpleNamespace(state=SimpleNamespace(epoch=epoch, max_epochs=2, epoch_length=3, iteration=0))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    made, engine = handler(tmp_path, epoch=2)
    made.progress.history.append({"epoch": 2, "train_loss": 0.5})
    made._save(engine)
    yield tmp_path
    release()


@pytest.mark.parametrize("damage", ["gone", "flipped", "its JSON is gone"])
def test_a_finished_pretraining_whose_encoder_is_lost_writes_it_again(finished: Path, damage: str) -> None:
    file = finished / "pretrained_encoder.pt"
    before = read_checkpoint(file)
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.with_suffix(".json").unlink()
    made, engine = handler(finished, value=7.0)
    made._start(engine)
    after = read_checkpoint(file)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["sha256"] == module.sha256(file)
    assert about["epochs"] == 2


def test_whole_encoders_are_left_alone(finished: Path) -> None:
    written = (finished / "pretrained_encoder.pt").stat().st_mtime_ns
    made, engine = handler(finished)
    made._start(engine)
    assert (finished / "pretrained_encoder.pt").stat().st_mtime_ns == written


def test_a_run_that_starts_again_keeps_the_old_one_aside(finished: Path) -> None:
    with pytest.raises(SettingsError, match=r"\(lr 0.1 -> 0.2; loss.class 'MSE' -> 'L1'\); continue it with those, or"):
        check_resume(str(finished), settings={"lr": 0.2}, recipe={"loss.class": "L1"})
    check_resume(str(finished), settings={"lr": 0.2}, resume=False)
    made, engine = handler(finished, value=7.0, resume=False)
    made._start(engine)
    assert engine.state.epoch == 0
    names = {path.name for path in finished.glob("*.pt")}
    assert names == {
        f"{name}_previous.pt" for name in ("pretraining_state", "pretrained_encoder", "pretrained_encoder_best")
    }
    assert (finished / "pretrained_encoder_previous.json").exists()


def test_an_encoder_from_elsewhere_is_not_replaced(finished: Path) -> None:
    (finished / "pretraining_state.pt").unlink()
    with pytest.raises(SettingsError, match="give this run another --ckpt_dir, or add --resume false, which keeps"):
        check_resume(str(finished), settings={"lr": 0.1})


def test_the_encoder_of_the_best_probe_is_kept(tmp_path: Path) -> None:
    made, engine = handler(tmp_path)
    kept = []
    for epoch, score in enumerate([0.5, 0.8, None, 0.8, 0.7, 0.9], 1):
        engine.state.epoch = epoch
        made.progress.history.append(
            {"epoch": epoch, "train_loss": 1.0} | ({} if score is None else {"probe_linear": score})
        )
        made._save(engine)
        kept.append(json.loads((tmp_path / "pretrained_encoder_probe.json").read_text())["epochs"])
    assert kept == [1, 2, 2, 2, 2, 6]
    release()
