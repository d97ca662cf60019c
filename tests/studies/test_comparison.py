# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Statistics of a study on results with known truth, on numbers worked out by hand, and on published examples."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import friedmanchisquare, wilcoxon
from sklearn.metrics import average_precision_score

from common.metrics import classification_scores, regression_scores
from tools.reporting import cells, comparison, significance
from tools.reporting.cells import all_cells, case_ranks, data_set_ranks, gap_rows, group_cells, group_rows
from tools.reporting.comparison import (
    _evaluate,
    average_precision,
    baseline,
    case_scores,
    compare,
    interval,
    paired_case_scores,
    resampled,
    score,
)
from tools.reporting.outcome import judge
from tools.reporting.significance import critical_difference, pair_tests, rank
from tools.studies.results import Block, Results, blocks_of, every_run, patients_sentence, read_results

from .synthetic import write_study

BRAIN = {"hippocampus": {}}
TWO = {"mae_resenc_l": 0.05, "scratch_resenc_l": 0.0}


def blocks(folder: Path, **told: Any) -> tuple[Results, list[Block]]:
    results = read_results(write_study(folder, **({"data_sets": BRAIN, "gains": TWO} | told)))
    return results, blocks_of(results)


@pytest.mark.parametrize(("gain", "word"), [(0.05, "better"), (-0.05, "worse"), (0.0, "")])
def test_a_better_arm_is_found_and_an_equal_one_is_not(tmp_path: Path, gain: float, word: str) -> None:
    _, found = blocks(tmp_path, gains=TWO | {"mae_resenc_l": gain}, luck=0.003, seeds=3)
    difference = compare(found[0], "mae_resenc_l", "scratch_resenc_l")
    assert difference is not None
    assert difference["difference"][0] == pytest.approx(gain, abs=0.008)
    assert difference["low"][0] <= difference["difference"][0] <= difference["high"][0]
    wide = np.diff(interval(resampled(found[0], "scratch_resenc_l")[:, 0]))[0]
    assert difference["high"][0] - difference["low"][0] < 0.25 * wide, "pairing takes out what makes cases differ"
    verdict = judge(found, pair_tests(found), "mae_resenc_l", "scratch_resenc_l")
    assert verdict is not None
    assert verdict.shown == word


@pytest.mark.parametrize(("seeds", "folds"), [(2, 2), (3, 1)])
def test_what_differs_between_runs_alone_is_seldom_shown(
    monkeypatch: pytest.MonkeyPatch, seeds: int, folds: int
) -> None:
    """All cases of a run share its luck, of which Wilcoxon's test over cases is sure; the interval must not be."""
    monkeypatch.setattr(comparison, "RESAMPLES", 400)
    rng = np.random.default_rng(7)
    cases, sure, shown, studies = 16, 0, 0, 80
    rows = sorted((index % folds, f"case_{index}") for index in range(cases))
    fold = np.array([own for own, _ in rows])
    for draw in range(studies):
        luck = 0.03 * rng.standard_normal((2, folds, seeds))
        values = rng.uniform(0.3, 0.8, cases)[None, :, None] + luck[:, fold]
        values += 0.01 * rng.standard_normal(values.shape)
        block = Block(
            *(f"draw_{draw}", "all", "segmentation", ["a", "b"], ["lesion"], list(range(folds)), list(range(seeds))),
            *(rows, fold, np.arange(cases), False, [None] * cases, np.repeat(values[..., None, None], 2, -1), None),
            *(np.ones((2, folds, seeds), bool), {"a": folds * seeds, "b": folds * seeds}),
        )
        found = compare(block, "a", "b")
        assert found is not None
        sure += wilcoxon(values[0].mean(1), values[1].mean(1)).pvalue < 0.05
        shown += bool(found["low"][0] > 0 or found["high"][0] < 0)
    assert sure > 0.4 * studies
    assert shown < 0.15 * studies


def test_intervals_grow_with_the_luck_of_runs(tmp_path: Path) -> None:
    widths = []
    for luck in (0.0, 0.05):
        _, (block,) = blocks(tmp_path / str(luck), luck=luck, seeds=3)
        found = compare(block, *TWO)
        assert found is not None
        widths.append(found["high"][0] - found["low"][0])
    assert widths[1] > 4 * widths[0]


@pytest.mark.parametrize(
    "name",
    [
        *(f"reporting.{name}" for name in ("cells", "comparison", "outcome", "plain", "significance", "tables")),
        "studies.plain",
        "studies.results",
    ],
)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"tools.{name}")).failed == 0


def test_identical_arms_have_no_difference_at_all(tmp_path: Path) -> None:
    folder = write_study(tmp_path, gains=TWO, data_sets=BRAIN)
    for run in (tmp_path / "runs").glob("*/mae_resenc_l/*/*/*/result.json"):
        other = Path(str(run).replace("mae_resenc_l", "scratch_resenc_l"))
        run.write_text(other.read_text())
    found = blocks_of(read_results(folder))
    (test,) = pair_tests(found)
    assert (test["difference"], test["low"], test["high"], test["p"], test["better"]) == (0, 0, 0, 1, "")
    assert test["arm_better_on"] == 0


def test_score_is_case_over_seeds_then_class_over_cases_then_classes(tmp_path: Path) -> None:
    """Class left is undefined in one case of one seed and in one case of both; by hand."""
    told = {
        ("case_0", 0): {"left": 0.2, "right": 0.5},
        ("case_0", 1): {"left": None, "right": 0.7},
        ("case_1", 0): {"left": None, "right": 0.9},
        ("case_1", 1): {"left": None, "right": 0.9},
        ("case_2", 0): {"left": 0.6, "right": 0.0},
        ("case_2", 1): {"left": 0.8, "right": 0.2},
    }

    def change(run: Any, result: Any) -> None:
        for case, entry in result["cases"].items():
            own = told[case, run["seed"]]
            entry["scores"] = {name: {"dice": value, "nsd": None} for name, value in own.items()}

    _, (block,) = blocks(tmp_path, cases=3, folds=1, gains={"scratch_resenc_l": 0}, change=change)
    left = (0.2 + 0.7) / 2
    right = (0.6 + 0.9 + 0.1) / 3
    assert score(block, "scratch_resenc_l")[0] == pytest.approx((left + right) / 2)
    assert np.isnan(score(block, "scratch_resenc_l")[1]), "a score that is defined nowhere"
    assert np.isnan(resampled(block, "scratch_resenc_l")[:, 1]).all()


def test_order_of_cases_and_runs_changes_nothing(tmp_path: Path) -> None:
    def turned(run: Any, result: Any) -> None:
        result["cases"] = dict(reversed(result["cases"].items()))

    first, one = blocks(tmp_path / "a", luck=0.02)
    second, other = blocks(tmp_path / "b", luck=0.02, change=turned)
    second.finished = dict(reversed(second.finished.items()))
    other = blocks_of(second)
    assert pair_tests(one) == pair_tests(other)
    assert str(all_cells(first, one)) == str(all_cells(second, other))


def test_bootstrap_of_segmentation_is_that_of_copied_cases(tmp_path: Path) -> None:
    """A weight of 2 is the same as the case twice; a seed of weight 0 is as if it had not been run."""
    _, (block,) = blocks(tmp_path, folds=1, cases=5, seeds=2)
    rows, runs = np.array([2.0, 0, 1, 1, 1]), np.array([[1.0, 0.0]])
    found = _evaluate(block, "mae_resenc_l", runs[None], rows[None])[0, 0]
    copied = block.values[0][[0, 0, 2, 3, 4], 0, :, 0]
    assert found == pytest.approx(copied.mean(0).mean())


def test_numbers_are_scored_as_everywhere_and_resampled_as_copied_cases(tmp_path: Path) -> None:
    _, (block,) = blocks(tmp_path, data_sets={"ages": {"task": "regression"}})
    assert block.metrics == ("r2", "pearson")
    assert block.truth is not None
    arm = block.arms.index("mae_resenc_l")
    by_hand = []
    for fold in (0, 1):
        own = block.fold == fold
        for seed in (0, 1):
            found = regression_scores(block.values[arm, own, seed, 0, 0], block.truth[own])
            by_hand.append([found["r2"], found["pearson"]])
    assert score(block, "mae_resenc_l") == pytest.approx(np.mean(by_hand, axis=0))
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (5, len(block.rows))).astype(float)
    weighted = _evaluate(block, "mae_resenc_l", np.ones((5, 2, 2)), counts)
    for row, own in zip(weighted, counts, strict=True):
        copied = []
        for fold in (0, 1):
            places = np.repeat(np.arange(len(own)), (own * (block.fold == fold)).astype(int))
            for seed in (0, 1):
                found = regression_scores(block.values[arm, places, seed, 0, 0], block.truth[places])
                copied.append([found["r2"], found["pearson"]])
        assert row == pytest.approx(np.mean(copied, axis=0))


@pytest.mark.parametrize(("gain", "better"), [(0.08, "mae_resenc_l"), (0.0, "")])
def test_a_better_regression_is_found_and_an_equal_one_is_not(tmp_path: Path, gain: float, better: str) -> None:
    gains, ages = TWO | {"mae_resenc_l": gain}, {"ages": {"task": "regression"}}
    _, found = blocks(tmp_path, gains=gains, data_sets=ages, cases=40, seeds=5)
    (test,) = pair_tests(found)
    assert test["metric"] == "r2"
    assert test["test"] == "permutation of cases"
    assert test["better"] == better
    assert (test["p"] < 0.01) == bool(better)
    difference = compare(found[0], "mae_resenc_l", "scratch_resenc_l")
    assert difference is not None
    assert test["difference"] == pytest.approx(difference["difference"][0])


def test_units_are_patients_where_groups_are(tmp_path: Path) -> None:
    groups = [f"patient_{i // 2}" for i in range(24)]
    _, (block,) = blocks(tmp_path / "a", data_sets={"acdc": {"groups": groups}}, folds=1)
    assert block.patients
    assert block.unit.max() + 1 == 12
    assert pair_tests([block])[0]["cases"] == 12
    _, (block,) = blocks(tmp_path / "b", data_sets={"acdc": {"groups": ["Basel", "Bern", "Ulm"]}}, folds=1)
    assert not block.patients
    assert block.unit.max() + 1 == 24


def test_patients_and_groups_that_are_told_are_not_read_from_counts(tmp_path: Path) -> None:
    """Two scans of each patient at two sites; one site is harder, and one case has no age."""

    def tell(run: Any, result: Any) -> None:
        for case, entry in result["cases"].items():
            index = int(case.removeprefix("case_"))
            site = "AB"[index // 2 % 2]
            age = None if index == 0 else "below 40" if index < 30 else "40 and above"
            entry |= {"patient": f"p{index // 2}", "groups": {"site": site, "age": age}}
            for scores in entry["scores"].values():
                scores["dice"] -= 0.25 * (site == "B")

    _, (block,) = blocks(tmp_path, cases=60, folds=1, change=tell)
    assert block.told
    assert not block.patients
    assert block.unit.max() + 1 == 30
    assert "hippocampus: 30 patients of 60 unseen cases" in patients_sentence(block)
    found = group_cells(block, "mae_resenc_l")
    assert list(found) == ["site", "age"]
    assert list(found["age"]["groups"]) == ["below 40", "40 and above"]
    assert [found[name]["missing"] for name in found] == [0, 1]
    site = found["site"]
    assert {name: (each["cases"], each["patients"]) for name, each in site["groups"].items()} == {
        "A": (30, 15),
        "B": (30, 15),
    }
    inside = np.array([own == "A" for own in block.columns["site"]])
    assert site["groups"]["A"]["score"] == pytest.approx(score(block, "mae_resenc_l", rows=inside)[0])
    assert (site["gap"]["best"], site["gap"]["worst"]) == ("A", "B")
    assert site["gap"]["interval"][0] > 0
    low, high = found["age"]["gap"]["interval"]
    assert low < 0 < high
    assert len(group_rows([block])) == 2 * 2 * 4
    (row, *_) = gap_rows([block])
    assert (row["arm"], row["column"], row["low"]) == ("mae_resenc_l", "site", site["gap"]["interval"][0])


def test_numbers_have_scores_of_groups_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one site the predictions are far off: its R2 is that of its own cases, and the gap leaves out 0."""

    def off(run: Any, result: Any) -> None:
        rng = np.random.default_rng([run["fold"], run["seed"], run["arm"] == "mae_resenc_l"])
        for entry in result["cases"].values():
            entry["predicted"][0] += (entry["group"] == "Ulm") * 12 * rng.standard_normal()

    ages = {"ages": {"task": "regression", "groups": ["Bern", "Ulm"]}}
    monkeypatch.setattr(comparison, "RESAMPLES", 500)
    drawn: list[Any] = []
    monkeypatch.setattr(cells, "resampled", lambda *told, **more: drawn.append(told) or resampled(*told, **more))
    results, (block,) = blocks(tmp_path, data_sets=ages, cases=80, folds=1, seeds=5, change=off)
    found = group_cells(block, "mae_resenc_l")["group"]
    for name, each in found["groups"].items():
        expected = []
        for result in results.finished.values():
            if result["run"]["arm"] == "mae_resenc_l":
                own = [case for case in result["cases"].values() if case["group"] == name]
                predicted, true = (
                    np.array([case[key] for case in own], float).ravel() for key in ("predicted", "truth")
                )
                expected.append(regression_scores(predicted, true)["r2"])
        assert each["score"] == pytest.approx(np.mean(expected)), "of the spread within the site, over runs"
        assert each["cases"] == 40
        assert each["interval"][0] < each["score"] < each["interval"][1]
    gap = found["gap"]
    assert (gap["best"], gap["worst"]) == ("Bern", "Ulm")
    assert gap["interval"][0] > 0
    rows = group_rows([block])
    assert {(row["metric"], row["group"]) for row in rows} == {
        (metric, site) for metric in ("r2", "pearson") for site in ("Bern", "Ulm")
    }
    count = len(drawn)
    assert count == 2 * 2 * 2 * 2, "arms, scores and sites, each as it is and widened"
    assert [row["arm"] for row in gap_rows([block])] == list(TWO)
    assert len(drawn) == count, "what is bootstrapped for the scores is not bootstrapped again for the gaps"


def test_arms_are_compared_on_shared_runs_only(tmp_path: Path) -> None:
    """The arm without fold 1 is not complete, takes no part in ranks, and is compared on fold 0."""
    skip = lambda run: "missing" if run["arm"] == "simclr_resenc_l" and run["fold"] == 1 else None  # noqa: E731
    results, (block,) = blocks(tmp_path, gains=TWO | {"simclr_resenc_l": 0.2}, skip=skip)
    assert not block.has("simclr_resenc_l")
    found = compare(block, "simclr_resenc_l", "scratch_resenc_l")
    assert found is not None
    assert found["runs"] == 2
    assert found["difference"][0] == pytest.approx(0.2, abs=0.01)
    cells = {(c.arm, c.metric): c for c in all_cells(results, [block])}
    assert not cells["simclr_resenc_l", "dice"].complete
    assert cells["simclr_resenc_l", "dice"].minus_scratch == pytest.approx(0.2, abs=0.01)
    ranks = data_set_ranks(results, [block])
    assert ranks is not None
    assert ranks.arms == ["mae_resenc_l", "scratch_resenc_l"]


def test_means_over_data_sets_follow_the_cards(tmp_path: Path) -> None:
    cards = {"a": {"group": "ID"}, "b": {"group": "ID"}, "c": {"group": "OOD"}, "d": {}}
    results, found = blocks(tmp_path, data_sets=cards)
    cells = {(c.arm, c.column): c for c in all_cells(results, found) if c.metric == "dice"}
    by = {name: cells["mae_resenc_l", name].value for name in (*cards, "ID", "OOD", "All")}
    assert by["ID"] == pytest.approx((by["a"] + by["b"]) / 2)
    assert by["OOD"] == by["c"]
    assert by["All"] == pytest.approx(np.mean([by[name] for name in cards]))
    mean = cells["mae_resenc_l", "All"]
    assert mean.high - mean.low < cells["mae_resenc_l", "a"].high - cells["mae_resenc_l", "a"].low
    assert mean.scratch == "scratch_resenc_l"


def test_seed_sd_is_that_of_the_seeds_scores(tmp_path: Path) -> None:
    results, (block,) = blocks(tmp_path, seeds=3, luck=0.03)
    own = []
    for seed in range(3):
        runs = every_run(block, "mae_resenc_l") & (np.arange(3) == seed)
        own.append(score(block, "mae_resenc_l", runs)[0])
    cell = next(c for c in all_cells(results, [block]) if (c.arm, c.metric) == ("mae_resenc_l", "dice"))
    assert cell.seed_sd == pytest.approx(np.std(own, ddof=1))


def test_holm_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three p values 0.01, 0.04, 0.03: 0.03, then 2 x 0.03, then the larger of that and 0.04."""
    given = iter([0.01, 0.04, 0.03])
    whole = significance._wilcoxon
    monkeypatch.setattr(significance, "_wilcoxon", lambda *told: (next(given), *whole(*told)[1:]))
    _, found = blocks(tmp_path, gains=TWO | {"simclr_resenc_l": 0.1}, seeds=1)
    tests = pair_tests(found)
    assert [test["p_holm"] for test in tests] == pytest.approx([0.03, 0.06, 0.06])
    assert [bool(test["better"]) for test in tests] == [True, False, False]


def of_cases(arms: dict[str, Any], seeds: int = 3) -> Block:
    """Return a block of one class and fold; an arm's Dice of each case is the same in all seeds."""
    values = np.stack(list(arms.values()))
    count = values.shape[1]
    return Block(
        *("made_up", "all", "segmentation", list(arms), ["lesion"], [0], list(range(seeds))),
        *([(0, f"case_{index:03d}") for index in range(count)], np.zeros(count, int), np.arange(count), False),
        *([None] * count, np.tile(values[:, :, None, None, None], (1, 1, seeds, 1, 2)), None),
        *(np.ones((len(arms), 1, seeds), bool), dict.fromkeys(arms, seeds)),
    )


@pytest.mark.parametrize("turned", [False, True])
def test_nothing_is_shown_where_test_and_mean_point_apart(turned: bool) -> None:
    """86 small gains decide the signed ranks, 14 large losses the mean; no arm is better."""
    level = np.random.default_rng(0).uniform(0.6, 0.9, 100)
    step = np.where(np.arange(100) < 86, 0.01, -0.5) + 1e-4 * np.random.default_rng(1).standard_normal(100)
    arms = {"mae": level + step, "scratch": level}
    (test,) = pair_tests([of_cases(dict(reversed(arms.items())) if turned else arms)])
    assert test["p_holm"] < 0.001
    assert (test["low"] > 0) if turned else (test["high"] < 0)
    assert test["better"] == ""


def empty_labels() -> tuple[np.ndarray, np.ndarray]:
    """Return Dice of two arms in 10 cases with a lesion and 20 without, in which only the first predicts one."""
    lesion = np.random.default_rng(0).uniform(0.4, 0.8, 10)
    other = lesion + 0.001 * np.random.default_rng(1).standard_normal(10)
    return np.append(lesion, np.zeros(20)), np.append(other, np.full(20, np.nan))


def test_paired_tests_and_ranks_know_what_is_rightly_left_empty() -> None:
    false_alarms, careful = empty_labels()
    block = of_cases({"mae": false_alarms, "other": false_alarms - 0.001, "scratch": careful})
    tests = {(row["arm"], row["other"]): row for row in pair_tests([block])}
    test = tests["mae", "scratch"]
    assert test["cases"] == 30
    assert test["p"] < 0.001
    assert test["better"] == "scratch"
    ranks = case_ranks(block)
    assert ranks is not None
    assert ranks.count == 30
    assert ranks.mean[2] < 1.5
    # scores and differences remain as they are documented: over the cases in which they are defined
    assert score(block, "scratch")[0] == pytest.approx(np.nanmean(careful))
    assert score(block, "mae")[0] == pytest.approx(false_alarms.mean())
    assert test["difference"] == pytest.approx(false_alarms.mean() - np.nanmean(careful))
    assert np.isnan(case_scores(block, "scratch")[10:]).all()


def test_only_what_another_arm_has_a_score_of_counts_as_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both leave case 0 empty; case 1 is empty and one of two seeds of each arm says so; by hand."""
    block = of_cases({"a": np.array([np.nan, 0.0, 0.5]), "b": np.array([np.nan, 0.0, 0.7])}, seeds=2)
    block.values[0, 1, 0] = np.nan
    found = paired_case_scores(block, ("a", "b"))
    assert found == pytest.approx(np.array([[np.nan, 0.5, 0.5], [np.nan, 0.0, 0.7]]), nan_ok=True)
    first = np.array([[True, False]])
    found = paired_case_scores(block, ("a", "b"), first)
    assert found == pytest.approx(np.array([[np.nan, 1.0, 0.5], [np.nan, 0.0, 0.7]]), nan_ok=True)
    monkeypatch.setattr(comparison, "_BEST", {})  # as of a distance, which has no best value in cases without a lesion
    assert np.isnan(paired_case_scores(block, ("a", "b"), first)[0, 1])


# Demsar, JMLR 7, 2006, table 6: AUC of C4.5 with its parameters m and cf, one, both or neither tuned, on 14 data sets;
# of two that are printed as 0.975, it ranks the first before the second
DEMSAR = np.array(
    [
        *([0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967]),
        *([0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931]),
        *([0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875]),
        *([1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669]),
        *([0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970]),
    ]
)


def test_ranks_and_critical_difference_of_demsars_example() -> None:
    """Its mean ranks, its critical difference, and its conclusion on both tuned against neither."""
    found = rank(DEMSAR, ["C4.5", "m", "cf", "m and cf"], "data sets")
    assert found is not None
    assert found.mean.round(3) == pytest.approx([3.143, 2.000, 2.893, 1.964])
    assert found.cd == pytest.approx(1.25, abs=0.005)
    assert critical_difference(5, 30) == pytest.approx(2.728 * np.sqrt(5 * 6 / (6 * 30)), abs=0.001)
    assert found.p == pytest.approx(friedmanchisquare(*DEMSAR.T).pvalue)
    assert found.pairs is not None
    gaps = np.abs(found.mean[:, None] - found.mean)
    assert ((found.pairs < 0.05) == (gaps > found.cd)).all()
    assert not (found.pairs < 0.05).any(), "1.18 between C4.5 and both tuned is less than 1.25"


# OpenMind, table 2, the pre-trained ResEnc-L: VoCo, SwinUNETR, SimCLR, VF, MG, MAE, S3D on 12 data sets
OPENMIND = np.array(
    [
        [57.14, 59.62, 77.50, 63.48, 51.12, 54.90, 75.12, 56.92, 63.49, 91.44, 85.60, 85.71],
        [56.07, 57.25, 77.45, 61.64, 49.42, 54.82, 74.69, 57.05, 65.68, 90.53, 84.95, 85.54],
        [57.15, 59.72, 78.01, 63.32, 51.56, 55.68, 77.77, 59.14, 68.20, 91.76, 86.06, 84.85],
        [57.42, 59.88, 78.18, 64.32, 51.67, 57.42, 76.11, 59.31, 63.98, 91.57, 85.38, 86.21],
        [58.03, 61.57, 77.58, 65.11, 54.69, 55.25, 77.14, 58.67, 71.27, 91.74, 86.35, 86.17],
        [58.25, 62.41, 77.89, 66.58, 55.14, 56.84, 77.96, 60.07, 70.85, 91.98, 86.78, 86.12],
        [58.76, 64.09, 78.05, 65.74, 52.81, 56.08, 78.81, 59.18, 66.66, 92.01, 86.16, 86.01],
    ]
).T


def test_ranks_of_the_published_table() -> None:
    found = rank(OPENMIND, ["VoCo", "SwinUNETR", "SimCLR", "VF", "MG", "MAE", "S3D"], "data sets")
    assert found is not None
    assert found.mean == pytest.approx([5.92, 6.67, 4.33, 3.58, 3.25, 1.92, 2.33], abs=0.005)
    assert found.count == 12


def test_ties_share_a_rank_and_rows_with_gaps_are_left_out() -> None:
    found = rank(np.array([[0.5, 0.5, 0.1], [np.nan, 1, 1], [0.2, 0.9, 0.3], [0.3, 0.3, 0.3]]), ["a", "b", "c"], "x")
    assert found is not None
    assert found.count == 3
    assert found.mean == pytest.approx([(1.5 + 3 + 2) / 3, (1.5 + 1 + 2) / 3, (3 + 2 + 2) / 3])
    assert rank(np.full((3, 3), np.nan), ["a", "b", "c"], "x") is None
    same = rank(np.full((4, 3), 0.5), ["a", "b", "c"], "x")
    assert same is not None
    assert same.p == 1
    two = rank(np.array([[1.0, 2.0]] * 5), ["a", "b"], "x")
    assert two is not None
    assert two.cd is None


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_with_weights_is_that_of_copies(ties: bool) -> None:
    rng = np.random.default_rng(0)
    p = rng.random(40).round(1 if ties else 6)
    own = rng.random(40) < 0.3
    weights = rng.integers(0, 3, (20, 40)).astype(float)
    found = average_precision(p[None], own, weights)
    for value, weight in zip(found, weights.astype(int), strict=True):
        assert value == pytest.approx(average_precision_score(np.repeat(own, weight), np.repeat(p, weight)))
    for same in (np.zeros(40, bool), np.ones(40, bool)):
        assert np.isnan(average_precision(p[None], same, weights)).all()
    assert np.isnan(average_precision(p[None], own, weights * own)).all()


@pytest.mark.parametrize("folds", [1, 2])
def test_a_fold_with_a_single_class_has_no_average_precision(tmp_path: Path, folds: int) -> None:
    """Of two folds, only the second has cases of both classes; AP is its own, not its mean with a 1."""

    def change(run: Any, result: Any) -> None:
        if run["fold"] == 0:
            for entry in result["cases"].values():
                entry["truth"] = 1

    told = {"abide": {"task": "classification"}}
    _, (block,) = blocks(tmp_path, data_sets=told, gains=TWO, seeds=1, folds=folds, change=change)
    test = pair_tests([block])[0]
    if folds == 1:
        assert np.isnan(score(block, "mae_resenc_l")[0])
        assert np.isnan([test["difference"], test["low"], test["p"]]).all()
        assert test["better"] == ""
        return
    own = block.fold == 1
    assert block.truth is not None
    for place, arm in enumerate(TWO):
        found = classification_scores(block.values[place, own, 0, :, 0], block.truth[own])
        assert score(block, arm)[0] == pytest.approx(found["ap"])
        assert found["ap"] < 1
        weights = np.full((1, len(own)), 2.0)  # not all ones, so that the weighted way is taken
        assert _evaluate(block, arm, np.ones((1, 2, 1)), weights)[0, 0] == pytest.approx(found["ap"])


def test_classification_scores_each_run_by_itself(tmp_path: Path) -> None:
    told = {"abide": {"task": "classification"}}
    _, (block,) = blocks(tmp_path, data_sets=told, gains={"mae_resenc_l": 0.05, "scratch_resenc_l": -0.05})
    expected = []
    for file in tmp_path.glob("runs/abide/mae_resenc_l/*/*/*/result.json"):
        cases = json.loads(file.read_text())["cases"].values()
        found = classification_scores(
            np.array([case["probabilities"] for case in cases]), np.array([case["truth"] for case in cases])
        )
        expected.append([found["ap"], found["balanced_accuracy"]])
    assert len(expected) == 4
    assert score(block, "mae_resenc_l") == pytest.approx(np.mean(expected, axis=0))
    weights = np.ones((1, 24)) * 2  # not all ones, so that the weighted way is taken
    assert _evaluate(block, "mae_resenc_l", np.ones((1, 2, 2)), weights)[0] == pytest.approx(np.mean(expected, axis=0))
    (test,) = pair_tests([block])
    assert test["better"] == "mae_resenc_l"
    assert test["p"] < 0.01
    assert test["low"] < test["difference"] < test["high"]


def test_permutation_keeps_its_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms without a difference: p values of many studies are not piled up near 0."""
    monkeypatch.setattr(significance, "_PERMUTATIONS", 500)
    found = []
    for trial in range(8):
        rng = np.random.default_rng(trial)

        def change(run: Any, result: Any, rng: np.random.Generator = rng) -> None:
            for entry in result["cases"].values():
                p = float(np.clip(0.5 + 0.15 * (2 * entry["truth"] - 1) + 0.2 * rng.standard_normal(), 0, 1))
                entry["probabilities"] = [1 - p, p]

        _, (block,) = blocks(
            tmp_path / str(trial), data_sets={"abide": {"task": "classification"}}, seeds=1, folds=1, change=change
        )
        found.append(pair_tests([block])[0]["p"])
    assert min(found) > 0.005
    assert np.mean(found) > 0.25


def test_baseline_is_of_the_same_backbone_and_length() -> None:
    arms = {
        "a": {"backbone": "primus_m", "weights": "x.pt", "epochs": 3},
        "b": {"backbone": "resenc_l", "weights": "scratch", "epochs": 3},
        "c": {"backbone": "resenc_l", "weights": "scratch", "epochs": 9},
        "d": {"backbone": "resenc_l", "weights": "y.pt", "epochs": 9},
    }
    assert [baseline(arms, name) for name in arms] == [None, None, None, "c"]
