# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, t

from common.metrics import bootstrap_interval, crossed_interval, format_summary, known_mean, summarise
from common.metrics.segmentation import METRICS
from common.metrics.statistics import wider_percentiles


def test_the_interval_of_a_mean_is_what_theory_says() -> None:
    """Of a normal sample: mean +- 1.96 standard errors."""
    values = np.random.default_rng(0).normal(5.0, 2.0, 200)
    low, high = bootstrap_interval(np.mean, values, resamples=4000)
    error = values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.03)


@pytest.mark.parametrize("skewed", [False, True])
def test_it_covers_the_truth_as_often_as_promised(skewed: bool) -> None:
    """From ten cases; plain percentiles would hold it in nine studies of ten. Skewed as Dice near 1, a little less."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        values = 1 - rng.exponential(1.0, 10) if skewed else rng.standard_normal(10)
        low, high = bootstrap_interval(np.mean, values, resamples=400)
        inside += low <= 0 <= high
    assert (0.86 if skewed else 0.92) <= inside / 400 <= (0.95 if skewed else 0.98)


def test_percentiles_are_those_of_students_t() -> None:
    """The bootstrap's standard deviation is s sqrt((n - 1) / n) / sqrt(n), and Student's bound t s / sqrt(n)."""
    for units in (3, 10, 50):
        low, high = wider_percentiles(units)
        reach = norm.ppf(high / 100) * np.sqrt((units - 1) / units)
        assert reach == pytest.approx(t.ppf(0.975, units - 1))
        assert low == pytest.approx(100 - high)
    assert wider_percentiles(1.0005) == pytest.approx((0, 100), abs=1e-6), "one patient has nearly all scans"


def made_up(
    rng: np.random.Generator,
    *,
    units: int,
    seeds: int,
    folds: int = 2,
    cases: float = 1.0,
    runs: float = 0.0,
    rest: float = 0.0,
    patients: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores of a study whose true mean is 0: ``(cases, seeds)``, folds and patients.

    Standard deviations between cases, between runs, of what remains, and between patients, who then have 1 to 5 scans.
    """
    unit = np.repeat(np.arange(units), rng.integers(1, 6, units) if patients else 1)
    fold = rng.permutation(np.arange(units) % folds)[unit]
    values = (cases * rng.standard_normal(len(unit)) + patients * rng.standard_normal(units)[unit])[:, None]
    values = values + runs * rng.standard_normal((folds, seeds))[fold]
    return values + rest * rng.standard_normal((len(unit), seeds)), fold, unit


STUDIES = {
    "cases differ": {"units": 10, "seeds": 3},
    "runs differ": {"units": 10, "seeds": 3, "cases": 0.3, "runs": 1.0},
    "both": {"units": 20, "seeds": 3, "runs": 0.3},
    "two seeds": {"units": 20, "seeds": 2, "runs": 0.3, "rest": 0.3},
    "neither": {"units": 20, "seeds": 3, "cases": 0.2, "runs": 0.1, "rest": 1.0},
    "one fold": {"units": 40, "seeds": 3, "folds": 1, "runs": 0.3, "rest": 0.5},
    "patients": {"units": 20, "seeds": 3, "cases": 0.5, "runs": 0.2, "patients": 1.0},
}


@pytest.mark.parametrize("kind", STUDIES)
def test_intervals_of_runs_and_cases_cover_the_truth(kind: str) -> None:
    """500 made-up studies of each kind."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(500):
        values, fold, unit = made_up(rng, **STUDIES[kind])
        low, high = crossed_interval(values, fold, units=unit)
        inside += low <= 0 <= high
    assert 0.92 <= inside / 500 <= 0.98, "93 to 97 %, and what 500 studies leave open"


def test_an_interval_of_one_run_is_students_and_of_runs_alone_too() -> None:
    values, fold, _ = made_up(np.random.default_rng(0), units=12, seeds=1)
    expected = t.interval(0.95, 11, values.mean(), values.std(ddof=1) / np.sqrt(12))
    assert crossed_interval(values, fold) == pytest.approx(expected)
    twice = crossed_interval(np.repeat(values, 2, axis=0), np.repeat(fold, 2), units=np.repeat(np.arange(12), 2))
    assert twice == pytest.approx(expected), "two scans of a patient that say the same are one"
    luck = np.random.default_rng(1).standard_normal(4)
    low, high = crossed_interval(np.tile(luck, (1000, 1)), [0] * 1000)
    assert (low, high) == pytest.approx(t.interval(0.95, 3, luck.mean(), luck.std(ddof=1) / 2), rel=1e-6)


def test_what_is_missing_or_the_same_is_no_evidence() -> None:
    values, fold, _ = made_up(np.random.default_rng(0), units=12, seeds=3, runs=0.5)
    assert crossed_interval(np.ones((5, 3)), [0] * 5) == pytest.approx([1, 1])
    assert crossed_interval(values[:1], [0]) is None
    assert crossed_interval(np.full((4, 2), np.nan), [0] * 4) is None
    assert crossed_interval(values, fold, units=["a"] * 12) is None
    whole = crossed_interval(values, fold)
    wider = np.column_stack([values, np.full(12, np.nan)])
    assert crossed_interval(wider, fold) == pytest.approx(whole)
    both = crossed_interval(np.stack([values, -values], axis=-1), fold)
    assert both == pytest.approx(np.stack([whole, -whole[::-1]], axis=-1))
    order = np.random.default_rng(1).permutation(12)
    assert crossed_interval(values[order][:, ::-1], fold[order]) == pytest.approx(whole)
    values[fold == 1, 2] = np.nan  # a run that is not there
    low, high = crossed_interval(values, fold)
    assert low < np.nanmean(values) < high


def test_a_seed_makes_it_repeatable() -> None:
    values = np.random.default_rng(2).random(30)
    first, second, other = (bootstrap_interval(np.mean, values, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_scans_of_one_patient_are_no_independent_evidence() -> None:
    """With ten copies of each patient, the interval is that of the patients, wider by about the root of ten."""
    patients = np.random.default_rng(3).normal(0.0, 1.0, 25)
    scans, whose = np.repeat(patients, 10), np.repeat(np.arange(25), 10).astype(str)
    alone, grouped = bootstrap_interval(np.mean, scans), bootstrap_interval(np.mean, scans, groups=whose)
    truth = bootstrap_interval(np.mean, patients)
    assert (grouped[1] - grouped[0]) / (alone[1] - alone[0]) == pytest.approx(np.sqrt(10), rel=0.1)
    assert grouped[1] - grouped[0] == pytest.approx(truth[1] - truth[0], rel=0.1)


def test_arrays_are_resampled_together() -> None:
    a = np.random.default_rng(4).random(20)
    interval = bootstrap_interval(lambda x, y: np.abs(x - y).max(), a, a)
    assert interval.tolist() == [0, 0]


def test_one_case_or_one_patient_has_no_interval() -> None:
    assert bootstrap_interval(np.mean, np.ones(1)) is None
    assert bootstrap_interval(np.mean, np.ones(0)) is None
    assert bootstrap_interval(np.mean, np.ones(5), groups=["a"] * 5) is None
    assert bootstrap_interval(np.mean, np.ones(5), resamples=0) is None


def test_undefined_resamples_are_left_out() -> None:
    values = np.array([0.5, np.nan, np.nan])
    assert bootstrap_interval(known_mean, values).tolist() == [0.5, 0.5]
    assert np.isnan(bootstrap_interval(known_mean, np.full(3, np.nan))).all()


def scores(dice: float, hd95_mm: float = 1.0, volume_error_ml: float = 0.0) -> dict[str, float]:
    return dict.fromkeys(METRICS, dice) | {"hd95_mm": hd95_mm, "volume_error_ml": volume_error_ml}


def test_a_summary_averages_cases_first_and_classes_last() -> None:
    """A class that is rarer than the others still has its full weight in the mean of the classes."""
    cases = [
        {"often": scores(0.9, volume_error_ml=-2.0), "rare": scores(np.nan, np.nan)},
        {"often": scores(0.7, volume_error_ml=2.0), "rare": scores(np.nan, np.nan)},
        {"often": scores(0.8), "rare": scores(0.2, np.inf)},
    ]
    summary = summarise(cases)["all"]
    assert summary["classes"]["often"]["dice"]["mean"] == pytest.approx(0.8)
    assert summary["classes"]["rare"]["dice"] == {"mean": 0.2, "interval": None, "cases": 1}
    assert summary["mean"]["dice"]["mean"] == pytest.approx(0.5)
    assert summary["mean"]["dice"]["cases"] == 3
    assert summary["classes"]["rare"]["hd95_mm"] == {"mean": None, "interval": None, "cases": 0}
    assert [summary["classes"]["rare"][key] for key in ("one_empty", "both_empty")] == [1, 2]
    assert summary["mean"]["hd95_mm"]["mean"] == 1.0
    assert summary["classes"]["often"]["volume_error_ml"]["mean"] == 0.0
    assert summary["classes"]["often"]["absolute_volume_error_ml"]["mean"] == pytest.approx(4 / 3, rel=1e-5)


def test_groups_are_summarised_alone() -> None:
    dice = {"A": [0.9, 0.8, 0.95], "B": [0.3, 0.5]}
    cases = [{"x": scores(value)} for values in dice.values() for value in values]
    summary = summarise(cases, groups=["A", "A", "A", "B", "B"])
    for group, values in dice.items():
        alone = summarise([{"x": scores(value)} for value in values])["all"]
        assert summary["groups"][group] == alone
        assert alone["classes"]["x"]["dice"]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
    assert list(summarise(cases, groups=["unknown", "z", "z", "A", "A"])["groups"]) == ["A", "z", "unknown"]


def test_a_table_of_many_groups_is_kept_short() -> None:
    cases = [{f"c{i}": scores(0.5, volume_error_ml=-0.001) for i in range(10)} for _ in range(8)]
    text = format_summary(summarise(cases, groups=list("ABCDABCD")), tolerance_mm=2.0, group="centre")
    lines = text.splitlines()
    assert "NSD 2 mm" in lines[0]
    assert [line.split()[:3] for line in lines if line.startswith("centre")] == [["centre", g, "2"] for g in "ABCD"]
    assert "the classes are in scores.json" in text
    assert "-0.00" not in text
    whole = format_summary(summarise(cases[:4], groups=list("AABB")), group="centre")
    assert sum(line.startswith("  c9 ") for line in whole.splitlines()) == 2
