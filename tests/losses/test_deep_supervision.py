# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A loss at several resolutions: its weights, and where labels are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.losses import DeepSupervision, DiceCrossEntropy
from common.tasks import SegmentationTask


class Mean(nn.Module):
    """A loss that tells its levels apart."""

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        return pred.mean() + 0 * label.sum()


def test_each_level_weighs_half_of_the_finer_one() -> None:
    outputs = [
        torch.full((2, 1, 8 >> level, 8 >> level, 4 >> level), value) for level, value in enumerate((1.0, 10.0, 100.0))
    ]
    found = DeepSupervision(Mean())(outputs, torch.zeros(2, 1, 8, 8, 4))
    assert float(found) == pytest.approx((1 + 10 / 2 + 100 / 4) / (1 + 1 / 2 + 1 / 4))


def test_an_output_that_is_right_everywhere_costs_nothing_and_terms_are_of_full_resolution() -> None:
    label = torch.zeros(1, 1, 8, 8, 8, dtype=torch.long)
    label[..., 4:, :, :] = 1
    right = [20 * torch.cat([1 - half, half], dim=1) for half in (label.float(), label.float()[..., ::2, ::2, ::2])]
    inner = DiceCrossEntropy(SegmentationTask(["background", "ball"]))
    loss = DeepSupervision(inner)
    assert float(loss(right, label)) == pytest.approx(0, abs=1e-6)
    wrong = [right[0], -right[1]]
    assert float(loss(wrong, label)) > 1
    assert float(inner.terms["cross_entropy"]) == pytest.approx(0, abs=1e-6)
    assert torch.equal(loss(wrong[0], label), inner(wrong[0], label))
