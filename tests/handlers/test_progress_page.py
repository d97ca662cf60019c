# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The page that grows with a run, and the lines of a terminal."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from common import terminal
from common.document import Chart
from common.errors import DataError
from common.handlers import Progress, ProgressPage, progress_page


def run(folder: Path, *, epochs: int = 4, fail_at: int = 0, name: str = "pre-training") -> dict[str, str]:
    """Train nothing; return the page as it was while the run went on and at its end."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    seen: dict[str, str] = {}

    def step(engine: Engine, _: Any) -> dict[str, torch.Tensor]:
        if engine.state.epoch == fail_at:
            raise DataError("scan <7> is gone")
        if engine.state.iteration in (1, 6):
            seen[f"step {engine.state.iteration}"] = (folder / "progress.html").read_text("utf-8")
        return {"loss": torch.tensor(1 / engine.state.iteration)}

    trainer = Engine(step)
    evaluator = Engine(lambda *_: None)
    progress = Progress(name, optimizer, history_file=folder / "history.json", evaluator=evaluator, samples_per_step=2)

    def validate(engine: Engine) -> None:
        evaluator.state.epoch = engine.state.epoch
        if name == "pre-training":
            evaluator.state.metrics = {"val_loss": 0.5, "embedding_similarity": 0.97}
        else:
            evaluator.state.metrics = {"val_dice": 0.5, "val_dice_core": 0.4, "val_dice_rim": 0.6}

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    progress.attach(trainer)
    page = ProgressPage(progress, path=folder / "progress.html", pictures=folder / "pictures", bundle="simclr_resenc_l")
    page.attach(trainer)
    try:
        trainer.run([None] * 5, max_epochs=epochs)
    except DataError:
        assert fail_at
    return seen | {"end": (folder / "progress.html").read_text("utf-8")}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_page, "_LEAST_SECONDS", 0)
    monkeypatch.setattr(progress_page, "_SHARE", 1e9)
    monkeypatch.setattr(terminal, "warned", [])
    monkeypatch.setattr(progress_page, "warned", terminal.warned)


def test_the_page_grows_and_reloads_itself_until_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "epoch_2.png").write_bytes(b"a picture")
    terminal.warn("warning: <something> is odd")
    pages = run(tmp_path)
    assert "Running: epoch 0 of 4 is done" in pages["step 1"]
    assert re.search(r"Running: epoch 1 of 4 is done, about [\d.]+ s left, [\d.e+]+ samples a second", pages["step 6"])
    for name in ("step 1", "step 6"):
        assert '<meta http-equiv="refresh" content="20">' in pages[name]
    assert "http-equiv" not in pages["end"]
    assert "Finished. Epoch 4 of 4 is done" in pages["end"]
    assert "<title>simclr_resenc_l, pre-training: finished</title>" in pages["end"]
    assert "Loss: contrastive loss of finding a crop&#x27;s partner" in pages["end"], "not of another method"
    assert pages["step 1"].count("<polyline") == 0
    assert pages["end"].count("<polyline") == 4, "two losses, alikeness, the rate"
    assert "mean cosine 0.97" in pages["end"]
    assert "Latest picture, epoch 2" in pages["end"]
    assert "data:image/png;base64,YSBwaWN0dXJl" in pages["end"]
    assert "warning: &lt;something&gt; is odd" in pages["end"]
    assert not re.search(r'https?:|src="(?!data:)|href="[^#]', pages["end"]), "one file, no network"
    assert not list(tmp_path.glob(".*.part"))
    assert "pre-training: epoch 1/4, loss 0.4567, validation loss 0.5, " in capsys.readouterr().out


def test_fine_tuning_shows_the_dice_of_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run(tmp_path, name="fine-tuning")["end"]
    chart = page.partition("Dice of each class in validation")[2].partition("</figure>")[0]
    assert [re.sub(r"<[^>]*>", "", key).strip() for key in re.findall(r"<span>(.*?)</span>", chart)] == [
        *("mean 0.5", "core 0.4", "rim 0.6")
    ]
    assert "contrastive" not in page, "fine-tuning has another loss"
    assert "validation Dice 0.500 (core 0.400, rim 0.600), " in capsys.readouterr().out


def test_a_run_that_stops_says_why(tmp_path: Path) -> None:
    page = run(tmp_path, fail_at=3)["end"]
    assert "Stopped: scan &lt;7&gt; is gone. Epoch 2 of 4 is done" in page
    assert "http-equiv" not in page


def test_a_warning_that_names_a_file_in_another_encoding_stops_nothing(tmp_path: Path) -> None:
    terminal.warned.append("scan_\udcff.nii.gz is left out")
    assert "scan_?.nii.gz is left out" in run(tmp_path)["end"]


def test_writing_takes_a_small_share_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    now = [0.0]
    spent = []

    def slow(*_: Any, **__: Any) -> None:
        now[0] += 0.3
        spent.append(0.3)

    monkeypatch.setattr(progress_page.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress_page, "write_html", slow)
    monkeypatch.setattr("common.handlers.progress.tqdm.write", lambda *_: None)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)

    def step(engine: Engine, _: Any) -> dict[str, torch.Tensor]:
        now[0] += 0.5
        return {"loss": torch.tensor(1.0)}

    trainer = Engine(step)
    progress = Progress("x", optimizer, history_file=tmp_path / "history.json")
    progress.attach(trainer)
    ProgressPage(progress, path=tmp_path / "p.html", pictures=tmp_path).attach(trainer)
    trainer.run([None] * 10, max_epochs=200)
    assert 5 < len(spent) < 20
    assert sum(spent) < 0.005 * now[0]


def test_bars_are_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(terminal.progress_bar(range(4), line_every=0, desc="preparing", unit="volume")) == [0, 1, 2, 3]
    lines = sys.stderr.getvalue().splitlines()
    assert "\r" not in sys.stderr.getvalue()
    assert re.fullmatch(r"preparing: 4 of 4 volumes, 00:00 left", lines[-1])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(terminal.progress_bar([1], desc="one")) == [1]
    assert sys.stderr.getvalue() == "", "nothing to wait for"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_and_a_warning_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, wanted in ((Terminal(), "\033[33mcareful\033[0m\n"), (io.StringIO(), "careful\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        terminal.warn("careful")
        assert stream.getvalue() == wanted
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Terminal())
    terminal.warn("careful")
    assert sys.stdout.getvalue() == "careful\n"
    assert terminal.warned == ["careful"]


def test_paths_are_told_from_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert terminal.near(tmp_path / "a" / "b.txt") == str(Path("a/b.txt"))
    assert terminal.near("a/b.txt") == str(Path("a/b.txt"))
    assert terminal.near(tmp_path.parent / "c") == str(tmp_path.parent / "c")


def test_scores_of_features_begin_with_the_random_weights(tmp_path: Path) -> None:
    history: list[dict[str, float]] = [
        {"epoch": 1, "train_loss": 2.0, "start_probe_linear": 0.5, "start_probe_rank": 3.0},
        {"epoch": 2, "train_loss": 1.0, "probe_linear": 0.75, "probe_knn": 0.7, "probe_rank": 9.0},
    ]
    charts = {part.title: part.lines for part in progress_page._charts(history, "") if isinstance(part, Chart)}
    assert charts["Frozen features, on unseen labelled cases"] == {
        "linear probe": [(0, 0.5), (2, 0.75)],
        "nearest neighbours": [(2, 0.7)],
    }
    assert charts["Effective rank of frozen features"] == {"dimensions": [(0, 3.0), (2, 9.0)]}
    assert list(charts["Loss"]) == ["training"]
