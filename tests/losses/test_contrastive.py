# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.losses import NTXentLoss

from .processes import contrast, share


def plain(views: Tensor, temperature: float) -> float:
    """Write the formula out: the mean over views of -log(e^(s_partner / t) / sum of e^(s_j / t) over all others)."""
    z = (views / views.norm(dim=-1, keepdim=True)).flatten(0, 1).tolist()
    n, total = len(z) // 2, 0.0
    for i in range(2 * n):
        powers = [math.exp(sum(a * b for a, b in zip(z[i], other, strict=True)) / temperature) for other in z]
        total -= math.log(powers[(i + n) % (2 * n)] / (sum(powers) - powers[i]))
    return total / (2 * n)


@pytest.mark.parametrize(("samples", "temperature"), [(1, 0.5), (2, 0.5), (5, 0.1), (7, 2.0)])
def test_the_loss_is_the_written_formula(samples: int, temperature: float) -> None:
    views = torch.randn(2, samples, 6, generator=torch.Generator().manual_seed(samples))
    assert float(NTXentLoss(temperature=temperature)(views)) == pytest.approx(plain(views, temperature), abs=1e-5)


def test_equal_pairs_orthogonal_to_all_else() -> None:
    for n, temperature in [(2, 1.0), (4, 0.5), (8, 0.5)]:
        expected = math.log(math.exp(1 / temperature) + 2 * n - 2) - 1 / temperature
        views = torch.eye(n).expand(2, n, n)
        assert float(NTXentLoss(temperature=temperature)(views)) == pytest.approx(expected, abs=1e-5)


def test_a_lonely_pair_has_no_one_to_be_confused_with() -> None:
    assert float(NTXentLoss()(torch.randn(2, 1, 4))) == 0


def test_collapsed_embeddings_are_guessed() -> None:
    assert float(NTXentLoss()(torch.ones(2, 5, 3))) == pytest.approx(math.log(9), abs=1e-5)


def test_length_of_embeddings_and_order_of_samples_and_views_do_not_matter() -> None:
    views = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    loss = NTXentLoss()
    expected = pytest.approx(float(loss(views)), abs=1e-6)
    assert float(loss(views * torch.rand(2, 6, 1).add(0.1) * 100)) == expected
    assert float(loss(views[:, torch.randperm(6)])) == expected
    assert float(loss(views.flip(0))) == expected
    assert float(loss(torch.stack([views[0], views[1].roll(1, 0)]))) != expected


def test_half_precision_is_computed_in_float32() -> None:
    views = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).half()
    assert float(NTXentLoss(temperature=0.01)(views)) == float(NTXentLoss(temperature=0.01)(views.float()))


def test_negatives_are_global_or_local() -> None:
    with pytest.raises(ValueError, match="'all'; it must be 'global' or 'local'"):
        NTXentLoss(negatives="all")


# several processes


@pytest.fixture
def averaged(processes: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
    """Average over processes, as DistributedDataParallel averages gradients."""
    both = processes["contrast"]
    return {
        negatives: [torch.stack(values).mean(0) for values in zip(*(one[negatives] for one in both), strict=True)]
        for negatives in ("global", "local")
    }


def test_many_processes_contrast_like_one(averaged: dict[str, list[Tensor]]) -> None:
    for actual, expected in zip(averaged["global"], contrast(0, 1)["global"], strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-6)
        assert float(expected.abs().max()) > 1e-3


def test_local_negatives_are_those_of_the_own_process(averaged: dict[str, list[Tensor]]) -> None:
    expected = []
    for rank in range(2):
        network, views = share(rank, 2)
        expected.append(plain(network(views).detach(), 0.5))
    assert float(averaged["local"][0]) == pytest.approx(sum(expected) / 2, abs=1e-5)
    for local, together in zip(averaged["local"], averaged["global"], strict=True):
        assert not torch.allclose(local, together, atol=1e-3)
