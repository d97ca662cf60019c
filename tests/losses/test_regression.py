# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Losses of numbers: what they are, what they ask for, and settings of the other task."""

from __future__ import annotations

import pytest
import torch

from common.errors import SettingsError
from common.losses import ClassificationLoss, RegressionLoss, target_loss
from common.tasks import ClassificationTask, RegressionTask

AGE = RegressionTask("age", mean=60.0, std=10.0)


def test_values_by_hand() -> None:
    pred, label = torch.tensor([[0.5], [-3.0]]), torch.tensor([[0.0], [0.0]])
    assert float(RegressionLoss("l1")(pred, label)) == pytest.approx(1.75)
    assert float(RegressionLoss("mse")(pred, label)) == pytest.approx((0.25 + 9) / 2)
    assert float(RegressionLoss("huber")(pred, label)) == pytest.approx((0.125 + 2.5) / 2)
    assert float(RegressionLoss("huber", delta=100)(pred, label)) == pytest.approx((0.25 + 9) / 4)


@pytest.mark.parametrize(("kind", "answer"), [("l1", 1.0), ("mse", 3.0)])
def test_one_asks_for_the_median_the_other_for_the_mean(kind: str, answer: float) -> None:
    label = torch.tensor([[0.0], [1.0], [8.0]])
    candidates = torch.linspace(-1, 9, 101)
    loss = RegressionLoss(kind)
    values = torch.stack([loss(value.expand(3, 1), label) for value in candidates])
    assert float(candidates[values.argmin()]) == pytest.approx(answer, abs=0.06)


def test_a_far_case_pulls_no_harder_than_delta() -> None:
    pred = torch.tensor([[0.0], [0.0]], requires_grad=True)
    RegressionLoss("huber")(pred, torch.tensor([[0.5], [1000.0]])).backward()
    assert pred.grad is not None
    assert pred.grad.flatten().tolist() == pytest.approx([-0.25, -0.5])


def test_half_precision_is_computed_in_full() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RegressionLoss("mse")(torch.tensor([[0.25]], dtype=torch.bfloat16), torch.tensor([[0.251]]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1e-6, rel=1e-3)


def test_the_task_decides_and_settings_of_the_other_one_are_refused() -> None:
    assert isinstance(target_loss(ClassificationTask(("a", "b"))), ClassificationLoss)
    chosen = target_loss(AGE)
    assert isinstance(chosen, RegressionLoss)
    assert (chosen.kind, chosen.delta) == ("huber", 1.0)
    with pytest.raises(SettingsError, match="regression_loss is 'l2'; it must be one of huber, l1, mse"):
        target_loss(AGE, regression="l2")
    with pytest.raises(SettingsError, match="add --task regression"):
        target_loss(ClassificationTask(("a", "b")), regression="mse")
    with pytest.raises(SettingsError, match=r"label_smoothing is 0\.1, but a regression has no classes"):
        target_loss(AGE, label_smoothing=0.1)
