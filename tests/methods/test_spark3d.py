# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import MaskedMSELoss
from common.methods.spark3d import Spark3D
from common.views import MaskedViews, SpatialCrop

from .samples import BACKBONES, fit, plain, read, unmoved

CELLS = [("unet", 8), ("unet", 4), ("unet", 2), ("transformer", 8)]  # blocks of 2 leave the coarsest map dense
cells = pytest.mark.parametrize(("name", "block"), CELLS)


def views(block: int, count: int = 2, ratio: float = 0.75) -> dict[str, Any]:
    crop = SpatialCrop(16)
    return MaskedViews(crop, block_size=block, hidden_ratio=ratio)(read(crop, range(count)))


def method(name: str, block: int) -> Spark3D:
    torch.manual_seed(0)
    return Spark3D(BACKBONES[name](), block_size=block)


def voxels(hidden: Tensor, size: int = 16) -> Tensor:
    return F.interpolate(hidden[:, None].float(), size=[size] * 3) > 0


@cells
def test_the_answer_does_not_depend_on_what_is_hidden(name: str, block: int) -> None:
    spark, batch = method(name, block).eval(), views(block)
    other = {**batch, "image": torch.where(voxels(batch["hidden"]), torch.tensor(7.0), batch["image"])}
    assert torch.equal(spark(batch)["reconstruction"], spark(other)["reconstruction"])
    seen = {**batch, "image": torch.where(voxels(batch["hidden"]), batch["image"], batch["image"].square())}
    assert not torch.allclose(spark(batch)["reconstruction"], spark(seen)["reconstruction"], atol=1e-2)


def densified(spark: Spark3D, batch: dict[str, Any]) -> list[Tensor]:
    """Return the maps that the decoder gets."""
    maps: list[Tensor] = []
    decode = spark.backbone.decode
    try:
        spark.backbone.decode = lambda features: maps.extend(features) or decode(features)
        spark(batch)
    finally:
        del spark.backbone.decode
    return maps


@cells
def test_maps_are_normalised_filled_and_projected(name: str, block: int) -> None:
    spark, batch = method(name, block).eval(), views(block)
    features = spark.backbone.encode(batch["image"], ~batch["hidden"], sparse=True)
    for level, dense in enumerate(densified(spark, batch)):
        feature, stride = features[level], spark.backbone.feature_strides[level]
        samples = []
        for sample, seen in zip(feature, ~voxels(batch["hidden"], feature.shape[2])[:, 0], strict=True):
            if stride > block:
                seen = torch.ones_like(seen)
            values = sample[:, seen]  # (C, visible voxels)
            deviation = values.var(1, correction=0, keepdim=True).add(1e-5).sqrt()
            filled = (spark.mask_tokens[level][0] if stride <= block else torch.zeros(1)).expand_as(sample).clone()
            filled[:, seen] = (values - values.mean(1, keepdim=True)) / deviation
            samples.append(filled)
        expected = torch.stack(samples)
        if stride > 1:  # full resolution is not projected
            weight, bias = spark.projections[level].weight, spark.projections[level].bias
            assert weight.shape[2:] == (3, 3, 3)
            expected = F.conv3d(expected, weight, bias, padding=1)
        assert torch.allclose(dense, expected, atol=1e-4)


def test_only_maps_that_are_not_coarser_than_a_block_have_a_token() -> None:
    assert [len(method("unet", block).mask_tokens) for block in (1, 2, 4, 8)] == [1, 2, 3, 3]
    assert len(method("transformer", 8).mask_tokens) == 1
    tokens = torch.cat([token.detach().flatten() for token in method("unet", 8).mask_tokens])
    assert 0 < float(tokens.abs().max()) <= 0.02


@cells
def test_the_loss_falls_on_hidden_places_only(name: str, block: int) -> None:
    batch = views(block)
    pred = method(name, block)(batch)
    pred["reconstruction"].retain_grad()
    MaskedMSELoss()(pred, batch).backward()
    assert torch.equal(pred["reconstruction"].grad != 0, voxels(batch["hidden"]))


@cells
def test_every_parameter_learns(name: str, block: int) -> None:
    spark, batch = method(name, block).train(), views(block)
    MaskedMSELoss()(spark(batch), batch).backward()
    assert unmoved(spark) == set()


@pytest.mark.parametrize(("name", "block"), CELLS[::3])
def test_it_learns(name: str, block: int) -> None:
    batch = views(block, 2, ratio=0.5)
    losses, _ = fit(method(name, block), MaskedMSELoss(), batch, steps=40, lr=1e-2)
    assert losses[-1] < 0.3 * losses[0]
    assert losses[-1] < 0.5 * float(batch["image"].var())  # better than the best constant answer


# the ratio of a step


def hide(indices: range, *, ratio: Any, batch_size: int | None = 8, side: int = 16, epoch: int = 1) -> dict[str, Any]:
    views = MaskedViews(plain(side), block_size=2, hidden_ratio=ratio, batch_size=batch_size)
    return views(read(plain(side), indices, shape=(side,) * 3, epoch=epoch))


def test_all_samples_of_a_step_hide_as_many_whatever_process_they_are_in() -> None:
    """A step of 8 samples in one process, in two, or in four micro-batches."""
    together = [hide(range(8 * step, 8 * step + 8), ratio=[0.6, 0.9]) for step in range(4)]
    for step, whole in enumerate(together):
        hidden = whole["hidden"].flatten(1).sum(1)
        assert hidden.unique().numel() == 1
        assert whole["visible_count"] == 512 - int(hidden[0])
        for size in (4, 2):
            for first in range(8 * step, 8 * step + 8, size):
                part = hide(range(first, first + size), ratio=[0.6, 0.9])
                rows = slice(first - 8 * step, first - 8 * step + size)
                assert torch.equal(part["hidden"], whole["hidden"][rows])
                assert part["visible_count"] == whole["visible_count"]
    assert len({whole["visible_count"] for whole in together}) == 4
    assert all(not torch.equal(whole["hidden"][0], whole["hidden"][1]) for whole in together)


def test_the_ratio_is_drawn_anew_in_each_epoch_and_is_the_same_again_for_the_same() -> None:
    counts = [hide(range(2), ratio=[0.6, 0.9], epoch=epoch)["visible_count"] for epoch in (1, 2, 3, 1)]
    assert len(set(counts)) == 3
    assert counts[0] == counts[3]


def test_the_ratio_is_uniform_over_steps() -> None:
    views = MaskedViews(plain(160), block_size=16, hidden_ratio=[0.6, 0.9], batch_size=8)
    image = torch.zeros(1, 1, 1, 1, 1)
    views.spatial = lambda batch: image  # not looked at here
    seen = [views({"key": [(0, 1, 8 * step)]}) for step in range(2000)]
    hidden = np.array([int(batch["hidden"].sum()) for batch in seen])
    assert np.array_equal(1000 - hidden, [batch["visible_count"] for batch in seen])
    assert 600 <= hidden.min() <= 603
    assert 896 <= hidden.max() < 900
    share, _ = np.histogram(hidden, bins=6, range=(600, 900))
    assert ((share - 2000 / 6) ** 2).sum() / (2000 / 6) < 20.5  # chi-squared of 5 degrees, p = 0.001


def test_a_static_ratio_hides_exactly_as_many_in_every_step() -> None:
    for ratio in (0.75, [0.75, 0.75]):
        seen = [hide(range(8 * step, 8 * step + 2), ratio=ratio, batch_size=None) for step in range(5)]
        assert {int(n) for batch in seen for n in batch["hidden"].flatten(1).sum(1)} == {384}
        assert {batch["visible_count"] for batch in seen} == {128}


def test_a_drawn_ratio_needs_to_know_what_a_step_is() -> None:
    with pytest.raises(ValueError, match=r"between 0\.6 and 0\.9 needs batch_size"):
        MaskedViews(SpatialCrop(16), block_size=4, hidden_ratio=[0.6, 0.9])
