# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.losses import MaskedMSELoss, gather, weighted_mean

from .processes import ignoring, masked_batch


def voxels(hidden: Tensor) -> Tensor:
    return hidden.repeat_interleave(4, 1).repeat_interleave(2, 2).repeat_interleave(4, 3)[:, None]


def without(batch: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != name}


def test_a_weighted_mean_is_that() -> None:
    values, weight = torch.tensor([2.0, 4.0, 100.0]), torch.tensor([1.0, 3.0, 0.0])
    assert float(weighted_mean(values * weight, weight)) == 3.5
    assert float(weighted_mean(values * 0, weight * 0)) == 0


def test_weights_get_no_gradient() -> None:
    weight = torch.rand(3, requires_grad=True)
    value = torch.rand(3, requires_grad=True)
    weighted_mean(value, weight).backward()
    assert weight.grad is None
    assert torch.allclose(value.grad, 1 / weight.detach().sum().expand(3))


def test_gather_is_nothing_in_one_process() -> None:
    x = torch.rand(3)
    assert gather(x) is x


def test_the_error_is_the_mean_over_hidden_voxels() -> None:
    prediction, batch = masked_batch()
    error = (prediction - batch["image"]).square()[voxels(batch["hidden"])]
    assert float(MaskedMSELoss()({"reconstruction": prediction}, without(batch, "ignored"))) == pytest.approx(
        float(error.mean()), rel=1e-5
    )


def test_ignored_voxels_cost_nothing() -> None:
    prediction, batch = masked_batch()
    prediction.requires_grad_()
    counted = voxels(batch["hidden"]) & ~batch["ignored"]
    loss = MaskedMSELoss()({"reconstruction": prediction}, batch)
    expected = pytest.approx(float((prediction - batch["image"]).detach().square()[counted].mean()), rel=1e-5)
    assert float(loss.detach()) == expected
    loss.backward()
    assert torch.equal(prediction.grad != 0, counted)
    wild = torch.where(counted, prediction.detach(), torch.full_like(batch["image"], 1e3))
    assert float(MaskedMSELoss()({"reconstruction": wild}, batch)) == expected


def test_nothing_ignored_is_the_plain_loss_and_all_ignored_is_zero() -> None:
    prediction, batch = masked_batch()
    prediction.requires_grad_()
    loss, nothing = MaskedMSELoss(), torch.zeros_like(batch["ignored"])
    plain = float(loss({"reconstruction": prediction.detach()}, without(batch, "ignored")))
    with_nothing = loss({"reconstruction": prediction.detach()}, {**batch, "ignored": nothing})
    assert float(with_nothing) == pytest.approx(plain, rel=1e-6)
    none_left = loss({"reconstruction": prediction}, {**batch, "ignored": ~nothing})
    none_left.backward()
    assert float(none_left.detach()) == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


# several processes


def test_many_processes_weigh_like_one(processes: dict[str, list[Any]]) -> None:
    """The processes hold different counts of voxels; averaged as DistributedDataParallel does, it is one mean."""
    for first, second, expected in zip(*processes["ignoring"], ignoring(0, 1), strict=True):
        assert torch.allclose((first + second) / 2, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(first, second, atol=1e-3)


def test_what_is_gathered_is_in_order_of_ranks_and_gradients_flow_back(processes: dict[str, list[Any]]) -> None:
    everything, asked = zip(*processes["gathering"], strict=True)
    assert all(torch.equal(one, torch.arange(8.0).view(2, 4)) for one in everything)
    assert torch.equal(torch.cat(asked, dim=1), 3 * torch.arange(8.0).view(2, 4))  # 1 + 2 of the two processes
