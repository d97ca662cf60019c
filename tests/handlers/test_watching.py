# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What is told while a run goes on: terms, norms, collapse, a loss that is no number, pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from matplotlib import image as images
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from common.errors import DataError, SettingsError
from common.handlers import (
    CaseBar,
    CollapseWatch,
    GradientClip,
    Pictures,
    Progress,
    StopAtNonFiniteLoss,
    draw_features,
    draw_fusion,
    draw_reconstruction,
    draw_restoration,
    draw_similarity,
)
from common.terminal import progress_bar


def trainer(losses: list[float], network: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """A trainer whose gradient is 3 in every one of the network's four weights, with the given losses."""

    def step(engine: Engine, batch: dict[str, Any]) -> dict[str, Tensor]:
        optimizer.zero_grad()
        (3 * network.weight.sum()).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        return {"loss": torch.tensor(losses[engine.state.iteration - 1])}

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    engine.amp, engine.scaler, engine.accumulation_steps = False, None, 1
    return engine


def linear() -> tuple[nn.Module, torch.optim.Optimizer]:
    network = nn.Linear(4, 1, bias=False)
    return network, torch.optim.SGD(network.parameters(), lr=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_step_and_files(bad: float) -> None:
    network, optimizer = linear()
    engine = trainer([1.0] * 13 + [bad] * 17, network, optimizer)
    saved = []
    StopAtNonFiniteLoss("models").attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: saved.append(e.state.epoch))
    batches = [{"path": [f"scan_{index}.nii.gz", f"other_{index}.nii.gz"]} for index in range(10)]
    with pytest.raises(SettingsError) as stopped:
        engine.run(batches, max_epochs=3, epoch_length=10)
    told = str(stopped.value)
    assert "in step 14 (epoch 2)" in told
    assert "other_3.nii.gz, scan_3.nii.gz;" in told
    assert "what was saved in models before is kept" in told
    assert "--lr" in told
    assert saved == [1], "nothing may be saved after the bad step"


def test_a_bad_loss_in_the_last_steps_of_an_epoch_is_found_before_it_is_saved() -> None:
    network, optimizer = linear()
    engine = trainer([1.0, 1.0, float("nan")], network, optimizer)
    StopAtNonFiniteLoss("models").attach(engine)
    with pytest.raises(SettingsError, match="in step 3"):
        engine.run([{"path": ["a"]}] * 3, max_epochs=1)


@pytest.mark.parametrize(("limit", "expected"), [(None, 6.0), (12.0, 6.0), (1.5, 1.5)])
def test_the_norm_is_told_as_it_was_and_clipped_to_the_limit(limit: float | None, expected: float) -> None:
    network, optimizer = linear()
    engine = trainer([1.0], network, optimizer)
    GradientClip(optimizer, limit).attach(engine)
    engine.run([{}], max_epochs=1)
    assert float(engine.state.gradient_norm) == pytest.approx(6.0)
    assert float(network.weight.grad.norm()) == pytest.approx(expected, rel=1e-4)


def test_progress_records_terms_norm_and_throughput(tmp_path: Path) -> None:
    network, optimizer = linear()
    engine = trainer([1.0, 2.0, 3.0, 5.0], network, optimizer)
    loss = SimpleNamespace(terms={"near": torch.tensor(0.25), "far": torch.tensor(0.5)})
    GradientClip(optimizer, None).attach(engine)
    progress = Progress("x", optimizer, history_file=tmp_path / "h.json", loss=loss, samples_per_step=8)
    progress.attach(engine)
    engine.run([{}] * 4, max_epochs=1)
    record = json.loads((tmp_path / "h.json").read_text())[0]
    assert record["train_loss"] == pytest.approx(2.75)
    assert (record["train_near"], record["train_far"]) == (0.25, 0.5)
    assert record["gradient_norm"] == pytest.approx(6.0)
    assert record["samples_per_second"] >= 4 * 8 / max(record["seconds"] + 0.01, 0.01) * 0.5
    assert engine.state.metrics["train_near"] == 0.25, "TensorBoard shows the engine's metrics"


@pytest.mark.parametrize(("left", "length", "told"), [(300.0, 24, 1), (5.0, 24, 0), (300.0, 10, 0), (300.0, 4, 0)])
def test_the_expected_time_is_told_once_and_early(
    left: float,
    length: int,
    told: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unless the run is short, or the first epoch's own line comes as early."""
    network, optimizer = linear()
    progress = Progress("x", optimizer, history_file=tmp_path / "h.json")
    monkeypatch.setattr(progress, "seconds_left", lambda _: left)
    engine = trainer([1.0] * 100, network, optimizer)
    progress.attach(engine)
    engine.run([{}] * length, max_epochs=4)
    printed = capsys.readouterr()
    shown = printed.out + printed.err
    assert shown.count("x: expected time: about 5 min more, as the first 10 steps went") == told
    assert shown.count("expected time") == told


def watch(embeddings: list[Tensor], epoch: int, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, float], str]:
    engine = Engine(lambda _, batch: {"pred": {"embedding": batch}})
    CollapseWatch(["embedding"]).attach(engine)
    engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "epoch", epoch - 1))
    engine.run(embeddings, max_epochs=epoch)
    return engine.state.metrics, capsys.readouterr().out


def test_collapse_is_told_and_health_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    healthy = [torch.randn(2, 32, 64) for _ in range(4)]
    metrics, told = watch(healthy, 5, capsys)
    assert abs(metrics["embedding_similarity"]) < 0.05
    assert metrics["embedding_collapse"] < 0.2
    assert told == ""

    same = [torch.ones(2, 32, 64) + 0.01 * torch.randn(2, 32, 64) for _ in range(4)]
    metrics, told = watch(same, 5, capsys)
    assert metrics["embedding_similarity"] > 0.99
    assert "nearly the same" in told
    assert "--lr" in told

    fixed = torch.randn(64)
    metrics, told = watch([torch.randn(2, 32, 1) * fixed for _ in range(4)], 5, capsys)
    assert metrics["embedding_collapse"] > 0.95
    assert metrics["embedding_directions"] == pytest.approx(1.0, abs=0.1)
    assert "nearly the same" in told

    few = [torch.randn(2, 4, 3) @ torch.randn(3, 64) for _ in range(1)]
    metrics, told = watch(few, 5, capsys)
    assert 1.5 < metrics["embedding_directions"] < 3
    assert told == "", "few directions are healthy where there are few crops"

    assert watch(same, 1, capsys)[1] == "", "an untrained network may look collapsed too"


def test_a_collapse_from_the_start_is_told_in_the_second_epoch_and_only_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = CollapseWatch(["embedding"])
    told = []
    for epoch in (1, 2, 3):
        engine = Engine(lambda _, batch: {"pred": {"embedding": batch}})
        handler.attach(engine)
        engine.add_event_handler(Events.STARTED, lambda e, epoch=epoch: setattr(e.state, "epoch", epoch - 1))
        engine.run([torch.ones(2, 8, 16)], max_epochs=epoch)
        told.append(capsys.readouterr().out)
    assert told[0] == told[2] == ""
    assert "nearly the same" in told[1]


def image_of(path: Path) -> Any:
    return images.imread(path)[..., :3]


def test_pictures_show_what_was_learned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    volume = torch.randn(2, 1, 16, 16, 16)
    hidden = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    hidden[:, 0] = True
    views = {"image": volume, "hidden": hidden, "target": volume, "share": torch.randint(5, (2, 16, 16, 16))}
    views["overlap"] = torch.rand(2, 3, 4)
    cases: dict[str, tuple[Any, dict[str, Tensor], dict[str, Tensor]]] = {
        "reconstruction": (draw_reconstruction, {"reconstruction": volume}, {"reconstruction": volume * 0}),
        "restoration": (draw_restoration, {"reconstruction": volume}, {"reconstruction": volume * 0}),
        "fusion": (draw_fusion, {"logits": torch.randn(2, 5, 16, 16, 16)}, {"logits": torch.zeros(2, 5, 16, 16, 16)}),
        "voco": (
            draw_similarity,
            {"base": torch.randn(2, 4, 8), "target": torch.randn(2, 3, 8)},
            {"base": torch.ones(2, 4, 8), "target": torch.ones(2, 3, 8)},
        ),
    }
    parts = torch.randn(2, 6, 4, 4, 4)
    cases["features"] = (draw_features, {"features": parts}, {"features": parts.flip(2)})
    for name, (draw, one, other) in cases.items():
        draw(views, one, tmp_path / f"{name}_1.png")
        draw(views, other, tmp_path / f"{name}_2.png")
        first, second = image_of(tmp_path / f"{name}_1.png"), image_of(tmp_path / f"{name}_2.png")
        assert first.shape == second.shape
        assert abs(first - second).mean() > 0.003, f"{name} does not show the prediction"
        assert first.std() > 0.1, f"{name} is empty"
    pairs = {"overlap": torch.eye(6)}
    draw_similarity(pairs, {"embedding": torch.randn(2, 6, 8)}, tmp_path / "simclr.png")
    assert image_of(tmp_path / "simclr.png").std() > 0.1


def test_pictures_come_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    drawn = []
    for epoch in range(1, 8):
        engine = Engine(lambda *_: {"pred": {}, "label": {}})
        Pictures(lambda v, p, path: drawn.append(path.name), folder=tmp_path, interval=3, epochs=7).attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e, epoch=epoch: setattr(e.state, "epoch", epoch))
        engine.run([0], max_epochs=1)
    assert drawn == ["epoch_3.png", "epoch_6.png", "epoch_7.png"]


def test_cases_are_counted_in_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.handlers.progress.progress_bar", partial(progress_bar, line_every=0))
    engine = Engine(lambda engine, batch: None)
    CaseBar("predicting").attach(engine)
    engine.run(range(4))
    told = capfd.readouterr()
    assert told.out == ""
    assert "\r" not in told.err
    lines = told.err.splitlines()
    assert lines
    assert all(line.startswith("predicting: ") and " of 4 cases" in line for line in lines)

    def fail(engine: Engine, batch: int) -> None:
        raise DataError("a.nii is empty; leave it out")

    engine = Engine(fail)
    CaseBar("predicting").attach(engine)
    with pytest.raises(DataError, match="is empty; leave it out"):
        engine.run(range(4))
