# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The plain rows of a study: which arms it gets, what they are trained as, and what is said of who beats them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from common.errors import SettingsError
from common.networks import PlainUNet
from common.weights import read_checkpoint
from tools.reporting import comparison, significance
from tools.reporting.plain import outcome_of, plain_rows_of, plain_sentence
from tools.reporting.report import write_report
from tools.studies import execution
from tools.studies.cost import _needs, _shorter, _table
from tools.studies.definition import FROZEN_RANDOM, MEAN, PLAIN, Arm, Study, cell_of
from tools.studies.plain import plain_arms, wanted_rows
from tools.studies.reading import read_study

from ..conftest import ROOT, write_cases, write_volume
from .synthetic import write_study

NARROW: dict[str, Any] = {
    "resenc_l": {"settings": {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1]}},
    "primus_m": {"settings": {"embed_dim": 24, "depth": 2, "num_heads": 2}},
}
SCRATCH = {"bundle": "mae_resenc_l", "weights": "scratch", "settings": {"lr": 0.05}}


def write_numbers(folder: Path, count: int = 6) -> None:
    """Write volumes with a number for each, a card, and nothing to tell it from."""
    rng = np.random.default_rng(0)
    rows = ["case,volume"]
    for index in range(count):
        write_volume(folder / "scans" / f"case_{index}.nii.gz", rng.normal(100, 10, (16, 16, 16)).astype(np.float32))
        rows.append(f"case_{index},{1000 + 50 * index}")
    (folder / "table.csv").write_text("\n".join(rows), "utf-8")
    card = {"name": "Volumes", "task": "regression", "target": "volume", "units": "ml", "input_size": [16, 16, 16]}
    (folder / "volumes.yaml").write_text(yaml.safe_dump(card), "utf-8")


def study_of(folder: Path, **content: Any) -> Study:
    """Return a study of balls and of numbers, with one arm from scratch unless told otherwise."""
    if not (folder / "task").exists():
        write_cases(folder / "task", 6)
        card = {"name": "Balls", "task": "segmentation", "labels": ["background", "ball"]}
        (folder / "ball.yaml").write_text(yaml.safe_dump(card), "utf-8")
        write_numbers(folder)
    short = {"epochs": 1, "num_workers": 0, "batch_size": 2}
    ball = {"patch_size": [16, 16, 16], "iterations_per_epoch": 2}
    whole: dict[str, Any] = {
        "arms": {"scratch": SCRATCH},
        "data_sets": {
            "ball": {"card": "ball.yaml", "folder": "task", "settings": ball},
            "volumes": {
                "card": "volumes.yaml",
                "folder": "scans",
                "table": "table.csv",
                "settings": {"accumulation_steps": 1},
            },
        },
        "settings": short,
        "backbones": NARROW,
        "budgets": [2],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump({**whole, **content}, sort_keys=False), "utf-8")
    return read_study(folder / "study.yaml")


def test_a_study_has_them_unless_it_says_otherwise(tmp_path: Path) -> None:
    arms = {"scratch": SCRATCH, "P": {"bundle": "mae_primus_m", "weights": "pretraining", "settings": {"lr": 1.0}}}
    study = study_of(tmp_path, arms=arms)
    rows = {name: arm for name, arm in study.arms.items() if name not in arms}
    assert {name: (arm.weights, arm.backbone, cell_of(arm.bundle)[1]) for name, arm in rows.items()} == {
        "frozen random resenc_l": (FROZEN_RANDOM, "resenc_l", "resenc_l"),
        "frozen random primus_m": (FROZEN_RANDOM, "primus_m", "primus_m"),
        "plain CNN": (PLAIN, "plain", "resenc_l"),
        "mean of training": (MEAN, "plain", "resenc_l"),
    }
    assert {run.data_set for run in study.runs() if run.arm == "mean of training"} == {"volumes"}
    data = study.data_sets["ball"]
    told = {name: study.training_settings(arm, data) for name, arm in rows.items()}
    assert told["frozen random resenc_l"]["features_per_stage"] == [4, 8, 8], "the same network"
    assert told["frozen random resenc_l"]["tuning"] == told["frozen random primus_m"]["tuning"] == "frozen_random"
    assert told["frozen random resenc_l"]["lr"] == told["plain CNN"]["lr"] == 0.05, "as the arm from scratch"
    assert "lr" not in told["frozen random primus_m"], "not the rate of a pre-trained arm"
    assert told["plain CNN"]["network_def"]["_target_"] == "common.networks.PlainUNet"
    assert "features_per_stage" not in told["plain CNN"]
    assert study.merged("inference", rows["plain CNN"], data)["network_def"] == told["plain CNN"]["network_def"]
    assert not study_of(tmp_path, plain_rows=False).arms.keys() - {"scratch"}
    assert [*study_of(tmp_path, plain_rows=["mean"]).arms] == ["scratch", "mean of training"]
    own = {**arms, "mine": {"bundle": "mae_primus_m", "weights": "plain"}}
    assert "plain CNN" not in study_of(tmp_path, arms=own).arms, "one of the kind is there"
    for content, words in (
        (
            {"plain_rows": ["plane"]},
            "plain_rows is .'plane'.; it must be true, false or a list of frozen_random, plain",
        ),
        ({"arms": {"plain CNN": SCRATCH}}, "the arm plain CNN is called as a plain row is; rename it"),
        (
            {"arms": {"a": {**SCRATCH, "weights": "plian"}}},
            "or one of scratch, pretraining, frozen_random, plain, mean",
        ),
    ):
        with pytest.raises(SettingsError, match=words):
            study_of(tmp_path, **content)


def test_there_is_one_for_each_length_and_spacing() -> None:
    arms = {
        f"{start}, {epochs}": Arm(f"{start}, {epochs}", "mae_resenc_l", start, "sawtooth", epochs, None)
        for start in ("scratch", "pretraining")
        for epochs in (1, 2)
    }
    rows = plain_arms(arms, wanted_rows(True), {"segmentation"})
    assert {name: arm.epochs for name, arm in rows.items()} == {
        "frozen random resenc_l, 1 epochs": 1,
        "frozen random resenc_l, 2 epochs": 2,
        "plain CNN, 1 epochs": 1,
        "plain CNN, 2 epochs": 2,
    }
    about = {name: {**vars(arm), "backbone": arm.backbone} for name, arm in (arms | rows).items()}
    assert plain_rows_of(about, "pretraining, 2") == ["frozen random resenc_l, 2 epochs", "plain CNN, 2 epochs"]
    alone = plain_arms({"a": Arm("a", "mae_primus_m", "pretraining", "sawtooth")}, [PLAIN], {"segmentation"})
    assert [(arm.bundle, arm.schedule) for arm in alone.values()] == [("mae_primus_m", None)]


def test_numbers_are_told_by_each_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs: the random encoder stays as it was drawn, the CNN is the plain one, and the mean is the mean."""
    monkeypatch.chdir(ROOT)
    study = study_of(tmp_path, keep=["models"])
    found = {}
    for run in study.runs():
        if run.data_set == "volumes" and run.arm != "scratch":
            assert execution.do(study, f"runs/{run.name}") == "finished"
            found[run.arm] = study.folder / "runs" / run.name
    results = {arm: json.loads((folder / "result.json").read_text("utf-8")) for arm, folder in found.items()}
    assert results.keys() == {"frozen random resenc_l", "plain CNN", "mean of training"}
    assert len({tuple(each["cases"]) for each in results.values()}) == 1, "the same unseen cases"
    run = next(run for run in study.runs() if run.arm == "mean of training")
    mean = np.mean([float(case["volume"]) for case in study.training_cases(run)])
    assert {case["predicted"][0] for case in results["mean of training"]["cases"].values()} == {mean}
    assert not (found["mean of training"] / "train").exists()

    def drawn(arm: str) -> torch.nn.Module:
        parser = ConfigParser(json.loads((found[arm] / "train.json").read_text("utf-8")))
        torch.manual_seed(0)
        return parser.get_parsed_content("network_def")  # type: ignore[no-any-return]

    learned = read_checkpoint(found["frozen random resenc_l"] / "models" / "classifier.pt")
    start = drawn("frozen random resenc_l").state_dict()
    assert {name.split(".")[0] for name in start if not torch.equal(start[name], learned[name])} == {"head"}
    plain = PlainUNet(1, with_decoder=False).encoder.state_dict()
    learned = read_checkpoint(found["plain CNN"] / "models" / "classifier.pt")
    assert {name for name in learned if name.startswith("encoder.")} == {f"encoder.{name}" for name in plain}
    assert sum(value.numel() for value in learned.values()) < 1_000_000
    start = drawn("plain CNN").state_dict()
    assert not any(torch.equal(start[name], value) for name, value in learned.items() if name.endswith("conv.weight"))


def test_segmentations_are_made_by_the_plain_cnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run by a transformer's bundle: training, inference and evaluation are the same, the network is another."""
    monkeypatch.chdir(ROOT)
    study = study_of(tmp_path, arms={"P": {"bundle": "mae_primus_m", "weights": "scratch"}}, keep=["models"])
    run = next(run for run in study.runs() if (run.arm, run.data_set) == ("plain CNN", "ball"))
    assert execution.do(study, f"runs/{run.name}") == "finished"
    folder = study.folder / "runs" / run.name
    cases = json.loads((folder / "result.json").read_text("utf-8"))["cases"]
    assert len(cases) == 3
    assert all(0 <= (case["scores"]["ball"]["dice"] or 0) <= 1 for case in cases.values())
    learned = read_checkpoint(folder / "models" / "model_final.pt")
    assert {name: value.shape for name, value in learned.items()} == {
        name: value.shape for name, value in PlainUNet(1, 2).state_dict().items()
    }
    told = json.loads((folder / "models" / "model_final.json").read_text("utf-8"))["settings"]
    assert (told["network"], told["from_scratch"]) == ("PlainUNet", True)
    assert "embed_dim" not in told


def test_their_cost_is_named_and_a_mean_costs_nothing(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    mean = next(run for run in study.runs() if run.arm == "mean of training")
    assert _needs(study, mean) == []
    machine = {"device": "cpu", "cpu": "two cores", "torch": "2"}
    plan = {"rows": [], "runs": 7, "hours": 2.0, "hours_left": 2.0, "hours_left_here": 1.0, "at_a_time": 2}
    text = _table({**plan, "plain_hours": 0.75, "peak_gib": 1.0, "disk_gib": 1.0, "machine": machine}, study)
    rows = "frozen random resenc_l, plain CNN, mean of training"
    assert f"0.75 of the hours are of the plain rows ({rows}); leave them out with plain_rows: false" in text
    costs = {"step": 3600.0, "start": 0.0, "predict": 0.0, "predict_start": 0.0, "score": 0.0, "score_start": 0.0}
    costs |= {"prepare": 0.0, "store": 0.0, "models": 0.0, "peak_gib": 1.0}

    class Same(dict[str, Any]):
        def __missing__(self, _: str) -> dict[str, float]:
            return costs

    told = _shorter(study, Same(), {"hours_left_here": 12.0, "at_a_time": 1, "machine": machine}, 4.0)
    assert "  plain_rows: false, without what the arms have to beat" in told


@pytest.mark.parametrize(("low", "high", "told"), [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "")])
def test_an_interval_without_0_decides(low: float, high: float, told: str) -> None:
    assert outcome_of(low, high) == told


def test_arms_of_one_outcome_share_a_clause() -> None:
    both = {"frozen": "better", "CNN": "better", "mean": "better"}
    told = plain_sentence({"a": both, "b": both, "c": {"frozen": "", "CNN": "worse", "mean": "better"}}, one_run=True)
    assert told == (
        "Against the plain rows (with one run of each, whose luck is not in these intervals): a and b beat frozen, CNN "
        "and mean; c beats mean, but is not shown to beat frozen and is worse than CNN."
    )
    assert plain_sentence({"a": {}}) == plain_sentence({}) == ""


def test_a_report_says_who_beats_them_and_tests_leave_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 300)
    monkeypatch.setattr(significance, "_PERMUTATIONS", 300)
    gains = {"mae_resenc_l": 0.06, "scratch_resenc_l": 0.0, "frozen_random_resenc_l": -0.1, "plain_cnn": 0.03}
    write_report(write_study(tmp_path, gains=gains, data_sets={"hippocampus": {}, "atl": {}}))
    page = (tmp_path / "report" / "report.md").read_text("utf-8")
    sentence = (
        "Against the plain rows: mae_resenc_l beats frozen_random_resenc_l and plain_cnn; scratch_resenc_l beats "
        "frozen_random_resenc_l, but is worse than plain_cnn."
    )
    assert sentence in capsys.readouterr().out
    assert sentence in page.replace("\\_", "_")

    def rows(name: str) -> list[dict[str, str]]:
        with open(tmp_path / "report" / f"{name}.csv", newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    plain = {(row["column"], row["arm"], row["row"]): row for row in rows("plain")}
    assert len(plain) == 3 * 2 * 2, "each data set and their mean, each arm, each row"
    gap = plain["All", "mae_resenc_l", "plain_cnn"]
    assert float(gap["difference"]) == pytest.approx(0.03, abs=0.01)
    assert (gap["outcome"], gap["seeds"]) == ("better", "2")
    arms = {row["arm"] for row in rows("tests")} | {row["other"] for row in rows("tests")}
    assert arms == {row["arm"] for row in rows("ranks")} == {"mae_resenc_l", "scratch_resenc_l"}
    assert {row["arm"] for row in rows("table")} == set(gains), "they are in the tables of scores"
    scratch = {row["arm"] for row in rows("table") if row["scratch"]}
    assert scratch == {"mae_resenc_l"}, "a plain row is held against nothing"


def test_a_plain_row_that_leads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 300)
    write_report(write_study(tmp_path, gains={"mae_resenc_l": 0.0, "plain_cnn": 0.1}, data_sets={"one": {}}))
    page = (tmp_path / "report" / "report.md").read_text("utf-8").replace("\\_", "_")
    assert "mae_resenc_l is worse than plain_cnn." in page
    assert "beside plain rows alone" in page
    gains = {"mae_resenc_l": 0.02, "scratch_resenc_l": 0.0, "plain_cnn": 0.1}
    write_report(write_study(tmp_path / "three", gains=gains, data_sets={"one": {}}))
    page = (tmp_path / "three" / "report" / "report.md").read_text("utf-8").replace("\\_", "_")
    assert "(Of the arms that are compared; plain_cnn, a plain row, has " in page
