# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.methods.voco import VoCo, VoCoLoss, VoCoViews, grid_overlap, project_over_batch
from common.networks import ProjectionHead, primus_m, resenc_l
from common.views import CropAugmentation, SpatialCrop

from .samples import BACKBONES, fit, plain, read, unmoved

GRID, SIDE, REGION = (2, 3, 1), 8, (16, 24, 8)


def small(count: int = 2, **settings: Any) -> tuple[VoCoViews, dict[str, Any]]:
    """Return views of whole volumes in which every voxel has a value of its own."""
    views = VoCoViews(plain(REGION), grid=GRID, crop_size=SIDE, **settings)
    batch = read(plain(REGION), range(count), shape=REGION)
    voxels = math.prod(REGION)
    batch["region"] = [torch.arange(voxels).view(REGION).float() + index * voxels for index in range(count)]
    return views, batch


# overlap


def test_a_target_on_the_grid_overlaps_with_one_crop_only() -> None:
    corners = torch.cartesian_prod(*[torch.arange(n) * SIDE for n in GRID])
    assert torch.equal(grid_overlap(corners, grid=GRID, crop_size=SIDE), torch.eye(6))


def test_overlaps_are_counted_voxels() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(-3, 20, (30, 3), generator=generator)  # some reach beyond the grid
    number = torch.full((40, 40, 40), -1)  # of the grid's crop at each voxel, with a border of 8 voxels
    for index, (i, j, k) in enumerate(np.ndindex(GRID)):
        z, y, x = (8 + SIDE * n for n in (i, j, k))
        number[z : z + SIDE, y : y + SIDE, x : x + SIDE] = index
    overlap = grid_overlap(corners, grid=GRID, crop_size=SIDE)
    for (z, y, x), row in zip((corners + 8).tolist(), overlap, strict=True):
        inside = number[z : z + SIDE, y : y + SIDE, x : x + SIDE]
        expected = [float((inside == index).sum()) / SIDE**3 for index in range(6)]
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


def test_targets_lie_anywhere_inside_and_overlap_with_the_grid_wholly() -> None:
    views = VoCoViews(SpatialCrop((256, 256, 64)))
    corners = torch.cat([views.draw((0, 0, index))[0] for index in range(500)])
    assert corners.shape == (2000, 3)
    assert corners.amin(0).tolist() == [0, 0, 0]
    assert corners.amax(0).tolist() == [192, 192, 0]
    for axis in (0, 1):
        seen = np.histogram(corners[:, axis], bins=8, range=(0, 193))[0]
        assert ((seen - 250) ** 2).sum() / 250 < 24.4  # chi-squared of 7 degrees, p = 0.001
    overlap = grid_overlap(corners, grid=(4, 4, 1), crop_size=64)
    assert torch.allclose(overlap.sum(1), torch.ones(2000), atol=1e-5)
    assert ((overlap > 0).sum(1) <= 4).all()


# views


def test_the_grid_goes_row_by_row_and_then_come_the_targets() -> None:
    views, batch = small(2, targets=5)
    seen = views(batch)
    assert seen["overlap"].shape == (2, 5, 6)
    crops = list(seen["crops"][:, 0])
    for region in batch["region"]:
        for z, y, x in np.ndindex(GRID):
            a, b, c = z * SIDE, y * SIDE, x * SIDE
            assert torch.equal(crops.pop(0), region[a : a + SIDE, b : b + SIDE, c : c + SIDE])
    for region, key, overlap in zip(batch["region"], batch["key"], seen["overlap"], strict=True):
        corners = views.draw(key)[0]
        for a, b, c in corners.tolist():
            assert torch.equal(crops.pop(0), region[a : a + SIDE, b : b + SIDE, c : c + SIDE])
        assert torch.equal(overlap, grid_overlap(corners, grid=GRID, crop_size=SIDE))
    assert crops == []


def test_each_crop_is_augmented_on_its_own() -> None:
    augmentation = CropAugmentation(noise_probability=1, noise_std_range=(0.5, 0.5), rot90_probability=1)
    views, batch = small(2, targets=2, augmentation=augmentation)
    batch["region"] = [torch.zeros(REGION)] * 2
    crops = views(batch)["crops"]
    assert (crops.flatten(1).std(1) > 0.1).all()
    likeness = torch.corrcoef(crops.flatten(1)) - torch.eye(len(crops))
    assert likeness.abs().max() < 0.3
    crops_of = [[augmentation.draw(stream) for stream in views.draw(key)[1]] for key in batch["key"]]
    order = [*crops_of[0][:6], *crops_of[1][:6], *crops_of[0][6:], *crops_of[1][6:]]  # grids, then targets
    assert torch.equal(crops, augmentation.apply(torch.zeros(16, 1, 8, 8, 8), order))


def test_a_grid_that_does_not_fill_the_region_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs patch_size \[256, 256, 64\], not \[256, 256, 128\]"):
        VoCoViews(SpatialCrop((256, 256, 128)))


# loss


def plain_loss(pred: dict[str, Tensor], overlap: Tensor) -> tuple[float, float]:
    """Write the loss of one process out, voxel counts and cosines as plain numbers; return its two parts."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return max(float(a @ b) / (float(a.norm()) * float(b.norm())), 0.0)

    near = far = weight = count = 0.0
    regularization = []
    for sample in range(len(overlap)):
        base, target = pred["base"][sample], pred["target"][sample]
        for t in range(len(target)):
            for g in range(len(base)):
                o, s = float(overlap[sample, t, g]), cosine(target[t], base[g])
                if "teacher_base" in pred:
                    s = cosine(target[t], pred["teacher_base"][sample, g])
                    s = (s + cosine(pred["teacher_target"][sample, t], base[g])) / 2
                near -= o * math.log(1 - abs(o - s) + 1e-6)
                weight += o
                far += s**2 * (o == 0)
                count += (o == 0) + 1e-6
        pairs = [(i, j) for i in range(len(base)) for j in range(i + 1, len(base))]
        regularization.append(sum(cosine(base[i], base[j]) for i, j in pairs) / len(pairs))
    return near / weight + far / count, sum(regularization) / len(regularization)


def answers(teacher: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    views, batch = small(3, targets=4)
    pred = {"base": torch.randn(3, 6, 5, generator=generator), "target": torch.randn(3, 4, 5, generator=generator)}
    if teacher:
        pred |= {f"teacher_{name}": torch.randn(value.shape, generator=generator) for name, value in pred.items()}
    return pred, views(batch)


@pytest.mark.parametrize("teacher", [False, True])
def test_the_loss_is_the_written_formula(teacher: bool) -> None:
    pred, seen = answers(teacher)
    loss, (prediction, regularization) = VoCoLoss(), plain_loss(pred, seen["overlap"])
    assert float(loss(pred, seen)) == pytest.approx(prediction + regularization, abs=1e-5)
    assert float(loss.terms["prediction"]) == pytest.approx(prediction, abs=1e-5)
    assert float(loss.terms["regularization"]) == pytest.approx(regularization, abs=1e-5)
    assert min(prediction, regularization) > 0.01
    longer = {name: 7 * value for name, value in pred.items()}
    assert float(loss(longer, seen)) == pytest.approx(prediction + regularization, abs=1e-5)


def test_the_1e_6_counts_for_every_pair() -> None:
    """As in the reference: where no pair is apart, the negative term is 0 over something, not 0 over 0."""
    pred = {"base": torch.eye(2).view(1, 2, 2), "target": torch.ones(1, 1, 2)}
    loss = VoCoLoss()
    value = loss(pred, {"overlap": torch.full((1, 1, 2), 0.5)})
    assert float(value) == pytest.approx(-math.log(1 - (0.5**0.5 - 0.5) + 1e-6), abs=1e-6)
    pred["target"] = torch.tensor([[[3.0, 4.0]]])
    loss(pred, {"overlap": torch.tensor([[[1.0, 0.0]]])})
    expected = -math.log(1 - 0.4 + 1e-6) + 0.8**2 / (1 + 2e-6)
    assert float(loss.terms["prediction"]) == pytest.approx(expected, abs=1e-6)


def test_a_perfect_answer_costs_nothing() -> None:
    corners = torch.cartesian_prod(*[torch.arange(n) * SIDE for n in GRID])[None]
    overlap = grid_overlap(corners[0], grid=GRID, crop_size=SIDE)[None]
    crops = torch.eye(6)[None]
    assert float(VoCoLoss()({"base": crops, "target": crops}, {"overlap": overlap})) == pytest.approx(0, abs=1e-5)


def grid_gradient(teacher: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient of the grid's embeddings, and that of the regularization alone."""
    pred, seen = answers(teacher)
    base = pred["base"].requires_grad_()
    pred["target"].requires_grad_()
    VoCoLoss()(pred, seen).backward()
    assert float(pred["target"].grad.abs().max()) > 1e-3
    z = F.normalize(base, dim=-1)
    upper = torch.ones(6, 6).triu(1)
    (alone,) = torch.autograd.grad((F.relu(z @ z.mT) * upper).sum() / upper.sum() / len(z), base)
    return base.grad, alone


def test_without_a_teacher_the_grid_learns_from_the_regularization_alone() -> None:
    gradient, alone = grid_gradient(False)
    assert torch.allclose(gradient, alone, atol=1e-6)


def test_with_a_teacher_the_grid_learns_from_both() -> None:
    gradient, alone = grid_gradient(True)
    assert ((gradient - alone).abs().amax(-1) > 1e-4).float().mean() > 0.9


# method


def method(name: str, **settings: Any) -> VoCo:
    torch.manual_seed(0)
    return VoCo(BACKBONES[name](with_decoder=False), hidden_features=32, embedding_features=16, **settings)


def test_the_whole_has_the_published_parameters() -> None:
    with torch.device("meta"):
        nets = resenc_l(with_decoder=False), primus_m(with_decoder=False, input_size=64)
        sizes = [sum(p.numel() for p in VoCo(net).parameters()) for net in nets]
    assert sizes == [100_985_088, 154_692_992 - 864]  # less a mask token that is not used


def waves(side: int = 16) -> dict[str, Tensor]:
    """Return views of two smooth volumes that differ from place to place."""
    region = plain((2 * side, 2 * side, side))
    batch = read(region, range(2), shape=region.patch_size)
    axes = [2.0 * torch.arange(n) / side for n in region.patch_size]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0)
    batch["region"] = [volume + place for volume in batch["region"]]
    return VoCoViews(region, grid=(2, 2, 1), crop_size=side)(batch)


@pytest.mark.parametrize("name", BACKBONES)
def test_grid_and_targets_are_told_apart(name: str) -> None:
    seen, voco = waves(), method(name).eval()
    pred = voco(seen)
    for part, row in (("base", 4 + 2), ("target", 8 + 4 + 2)):  # the second sample's third
        (alone,) = voco.embed(seen["crops"][row : row + 1])
        assert torch.allclose(pred[part][1, 2], alone[0], atol=1e-5)
    parts = method(name, chunks=3).eval()(seen)
    assert all(torch.allclose(pred[key], parts[key], atol=1e-5) for key in pred)


@pytest.mark.parametrize("teacher_momentum", [None, 0.9])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns_but_the_teacher_s(name: str, teacher_momentum: float | None) -> None:
    voco, seen = method(name, teacher_momentum=teacher_momentum).train(), waves()
    VoCoLoss()(voco(seen), seen).backward()
    teacher = {n for n, _ in voco.named_parameters() if n.startswith("teacher.")}
    biases = {f"projection.hidden{layer}.bias" for layer in (1, 2)}  # which a norm over the batch takes away
    assert unmoved(voco) - (biases if teacher else set()) == teacher
    assert {n for n, p in voco.named_parameters() if p.grad is None or not p.requires_grad} == teacher
    assert (teacher == set()) == (teacher_momentum is None)


@pytest.mark.parametrize("teacher_momentum", [None, 0.0, 0.9])
@pytest.mark.parametrize("name", BACKBONES)
def test_it_learns(name: str, teacher_momentum: float | None) -> None:
    seen = waves(side=8)
    losses, answer = fit(method(name, teacher_momentum=teacher_momentum), VoCoLoss(), seen, steps=60, lr=5e-4)
    assert losses[-1] < 0.3 * losses[0]
    likeness = F.cosine_similarity(answer["target"][:, :, None], answer["base"][:, None], dim=-1)
    assert torch.corrcoef(torch.stack([likeness.detach().flatten(), seen["overlap"].flatten()]))[0, 1] > 0.7


# teacher


def test_with_a_teacher_the_projection_normalises_over_the_batch() -> None:
    torch.manual_seed(0)
    head, x = ProjectionHead(6, hidden_features=8, out_features=4), torch.randn(12, 6)
    norm = torch.nn.BatchNorm1d(8, affine=False, track_running_stats=False)
    expected = head.output(F.relu(norm(head.hidden2(F.relu(norm(head.hidden1(x)))))))
    torch.testing.assert_close(project_over_batch(head, x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        project_over_batch(head, 5 * x + 3), project_over_batch(head, 5 * x), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_embeddings_of_crops_stay_apart_and_parts_of_a_batch_are_one(name: str) -> None:
    voco, seen = method(name, teacher_momentum=0.9).train(), waves(side=8)
    _, pred = fit(voco, VoCoLoss(), seen, steps=30, lr=5e-3)
    units = F.normalize(torch.cat([pred["base"], pred["target"]], 1).detach().flatten(0, 1), dim=1)
    assert float((units @ units.T).mean()) < 0.8
    parts = method(name, teacher_momentum=0.9, chunks=3).eval()
    parts.load_state_dict(voco.eval().state_dict())
    whole, again = voco(seen), parts(seen)
    assert all(torch.allclose(whole[key], again[key], rtol=1e-4, atol=1e-5) for key in whole)


def pairs(voco: VoCo) -> list[tuple[Tensor, Tensor]]:
    """Return the teacher's weights beside those of the network that it follows."""
    backbone, projection = voco.teacher
    followed = [*voco.backbone.named_parameters(), *voco.projection.named_parameters()]
    following = [*backbone.named_parameters(), *projection.named_parameters()]
    assert [name for name, _ in followed] == [name for name, _ in following]
    return [(b.detach(), a.detach()) for (_, a), (_, b) in zip(followed, following, strict=True)]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_teacher_starts_equal_and_follows_in_training_only(name: str) -> None:
    voco, seen = method(name, teacher_momentum=0.75), waves()
    assert all(torch.equal(teacher, student) for teacher, student in pairs(voco))
    pred = voco.eval()(seen)
    assert torch.equal(pred["teacher_base"], pred["base"])
    assert torch.equal(pred["teacher_target"], pred["target"])
    assert not pred["teacher_base"].requires_grad
    with torch.no_grad():
        for parameter in [*voco.backbone.parameters(), *voco.projection.parameters()]:
            parameter.add_(torch.randn_like(parameter) / 10)
    before = [(teacher.clone(), student.clone()) for teacher, student in pairs(voco)]
    voco.eval()(seen)
    assert all(torch.equal(teacher, old) for (teacher, _), (old, _) in zip(pairs(voco), before, strict=True))
    pred = voco.train()(seen)
    for (teacher, student), (old, same) in zip(pairs(voco), before, strict=True):
        assert torch.equal(student, same)
        assert torch.allclose(teacher, 0.75 * old + 0.25 * student, atol=1e-6)
    assert not torch.allclose(pred["teacher_base"], pred["base"], atol=1e-3)


def test_the_teacher_is_part_of_what_a_run_resumes_from() -> None:
    voco, seen = method("unet", teacher_momentum=0.5).train(), waves()
    torch.nn.init.ones_(voco.projection.output.bias)
    voco(seen)
    again = method("unet", teacher_momentum=0.5)
    again.load_state_dict(voco.state_dict())
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(pairs(voco), pairs(again), strict=True))
    assert not torch.equal(*pairs(again)[-1])
    assert {n.split(".")[0] for n in voco.state_dict()} == {"backbone", "projection", "teacher"}
    assert method("unet").teacher is None


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_teacher_that_cannot_follow_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=f"teacher_momentum {momentum} must be"):
        method("unet", teacher_momentum=momentum)
