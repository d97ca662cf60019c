# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from common.metrics import bootstrap_interval, known_mean, summarise
from common.metrics.segmentation import METRICS


def test_the_interval_of_a_mean_is_what_theory_says() -> None:
    """Of a normal sample: mean +- 1.96 standard errors."""
    values = np.random.default_rng(0).normal(5.0, 2.0, 200)
    low, high = bootstrap_interval(np.mean, values, resamples=4000)
    error = values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.03)


def test_it_covers_the_truth_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(np.mean, rng.normal(0.0, 1.0, 40), resamples=300)
        inside += low <= 0 <= high
    assert 0.89 <= inside / 200 <= 0.98  # a little below 95 % with 40 cases


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
