# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from common.engines.features import read_features
from common.engines.probing import (
    _auroc,
    _average_precision,
    _classification_scores,
    compare_probes,
    outer_folds,
    probe_features,
    read_target,
)
from common.errors import DataError, SettingsError
from tools.commanding.parsing import parse
from tools.scoring import probe as probe_tool
from tools.scoring.feature_map import draw_map
from tools.scoring.settings import Probe

from ..conftest import ROOT, write_volume
from ..engines.test_features import embed
from ..starts import python


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_features(folder: Path, values: np.ndarray) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    cases = [f"case_{index:03d}" for index in range(len(values))]
    names = [f"f{index:03d}" for index in range(values.shape[1])]
    rows = [
        {"case": case, "source": f"{case}.nii.gz", **dict(zip(names, row.tolist(), strict=True))}
        for case, row in zip(cases, values, strict=True)
    ]
    write_table(folder / "features.csv", rows)
    return cases


def target_of(tmp_path: Path, values: list[Any], groups: list[Any] | None = None, **kwargs: Any) -> Any:
    cases = [f"case_{index:03d}" for index in range(len(values))]
    rows = [{"case": case, "t": value} for case, value in zip(cases, values, strict=True)]
    for row, group in zip(rows, groups or [], strict=bool(groups)):
        row["g"] = group
    table = write_table(tmp_path / "table.csv", rows)
    return read_target(table, cases, target="t", group="g" if groups else None, **kwargs)


def test_metrics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 3):
        truth = rng.integers(0, classes, 60)
        scores = rng.dirichlet(np.ones(classes), 60).round(1)  # with ties
        scores /= scores.sum(1, keepdims=True)
        decisions = scores.argmax(1)
        found = _classification_scores(truth, np.zeros(60, int), decisions, scores)
        assert found[0] == pytest.approx(balanced_accuracy_score(truth, decisions))
        area = roc_auc_score(truth, scores[:, 1] if classes == 2 else scores, multi_class="ovr", average="macro")
        assert found[1] == pytest.approx(area)
        precision = [average_precision_score(truth == index, scores[:, index]) for index in range(classes)]
        assert found[2] == pytest.approx(np.mean(precision))
        assert found[3] == pytest.approx(f1_score(truth, decisions, average="macro"))


def test_ranking_is_undefined_without_both_classes() -> None:
    assert _auroc(np.array([True, True]), np.array([0.1, 0.2]))[1] == 0
    assert np.isnan(_average_precision(np.array([False]), np.array([0.5])))


def test_scores_of_different_folds_are_not_compared() -> None:
    """Each fold ranks perfectly on a scale of its own."""
    truth, fold = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    score = np.array([0.1, 0.2, 0.8, 0.9])
    found = _classification_scores(truth, fold, (score > 0.5).astype(int), np.stack([1 - score, score], 1))
    assert found[1] == 1.0


def test_classes_that_differ_are_told_and_shuffled_ones_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, 75)
    features = rng.standard_normal((75, 20)) + 3.0 * np.eye(20)[values]
    features *= rng.uniform(0.01, 100, 20)  # scales of the features must not matter
    target = target_of(tmp_path, [f"kind {value}" for value in values])
    assert target.task == "classification"
    found = probe_features(features, target, repeats=2, resamples=200).metrics
    for model in ("kNN", "linear"):
        assert found[model]["AUROC"]["estimate"] > 0.85
        assert found[model]["balanced accuracy"]["interval"][0] > 1 / 3
        assert len(found[model]["F1"]["folds"]) == 10
    assert found["baseline"]["AUROC"]["estimate"] == 0.5
    assert found["baseline"]["balanced accuracy"]["estimate"] == pytest.approx(1 / 3)

    held, estimates = [], []
    for _ in range(4):
        shuffled = target_of(tmp_path, rng.permutation(["a", "b"] * 30).tolist())
        found = probe_features(rng.standard_normal((60, 20)), shuffled, repeats=1, resamples=200).metrics
        for model in ("kNN", "linear"):
            low, high = found[model]["AUROC"]["interval"]
            held.append(low < 0.5 < high)
            estimates.append(found[model]["AUROC"]["estimate"])
    assert np.mean(held) >= 7 / 8, "intervals of 95 %, of models that were trained on chance"
    assert np.mean(estimates) < 0.57, "better than chance at nothing is a leak"


def test_chance_stays_chance_on_average(tmp_path: Path) -> None:
    """More features than cases and settings that are chosen: a leak would show at once."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(5):
        target = target_of(tmp_path, rng.permutation([0, 1] * 20).tolist())
        result = probe_features(rng.standard_normal((40, 80)), target, repeats=1, resamples=0)
        found.append([result.metrics[model]["AUROC"]["estimate"] for model in ("kNN", "linear")])
        assert result.metrics["linear"]["AUROC"]["interval"] is None
    assert np.abs(np.mean(found, axis=0) - 0.5).max() < 0.12


def test_a_linear_function_is_recovered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((80, 10))
    age = 50 + 8 * features @ rng.standard_normal(10)
    target = target_of(tmp_path, age.tolist())
    assert target.task == "regression"
    assert "80 distinct numbers: regression" in target.notes[0]
    found = probe_features(features, target, repeats=2, resamples=200).metrics
    assert found["linear"]["R2"]["estimate"] > 0.99
    assert found["linear"]["R2"]["interval"][0] > 0.98
    assert found["linear"]["MAE"]["estimate"] < 0.1 * found["baseline"]["MAE"]["estimate"]
    assert found["linear"]["R2"]["estimate"] > found["kNN"]["R2"]["estimate"] > found["baseline"]["R2"]["estimate"]
    assert found["baseline"]["R2"]["estimate"] == pytest.approx(0)
    assert list(found["linear"]) == ["MAE", "RMSE", "R2", "Pearson", "Spearman"]
    assert found["linear"]["RMSE"]["estimate"] >= found["linear"]["MAE"]["estimate"]
    assert found["linear"]["Spearman"]["interval"][0] > 0.97
    undefined = {name: found["baseline"]["Pearson"][name] for name in ("estimate", "interval", "fold_mean", "fold_std")}
    assert set(undefined.values()) == {None}


def test_two_kinds_of_features_are_compared_case_by_case(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 40)
    noise = rng.standard_normal((40, 6))
    options: dict[str, Any] = {"repeats": 2, "resamples": 200}
    target = target_of(tmp_path, values.tolist())
    good, poor = (probe_features(noise + gain * np.eye(6)[values], target, **options) for gain in (3.0, 0.0))
    for metric in ("AP", "balanced accuracy"):
        found = compare_probes(good, poor, metric=metric, resamples=200)
        own = [one.metrics["linear"][metric]["estimate"] for one in (good, poor)]
        assert found["estimate"] == pytest.approx(own[0] - own[1])
        assert 0 < found["interval"][0] < found["estimate"] < found["interval"][1]
        assert found["units"] == 40
    same = compare_probes(good, good, metric="AP", resamples=50)
    assert (same["estimate"], same["interval"]) == (0.0, [0.0, 0.0])
    with pytest.raises(ValueError, match="40 and 30 cases"):
        compare_probes(good, probe_features(noise, target_of(tmp_path, values[:30].tolist()), **options), metric="AP")
    ages = target_of(tmp_path, (noise[:, 0] * 10).tolist())
    told, lost = (probe_features(x, ages, **options) for x in (noise, rng.standard_normal((40, 6))))
    assert compare_probes(told, lost, metric="R2", resamples=50)["interval"][0] > 0.3


@pytest.mark.parametrize("values", [[0, 1] * 30, np.linspace(0, 1, 60).tolist()])
def test_folds_never_tear_groups_apart(values: list[float], tmp_path: Path) -> None:
    groups = [f"p{index // 5}" for index in range(60)]
    target = target_of(tmp_path, values, groups)
    for seed in range(3):
        parts, note = outer_folds(target, folds=5, seed=seed)
        assert note is None
        tested = np.concatenate([test for _, test in parts])
        assert sorted(tested) == list(range(60))
        for train, test in parts:
            assert not {groups[index] for index in train} & {groups[index] for index in test}


def test_what_a_patient_looks_like_is_not_taken_for_the_disease(tmp_path: Path) -> None:
    """Features know only the patient; without groups that looks like a diagnosis."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), 4)
    features = 5 * rng.standard_normal((20, 30))[patients] + rng.standard_normal((80, 30))
    values = (patients % 2).tolist()
    torn = probe_features(features, target_of(tmp_path, values), repeats=1, resamples=300).metrics["kNN"]["AUROC"]
    whole = probe_features(features, target_of(tmp_path, values, patients.tolist()), repeats=1, resamples=300).metrics[
        "kNN"
    ]["AUROC"]
    assert torn["estimate"] > 0.95
    assert whole["interval"][0] < 0.5 < whole["interval"][1]
    assert np.ptp(whole["interval"]) > np.ptp(torn["interval"])


def test_few_cases_lower_the_folds_and_are_told(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((15, 4))
    result = probe_features(features, target_of(tmp_path, ["a"] * 12 + ["b"] * 3), resamples=50)
    assert result.folds == 3
    assert any("only 3 folds instead of 5: there are 3 cases of t 'b'" in note for note in result.notes)
    assert any("the rarest class has 3" in note for note in result.notes)
    small = probe_features(features[:6], target_of(tmp_path, ["a", "b", "c"] * 2), resamples=50)
    assert small.folds == 2
    with pytest.raises(DataError, match="1 cases of t 'b', too few"):
        probe_features(features, target_of(tmp_path, ["a"] * 14 + ["b"]))
    with pytest.raises(DataError, match="1 groups of t 'b', too few"):
        probe_features(features, target_of(tmp_path, ["a"] * 11 + ["b"] * 4, [str(i) for i in range(11)] + ["x"] * 4))
    tiny = probe_features(features[:4], target_of(tmp_path, [1.5, 2.5, 3.5, 4.5]), resamples=50)
    assert tiny.folds == 4
    for wrong in ({"folds": 1}, {"folds": 2.5}, {"repeats": 0}):
        with pytest.raises(SettingsError):
            probe_features(features, target_of(tmp_path, ["a", "b"] * 7 + ["a"]), **wrong)  # type: ignore[arg-type]


def test_bad_tables_end_in_sentences(tmp_path: Path) -> None:
    cases = [f"case_{index:03d}" for index in range(6)]

    def read(rows: list[dict[str, Any]] | str, **kwargs: Any) -> Any:
        table = tmp_path / "t.csv"
        if isinstance(rows, str):
            table.write_text(rows)
        else:
            write_table(table, rows)
        return read_target(table, cases, **{"target": "t", **kwargs})

    good = [{"case": case, "t": index % 2, "g": index} for index, case in enumerate(cases)]
    for rows, settings, words in (
        ("", {}, "no column case"),
        ("name,t\na,1\n", {}, "no column case"),
        ("case,x\na,1\n", {}, "no column 't'; it has 'case', 'x'"),
        (good, {"group": "patient"}, "no column 'patient'"),
        ([{"case": "x", "t": 1}], {}, "names none of the 6 cases"),
        ([{**row, "t": 1} for row in good], {}, "every case has the t '1'"),
        ([{**row, "t": "nan"} for row in good], {}, "no value of t"),
        ([*good, {"case": cases[0], "t": 1, "g": 0}], {}, "says two things of the case case_000"),
        ([{**row, "g": ""} for row in good], {"group": "g"}, "case_000 has no 'g'"),
        ([{**row, "t": "high"} for row in good], {"task": "regression"}, "'high', not a number"),
        ([{**row, "t": 3} for row in good], {"task": "regression"}, "nothing to tell apart"),
    ):
        with pytest.raises(DataError, match=words):
            read(rows, **settings)
    with pytest.raises(SettingsError, match="classification or regression"):
        read(good, task="ranking")
    with pytest.raises(DataError, match="cannot be read"):
        read_target(tmp_path / "none.csv", cases, target="t")

    mixed = [*good[:4], {"case": cases[4], "t": "", "g": 1}, {"case": "stranger", "t": 1, "g": 1}]
    found = read([{**row, "case": f"{row['case']}.nii.gz"} for row in mixed])
    assert found.cases == cases[:4]
    told = " ".join(found.notes)
    for words in ("1 case(s) of the features, such as case_005", "such as stranger", "such as case_004, have no t"):
        assert words in told


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["10", "9", "2"] * 2, "classification", ["2", "9", "10"]),
        (["b", "a"] * 3, "classification", ["a", "b"]),
        (["0.5", "1.5", "2.5"] * 2, "regression", []),
        (["0.5", "1.5"] * 3, "classification", ["0.5", "1.5"]),
        ([str(age) for age in range(20, 32)], "regression", []),
    ],
)
def test_the_task_is_told_by_the_values(values: list[str], task: str, classes: list[str], tmp_path: Path) -> None:
    found = target_of(tmp_path, values)
    assert (found.task, found.classes) == (task, classes)
    other = {"classification": "regression", "regression": "classification"}[task]
    if classes != ["a", "b"]:
        assert target_of(tmp_path, values, task=other).task == other


@pytest.mark.parametrize(("count", "kinds"), [(12, 2), (40, 3), (40, 0), (60, 11), (3, 2)])
def test_the_map_says_what_it_is(count: int, kinds: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = [f"kind {index % kinds}" for index in range(count)] if kinds else rng.uniform(20, 80, count).tolist()
    target = target_of(tmp_path, values)
    features = rng.standard_normal((count, 30))
    how = draw_map(tmp_path / "a" / "map.png", features, target, seed=1)
    assert ("t-SNE" in how) == (count >= 30)
    assert "PCA" in how
    first = matplotlib.image.imread(tmp_path / "a" / "map.png")
    assert min(first.shape[:2]) > 500
    draw_map(tmp_path / "b.png", features, target, seed=1)
    np.testing.assert_array_equal(first, matplotlib.image.imread(tmp_path / "b.png"))


def test_scans_that_differ_are_told_from_features_of_a_random_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From files to scores, with a structure in half of the scans that cannot be overlooked."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(24):
        values = 100 + 10 * rng.standard_normal((20, 20, 20))
        if index % 2:
            values[4:16, 4:16, 9:12] += 150
        write_volume(tmp_path / "images" / f"scan_{index:02d}.nii.gz", values.astype(np.float32))
        kind = "plate" if index % 2 else "nothing"
        rows.append({"case": f"scan_{index:02d}.nii.gz", "kind": kind, "patient": index // 2})
    table = write_table(tmp_path / "labels.csv", rows)
    embed("mae_resenc_l", tmp_path / "images", tmp_path / "f", from_scratch=True, stages=[0, 1, 2])
    probe_tool.probe(Probe(str(tmp_path / "f"), str(table), "kind", repeats=1, resamples=200))
    told = capsys.readouterr().out
    assert "kind of 24 cases (12 nothing, 12 plate); 5 folds, 1 time(s)" in told
    assert "few cases: the rarest class has 12" in told
    assert "55 against 76 Dice" in told
    folder = tmp_path / "f" / "probe_kind"
    about = json.loads((folder / "probe.json").read_text())
    assert about["scores"]["linear"]["AUROC"]["estimate"] > 0.9
    assert about["provenance"]["settings"]["from_scratch"] is True
    with open(folder / "probe.csv", newline="") as stream:
        predictions = list(csv.DictReader(stream))
    assert len(predictions) == 24 * 3
    linear = [row for row in predictions if row["model"] == "linear"]
    right = np.mean([row["target"] == row["prediction"] for row in linear])
    assert right == pytest.approx(about["scores"]["linear"]["balanced accuracy"]["estimate"])
    assert float(linear[0]["p_plate"]) + float(linear[0]["p_nothing"]) == pytest.approx(1, abs=1e-5)
    assert (folder / "map.png").stat().st_size > 10_000

    first = (folder / "probe.csv").read_bytes()
    table_of = str(tmp_path / "f" / "features.csv")
    probe_tool.probe(Probe(table_of, str(table), "kind", repeats=1, resamples=200, output=str(tmp_path / "again")))
    assert (tmp_path / "again" / "probe.csv").read_bytes() == first, "a seed decides everything"
    probe_tool.probe(Probe(table_of, str(table), "kind", patient="patient", repeats=1, resamples=50))
    assert "24 cases of 12 patients" in capsys.readouterr().out


def test_the_command_line_ends_in_a_sentence(tmp_path: Path) -> None:
    cases = write_features(tmp_path / "f", np.random.default_rng(0).standard_normal((8, 3)))
    table = write_table(tmp_path / "t.csv", [{"case": case, "x": 1} for case in cases])
    command = [python(), str(ROOT / "tools" / "probe.py"), str(tmp_path / "f"), "--table", str(table)]
    result = subprocess.run([*command, "--target", "diagnosis"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().startswith("Stopped:")
    assert "no column 'diagnosis'; it has 'case', 'x'" in result.stderr
    assert read_features(tmp_path / "f")[0] == cases
    with pytest.raises(SettingsError, match="--group is called --patient here; write --patient"):
        parse("probe", Probe, [str(tmp_path / "f"), "--table", str(table), "--target", "x", "--group", "who"])
