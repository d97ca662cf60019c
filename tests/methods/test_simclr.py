# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import NTXentLoss
from common.methods.simclr import SimCLR, SimCLRLoss, SimCLRViews
from common.views import CropAugmentation, SpatialCrop

from .samples import BACKBONES, fit, plain, read, unmoved

REGION, SIDE = (24, 20, 8), 8


def small(count: int = 3, **settings: Any) -> tuple[SimCLRViews, dict[str, Any]]:
    """Return views of whole volumes in which every voxel has a value of its own."""
    views = SimCLRViews(plain(REGION), crop_size=SIDE, **settings)
    batch = read(plain(REGION), range(count), shape=REGION)
    voxels = math.prod(REGION)
    batch["region"] = [torch.arange(voxels).view(REGION).float() + index * voxels for index in range(count)]
    return views, batch


def cut(region: Tensor, corner: Tensor) -> Tensor:
    z, y, x = corner.tolist()
    return region[z : z + SIDE, y : y + SIDE, x : x + SIDE]


# places


def test_partners_share_at_least_half_of_every_side_and_lie_inside() -> None:
    views = SimCLRViews(SpatialCrop((192, 192, 64)))
    corners = torch.cat([views.draw((0, 0, index))[0] for index in range(1000)], dim=1)  # (2, 2000, 3)
    shift = corners[1] - corners[0]
    assert shift.abs().amax(0).tolist() == [32, 32, 0]
    assert corners.amin((0, 1)).tolist() == [0, 0, 0]
    assert corners.amax((0, 1)).tolist() == [128, 128, 0]
    assert float(corners[0, :, :2].float().mean()) == pytest.approx(64, abs=2)
    # away from the border, every shift from -32 to 32 is equally likely
    free = ((corners[0, :, :2] >= 32) & (corners[0, :, :2] <= 96)).all(1)
    seen = np.histogram(shift[free, :2], bins=5, range=(-32.5, 32.5))[0]
    assert ((seen - seen.mean()) ** 2).sum() / seen.mean() < 18.5  # chi-squared of 4 degrees, p = 0.001


@pytest.mark.parametrize("max_shift", [0, 3, 7])
def test_partners_lie_as_near_as_they_are_asked_to(max_shift: int) -> None:
    views, _ = small(max_shift=max_shift)
    corners = torch.cat([views.draw((0, 0, index))[0] for index in range(200)], dim=1)
    assert (corners[1] - corners[0]).abs().amax(0).tolist() == [max_shift, max_shift, 0]


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"crop_size 64 does not fit into patch_size \[192, 192, 63\]"):
        SimCLRViews(SpatialCrop((192, 192, 63)))
    for shift in (-1, 64):
        with pytest.raises(ValueError, match=f"max_shift {shift} must be less than crop_size 64"):
            SimCLRViews(SpatialCrop(64), max_shift=shift)


# views


def test_references_come_first_and_then_their_partners() -> None:
    views, batch = small(3, pairs=2)
    crops = views(batch)["crops"]
    assert crops.shape == (12, 1, SIDE, SIDE, SIDE)
    expected = [
        cut(region, corner)
        for view in range(2)
        for region, key in zip(batch["region"], batch["key"], strict=True)
        for corner in views.draw(key)[0][view]
    ]
    assert torch.equal(crops[:, 0], torch.stack(expected))


def test_overlaps_are_counted_voxels() -> None:
    """Each voxel of the volumes has its own value: what two crops share can be counted."""
    views, batch = small(3, pairs=3)
    seen = views(batch)
    values = [set(crop.flatten().tolist()) for crop in seen["crops"]]
    references, partners = values[:9], values[9:]
    expected = torch.tensor([[len(a & b) / SIDE**3 for b in partners] for a in references])
    assert torch.allclose(seen["overlap"], expected, atol=1e-6)
    assert (seen["overlap"].diagonal() >= 0.25).all()  # of a pair: half of two sides, the third is as short as a crop
    assert (expected - expected.diag().diag() > 0).any()  # pairs of one volume may overlap too
    same, _ = small(max_shift=0)
    assert torch.equal(same(batch)["overlap"].diagonal(), torch.ones(6))


def test_each_crop_is_augmented_on_its_own() -> None:
    augmentation = CropAugmentation(noise_probability=1, noise_std_range=(0.5, 0.5), rot90_probability=1)
    views, batch = small(2, augmentation=augmentation)
    batch["region"] = [torch.zeros(REGION)] * 2
    crops = views(batch)["crops"]
    assert (crops.flatten(1).std(1) > 0.1).all()
    assert (torch.corrcoef(crops.flatten(1)) - torch.eye(8)).abs().max() < 0.3
    drawn = [[augmentation.draw(stream) for stream in views.draw(key)[1]] for key in batch["key"]]
    order = [*drawn[0][:2], *drawn[1][:2], *drawn[0][2:], *drawn[1][2:]]  # references, then partners
    assert torch.equal(crops, augmentation.apply(torch.zeros(8, 1, 8, 8, 8), order))
    plain_views, _ = small(2)
    assert torch.equal(views(batch)["overlap"], plain_views(batch)["overlap"])


# method and loss


def method(name: str, **settings: Any) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(BACKBONES[name](with_decoder=False), hidden_features=32, embedding_features=16, **settings)


def waves(count: int = 3, *, side: int = 16, pairs: int = 2) -> dict[str, Tensor]:
    """Return views of smooth volumes."""
    region = plain((2 * side, 2 * side, side))
    views = SimCLRViews(region, crop_size=side, pairs=pairs, max_shift=side // 4)
    return views(read(region, range(count), shape=region.patch_size))


@pytest.mark.parametrize("name", BACKBONES)
def test_an_embedding_is_of_its_crop_alone(name: str) -> None:
    simclr, seen = method(name), waves()
    embedding = simclr(seen)["embedding"]
    assert embedding.shape == (2, 6, 16)
    assert torch.allclose(embedding[1, 2], simclr.embed(seen["crops"][8:9])[0][0], atol=1e-5)
    assert torch.allclose(embedding, method(name, chunks=5)(seen)["embedding"], atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_projection_reads_the_averages_of_all_maps(name: str) -> None:
    simclr, seen = method(name), waves()
    read_by_projection: list[Tensor] = []
    simclr.projection.register_forward_pre_hook(lambda _, inputs: read_by_projection.append(inputs[0]))
    simclr(seen)
    maps = simclr.backbone.encode(seen["crops"])
    expected = torch.cat([m.flatten(2).sum(2) / m[0, 0].numel() for m in maps], dim=1)
    assert torch.allclose(read_by_projection[0], expected, atol=1e-5)


def test_the_loss_contrasts_references_with_partners() -> None:
    embedding = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 0.1):
        expected = float(NTXentLoss(temperature=temperature)(embedding))
        assert float(SimCLRLoss(temperature=temperature)({"embedding": embedding}, {})) == expected
    assert SimCLRLoss().contrast.temperature == 0.5
    with pytest.raises(ValueError, match="negatives"):
        SimCLRLoss(negatives="few")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns(name: str) -> None:
    simclr, seen = method(name).train(), waves()
    SimCLRLoss()(simclr(seen), seen).backward()
    assert unmoved(simclr) == set()


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_of_parts_are_those_of_the_whole(name: str) -> None:
    gradients = []
    for chunks in (1, 4):
        simclr, seen = method(name, chunks=chunks).train(), waves()
        SimCLRLoss()(simclr(seen), seen).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in simclr.parameters()]))
    assert torch.allclose(*gradients, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("name", BACKBONES)
def test_it_learns(name: str) -> None:
    seen = waves(8, side=8, pairs=1)
    losses, answer = fit(method(name), SimCLRLoss(), seen, steps=30)
    lowest = math.log(math.exp(2) + 14 * math.exp(-2 / 7)) - 2  # of eight pairs as far apart as they can be
    assert losses[-1] - lowest < 0.4 * (losses[0] - lowest)
    likeness = F.cosine_similarity(answer["embedding"][0][:, None], answer["embedding"][1][None], dim=-1)
    assert torch.equal(likeness.argmax(1), torch.arange(8))  # each finds its partner
