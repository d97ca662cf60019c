# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The label curve's table on results with known answers, the study that it is, and a whole tiny one that goes on."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import SettingsError
from tools.commanding.settings import filled
from tools.curves import label_curve as tool
from tools.curves.curve_report import (
    ARMS,
    MEAN_ROW,
    ROWS,
    _verdict,
    curve_table,
    plain_rows_table,
    scores_of,
    write_curve,
)
from tools.curves.label_curve import _counts, label_curve
from tools.curves.settings import LabelCurve
from tools.studies.definition import Arm, Run, Study
from tools.studies.execution import pieces, state
from tools.studies.reading import read_study
from tools.studies.results import read_json

from ..conftest import ROOT
from ..starts import python


def results(gain: float, *, cases: int = 40, seeds: int = 2, noise: float = 0.02, luck: float = 0.0) -> list:
    """Two classes, two folds; scores vary from case to case far more than between the two ways to start."""
    rng = np.random.default_rng(0)
    level = rng.uniform(0.3, 0.9, cases)
    found = []
    for count in (2, 8):
        for fold in range(2):
            names = [index for index in range(cases) if index % 2 == fold]
            for seed in range(seeds):
                for arm, start in (("pre-trained", gain), ("from scratch", 0.0)):
                    extra = start + luck * rng.standard_normal()
                    scores = {
                        f"case_{i}": {"a": level[i] + extra + noise * rng.standard_normal(), "b": level[i] + extra}
                        for i in names
                    }
                    found.append((Run(arm, "data", str(count), fold, seed, count), scores))
    return found


@pytest.mark.parametrize("gain", [0.05, -0.05, 0.0])
def test_differences_are_paired_by_case(gain: float) -> None:
    rows = curve_table(results(gain))
    assert [row["cases"] for row in rows] == [2, 8]
    for row in rows:
        assert row["unseen"] == 40
        assert row["pairs_of_runs"] == 4
        assert row["difference"] == pytest.approx(gain, abs=0.005)
        assert row["difference"] == pytest.approx(row["pretrained"] - row["scratch"], abs=1e-4)
        narrow, wide = (row[f"{n}_high"] - row[f"{n}_low"] for n in ("difference", "scratch"))
        assert narrow < 0.2 * wide, "pairing takes out what makes cases differ"
        assert (row["difference_low"] > 0) == (gain > 0)
        assert (row["difference_high"] < 0) == (gain < 0)


def test_what_depends_on_the_run_widens_the_interval() -> None:
    """All cases of a run share its luck, so that many cases do not make a difference sure."""
    steady, lucky = (curve_table(results(0.0, seeds=4, luck=luck))[0] for luck in (0.0, 0.05))
    widths = [row["difference_high"] - row["difference_low"] for row in (steady, lucky)]
    assert widths[1] > 4 * widths[0]
    assert lucky["difference_low"] < 0 < lucky["difference_high"]


def test_a_run_without_its_partner_does_not_count() -> None:
    complete = results(0.1)
    broken = [entry for entry in complete if entry[0] != Run("from scratch", "data", "2", 0, 0, 2)]
    assert len(broken) == len(complete) - 1
    rows = curve_table(broken)
    assert [row["pairs_of_runs"] for row in rows] == [3, 4]
    assert rows[0]["difference"] == pytest.approx(0.1, abs=0.01)
    assert curve_table([entry for entry in complete if entry[0].arm == "from scratch"]) == []


def test_seeds_are_no_independent_evidence_and_groups_go_together() -> None:
    few, many = curve_table(results(0.0, seeds=1)), curve_table(results(0.0, seeds=8))
    widths = [rows[0]["scratch_high"] - rows[0]["scratch_low"] for rows in (few, many)]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)
    groups = {f"case_{i}": str(i // 10) for i in range(40)}
    grouped = curve_table(results(0.0), groups=groups)
    assert grouped[0]["scratch_high"] - grouped[0]["scratch_low"] != pytest.approx(widths[0], rel=0.02)


def result(scores: dict[str, dict[str, float | None]], group: str | None = None) -> dict[str, Any]:
    """Return what a run's result.json says."""
    cases = {
        case: {"group": group, "scores": {name: {"dice": dice, "nsd": dice} for name, dice in own.items()}}
        for case, own in scores.items()
    }
    return {"cases": cases, "seconds": {"training": 2.0, "inference": 1.0}}


def test_what_is_not_defined_is_no_dice() -> None:
    found = scores_of(result({"one": {"a": 0.5, "b": None}, "two": {"a": None, "b": None}}))
    assert found == {"one": {"a": 0.5}}


def test_the_record_says_what_was_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [(run, result(scores)) for run, scores in results(0.05)]
    asked = {"bundle": "mae_resenc_l", "settings": {"epochs": 3}, "group": None}
    rates = {"pre-trained": 0.01, "from scratch": 0.03}
    write_curve(tmp_path, results=found, rates=rates, asked=asked)
    text = (tmp_path / "curve.md").read_text()
    assert "pre-trained is better" in text
    assert "pre-trained 0.01, from scratch 0.03" in text
    assert "epochs 3" in text
    with open(tmp_path / "curve.csv", newline="") as stream:
        assert [row["cases"] for row in csv.DictReader(stream)] == ["2", "8"]
    assert (tmp_path / "curve.png").stat().st_size > 20_000
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "With 8 labelled cases: pre-trained is better (" in page
    assert "No prediction is kept." in page
    assert "| labelled cases |" in capsys.readouterr().out


def with_plain_rows(gain: float, *, seeds: int = 2) -> list:
    """The same, and a frozen random encoder that is worse by 0.2 and a plain CNN that is better by 0.02."""
    found = results(gain, seeds=seeds)
    for run, scores in [entry for entry in found if entry[0].arm == "from scratch"]:
        for arm, extra in (("frozen random", -0.2), ("plain CNN", 0.02)):
            own = {case: {name: dice + extra for name, dice in each.items()} for case, each in scores.items()}
            found.append((replace(run, arm=arm), own))
    return found


def test_both_ways_to_start_are_held_against_the_plain_rows(tmp_path: Path) -> None:
    plain = plain_rows_table(with_plain_rows(0.05))
    assert len(plain) == 2 * 2 * 2
    by = {(row["cases"], row["arm"], row["row"]): row for row in plain}
    assert by[8, "pre-trained", "frozen random"]["difference"] == pytest.approx(0.25, abs=0.005)
    assert by[8, "from scratch", "plain CNN"]["difference"] == pytest.approx(-0.02, abs=1e-6)
    assert [by[8, "pre-trained", row]["outcome"] for row in ROWS] == ["better", "better"]
    assert [by[8, "from scratch", row]["outcome"] for row in ROWS] == ["better", "worse"]
    found = [(run, result(scores)) for run, scores in with_plain_rows(0.05)]
    asked = {"bundle": "mae_resenc_l", "settings": {"epochs": 3}, "group": None}
    write_curve(tmp_path, results=found, rates={"pre-trained": 0.01}, asked=asked)
    sentence = (
        "With 8 labelled cases, against the plain rows: pre-trained beats frozen random and plain CNN; from scratch "
        "beats frozen random, but is worse than plain CNN."
    )
    for name in ("curve.md", "report.html"):
        assert sentence in (tmp_path / name).read_text("utf-8")
    assert json.loads((tmp_path / "curve.json").read_text())["plain"] == plain
    assert "| 8 | plain CNN | 0.6" in (tmp_path / "curve.md").read_text()
    write_curve(tmp_path, results=found[:16], rates={"pre-trained": 0.01}, asked=asked)
    assert "plain" not in (tmp_path / "curve.md").read_text()
    lone = [(run, result(scores)) for run, scores in with_plain_rows(0.05, seeds=1)]
    write_curve(tmp_path, results=lone, rates={"pre-trained": 0.01}, asked=asked)
    assert "with one run of each, whose luck is not in these intervals" in (tmp_path / "curve.md").read_text()


def test_one_seed_gives_no_verdict() -> None:
    """What another seed would have changed is not known then."""
    one, two = (curve_table(results(0.3, seeds=seeds))[0] for seeds in (1, 2))
    assert [_verdict(row) for row in (one, two)] == ["one seed, so no verdict", "pre-trained is better"]


def test_numbers_of_cases() -> None:
    folds = [{"training": list(range(20))}, {"training": list(range(19))}]

    def counts(cases: str) -> list[int]:
        return _counts(filled(LabelCurve, "mae_resenc_l", "mni", cases=cases).cases, folds)

    assert counts("2,4,all") == [2, 4, 19]
    assert counts("3") == [3]
    with pytest.raises(SettingsError, match="names 20"):
        counts("20")
    with pytest.raises(SettingsError, match="--cases is 'few'; it must be"):
        counts("few")


class Trainer:
    """Stands for the processes of a study: notes what is not done, and writes results with a Dice for each arm."""

    def __init__(self, dice: Callable[[Arm, Run], float]) -> None:
        self.dice, self.done, self.failing = dice, list[str](), set[str]()

    def __call__(self, study: Study, where: Any, *, wanted: Sequence[str] | None = None) -> dict[str, str]:
        failed = {}
        runs = {f"runs/{run.name}": run for run in study.runs()}
        for name in pieces(study) if wanted is None else wanted:
            folder = study.folder / name
            if state(folder) == "finished":
                continue
            folder.mkdir(parents=True, exist_ok=True)
            self.done.append(name)
            run = runs.get(name)
            if name in self.failing:
                failed[name] = "the loss is not finite in epoch 1" if run and "lr" in run.arm else "it broke"
                (folder / "failed.json").write_text(json.dumps({"why": failed[name]}))
            elif run is None:
                (folder / "pretrained_encoder.pt").write_bytes(b"weights")
                (folder / "result.json").write_text("{}")
            else:
                value = self.dice(study.arms[run.arm], run)
                unseen = [
                    Path(case["image"]).name for case in study.data_sets[run.data_set].parts[run.fold]["validation"]
                ]
                content = result({case: {"ball": value} for case in unseen})
                if study.data_sets[run.data_set].task == "regression":
                    content["cases"] = numbers(unseen, value)
                (folder / "result.json").write_text(json.dumps(content))
        return failed


def numbers(unseen: Sequence[str], error: float) -> dict[str, Any]:
    """Return what is told of cases whose numbers are missed by about so much."""
    found = {}
    for name in unseen:
        index = int(name.split("_")[1].split(".")[0])
        truth, off = 100.0 + 10 * index, error * (1 + 0.1 * (index % 3)) * (-1) ** index
        found[name] = {"group": None, "truth": truth, "predicted": [truth + off]}
    return found


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Twenty labelled cases, of which nothing but names is read."""
    for kind in ("images", "labels"):
        (tmp_path / "task" / kind).mkdir(parents=True)
        for index in range(20):
            (tmp_path / "task" / kind / f"case_{index}.nii.gz").write_text(f"{kind} {index}")
    return tmp_path / "task"


def asked(task: Path, **told: Any) -> LabelCurve:
    whole = {"labels": "background,ball", "output": str(task.parent / "curve"), "seeds": 2, "cases": "2,8,all"}
    whole["plain_rows"] = "false"
    return filled(LabelCurve, "mae_resenc_l", str(task), **{**whole, **told})


def test_fewer_cases_are_among_more(cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "run_pieces", Trainer(lambda *_: 0.5))
    label_curve(asked(cases, rates="1"))
    study = read_study(cases.parent / "curve" / "study.yaml")
    assert study.folder == cases.parent / "curve"
    assert study.budgets == ["2", "8", "10"]
    drawn = {
        (run.seed, run.cases): [case["image"] for case in study.training_cases(run)]
        for run in study.runs()
        if run.fold == 0
    }
    for seed in (0, 1):
        names = [{*drawn[seed, count]} for count in (2, 8, 10)]
        assert [len(each) for each in names] == [2, 8, 10]
        assert names[0] < names[1] < names[2]
    assert drawn[0, 8] != drawn[1, 8]


def test_a_curve_is_a_study_that_goes_on(
    cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pre-training comes first, rates next, then the runs of both arms; what is there is not done again."""

    def dice(arm: Arm, run: Run) -> float:
        level = 0.4 if arm.weights == "scratch" else 0.7
        return float(level + 0.01 * run.seed - 0.1 * run.fold - 0.01 * abs(np.log(arm.settings["lr"] / 0.2)))

    trainer = Trainer(dice)
    monkeypatch.setattr(tool, "run_pieces", trainer)
    folder = cases.parent / "curve"
    more = {"settings": {"momentum": 0.8, "block_size": 4, "tiles_per_step": 2, "pretrain_epochs": 20, "lr": 0.2}}
    broken = "runs/data/from_scratch/budget_8/fold_1/seed_1"
    trainer.failing = {broken}
    with pytest.raises(SystemExit, match="Stopped: 1 failed"):
        label_curve(asked(cases, **more))
    assert f"failed: {broken}: it broke" in capsys.readouterr().out
    kinds = [name.split("/")[0] if name.startswith("pretraining") else name.split("/")[1] for name in trainer.done]
    assert kinds == ["pretraining"] + 6 * ["held_out"] + ["pretraining"] + 24 * ["data"]
    table = json.loads((folder / "curve.json").read_text())
    assert [row["pairs_of_runs"] for row in table["rows"]] == [4, 3, 4]
    assert table["rates"] == dict.fromkeys(ARMS, 0.2)
    study = read_study(folder / "study.yaml")
    for start, arm in study.arms.items():
        data = study.data_sets["data"]
        told = study.training_settings(arm, data)
        assert (told["lr"], told["momentum"], told["features_per_stage"]) == (0.2, 0.8, [8, 16, 32, 64])
        assert "block_size" not in told
        assert study.merged("inference", arm, data)["tiles_per_step"] == 2
        own = study.pretraining_settings(arm, data)
        assert [own[name] for name in ("epochs", "warmup_epochs", "lr", "momentum", "block_size")] == [
            20,
            2,
            0.1,
            0.8,
            4,
        ]
        assert arm.weights == {"pre-trained": "pretraining", "from scratch": "scratch"}[start]
    held = read_study(folder / "rates.yaml").data_sets["held out"].parts[0]
    names = {part: {case["image"] for case in held[part]} for part in held}
    assert [len(names[part]) for part in ("training", "validation")] == [8, 2]
    assert {*names["training"], *names["validation"]} == {
        case["image"] for case in study.data_sets["data"].parts[0]["training"]
    }
    trainer.failing, trainer.done = set(), []
    label_curve(asked(cases, **{**more, "cases": "2,4,8,all"}))
    assert [name for name in trainer.done if "/budget_4/" not in name] == [broken]
    assert len(trainer.done) == 1 + 8
    assert "| 4 | 0.6" in (folder / "curve.md").read_text()
    assert read_json(folder / "study.json")["budgets"] == ["2", "4", "8", "10"]
    with pytest.raises(SettingsError, match="holds a curve of other settings"):
        label_curve(asked(cases, settings={**more["settings"], "lr": 3.0}))


def test_plain_rows_have_rates_of_their_own(
    cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = {"scratch": 0.2, "pretraining": 0.2, "frozen_random": 0.6, "plain": 0.066}
    known = {str(cases.parent / "e.pt"): 0.2, **best}
    trainer = Trainer(lambda arm, _: 0.5 - 0.01 * abs(np.log(arm.settings["lr"] / known[arm.weights])))
    monkeypatch.setattr(tool, "run_pieces", trainer)
    (cases.parent / "e.pt").write_bytes(b"weights")
    told: dict[str, Any] = {"pretrained": str(cases.parent / "e.pt"), "settings": {"lr": 0.2}, "cases": "2"}
    label_curve(asked(cases, **told))
    before = len(trainer.done)
    label_curve(asked(cases, **told, plain_rows="true"))
    assert "8 of the 16 runs, and as large a share of the search" in capsys.readouterr().out
    curve = read_json(cases.parent / "curve" / "curve.json")
    assert curve["rates"] == pytest.approx(
        {"pre-trained": 0.2, "from scratch": 0.2, "frozen random": 0.6, "plain CNN": 0.06}
    )
    new = trainer.done[before:]
    assert all("frozen_random" in name or "plain_CNN" in name for name in new), "what is done is not done again"
    assert sum(name.startswith("runs/data/") for name in new) == 8
    study = read_study(cases.parent / "curve" / "study.yaml")
    assert {name: arm.weights for name, arm in study.arms.items() if name in ROWS} == ROWS
    assert len(study.arms) == 4


def test_a_curve_of_numbers_is_one_of_errors(
    cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = cases.parent / "volumes.csv"
    table.write_text("\n".join(["case,volume", *(f"case_{i},{100 + 10 * i}" for i in range(20))]), "utf-8")
    far = {"pretraining": 4.0, "scratch": 8.0, "frozen_random": 12.0, "plain": 6.0, "mean": 30.0}

    def error(arm: Arm, run: Run) -> float:
        return far[arm.weights if arm.weights in far else "pretraining"] + 0.2 * run.seed

    trainer = Trainer(error)
    monkeypatch.setattr(tool, "run_pieces", trainer)
    told = {"labels": None, "table": str(table), "target": "volume", "plain_rows": "true", "cases": "4"}
    label_curve(asked(cases / "images", **told, output=str(cases.parent / "curve"), settings={"units": "ml"}))
    folder = cases.parent / "curve"
    curve = read_json(folder / "curve.json")
    (row,) = curve["rows"]
    assert row["scratch"] == pytest.approx(2 * 4.1 * 1.1 - 0.11, abs=0.3), "told as errors"
    assert row["scratch_low"] <= row["scratch"] <= row["scratch_high"]
    assert row["difference"] == pytest.approx(row["scratch"] - row["pretrained"], abs=1e-3)
    assert row["difference_low"] > 0
    by = {(each["arm"], each["row"]): each for each in curve["plain"]}
    assert {name for _, name in by} == {*ROWS, MEAN_ROW}
    assert by["from scratch", "plain CNN"]["outcome"] == "worse"
    assert by["from scratch", MEAN_ROW]["difference"] == pytest.approx(22 * 1.1, abs=1.5)
    text = (folder / "curve.md").read_text("utf-8")
    assert "| labelled cases | pre-trained | from scratch | error lower by [95 %] | |" in text
    assert "pre-trained is better" in text
    assert "Mean absolute error of volume, ml, on unseen cases (20 in all)" in text
    assert (
        "pre-trained beats frozen random, plain CNN and mean of training; from scratch beats frozen random and" in text
    )
    assert "Cases to look through" not in (folder / "report.html").read_text("utf-8")
    study = read_study(folder / "study.yaml")
    data = study.data_sets["data"]
    told_arm = study.training_settings(study.arms["pre-trained"], data)
    assert (data.task, told_arm["input_size"], told_arm["units"]) == ("regression", [32, 32, 32], "ml")
    assert set(curve["rates"]) == {*ARMS, *ROWS}, "a mean has no learning rate"
    assert not any("mean_of" in name for name in trainer.done if "held_out" in name)
    for wrong, words in (
        ({"target": None}, "a table needs both"),
        ({"labels": "background,ball"}, "which --labels says nothing of; leave one out"),
    ):
        with pytest.raises(SettingsError, match=words):
            asked(cases / "images", **{**told, **wrong})


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"labels": None}, "name the classes: --labels"),
        ({"settings": {"epohcs": 3}}, "unknown setting --epohcs .did you mean --epochs"),
        ({"settings": {"pretrain_epohcs": 3}}, "unknown setting --epohcs .did you mean --epochs"),
        ({"settings": {"seed": 3}}, "name seed, which the study itself decides"),
        ({"cases": "11"}, "--cases names 11, but a fold has 10"),
    ],
)
def test_a_curve_that_does_not_fit_is_refused_and_may_be_mended(
    told: dict[str, Any], words: str, cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(lambda *_: 0.5)
    monkeypatch.setattr(tool, "run_pieces", trainer)
    with pytest.raises(SettingsError, match=words):
        label_curve(asked(cases, **told))
    assert not trainer.done
    label_curve(asked(cases, rates="1"))
    assert len(trainer.done) == 2 + 24


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (0.1, [0.03, 0.1, 0.3]),
        (0.9, [0.03, 0.1, 0.3, 0.9, 2.7]),
        (50.0, [0.03, 0.1, 0.3, 0.9, 2.7]),
        (0.009, [0.0027, 0.009, 0.03, 0.1, 0.3]),
    ],
)
def test_rates_are_looked_for_beyond_the_end(
    peak: float, tried: list[float], cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is tried once, also by a curve that was cut; at most two beyond those asked for."""
    trainer = Trainer(lambda arm, _: -abs(np.log(arm.settings["lr"] / peak)))
    trainer.failing = {"runs/held_out/from_scratch_lr_0.3/budget_all/fold_0/seed_0"}  # came apart, which counts as 0
    monkeypatch.setattr(tool, "run_pieces", trainer)
    encoder = cases.parent / "encoder.pt"
    encoder.write_bytes(b"weights")
    for _ in range(2):
        label_curve(asked(cases, cases="2", seeds=1, pretrained=str(encoder), settings={"lr": 0.1}))
    found = [name for name in trainer.done if name.startswith("runs/held_out/pre-trained_lr_")]
    assert sorted(float(name.split("_lr_")[1].split("/")[0]) for name in found) == pytest.approx(tried)
    best = read_json(cases.parent / "curve" / "curve.json")["rates"]["pre-trained"]
    assert best == pytest.approx(min(tried, key=lambda rate: abs(np.log(rate / peak))))


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["mae_resenc_l", "mae_primus_m"])
def test_a_whole_tiny_curve(bundle: str, labelled: Path, tmp_path: Path) -> None:
    tiny = ["--epochs", "2", "--iterations_per_epoch", "4", "--pretrain_epochs", "1", "--warmup_epochs", "0"]
    tiny += ["--pretrain_iterations_per_epoch", "2", "--pretrain_val_iterations", "1", "--patch_size", "[16,16,16]"]
    line = [python(), "-W", "ignore", "tools/label_curve.py", bundle, "--data", str(labelled), *tiny]
    line += ["--labels", "['background','ball']", "--seeds", "1", "--output", str(tmp_path / "curve")]
    line += ["--rates", "1,2" if bundle == "mae_resenc_l" else "1"]
    for cases, pairs in (("1", 1), ("1,all", 2), ("1,all", 2)):
        result = subprocess.run([*line, "--cases", cases], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        rows = json.loads((tmp_path / "curve" / "curve.json").read_text())["rows"]
        assert len(rows) == pairs
        assert all(row["unseen"] == 5 for row in rows), "every case is unseen in one fold"
    changed = subprocess.run([*line, "--cases", "1", "--lr", "3"], cwd=ROOT, capture_output=True, text=True)
    assert "other settings" in changed.stderr
