# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of classes against answers worked out by hand, and against scikit-learn where that has the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from common.metrics.classification import (
    SCORES,
    classification_scores,
    draw_classification,
    format_classification,
    summarise_classification,
)


def test_two_classes_by_hand() -> None:
    # sorted by the score of class 1: 1 0 1 0; one of each is decided right
    probability = np.array([0.9, 0.6, 0.4, 0.1])
    scores = classification_scores(np.stack([1 - probability, probability], 1), np.array([1, 0, 1, 0]))
    assert scores["auroc"] == pytest.approx(3 / 4)
    assert scores["ap"] == pytest.approx((1 + 2 / 3) / 2)  # the same for both classes here
    assert scores["balanced_accuracy"] == scores["balanced_accuracy_reference"] == pytest.approx(0.5)
    assert scores["f1"] == pytest.approx(0.5)
    assert scores["accuracy"] == pytest.approx(0.5)


def test_three_classes_by_hand() -> None:
    # decisions 0 0 1 | 1 1 | 0 for the truth 0 0 0 | 1 1 | 2: recalls 2/3, 1, 0; specificities 2/3, 3/4, 1
    truth = np.array([0, 0, 0, 1, 1, 2])
    decided = np.array([0, 0, 1, 1, 1, 0])
    scores = classification_scores(np.eye(3)[decided] * 0.8 + 0.1, truth)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["balanced_accuracy_reference"] == pytest.approx((2 / 3 + 2 / 3 + 1 + 3 / 4 + 0 + 1) / 6)
    assert scores["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert scores["accuracy"] == pytest.approx(4 / 6)


def test_labels_by_hand() -> None:
    probability = np.array([[0.9, 0.2], [0.8, 0.7], [0.3, 0.6], [0.1, 0.1]])
    truth = np.array([[1, 0], [0, 1], [1, 0], [0, 0]])
    scores = classification_scores(probability, truth)
    # first label: recall 1/2, specificity 1/2; second: 1 and 2/3
    assert scores["balanced_accuracy"] == scores["balanced_accuracy_reference"] == pytest.approx((1 + 1 + 2 / 3) / 4)
    assert scores["auroc"] == pytest.approx((3 / 4 + 1) / 2)
    assert scores["ap"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert scores["f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["accuracy"] == pytest.approx(5 / 8)


def test_agreement_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 4)).round(1)  # with ties
    probability = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).round(2)
    truth = rng.integers(0, 4, 60)
    scores = classification_scores(probability, truth)
    decided = probability.argmax(1)
    onehot = np.eye(4)[truth]
    assert scores["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, decided))
    assert scores["f1"] == pytest.approx(metrics.f1_score(truth, decided, average="macro"))
    assert scores["auroc"] == pytest.approx(metrics.roc_auc_score(onehot, probability, average="macro"))

    assert scores["ap"] == pytest.approx(metrics.average_precision_score(onehot, probability, average="macro"))


def test_an_absent_class_is_left_out_of_the_means_and_not_a_crash() -> None:
    probability = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6]])
    scores = classification_scores(probability, np.array([0, 1, 0]))
    assert np.isnan(scores["classes"][2, :4]).all()
    assert scores["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert scores["auroc"] == scores["ap"] == 1.0
    one = classification_scores(probability, np.array([0, 0, 0]))
    assert math.isnan(one["auroc"])
    assert math.isnan(one["ap"])
    labels = classification_scores(probability, np.zeros((3, 3), int))
    assert all(math.isnan(labels[name]) for name in SCORES if name != "accuracy")


def test_intervals_hold_the_value_and_patients_widen_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    patient = np.repeat(np.arange(20), 6)
    truth = (patient % 2).astype(int)
    signal = truth + np.repeat(rng.normal(0, 1.0, 20), 6) + rng.normal(0, 0.1, 120)
    one = 1 / (1 + np.exp(-signal))
    probability = np.stack([1 - one, one], 1)
    alone = summarise_classification(probability, truth, ["no", "yes"], resamples=200)
    grouped = summarise_classification(probability, truth, ["no", "yes"], groups=list(patient), resamples=200)
    width = {}
    for name, summary in (("alone", alone), ("grouped", grouped)):
        low, high = summary["scores"]["auroc"]["interval"]
        assert low < summary["scores"]["auroc"]["value"] < high
        width[name] = high - low
    assert width["grouped"] > 1.5 * width["alone"]
    assert grouped["groups"] == 20
    assert sum(map(sum, alone["confusion"])) == 120
    assert alone["classes"]["yes"]["cases"] == 60
    text = format_classification(grouped)
    assert "200 resamples of 20 groups" in text
    assert "balanced_accuracy_reference" in text
    draw_classification(probability, truth, ["no", "yes"], tmp_path / "a.png")
    draw_classification(probability, np.stack([truth, 0 * truth], 1), ["no", "yes"], tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_without_resamples_there_are_no_intervals() -> None:
    summary = summarise_classification(np.array([[0.2, 0.8], [0.9, 0.1]]), np.array([1, 0]), ["a", "b"], resamples=0)
    assert summary["scores"]["ap"] == {"value": 1.0, "interval": None}
    assert "ap                           100.0\n" in format_classification(summary)
