# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Looks at the features of a pre-training: what they find, what they cost, and that nothing else feels them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from common import terminal
from common.bundles import read_config
from common.engines.watching import FeatureWatch, ProbeSource, handler
from common.engines.watching.crops import crop_box
from common.engines.watching.labelled import CaseTask, VoxelTask, unseen_scores
from common.engines.watching.verdicts import decline, outcome
from common.errors import DataError, SettingsError
from common.handlers import Progress
from common.networks import ResEncUNet

from ..conftest import BUNDLES, ROOT, blobs, write_cases, write_volume

SIDES = [16, 16, 16]


class Method(nn.Module):
    """A narrow encoder with dropout, which draws numbers in training."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1, 1], with_decoder=False)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            next(self.backbone.parameters()).add_(value)

    def forward(self, image: Tensor) -> Tensor:
        return self.drop(self.backbone.encode(image)[-1]).square().mean()


@dataclass(frozen=True)
class Held:
    """A volume in memory."""

    source: str
    values: np.ndarray

    @property
    def shape(self) -> Sequence[int]:
        return self.values.shape

    def read(self, start: Sequence[int], stop: Sequence[int], *, mask: str | None = None) -> np.ndarray:
        return self.values[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]


def held(count: int = 4) -> dict[str, Any]:
    volumes = [Held(f"scan_{index}", ((blobs(index)[0] - 100) / 30).astype(np.float16)) for index in range(count)]
    return {"training": volumes, "validation": volumes[:1]}


def run(
    folder: Path, *, epochs: int = 3, interval: int = 1, source: ProbeSource | None = None, volumes: Any = None
) -> tuple[list[dict[str, float]], Method, FeatureWatch, list[dict[str, float]]]:
    """Train a few steps; return the history, what was trained, the handler, and what TensorBoard saw."""
    method, seen = Method(), []
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)

    def step(_: Engine, batch: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss = method.train()(batch)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    trainer = Engine(step)
    progress = Progress("pre-training", optimizer, history_file=folder / "history.json")
    watch = FeatureWatch(
        method,
        progress=progress,
        volumes=volumes or held(),
        patch_size=SIDES,
        interval=interval,
        source=source,
    )
    watch.attach(trainer)
    progress.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)))
    torch.manual_seed(1)
    trainer.run(list(torch.randn(2, 1, 1, *SIDES)), max_epochs=epochs)
    return progress.history, method, watch, seen


@pytest.fixture(autouse=True)
def _without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "_SHARE", 1e9)
    monkeypatch.setattr(terminal, "warned", [])


def source(folder: Path, **more: Any) -> ProbeSource:
    return ProbeSource(data=str(folder), store_dir=str(folder / "store"), **more)


def test_scores_join_the_history_and_nothing_else_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = source(write_cases(tmp_path / "labelled", 4), labels=["background", "ball"])
    plain, one, _, _ = run(tmp_path / "plain", interval=0)
    assert not any("probe" in name for record in plain for name in record)
    history, other, watch, seen = run(tmp_path / "probed", interval=2, source=labelled)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert [record["train_loss"] for record in plain] == [record["train_loss"] for record in history]
    assert other.training
    assert all(parameter.requires_grad for parameter in other.parameters())
    names = {"rank", "agreement", "knn", "linear", "linear_auroc"}
    assert {name for name in history[0] if name.startswith("start_")} == {f"start_probe_{name}" for name in names}
    for record, due in zip(history, (False, True, True), strict=True):
        assert {name for name in record if name.startswith("probe_")} == {f"probe_{n}" for n in names if due}
        assert np.isfinite(list(record.values())).all()
    assert [name for name in seen[0] if name.startswith("probe/")] == []
    assert {name for name in seen[1] if name.startswith("probe/")} == {f"probe/{name}" for name in names}
    assert seen[2]["probe/rank"] == history[2]["probe_rank"], "that of its own epoch"
    assert 1 < history[1]["probe_rank"] <= 8
    assert history[1]["probe_linear"] > 0.8, "a ball is brighter than what is around it"
    assert json.loads((tmp_path / "probed" / "history.json").read_text()) == history
    parts = json.loads((tmp_path / "probed" / "probes.json").read_text())
    assert sorted(parts["reference"] + parts["unseen"]) == [f"case_{index}" for index in range(4)]
    told = capsys.readouterr().out
    assert f"2 unseen case(s): {', '.join(parts['unseen'])}" in told
    assert "features before the first step: linear probe 0." in told
    assert "linear probe of voxels of background, ball (balanced accuracy, chance 0.5): " in told
    assert watch.progress.summary in told
    assert "probes took" in told


def test_a_look_leaves_every_generator_as_it_was(tmp_path: Path) -> None:
    _, method, watch, _ = run(tmp_path, epochs=1)
    method.train()
    method.backbone.encoder.eval()
    frozen = next(method.backbone.parameters()).requires_grad_(False)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = watch._measured()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
    assert (method.training, method.backbone.training, method.backbone.encoder.training) == (True, True, False)
    assert next(parameter for parameter in method.parameters() if not parameter.requires_grad) is frozen
    assert first == watch._measured(), "always the same crops, views and positions"


def test_features_that_are_no_numbers_stop_no_training(tmp_path: Path) -> None:
    _, method, watch, _ = run(tmp_path, epochs=1)
    with torch.no_grad():
        next(method.backbone.parameters()).fill_(float("nan"))
    assert watch._measured() == {}
    assert "cannot be scored: its features are NaN" in terminal.warned[-1]


def test_without_enough_volumes_only_the_rank_is_told(tmp_path: Path) -> None:
    history, *_ = run(tmp_path, volumes=held(1))
    assert "probe_rank" in history[-1]
    assert "probe_agreement" not in history[-1]


@pytest.mark.parametrize(("seconds", "epoch", "most"), [(1.0, 100.0, 100), (10.0, 20.0, 9), (200.0, 1.0, 0)])
def test_it_takes_no_more_than_its_share(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    epoch: float,
    most: int,
) -> None:
    """A stand-in takes so many seconds for a look, and a hundred epochs as many each."""
    now = [0.0]
    monkeypatch.setattr(handler, "_SHARE", 0.05)
    monkeypatch.setattr(handler.time, "monotonic", lambda: now[0])

    def look(_: Any) -> dict[str, float]:
        now[0] += seconds
        return {"rank": 3.0}

    progress = Progress("x", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), history_file=tmp_path / "h.json")
    watch = FeatureWatch(Method(), progress=progress, volumes=held(), patch_size=SIDES, interval=1)
    monkeypatch.setattr(watch.pairs, "scores", look)
    trainer = Engine(lambda *_: {"loss": torch.tensor(1.0)})
    watch.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: now.__setitem__(0, now[0] + epoch))
    progress.attach(trainer)
    trainer.run([None], max_epochs=100)
    looks = sum("probe_rank" in record for record in progress.history)
    assert looks == most
    first = seconds if most < 100 else 0  # the look before the first step is taken in any case
    assert watch.spent <= max(0.05 * now[0], first) * (1 + 1e-9)
    told = capsys.readouterr().out
    assert ("it comes about every" in told) == (most < 100)
    if most == 9:
        assert "a look at the features takes 10 s, an epoch 20 s; to stay below 5% of the time" in told
        assert "about every 10 epochs" in told


def curve(scores: Sequence[float], losses: Sequence[float], name: str = "probe_linear") -> list[dict[str, float]]:
    return [
        {"epoch": index + 1, "train_loss": loss, name: score}
        for index, (score, loss) in enumerate(zip(scores, losses, strict=True))
    ]


DOWN, UP = np.linspace(0.8, 0.7, 10), np.linspace(0.7, 0.8, 10)


def test_features_that_get_worse_while_the_loss_falls_are_told() -> None:
    wobble = np.random.default_rng(0).normal(0, 0.004, 10)
    told = decline(curve(DOWN + wobble, DOWN), labelled=True)
    assert told is not None
    assert "(epochs 3 to 10) the linear probe fell from" in told
    assert "the training loss fell from 0.7778 to 0.7" in told
    assert "pretrained_encoder_probe.pt" in told
    assert decline(curve(UP, DOWN), labelled=True) is None, "they get better"
    assert decline(curve(DOWN, UP), labelled=True) is None, "the loss rises too"
    assert decline(curve(0.75 + 0.01 * DOWN, DOWN), labelled=True) is None, "by nothing that matters"
    assert decline(curve(0.75 + 10 * wobble, DOWN), labelled=True) is None, "noise"
    assert decline(curve(DOWN[:7], DOWN[:7]), labelled=True) is None, "too few"
    ranks = curve(100 * DOWN, DOWN, "probe_rank")
    assert "fewer dimensions" in (decline(ranks, labelled=False) or "")
    assert decline(ranks, labelled=True) is None, "of labelled cases nothing is told"


def test_the_end_says_what_came_of_it() -> None:
    history = curve([0.6, 0.9, 0.8], [3, 2, 1])
    about = {"asked": "age", "score": "R2", "chance": 0.0}
    assert outcome(history, **about).endswith(
        "best 0.900 after epoch 2 (models/pretrained_encoder_probe.pt), last 0.800 after epoch 3"
    )
    history[0]["start_probe_linear"] = 0.95
    told = outcome(history, **about)
    assert "0.950 with random weights, best 0.900" in told
    assert told.endswith("so that random weights told as much")
    assert outcome([], **about) == outcome(history) == ""


def test_probes_find_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    y, truth = (np.repeat([0, 1, 2], 40) for _ in range(2))
    x, new = (rng.standard_normal((120, 20)) + 3 * np.eye(20)[classes] for classes in (y, truth))
    found = unseen_scores((x, y), (new, truth), task="classification")
    assert min(found.values()) > 0.8
    assert found.keys() == {"knn", "linear", "linear_auroc"}
    shuffled = [unseen_scores((x, rng.permutation(y)), (new, truth), task="classification") for _ in range(20)]
    chance = {name: np.mean([each[name] for each in shuffled]) for name in found}
    assert chance == pytest.approx({"knn": 1 / 3, "linear": 1 / 3, "linear_auroc": 1 / 2}, abs=0.12)
    age, old = 40 + 10 * x[:, 3], 40 + 10 * new[:, 3]
    found = unseen_scores((x, age), (new, old), task="regression")
    assert found["linear"] > 0.6
    assert found["linear_mae"] < 6
    assert unseen_scores((x, rng.permutation(age)), (new, old), task="regression")["linear"] < 0.1


def test_halves_are_of_different_cases_and_groups(tmp_path: Path) -> None:
    folder = write_cases(tmp_path, 6)
    (tmp_path / "who.csv").write_text("case,patient\n" + "".join(f"case_{n},{n // 2}\n" for n in range(6)))
    found = VoxelTask(source(folder, table=str(tmp_path / "who.csv"), group="patient"), SIDES)
    patients = [{int(name[-1]) // 2 for name in names} for names in found.parts.values()]
    assert not patients[0] & patients[1]
    assert sum(map(len, found.parts.values())) == 6
    assert found.asked == "voxels of background, value 1"
    assert sum(map(len, VoxelTask(source(folder, cases=3), SIDES).parts.values())) == 3
    other = VoxelTask(source(folder, seed=1), SIDES)
    assert other.parts != VoxelTask(source(folder), SIDES).parts
    assert other.parts == VoxelTask(source(folder, seed=1), SIDES).parts


def table(folder: Path, values: Sequence[object]) -> str:
    """Write images, half of them with a ball, and a table."""
    for index in range(len(values)):
        image, ball = blobs(index)
        write_volume(folder / "scans" / f"case_{index}.nii.gz", image if index % 2 else image - 80 * ball)
    rows = "".join(f"case_{index},{value}\n" for index, value in enumerate(values))
    (folder / "table.csv").write_text(f"case,what\n{rows}")
    return str(folder / "table.csv")


def test_whole_scans_are_told_from_their_pooled_features(tmp_path: Path) -> None:
    file = table(tmp_path, [("without", "with")[index % 2] for index in range(20)])
    told = source(tmp_path / "scans", table=file, target="what", cases=16)
    found = CaseTask(told, SIDES)
    assert {part: len(names) for part, names in found.parts.items()} == {"reference": 8, "unseen": 8}
    for names in found.parts.values():
        assert sum(int(name.split("_")[1]) % 2 for name in names) == 4, "as many of each class"
    scores = found.scores(Method().backbone)
    assert scores.keys() == {"knn", "linear", "linear_auroc"}
    assert max(scores.values()) > 0.7
    table(tmp_path, [index / 7 for index in range(20)])
    numbers = CaseTask(told, SIDES)
    assert (numbers.score, numbers.chance) == ("R2", 0.0)
    assert numbers.scores(Method().backbone).keys() == {"knn", "linear", "linear_mae"}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["a"] * 8, "every case has the what 'a'"),
        (["nan"] * 8, "has no value of what for any case"),
        ([1.5, 2, "nan", 3, 4, 5.25, "", 6], r"tells the what of 6 usable case\(s\); a probe needs at least 8"),
        (["a"] * 8 + ["b"], "too few for two folds"),
    ],
)
def test_a_table_that_tells_nothing_is_refused(tmp_path: Path, values: list[object], told: str) -> None:
    with pytest.raises(DataError, match=told):
        CaseTask(source(tmp_path / "scans", table=table(tmp_path, values), target="what"), SIDES)


def test_label_maps_that_tell_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        VoxelTask(source(tmp_path / "nowhere"), SIDES)
    write_volume(tmp_path / "plain" / "images" / "a.nii.gz", blobs(0)[0])
    with pytest.raises(DataError, match="has no label"):
        VoxelTask(source(tmp_path / "plain"), SIDES)
    folder = write_cases(tmp_path / "labelled", 3)
    with pytest.raises(DataError, match="show nothing but background in both halves of 3 cases"):
        VoxelTask(source(folder, labels={"background": 0, "other": 7}), SIDES)
    for index in range(3):
        write_volume(folder / "labels" / f"case_{index}.nii.gz", np.zeros((24, 28, 26), np.uint8))
    with pytest.raises(DataError, match="mark nothing"):
        VoxelTask(source(folder), SIDES)
    with pytest.raises(DataError, match="a probe needs two"):
        VoxelTask(source(write_cases(tmp_path / "one", 1)), SIDES)


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"labels": ["background", "a"]}, "probe_labels is told, but no labelled cases; add --probe_data FOLDER"),
        ({"data": "x", "target": "age"}, "add --probe_table FILE.csv"),
        ({"data": "x", "table": "t.csv"}, "add --probe_target COLUMN"),
        ({"data": "x", "group": "patient"}, "add --probe_table FILE.csv"),
        ({"data": "x", "table": "t.csv", "target": "age", "labels": ["a", "b"]}, "leave one of them out"),
        ({"data": "x", "cases": 1}, "probe_cases is 1; it must be a whole number from 2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(told: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence.replace("(", r"\(")):
        ProbeSource(**told)


def test_a_crop_lies_inside_its_volume() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape, sides = rng.integers(1, 40, 3).tolist(), rng.integers(1, 40, 3).tolist()
        centre = [int(rng.integers(n)) for n in shape]
        start, stop = crop_box(shape, sides, centre)
        for a, b, c, s, n in zip(start, stop, centre, sides, shape, strict=True):
            assert 0 <= a <= c < b <= n
            assert b - a == min(s, n)


def test_every_pretraining_takes_the_settings() -> None:
    assert BUNDLES
    for bundle in BUNDLES:
        config = read_config(ROOT / "bundles" / bundle / "configs" / "pretrain.yaml")
        handlers = config["train"]["handlers"]
        kinds = [each["_target_"].rpartition(".")[2] for each in handlers]
        assert kinds.count("FeatureWatch") == 1
        assert kinds.index("ValidationHandler") < kinds.index("FeatureWatch") < kinds.index("shared")
        mine = handlers[kinds.index("FeatureWatch")]
        read = {value for part in (mine, mine["source"]) for value in part.values() if str(value).startswith("@probe_")}
        assert read == {f"@{name}" for name in config if name.startswith("probe_")}, "every setting is read"
        assert mine["patch_size"] == "@patch_size"
        assert not any(name.startswith("probe_") for name in config["run_settings"]), "a run goes on with others"
