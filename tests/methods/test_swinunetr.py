# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import NTXentLoss
from common.methods.swinunetr import SwinUNETRLoss, SwinUNETRPretraining, SwinUNETRViews, ViewDraw
from common.networks import primus_m, resenc_l
from common.views import SpatialCrop

from .samples import BACKBONES, fit, plain, read, unmoved


def small(count: int = 3, side: int = 16, **settings: Any) -> tuple[SwinUNETRViews, dict[str, Any]]:
    """Return views of whole volumes."""
    return SwinUNETRViews(plain(side), **settings), read(plain(side), range(count), shape=(side,) * 3)


def cover(boxes: list[list[int]], side: int) -> Tensor:
    """Mark the voxels that boxes cover."""
    covered = torch.zeros(side, side, side, dtype=torch.bool)
    for z0, y0, x0, z1, y1, x1 in boxes:
        covered[z0:z1, y0:y1, x0:x1] = True
    return covered


# turns


def test_turning_back_by_the_label_gives_the_crop_that_both_views_share() -> None:
    views, batch = small(16)
    seen = views(batch)
    assert sorted(seen["rotation"].unique().tolist()) == [0, 1, 2, 3]
    for row, (target, label) in enumerate(zip(seen["target"], seen["rotation"].tolist(), strict=True)):
        assert torch.equal(target[0].rot90(-label, dims=(1, 2)), batch["region"][row % 16])
    assert not torch.equal(seen["rotation"][:16], seen["rotation"][16:])


def test_turns_are_equally_likely_and_independent_in_both_views() -> None:
    views, _ = small(0, cut_share=0.0)
    pairs = [tuple(view.rotation for view in views.draw((0, 0, index))) for index in range(1600)]
    seen = np.array([pairs.count((a, b)) for a in range(4) for b in range(4)])
    assert ((seen - 100) ** 2).sum() / 100 < 37.7  # chi-squared of 15 degrees, p = 0.001


# boxes


def test_boxes_at_160_are_the_published_ones() -> None:
    views, volume = SwinUNETRViews(SpatialCrop(160)), 160**3
    draws = [view for index in range(200) for view in views.draw((0, 0, index))]
    for name in ("noise_boxes", "copy_boxes"):
        boxes = [np.array(getattr(draw, name), dtype=np.int64).reshape(-1, 6) for draw in draws]
        every = np.concatenate(boxes)
        low, high = every[:, :3], every[:, 3:]
        assert low.min(0).tolist() == [0] * 3
        assert low.max(0).tolist() == [151] * 3
        assert high.max() == 160
        whole = (high < 160).all(1)  # not clipped at the border
        sides = (high - low)[whole]
        assert sides.min(0).tolist() == [8] * 3
        assert sides.max(0).tolist() == [39] * 3
        # the budget is uniform in 0 to 0.3 of the volume, and boxes are drawn until it is reached and no longer
        sizes = [(b[:, 3:] - b[:, :3]).prod(1) for b in boxes]
        covered = np.array([size.sum() for size in sizes]) / volume
        before_last = np.array([size[:-1].sum() for size in sizes]) / volume
        assert before_last.max() < 0.3
        assert covered.max() < 0.3 + (39 / 160) ** 3
        assert covered.min() < 0.01
        assert covered.mean() == pytest.approx(0.15, abs=0.015)
        for share in (0.25, 0.5, 0.75):
            assert np.mean(covered < 0.3 * share) == pytest.approx(share, abs=0.06)


def test_boxes_reach_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever share is drawn first, that many voxels are covered, and with the last box less, fewer."""
    views, drawn, rand = SwinUNETRViews(SpatialCrop(160)), [], torch.rand

    def remember(*size: Any, **settings: Any) -> Tensor:
        values = rand(*size, **settings)
        drawn.append((size, values))
        return values

    for seed in range(20):
        drawn.clear()
        monkeypatch.setattr(torch, "rand", remember)
        boxes = np.array(views._boxes(torch.Generator().manual_seed(seed)))
        monkeypatch.undo()
        (budget,) = [float(values) * 0.3 * 160**3 for size, values in drawn if size == ((),)]
        volumes = (boxes[:, 3:] - boxes[:, :3]).prod(1)
        assert volumes.sum() >= budget > volumes[:-1].sum()


def test_nothing_is_cut_if_nothing_may_be() -> None:
    views, batch = small(3, cut_share=0.0)
    seen = views(batch)
    assert torch.equal(seen["image"], seen["target"])


def test_noise_lies_between_zero_and_one_and_touches_both() -> None:
    views = SwinUNETRViews(plain(32))
    view = torch.full((32, 32, 32), 50.0)
    draw = ViewDraw(
        rotation=0, noise_boxes=[[0, 0, 0, 20, 20, 32], [24, 24, 24, 32, 30, 32]], copy_boxes=[], other=0, noise_seed=1
    )
    cut = views.cut(view, None, draw)
    for box in draw.noise_boxes:
        noise = cut[cover([box], 32)]
        assert (float(noise.min()), float(noise.max())) == (0, 1)
        assert 0.3 < float(noise.mean()) < 0.7
        assert len(noise.unique()) > 0.9 * len(noise)
    assert (cut[~cover(draw.noise_boxes, 32)] == 50).all()
    assert (view == 50).all()
    assert torch.equal(views.cut(view, None, draw), cut)
    other = views.cut(view, None, ViewDraw(**{**vars(draw), "noise_seed": 2}))
    assert not torch.equal(other, cut)


def test_copied_boxes_show_the_other_crop_s_turned_view_at_the_same_place() -> None:
    views, batch = small(3, side=32)
    seen, alone = views(batch), 0
    for view in range(2):
        for index, key in enumerate(batch["key"]):
            row, draw = 3 * view + index, views.draw(key)[view]
            other = 3 * view + int(3 * draw.other)
            noisy = cover(draw.noise_boxes, 32)
            copied = cover(draw.copy_boxes, 32) & (other != row)  # a crop does not copy from itself
            alone += int(other == row)
            image, target = seen["image"][row, 0], seen["target"][row, 0]
            assert torch.equal(image[copied], seen["target"][other, 0][copied])  # uncut, and over the noise
            assert torch.equal(image[~copied & ~noisy], target[~copied & ~noisy])
            noise = image[noisy & ~copied]
            assert ((noise >= 0) & (noise <= 1)).all()
            assert not torch.equal(image, target)
    assert 0 < alone < 6


def test_all_crops_of_a_batch_are_copied_from() -> None:
    views, _ = small(0, cut_share=0.0)
    others = [int(4 * view.other) for index in range(400) for view in views.draw((0, 0, index))]
    assert np.bincount(others, minlength=4) / len(others) == pytest.approx([0.25] * 4, abs=0.05)


def test_a_lonely_crop_has_none_to_copy_from() -> None:
    views, batch = small(1, side=32)
    seen = views(batch)
    changed = (seen["image"] != seen["target"]).squeeze(1)
    for view, draw in enumerate(views.draw(batch["key"][0])):
        assert not (changed[view] & ~cover(draw.noise_boxes, 32)).any()


def test_crops_that_cannot_be_turned_or_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[16, 16, 8\] cannot be turned"):
        SwinUNETRViews(plain((16, 16, 8)))
    with pytest.raises(ValueError, match=r"\[4, 16, 16\] is too small"):
        SwinUNETRViews(plain((4, 16, 16)))
    SwinUNETRViews(plain((8, 16, 16)))  # turned in the plane of the last two axes


# method and loss


def method(name: str, **settings: Any) -> SwinUNETRPretraining:
    torch.manual_seed(0)
    return SwinUNETRPretraining(BACKBONES[name](with_decoder=False), embedding_features=32, **settings)


def test_the_whole_has_the_published_parameters() -> None:
    with torch.device("meta"):
        unet, transformer = resenc_l(with_decoder=False), primus_m(with_decoder=False)
        sizes = [sum(p.numel() for p in SwinUNETRPretraining(net).parameters()) for net in (unet, transformer)]
    assert sizes == [96_601_733, 164_675_389 - 864]  # less a mask token that is not used


@pytest.mark.parametrize("name", BACKBONES)
def test_heads_read_the_first_two_voxels_of_the_coarsest_map(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swin = method(name)
    features = [f.detach().requires_grad_() for f in swin.backbone.encode(torch.randn(2, 1, 16, 16, 16))]
    monkeypatch.setattr(swin.backbone, "encode", lambda image: features)
    reconstruction, rotation, embedding = swin.predict(torch.zeros(2, 1, 16, 16, 16))
    for output, expected in ((rotation, [0]), (embedding, [1])):
        gradients = torch.autograd.grad(output.square().sum(), features, retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in gradients[:-1])
        assert gradients[-1].abs().sum((0, 1)).flatten().nonzero().flatten().tolist() == expected
    gradients = torch.autograd.grad(reconstruction.square().sum(), features, allow_unused=True)
    assert all(gradient is None for gradient in gradients[:-1])  # no finer map helps to rebuild
    assert (gradients[-1].abs().sum(1) > 0).all()
    assert reconstruction.shape == (2, 1, 16, 16, 16)


def test_a_map_of_one_voxel_is_refused() -> None:
    swin = SwinUNETRPretraining(BACKBONES["transformer"](with_decoder=False))
    with pytest.raises(ValueError, match=r"\[8, 8, 8\] leaves one voxel"):
        swin.predict(torch.zeros(2, 1, 8, 8, 8))


@pytest.mark.parametrize("name", BACKBONES)
def test_parts_of_a_batch_answer_as_the_whole(name: str) -> None:
    views, batch = small(3)
    seen = views(batch)
    whole, parts = method(name)(seen), method(name, chunks=2)(seen)
    assert all(torch.allclose(whole[key], parts[key], atol=1e-5) for key in whole)
    assert whole["embedding"].shape == (2, 3, 32)
    alone = method(name).predict(seen["image"][4:5])[2]  # the second view of the second crop
    assert torch.allclose(whole["embedding"][1, 1], alone[0], atol=1e-5)


def test_the_loss_is_the_sum_of_three_written_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    reconstruction, target = torch.randn(2, 6, 1, 4, 4, 4, generator=generator)
    rotation, embedding = torch.randn(6, 4, generator=generator), torch.randn(2, 3, 8, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 2, 1])
    loss = SwinUNETRLoss()
    total = loss(
        {"reconstruction": reconstruction, "rotation": rotation, "embedding": embedding},
        {"target": target, "rotation": labels},
    )
    expected = {
        "reconstruction": float((reconstruction - target).abs().mean()),
        "rotation": float(
            -torch.stack([row.softmax(0)[k].log() for row, k in zip(rotation, labels, strict=True)]).mean()
        ),
        "contrast": float(NTXentLoss(temperature=0.5)(embedding)),
    }
    assert {name: float(term) for name, term in loss.terms.items()} == pytest.approx(expected, abs=1e-5)
    assert float(total) == pytest.approx(sum(expected.values()), abs=1e-5)
    with pytest.raises(ValueError, match="negatives"):
        SwinUNETRLoss(negatives="some")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns(name: str) -> None:
    swin, seen = method(name).train(), small()[0](small()[1])
    SwinUNETRLoss()(swin(seen), seen).backward()
    # in front of a norm without weights, the bias of a head's convolution is taken away
    last = len(swin.reconstruction_head.convolutions) - 1
    biases = {f"reconstruction_head.convolutions.{index}.bias" for index in range(last)}
    assert unmoved(swin) <= biases


@pytest.mark.parametrize("name", BACKBONES)
def test_it_learns(name: str) -> None:
    views, batch = small(3, cut_share=0.1)
    seen, loss = views(batch), SwinUNETRLoss()
    losses, answer = fit(method(name), loss, seen, steps=40, lr=1e-2)
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(answer["rotation"].argmax(1), seen["rotation"])
    assert float(loss.terms["reconstruction"]) < 0.7 * float(seen["target"].abs().mean())
    assert float(loss.terms["contrast"]) < np.log(5)
    assert F.cosine_similarity(*answer["embedding"]).min() > 0.5
