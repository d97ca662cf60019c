# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from common.losses import MaskedMSELoss
from common.methods.simmim import SimMIM
from common.views import MaskedViews, SpatialCrop

from .samples import BACKBONES, fit, read, unmoved

BLOCK = 8


def views(count: int = 2, ratio: float = 0.75) -> dict[str, Any]:
    crop = SpatialCrop(16)
    return MaskedViews(crop, block_size=BLOCK, hidden_ratio=ratio)(read(crop, range(count)))


def method(name: str) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(BACKBONES[name]())


def voxels(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(hidden[:, None].float(), scale_factor=BLOCK) > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_the_answer_does_not_depend_on_what_is_hidden(name: str) -> None:
    simmim, batch = method(name).eval(), views()
    other = {**batch, "image": torch.where(voxels(batch["hidden"]), torch.tensor(7.0), batch["image"])}
    assert torch.equal(simmim(batch)["reconstruction"], simmim(other)["reconstruction"])
    seen = {**batch, "image": torch.where(voxels(batch["hidden"]), batch["image"], torch.tensor(7.0))}
    assert not torch.allclose(simmim(batch)["reconstruction"], simmim(seen)["reconstruction"], atol=1e-2)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_answer_depends_on_the_token_exactly_if_something_is_hidden(name: str) -> None:
    """Unlike MAE's zeros, what stands for a hidden block is learned."""
    simmim, batch = method(name).eval(), views()
    nothing = {**batch, "hidden": torch.zeros_like(batch["hidden"])}
    before = [simmim(case)["reconstruction"] for case in (batch, nothing)]
    torch.nn.init.normal_(simmim.mask_token)
    after = [simmim(case)["reconstruction"] for case in (batch, nothing)]
    assert not torch.allclose(before[0], after[0], atol=1e-2)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[1], simmim.backbone(batch["image"]))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_loss_falls_on_hidden_places_only(name: str) -> None:
    batch = views()
    pred = method(name)(batch)
    pred["reconstruction"].retain_grad()
    MaskedMSELoss()(pred, batch).backward()
    assert torch.equal(pred["reconstruction"].grad != 0, voxels(batch["hidden"]))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns(name: str) -> None:
    simmim, batch = method(name).train(), views()
    MaskedMSELoss()(simmim(batch), batch).backward()
    assert unmoved(simmim) == set()
    assert {n for n, _ in simmim.named_parameters() if not n.startswith("backbone.")} == {"mask_token"}


@pytest.mark.parametrize("name", BACKBONES)
def test_it_learns(name: str) -> None:
    batch = views(2, ratio=0.5)
    losses, _ = fit(method(name), MaskedMSELoss(), batch, steps=40, lr=1e-2)
    assert losses[-1] < 0.3 * losses[0]
    assert losses[-1] < 0.5 * float(batch["image"].var())  # better than the best constant answer
