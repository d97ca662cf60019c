# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from common.losses import MaskedMSELoss
from common.methods.mae import MAELoss, TransformerMAE, UNetMAE
from common.networks import Primus, ResEncUNet
from common.views import MaskedViews, SpatialCrop, reading_stream

METHODS: dict[str, Callable[..., nn.Module]] = {
    "unet": lambda **own: UNetMAE(ResEncUNet(features_per_stage=[8, 16, 16], blocks_per_stage=[1, 1, 1]), **own),
    "transformer": lambda **own: TransformerMAE(
        Primus(input_size=16, embed_dim=48, depth=2, num_heads=4), decoder_depth=1, drop_path=0.0, **own
    ),
}


def views(count: int = 2, ratio: float = 0.75) -> dict[str, torch.Tensor]:
    crop = SpatialCrop(16)
    make = MaskedViews(crop, block_size=8, hidden_ratio=ratio)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 6, 32)] * 3, indexing="ij")).astype(np.float32)
    volume = np.sin(grid).sum(0)
    keys = [(0, 1, i) for i in range(count)]
    draws = [crop.draw(reading_stream(key), volume.shape) for key in keys]
    regions = [torch.from_numpy(volume[tuple(map(slice, d.start, d.stop))]) for d in draws]
    return make({"region": regions, "spatial": draws, "key": keys})


def test_views_hide_exactly_the_ratio_and_repeat() -> None:
    first, again = views(), views()
    assert first["image"].shape == (2, 1, 16, 16, 16)
    assert first["hidden"].flatten(1).sum(1).tolist() == [6, 6]
    assert first["visible_count"] == 2
    assert all(torch.equal(first[key], again[key]) for key in ("image", "hidden"))


@pytest.mark.parametrize(
    ("block", "ratio", "words"),
    [(5, 0.75, "multiple of block_size"), (8, 0.01, "hide at least one"), (8, 1.0, "not all")],
)
def test_masks_that_cannot_be_are_refused(block: int, ratio: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MaskedViews(SpatialCrop(16), block_size=block, hidden_ratio=ratio)


@pytest.mark.parametrize("name", METHODS)
def test_the_answer_does_not_depend_on_what_is_hidden(name: str) -> None:
    torch.manual_seed(0)
    method, batch = METHODS[name]().eval(), views()
    hidden = batch["hidden"].repeat_interleave(8, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, None]
    other = {**batch, "image": torch.where(hidden, torch.full_like(batch["image"], 7.0), batch["image"])}
    assert torch.equal(method(batch)["reconstruction"], method(other)["reconstruction"])


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_on_hidden_places_only(name: str) -> None:
    torch.manual_seed(0)
    method, batch = METHODS[name]().eval(), views()
    pred = method(batch)
    pred["reconstruction"].retain_grad()
    MaskedMSELoss()(pred, batch).backward()
    touched = torch.nn.functional.max_pool3d(pred["reconstruction"].grad.abs(), 8).squeeze(1) > 0
    assert torch.equal(touched, batch["hidden"])


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    method, batch = METHODS[name]().train(), views()
    MaskedMSELoss()(method(batch), batch).backward()
    assert [n for n, p in method.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", METHODS)
def test_it_learns(name: str) -> None:
    torch.manual_seed(0)
    method, batch = METHODS[name]().train(), views(4, ratio=0.5)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = MaskedMSELoss()(method(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.35 * losses[0]


def test_loss_refuses_blocks_that_do_not_divide() -> None:
    batch = {"image": torch.zeros(1, 1, 10, 8, 8), "hidden": torch.ones(1, 4, 2, 2, dtype=torch.bool)}
    with pytest.raises(ValueError, match="does not divide"):
        MaskedMSELoss()({"reconstruction": batch["image"]}, batch)


# with a contrast


@pytest.mark.parametrize("name", METHODS)
def test_without_a_weight_nothing_changes(name: str) -> None:
    answers, batch = [], views()
    for contrast in (False, True):
        torch.manual_seed(0)
        method = METHODS[name](contrast=contrast).train()
        answers.append(method(batch))
        loss = MAELoss()(answers[-1], batch)
        assert torch.equal(loss, MaskedMSELoss()(answers[-1], batch))
        assert ("embedding" in answers[-1]) == contrast == any("projection" in key for key in method.state_dict())
    assert torch.equal(answers[0]["reconstruction"], answers[1]["reconstruction"])


def test_the_hybrid_loss_is_both_written_out() -> None:
    batch = views(3)
    generator = torch.Generator().manual_seed(0)
    pred = {"reconstruction": torch.randn(batch["image"].shape, generator=generator)}
    pred["embedding"] = torch.randn(2, 3, 5, generator=generator)
    rows = [[float(v) for v in row] for row in pred["embedding"].double().flatten(0, 1)]

    def likeness(i: int, j: int) -> float:
        return math.exp(
            sum(map(math.prod, zip(rows[i], rows[j], strict=True))) / 0.5 / math.hypot(*rows[i]) / math.hypot(*rows[j])
        )

    surprises = [
        -math.log(likeness(i, (i + 3) % 6) / sum(likeness(i, j) for j in range(6) if j != i)) for i in range(6)
    ]
    loss = MAELoss(contrast_weight=0.3)
    rebuilt = float(MaskedMSELoss()(pred, batch))
    assert float(loss(pred, batch)) == pytest.approx(rebuilt + 0.3 * sum(surprises) / 6, abs=1e-5)
    assert {name: float(value) for name, value in loss.terms.items()} == pytest.approx(
        {"rebuilt": rebuilt, "contrast": sum(surprises) / 6}, abs=1e-5
    )


@pytest.mark.parametrize("name", METHODS)
def test_two_sets_of_blocks_of_a_crop_are_embedded_and_all_learn(name: str) -> None:
    torch.manual_seed(0)
    method, batch = METHODS[name](contrast=True).train(), views(3)
    pred = method(batch)
    assert pred["embedding"].shape == (2, 3, 2048)
    turned = method(batch | {"hidden": batch["hidden"].flip((1, 2, 3))})["embedding"]
    torch.testing.assert_close(pred["embedding"], turned.flip(0), rtol=1e-4, atol=1e-5)
    MAELoss(contrast_weight=1.0)(pred, batch).backward()
    assert [n for n, p in method.named_parameters() if p.grad is None] == []


def test_a_contrast_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"contrast_weight -1 must be at least 0"):
        MAELoss(contrast_weight=-1)
    batch = views(1)
    pred = {"reconstruction": batch["image"], "embedding": torch.ones(2, 1, 4)}
    with pytest.raises(ValueError, match=r"1 is computed at a time; raise --batch_size or lower --accumulation_steps"):
        MAELoss(contrast_weight=0.5)(pred, batch)
