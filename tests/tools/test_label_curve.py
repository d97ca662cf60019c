# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The label curve's table on results with known answers, and a whole tiny curve that is cut and goes on."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.errors import SettingsError
from tools.commanding.settings import filled
from tools.curves.curve_report import _verdict, curve_table, write_curve
from tools.curves.label_curve import Curve, _counts
from tools.curves.settings import LabelCurve

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
                    found.append(((fold, count, seed, arm, "x"), scores))
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
    broken = [entry for entry in complete if entry[0][:4] != (0, 2, 0, "from scratch")]
    rows = curve_table(broken)
    assert [row["pairs_of_runs"] for row in rows] == [3, 4]
    assert rows[0]["difference"] == pytest.approx(0.1, abs=0.01)
    assert curve_table([entry for entry in complete if entry[0][3] == "from scratch"]) == []


def test_seeds_are_no_independent_evidence_and_groups_go_together() -> None:
    few, many = curve_table(results(0.0, seeds=1)), curve_table(results(0.0, seeds=8))
    widths = [rows[0]["scratch_high"] - rows[0]["scratch_low"] for rows in (few, many)]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)
    groups = {f"case_{i}": str(i // 10) for i in range(40)}
    grouped = curve_table(results(0.0), groups=groups)
    assert grouped[0]["scratch_high"] - grouped[0]["scratch_low"] != pytest.approx(widths[0], rel=0.02)


def test_the_record_says_what_was_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = []
    for number, (entry, scores) in enumerate(results(0.05)):
        folder = tmp_path / f"run_{number}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps({"seconds": 2.0, "lr": 0.1, "train_loss": 1, "dice": scores}))
        plan.append((*entry[:4], folder.name))
    asked = {"bundle": "mae_resenc_l", "settings": {"epochs": 3}}
    rates = {"pre-trained": 0.01, "from scratch": 0.03}
    write_curve(tmp_path, plan=plan, rates=rates, asked=asked)
    text = (tmp_path / "curve.md").read_text()
    assert "pre-trained is better" in text
    assert "pre-trained 0.01, from scratch 0.03" in text
    assert "epochs 3" in text
    with open(tmp_path / "curve.csv", newline="") as stream:
        assert [row["cases"] for row in csv.DictReader(stream)] == ["2", "8"]
    assert (tmp_path / "curve.png").stat().st_size > 20_000
    assert "| labelled cases |" in capsys.readouterr().out


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
    with pytest.raises(SystemExit, match="names 20"):
        counts("20")
    with pytest.raises(SettingsError, match="--cases is 'few'; it must be"):
        counts("few")


def test_fewer_cases_are_among_more(tmp_path: Path) -> None:
    fold = {"training": [{"image": f"{i}.nii"} for i in range(20)], "validation": []}
    curve = Curve("x", tmp_path, folds=[fold], labels=[], settings={}, pretraining={}, pretrained=None)
    for seed in (0, 1):
        names = [{case["image"] for case in curve.subset(0, count, seed)} for count in (2, 8, 20)]
        assert names[0] < names[1] < names[2]
    assert curve.subset(0, 5, 0) != curve.subset(0, 5, 1)


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
    peak: float, tried: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is tried once, also by a curve that was cut; at most two beyond those asked for."""
    calls: list[float] = []

    def score(self: Curve, arm: str, rate: float, cases: list, held: list) -> float:
        calls.append(rate)
        return -abs(np.log(rate / peak))

    monkeypatch.setattr(Curve, "_score", score)
    fold = {"training": [{"image": f"{i}.nii"} for i in range(9)], "validation": []}
    for _ in range(2):
        curve = Curve("x", tmp_path, folds=[fold], labels=[], settings={}, pretraining={}, pretrained=None)
        best = curve.tune("pre-trained", [0.3, 1, 3], 2, 0.1)
    assert sorted(calls) == pytest.approx(tried)
    assert best == pytest.approx(min(tried, key=lambda rate: abs(np.log(rate / peak))))


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["mae_resenc_l", "mae_primus_m"])
def test_a_whole_tiny_curve(bundle: str, labelled: Path, tmp_path: Path) -> None:
    tiny = ["--epochs", "2", "--iterations_per_epoch", "4", "--pretrain_epochs", "1", "--warmup_epochs", "0"]
    tiny += ["--pretrain_iterations_per_epoch", "2", "--pretrain_val_iterations", "1", "--patch_size", "[16,16,16]"]
    line = [python(), "-W", "ignore", "tools/label_curve.py", bundle, "--data", str(labelled), *tiny]
    line += ["--labels", "['background','ball']", "--seeds", "1", "--rates", "1", "--output", str(tmp_path / "curve")]
    for cases, pairs in (("1", 1), ("1,all", 2), ("1,all", 2)):
        result = subprocess.run([*line, "--cases", cases], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        rows = json.loads((tmp_path / "curve" / "curve.json").read_text())["rows"]
        assert len(rows) == pairs
        assert all(row["unseen"] == 5 for row in rows), "every case is unseen in one fold"
    changed = subprocess.run([*line, "--cases", "1", "--lr", "3"], cwd=ROOT, capture_output=True, text=True)
    assert "other settings" in changed.stderr
