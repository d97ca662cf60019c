# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.methods.volumefusion import FusionLoss, FusionViews, VolumeFusion, fuse
from common.views import AugmentationDraw, CropAugmentation, SpatialCrop

from .samples import BACKBONES, fit, plain, read, unmoved

SMALL: dict[str, Any] = {"box_sides": (2, 10)}


def small(count: int = 2, **settings: Any) -> tuple[FusionViews, dict[str, Any]]:
    """Return views of whole volumes of 16 voxels a side, two for each sample."""
    return FusionViews(plain(16), **SMALL, **settings), read(plain(16), range(count), shape=(16,) * 3, each=2)


# boxes


@pytest.fixture(scope="module")
def large() -> list[np.ndarray]:
    """Draw the boxes of many samples at 160^3 voxels."""
    views = FusionViews(SpatialCrop(160))
    return [views.draw((0, 0, index))[0].numpy() for index in range(600)]


def test_boxes_at_160_are_the_published_ones(large: list[np.ndarray]) -> None:
    counts, boxes = [len(boxes) for boxes in large], np.concatenate(large)
    low, sides = boxes[:, :3], boxes[:, 3:6]
    assert (min(counts), max(counts)) == (10, 39)
    assert np.mean(counts) == pytest.approx(24.5, abs=1)
    assert sides.min(0).tolist() == [8] * 3
    assert sides.max(0).tolist() == [100] * 3
    assert sides.mean(0) == pytest.approx([54] * 3, rel=0.02)
    assert low.min(0).tolist() == [0] * 3
    assert (low + sides).max(0).tolist() == [160] * 3
    place = low / (160 - sides)  # uniform over all places where the box fits
    assert place.mean(0) == pytest.approx([0.5] * 3, abs=0.01)
    assert place.std(0) == pytest.approx([12**-0.5] * 3, abs=0.01)
    together = np.corrcoef(np.concatenate([place, sides], axis=1).T)
    assert np.abs(together - np.eye(6)).max() < 0.05


def test_classes_of_boxes_are_equally_likely(large: list[np.ndarray]) -> None:
    seen = np.bincount(np.concatenate(large)[:, 6], minlength=5)
    expected = seen.sum() / 5
    assert len(seen) == 5
    assert ((seen - expected) ** 2).sum() / expected < 18.5  # chi-squared of 4 degrees, p = 0.001


def test_later_boxes_lie_over_earlier_ones_and_outside_is_class_zero() -> None:
    views = FusionViews(plain(16), box_sides=(2, 10), boxes=(5, 5))
    boxes, _ = views.draw((0, 0, 0))
    share = views.paint(boxes, torch.device("cpu"))
    for place in np.ndindex(16, 16, 16):
        inside = [box[6] for box in boxes.tolist() if all(a <= p < a + n for a, n, p in zip(box, box[3:], place))]  # noqa: B905
        assert int(share[place]) == (inside[-1] if inside else 0)


def test_boxes_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"box_sides \[8, 100\] do not fit into patch_size \[96, 160, 160\]"):
        FusionViews(SpatialCrop((96, 160, 160)))
    with pytest.raises(ValueError, match=r"\[9, 8\]"):
        FusionViews(SpatialCrop(16), box_sides=(9, 8))


# fusion


def test_shares_of_nothing_and_of_all_are_the_volumes_themselves() -> None:
    views, batch = small(8)
    seen, volumes = views(batch), torch.stack(batch["region"])
    foreground, background = volumes[0::2], volumes[1::2]
    image, share = seen["image"].squeeze(1), seen["share"]
    assert share.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(image[share == 0], background[share == 0])
    assert torch.equal(image[share == 4], foreground[share == 4])
    assert torch.allclose(image[share == 1], (foreground + 3 * background)[share == 1] / 4, atol=1e-6)
    assert torch.allclose(image[share == 3], (3 * foreground + background)[share == 3] / 4, atol=1e-6)


def test_each_sample_is_made_of_its_own_two_volumes() -> None:
    views, batch = small(5)
    batch["region"] = [torch.full((16, 16, 16), float(number)) for number in range(10)]
    seen = views(batch)
    for sample, (image, share) in enumerate(zip(seen["image"][:, 0], seen["share"], strict=True)):
        assert torch.equal(image, 2 * sample + 1 - share / 4)  # foreground 2 i, background 2 i + 1


def test_fusing_is_linear_and_keeps_what_volumes_agree_in() -> None:
    share = torch.arange(3).view(1, 3, 1, 1)
    one, two = torch.randn(2, 1, 1, 3, 1, 1)
    assert torch.allclose(fuse(one, one, share, classes=3), one)
    mixed = fuse(one, two, share, classes=3)
    assert torch.allclose(
        mixed.flatten(), torch.stack([two[0, 0, 0], (one + two)[0, 0, 1] / 2, one[0, 0, 2]]).flatten()
    )


def test_volumes_are_augmented_one_by_one_before_they_are_fused() -> None:
    augmentation = CropAugmentation(noise_probability=1, gamma_probability=1, rot90_probability=0)
    views, batch = small(4, augmentation=augmentation)
    seen = views(batch)
    assert torch.equal(seen["share"], small(4)[0](batch)["share"])  # boxes are neither moved nor drawn otherwise
    for index, key in enumerate(batch["key"]):
        volumes = [volume[None, None] for volume in batch["region"][2 * index : 2 * index + 2]]
        _, streams = views.draw(key)
        changed = [augmentation(volume, [stream]) for volume, stream in zip(volumes, streams, strict=True)]
        fused = fuse(*changed, seen["share"][index : index + 1], classes=5)
        assert torch.allclose(seen["image"][index : index + 1], fused, atol=1e-5)
        draws = [augmentation.draw(stream) for stream in views.draw(key)[1]]
        assert draws[0] != draws[1]
        assert AugmentationDraw() not in draws


# loss


def plain_loss(logits: Tensor, share: Tensor) -> tuple[float, float]:
    """Return cross-entropy, and soft Dice averaged over samples and all classes, from a one-hot volume."""
    probability = logits.double().softmax(1)
    truth = torch.stack([share == c for c in range(logits.shape[1])], dim=1).double()  # (B, classes, D, H, W)
    cross_entropy = -(probability.log() * truth).sum(1).mean()
    axes = (2, 3, 4)
    dice = (2 * (probability * truth).sum(axes) + 1e-5) / (truth.sum(axes) + probability.sum(axes) + 1e-5)
    return float(cross_entropy), float(dice.mean())


@pytest.mark.parametrize("present", [5, 2, 1])
def test_the_loss_is_the_written_formula(present: int) -> None:
    generator = torch.Generator().manual_seed(present)
    logits = 3 * torch.randn(2, 5, 4, 5, 6, generator=generator)
    share = torch.randint(present, (2, 4, 5, 6), generator=generator)
    loss, (cross_entropy, dice) = FusionLoss(), plain_loss(logits, share)
    assert float(loss({"logits": logits}, {"share": share})) == pytest.approx(cross_entropy - dice, abs=1e-5)
    assert float(loss.terms["cross_entropy"]) == pytest.approx(cross_entropy, abs=1e-5)
    assert float(loss.terms["dice"]) == pytest.approx(1 - dice, abs=1e-5)


def test_the_loss_of_a_perfect_answer_is_minus_one() -> None:
    """Absent classes count as perfect too if no voxel is given to them."""
    share = torch.randint(2, (2, 4, 4, 4))
    logits = 1000.0 * torch.nn.functional.one_hot(share, 5).movedim(-1, 1)
    loss = FusionLoss()
    assert float(loss({"logits": logits}, {"share": share})) == pytest.approx(-1, abs=1e-5)
    assert float(loss.terms["dice"]) == pytest.approx(0, abs=1e-5)


# method


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    method, seen = VolumeFusion(BACKBONES[name](out_channels=5)).train(), small()[0](small()[1])
    FusionLoss()(method(seen), seen).backward()
    assert unmoved(method) == set()
    assert all(n.startswith("backbone.") for n, _ in method.named_parameters())  # all of it is kept


@pytest.mark.parametrize("name", BACKBONES)
def test_it_learns(name: str) -> None:
    torch.manual_seed(0)
    views = FusionViews(plain(16), box_sides=(4, 12))
    batch = read(plain(16), range(2), shape=(16,) * 3, each=2)
    batch["region"][0::2] = [volume + 4 for volume in batch["region"][0::2]]
    seen, loss = views(batch), FusionLoss()
    losses, answer = fit(VolumeFusion(BACKBONES[name](out_channels=5)), loss, seen, steps=40, lr=1e-2)
    most_frequent = float((seen["share"] == seen["share"].flatten().mode().values).float().mean())
    right = float((answer["logits"].argmax(1) == seen["share"]).float().mean())
    assert losses[-1] < losses[0] - 0.7
    assert right > most_frequent + 0.15
