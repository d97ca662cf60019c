# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a plan advises keeps within the hours; costs count what starts once; settings are judged before any work."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from common.errors import SettingsError
from tools import study as study_command
from tools.commanding.parsing import parse
from tools.commanding.running import run
from tools.studies import commands as study_tool
from tools.studies import cost
from tools.studies.cost import _by_case, _hours_left, _kind, _measured, _needs, _shorter
from tools.studies.definition import Study, digest
from tools.studies.execution import pieces
from tools.studies.reading import read_study
from tools.studies.scheduling import Place
from tools.studies.settings import Measure, Piece, Slurm, WriteCard

from ..conftest import ROOT, write_cases

TOOLS = {name: getattr(study_command, name) for name in ("plan", "run", "slurm", "one")}
ARMS = {
    "MAE": {"bundle": "mae_resenc_l", "weights": "pretraining"},
    "scratch": {"bundle": "mae_resenc_l", "weights": "scratch"},
}
STEPS = 10  # of an epoch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve labelled cases and a card; commands may change the folder of the process."""
    monkeypatch.chdir(ROOT)
    write_cases(tmp_path / "task", 12)
    card = {"name": "Balls", "task": "segmentation", "labels": ["background", "ball"]}
    (tmp_path / "ball.yaml").write_text(yaml.safe_dump(card), "utf-8")
    return tmp_path


def written(folder: Path, **content: Any) -> Path:
    whole: dict[str, Any] = {
        "arms": {"scratch": ARMS["scratch"]},
        "data_sets": {"ball": {"card": "ball.yaml", "folder": "task"}},
        "settings": {"epochs": 100, "iterations_per_epoch": STEPS},
        "pretraining": {"epochs": 1, "iterations_per_epoch": 1, "val_iterations": 0},
        "plain_rows": False,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**whole, **content}, sort_keys=False), "utf-8")
    return path


def costs_of(study: Study, *, epoch: float, pretraining: float = 0.0) -> dict[str, dict[str, float]]:
    """Return made up costs: hours of an epoch and of a pre-training, and nothing besides."""
    rest = dict.fromkeys(("start", "predict_start", "predict", "score_start", "score", "prepare", "store"), 0.0)
    hours = {"pretrain": pretraining, "train": epoch / STEPS}
    return {
        digest(_kind(study, run, config)): {**rest, "step": 3600 * hours[config], "models": 0.0, "peak_gib": 1.0}
        for run in study.runs()
        for config in _needs(study, run)
    }


def advice(study: Study, costs: dict[str, dict[str, float]], hours: float, count: int = 1) -> list[str]:
    need = _hours_left(study, costs, count)
    return _shorter(study, costs, {"hours_left_here": need, "at_a_time": count, "machine": {"device": "cpu"}}, hours)


def finish(study: Study, *names: str) -> None:
    for name in names:
        (study.folder / name).mkdir(parents=True)
        (study.folder / name / "result.json").write_text("{}", "utf-8")


def test_fewer_folds_are_folds_of_the_same_partition(folder: Path) -> None:
    study = read_study(written(folder, folds={"of": 6, "use": [0, 1, 2, 3]}))
    costs = costs_of(study, epoch=0.01)
    told = advice(study, costs, 2.5)
    assert told[0] == "That is 1.6 times the 2.5 hours. Any one of these would do:"
    assert "  folds: {of: 6, use: [0, 1]}, 2 instead of 4" in told
    assert "  2 runs at a time (on more cores (--jobs), or slurm)" in told
    study.data_sets["other"] = replace(study.data_sets["ball"], name="other", parts=study.data_sets["ball"].parts[:4])
    assert "  folds: {use: [0, 1]}, with the same of, 2 instead of 4" in advice(study, costs_of(study, epoch=0.01), 5)


def test_pre_training_does_not_scale_with_seeds_and_epochs(folder: Path) -> None:
    study = read_study(written(folder, arms={"MAE": ARMS["MAE"]}, seeds=[0, 1, 2]))
    costs = costs_of(study, epoch=0.01, pretraining=3.0)
    assert _hours_left(study, costs, 1) == pytest.approx(6)
    told = advice(study, costs, 3.5)
    assert not any("seeds: [" in line for line in told), "one seed takes four hours"
    assert any("settings: {epochs: 16} instead of up to 100" in line for line in told), "3 * 16 hundredths of an hour"
    assert not any("at a time" in line for line in told if line.startswith("  ")), "the pre-training is one"
    assert any("seeds: [0], 1 instead of 3" in line for line in advice(study, costs, 4.01))
    assert len(told := advice(study, costs, 2.9)) == 1
    assert "Neither more runs at a time nor fewer seeds, folds, epochs or arms alone would do." in told[0]


def test_every_advice_keeps_within_the_hours(folder: Path) -> None:
    content: dict[str, Any] = {
        "arms": {**ARMS, "third": ARMS["scratch"]},
        "seeds": [0, 1, 2, 3],
        "folds": 4,
        "backbones": {"resenc_l": {"settings": {"epochs": 50}}},
    }
    study = read_study(written(folder, **content))
    costs = costs_of(study, epoch=0.013, pretraining=0.8)
    for hours in (4.0, 10.0, 17.0, 25.0, 33.0):
        told = advice(study, costs, hours)
        for line in told[1:]:
            if match := re.match(r"  (seeds|folds): (\[[\d, ]+\]|\{of: 4, use: .*?\})", line):
                changed = read_study(written(folder, **{**content, match[1]: yaml.safe_load(match[2])}))
            elif match := re.match(r"  settings: \{epochs: (\d+)\} of the backbone resenc_l instead of up to 50", line):
                few = {"resenc_l": {"settings": {"epochs": int(match[1])}}}
                changed = read_study(written(folder, **{**content, "backbones": few}))
            elif match := re.match(r"  2 of the 3 arms: (.*)", line):
                changed = read_study(
                    written(
                        folder, **{**content, "arms": {name: content["arms"][name] for name in match[1].split("; ")}}
                    )
                )
            else:
                match = re.match(r"  (\d+) runs at a time", line)
                assert match, line
                assert _hours_left(study, costs, int(match[1])) <= hours
                continue
            assert _hours_left(changed, costs, 1) <= hours, line
    assert len(told) == 6, "of all five kinds"


def test_fewer_epochs_are_told_where_they_have_an_effect(folder: Path) -> None:
    study = read_study(written(folder, lengths=[40, 100], arms=ARMS))
    (line,) = (line for line in advice(study, costs_of(study, epoch=0.01), 2.01) if "epochs: " in line)
    # 2 runs of 40 epochs and 2 of 60 are 2 hours
    assert line.startswith("  epochs: 60 of MAE, 100 epochs, scratch, 100 epochs (of the arm, or in lengths) instead")
    one = {"scratch": {**ARMS["scratch"], "settings": {"epochs": 100}}, "other": ARMS["scratch"]}
    study = read_study(written(folder, arms=one, settings={"epochs": 20, "iterations_per_epoch": STEPS}))
    (line,) = (line for line in advice(study, costs_of(study, epoch=0.01), 0.701) if "epochs: " in line)
    assert line.startswith("  settings: {epochs: 50} of the arm scratch instead of up to 100;")
    study.data_sets["ball"].settings["epochs"] = 90
    (line,) = (line for line in advice(study, costs_of(study, epoch=0.01), 1.001) if "epochs: " in line)
    assert "{epochs: 50} of the arm scratch; settings: {epochs: 50} of the data set ball instead" in line


def test_epochs_of_runs_that_are_done_are_not_changed_in_place(folder: Path) -> None:
    study = read_study(written(folder, seeds=[0, 1]))
    costs = costs_of(study, epoch=0.01)
    finish(study, next(iter(pieces(study))))
    (line,) = (line for line in advice(study, costs, 0.51) if "epochs: " in line)
    assert "settings: {epochs: 25} instead of up to 100, with another output, as runs that are done" in line


def test_no_more_runs_at_a_time_than_are_left(folder: Path) -> None:
    study = read_study(written(folder))
    assert not any("at a time (" in line for line in advice(study, costs_of(study, epoch=0.01), 0.01))
    study = read_study(written(folder, seeds=[0, 1, 2, 3, 4]))
    costs = costs_of(study, epoch=0.01)
    finish(study, *list(pieces(study))[:2])
    assert "  3 runs at a time (on more cores (--jobs), or slurm)" in advice(study, costs, 1.0, count=1)
    assert "  3 runs at a time (on more cores (--jobs), or slurm)" in advice(study, costs, 1.0, count=2)
    assert _hours_left(study, costs, 2) == pytest.approx(2), "three runs at two places"
    assert advice(study, costs, 1.0, count=3) == ["That is within the 1 hours."]


def test_a_start_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], list[int]()

    def work(cases: Sequence[Any]) -> None:
        now[0] += (0.0 if calls else 3.0) + 5.0 + each * len(cases)
        calls.append(len(cases))

    monkeypatch.setattr(cost, "time", SimpleNamespace(monotonic=lambda: now[0]))
    each = 0.5
    assert _by_case(work, [1, 2]) == (pytest.approx(8.0), pytest.approx(0.5))
    assert calls == [1, 1, 2]
    each, calls[:] = 100.0, [0]
    assert _by_case(work, [1, 2]) == (pytest.approx(5.0), pytest.approx(100.0))
    assert calls == [0, 1, 2], "what takes long is not repeated"
    assert _by_case(work, [1]) == (0.0, pytest.approx(105.0))


def test_costs_are_measured_again_when_that_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(written(folder))
    (run,), count = study.runs(), [0.0]

    def pretend(command: list[str], **_: Any) -> SimpleNamespace:
        count[0] += 1
        Path(command[7]).write_text(json.dumps({"step": count[0]}), "utf-8")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(cost, "subprocess", SimpleNamespace(run=pretend))
    place = Place(None, 1)
    found = [
        _measured(study, run, "train", place, steps=2, again=again)["step"] for again in (False, False, True, False)
    ]
    assert found == [1, 1, 2, 2]


def test_a_plan_hands_on_what_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(study_tool, "write_plan", lambda *_, **settings: told.append(settings["again"]))
    file = str(written(folder))
    for more in ([], ["--again"], ["--again", "true"], ["--again", "false"]):
        run(TOOLS, ["plan", file, "--gpus", "", "--hours", "1.5", *more])
    assert told == [False, True, True, False]


def test_a_plan_says_what_does_not_fit_a_gpu_that_is_not_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, float]] = []

    def pretend(content: Any, gib: float) -> dict[str, Any] | None:
        asked.append((content, gib))
        large = content["patch_size"] == [160, 160, 160] and "accumulation_steps" in content and gib < 10
        return {"text": "needs 13.0 GiB; add --accumulation_steps 2"} if large else None

    monkeypatch.setattr(study_tool, "write_plan", lambda *_, **settings: None)
    monkeypatch.setattr(cost, "memory_problem", pretend)
    file = str(written(folder, arms=ARMS))
    run(TOOLS, ["plan", file, "--gpu_gib", "8"])
    told = capsys.readouterr().out
    assert "train of MAE on ball: needs 13.0 GiB; add --accumulation_steps 2" in told
    assert "pretrain of MAE on ball: needs 13.0 GiB" in told
    contents = [content for content, _ in asked if "labels" in content]
    assert contents
    assert all(content["labels"] == ["background", "ball"] and content["amp"] for content in contents)
    run(TOOLS, ["plan", file, "--gpu_gib", "24"])
    assert "Every run fits GPUs of 24 GiB" in capsys.readouterr().out
    count = len(asked)
    run(TOOLS, ["plan", file])
    assert len(asked) == count, "only where it is asked for"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run s.yaml --jobs abc", "--jobs is 'abc'; it must be a whole number from 0"),
        ("run s.yaml --jobs 1.5", "--jobs is '1.5'; it must be a whole number"),
        ("run s.yaml --jobs -1", "--jobs is '-1'; it must be a whole number from 0"),
        ("run s.yaml --shard 3", "--shard is '3'; it must be i/n"),
        ("plan s.yaml --jobs x", "--jobs is 'x'"),
        ("plan s.yaml --hours abc", "--hours is 'abc'; it must be a number from 0"),
        ("plan s.yaml --hours -2", "--hours is '-2'; it must be a number from 0"),
        ("plan s.yaml --memory_gib x", "--memory_gib is 'x'; it must be a number from 0"),
        ("plan s.yaml --memory_gib 1e999", "--memory_gib is '1e999'; it must be a number from 0"),
        ("plan s.yaml --steps 0", "--steps is '0'; it must be a whole number from 1"),
        ("plan s.yaml --shards 0", "--shards is '0'; it must be a whole number from 1"),
        ("slurm s.yaml --tasks x", "--tasks is 'x'; it must be a whole number from 1"),
        ("slurm s.yaml --tasks 0", "--tasks is '0'; it must be a whole number from 1"),
        ("slurm s.yaml --options gpu", "--options is 'gpu'; it must hold options of sbatch in one line; write for"),
        ("slurm s.yaml --options=--comment='a", "in which a quotation is not closed; write for example"),
        ("slurm s.yaml --options --time=1:00:00", "a value that begins with a hyphen as --options=--time=1:00:00"),
    ],
)
def test_numbers_are_judged_before_any_work(line: str, words: str, folder: Path) -> None:
    file = written(folder)
    with pytest.raises(SettingsError) as error:
        run(TOOLS, line.replace("s.yaml", str(file)).split())
    assert words in str(error.value)
    assert not (folder / "study").exists()


def test_a_value_that_looks_like_a_setting_is_told_how_to_be_written() -> None:
    for value, written_so in (("-p gpu", "'-p gpu'"), ("--a=b --c=d", "'--a=b --c=d'")):
        with pytest.raises(SettingsError, match=f"hyphen as --options={written_so}"):
            parse("slurm", Slurm, [str(ROOT), "--options", value])
        assert parse("slurm", Slurm, [str(ROOT), f"--options={value}"]).options.startswith(f"#SBATCH {value[:3]}")


def test_a_piece_that_the_study_does_not_have_is_told(folder: Path) -> None:
    file = written(folder)
    piece = "runs/ball/scratch/budget_all/fold_0/seed_"
    with pytest.raises(SettingsError, match=f"no piece '{piece}7'; the nearest of its 1 is {piece}0"):
        study_tool.one(Piece(str(file), f"{piece}7", str(folder / "out")))
    with pytest.raises(SettingsError, match="no run 'x'"):
        study_tool.measure(Measure(str(file), "x", "train", str(folder / "out"), "c.json"))
    assert not (folder / "out").exists()


def test_a_card_makes_its_folder(folder: Path) -> None:
    study_tool.card(WriteCard(str(folder / "task"), output=str(folder / "new" / "c.yaml")))
    assert yaml.safe_load((folder / "new" / "c.yaml").read_text("utf-8"))["task"] == "segmentation"


def test_a_script_for_sbatch_keeps_each_option_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(folder, name="two\nlines", seeds=[0, 1])
    options = "--time=1:00:00 -p gpu --comment='two words' --exclusive --mail-user a@b"
    run(TOOLS, ["slurm", str(file), "--output", str(folder / "my 5% out"), f"--options={options}"])
    script = folder / "my 5% out" / "study.sbatch"
    lines = script.read_text("utf-8").splitlines()
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")] == [
        "--job-name=my_5_out",
        "--array=0-1",
        f"--output='{folder}/my 5%% out/slurm-%A_%a.txt'",
        *("--time=1:00:00", "-p gpu", "--comment='two words'", "--exclusive", "--mail-user a@b"),
    ]
    assert all(line.startswith("#") for line in lines[: lines.index("set -euo pipefail")])
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert f"sbatch '{script}'" in capsys.readouterr().out
