# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of numbers against SciPy and scikit-learn, and against answers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn import metrics

from common.metrics.regression import (
    REGRESSION_SCORES,
    draw_regression,
    format_regression,
    regression_scores,
    summarise_regression,
)
from common.tasks import RegressionTask

AGE = RegressionTask("age", mean=60.0, std=10.0, units="years")


def cohort(count: int = 80, *, error: float = 4.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ages, and predictions with an error of this standard deviation."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(60, 10, count)
    return truth + rng.normal(0, error, count), truth


def test_agreement_with_scipy_and_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 12, 60).astype(float)  # with ties
    predicted = (0.5 * truth + rng.normal(size=60)).round(1)
    found = regression_scores(predicted, truth)
    assert list(found) == list(REGRESSION_SCORES)
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(truth, predicted))
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(truth, predicted))
    assert found["r2"] == pytest.approx(metrics.r2_score(truth, predicted))
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, predicted).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, predicted).statistic)


def test_by_hand() -> None:
    # errors 1, -1, 2; squares 1, 1, 4 over a spread of 8 around the mean 3
    found = regression_scores(np.array([2.0, 2.0, 7.0]), np.array([1.0, 3.0, 5.0]))
    assert found["mae"] == pytest.approx(4 / 3)
    assert found["rmse"] == pytest.approx(math.sqrt(2))
    assert found["r2"] == pytest.approx(1 - 6 / 8)
    straight = regression_scores(np.array([10.0, 20.0, 30.0]), np.array([3.0, 2.0, 1.0]))
    assert straight["pearson"] == straight["spearman"] == -1
    assert straight["r2"] < 0, "a perfect correlation of the wrong sign and size"


def test_what_is_not_defined_is_no_number() -> None:
    same = regression_scores(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert same["mae"] == 1.5
    assert all(math.isnan(same[name]) for name in ("r2", "pearson", "spearman"))
    constant = regression_scores(np.array([2.0, 2.0]), np.array([1.0, 3.0]))
    assert constant["r2"] == 0
    assert math.isnan(constant["pearson"])
    alone = summarise_regression(np.array([50.0]), np.array([55.0]), AGE)
    assert alone["scores"]["mae"] == {"value": 5.0, "interval": None}
    assert alone["scores"]["r2"]["value"] is None
    assert "R2        undefined" in format_regression(alone)
    assert "has no interval" in alone["mean_of_training"]["sentence"]


def test_intervals_hold_the_value_and_patients_widen_them() -> None:
    predicted, truth = cohort()
    patient = np.repeat(np.arange(16), 5)
    predicted = predicted + np.repeat(np.random.default_rng(2).normal(0, 6, 16), 5)
    alone = summarise_regression(predicted, truth, AGE, resamples=300)
    grouped = summarise_regression(predicted, truth, AGE, groups=list(patient), resamples=300)
    for name in REGRESSION_SCORES:
        low, high = alone["scores"][name]["interval"]
        assert low < alone["scores"][name]["value"] < high, name
        assert alone["scores"][name]["value"] == grouped["scores"][name]["value"]

    def width(summary: dict[str, Any]) -> float:
        low, high = summary["scores"]["mae"]["interval"]
        return float(high - low)

    assert width(grouped) > 1.3 * width(alone)
    assert "300 resamples of 16 groups" in format_regression(grouped)


def test_intervals_of_the_error_hold_the_true_one() -> None:
    """Of 30 draws of 50 cases, the 95 % interval of the RMSE holds the error that was drawn in 25 or more."""
    held = 0
    for seed in range(30):
        predicted, truth = cohort(50, error=4.0, seed=seed)
        low, high = summarise_regression(predicted, truth, AGE, resamples=100)["scores"]["rmse"]["interval"]
        held += low <= 4.0 <= high
    assert held >= 25


def test_a_model_has_to_beat_the_mean_of_the_training_cases() -> None:
    predicted, truth = cohort()
    good = summarise_regression(predicted, truth, AGE, resamples=200)["mean_of_training"]
    assert good["mae"]["value"] == pytest.approx(np.abs(truth - 60).mean(), rel=1e-5)
    assert good["mae_gain"]["value"] == pytest.approx(good["mae"]["value"] - np.abs(predicted - truth).mean(), rel=1e-4)
    assert good["mae_gain"]["interval"][0] > 0
    assert "always saying 60 years, the mean of the training cases" in good["sentence"]
    assert "the model is better by" in good["sentence"]
    blind = np.random.default_rng(3).permutation(truth)
    bad = summarise_regression(blind, truth, AGE, resamples=200)["mean_of_training"]
    assert "the model is worse by" in bad["sentence"]
    same = 60 + np.random.default_rng(4).normal(0, 0.5, len(truth))
    even = summarise_regression(same, truth, AGE, resamples=200)["mean_of_training"]
    assert "the model is not shown to be better" in even["sentence"]


def test_without_resamples_there_are_no_intervals() -> None:
    predicted, truth = cohort(10)
    summary = summarise_regression(predicted, truth, RegressionTask("volume", mean=60.0), resamples=0)
    assert all(entry["interval"] is None for entry in summary["scores"].values())
    assert format_regression(summary).startswith("volume: 10 cases")


def test_the_picture_shows_the_cases_and_the_line_of_no_error(tmp_path: Path) -> None:
    predicted, truth = cohort(30, error=0.0)
    draw_regression(predicted, truth, AGE, tmp_path / "right.png")
    draw_regression(predicted[::-1], truth, AGE, tmp_path / "wrong.png")
    right, wrong = (
        np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in ("right.png", "wrong.png")
    )
    assert right.shape == wrong.shape
    blue = [(picture[..., 2] - picture[..., 0] > 80) for picture in (right, wrong)]
    # on the line of no error, points lie on the falling diagonal of the square of the axes
    places = np.argwhere(blue[0])
    assert np.corrcoef(places.T)[0, 1] < -0.99
    assert abs(np.corrcoef(np.argwhere(blue[1]).T)[0, 1]) < 0.6
    draw_regression(np.array([1.0]), np.array([1.0]), RegressionTask("x", mean=1.0), tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 3000
