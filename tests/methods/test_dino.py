# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.methods.dino import DINO, DINOLoss, DINOViews, RunningNorm, crop_sides, koleo, sinkhorn
from common.views import BiasField, CropAugmentation, SpatialCrop

from .samples import BACKBONES, fit, plain, read, unmoved

SMALL: dict[str, Any] = {"crop_size": 16, "local_size": 8, "local_crops": 3, "multiple": 8, "block_size": 8}
SMALL |= {"hidden_ratio": (0.25, 0.6), "batch_size": 4}


def views_of(count: int = 3, side: int = 24, **settings: Any) -> dict[str, Any]:
    crop = plain(side)
    return DINOViews(crop, **SMALL | settings)(read(crop, range(count), shape=(side,) * 3))


# crops


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        (1.0, (96, 96, 96)),
        (None, (96, 96, 96)),
        ([0.5, 0.5, 0.5], (96, 96, 96)),
        ([3.0, 1.0, 1.0], (32, 96, 96)),
        ([1.0, 0.5, 2.0], (48, 96, 32)),
        ([50.0, 1.0, 1.0], (16, 96, 96)),
    ],
)
def test_a_crop_is_a_cube_in_space_as_near_as_the_stride_allows(spacing: Any, expected: tuple[int, ...]) -> None:
    sides = crop_sides(96, spacing_mm=spacing, multiple=16)
    assert sides == expected
    each = spacing if isinstance(spacing, list) else [1.0] * 3
    for side, one in zip(sides, each, strict=True):
        assert side == 16 or abs(side * one - 96 * min(each)) <= 8 * one, "half a stride from it at most"


def test_a_side_that_the_network_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="a crop of side 40 must be a multiple of 16"):
        crop_sides(40, spacing_mm=1.0, multiple=16)


def test_large_crops_show_more_than_small_ones_and_all_lie_in_the_region() -> None:
    views = DINOViews(SpatialCrop(160), multiple=16, batch_size=8)
    covered: dict[str, list[float]] = {"large": [], "small": []}
    for index in range(60):
        large, small, _ = views.draw((0, 1, index))
        assert (len(large), len(small)) == (2, 4)
        for name, draws in (("large", large), ("small", small)):
            for draw in draws:
                assert all(
                    min(low, side - 1) >= 0 and low + side <= 160
                    for low, side in zip(draw.low, draw.sides, strict=True)
                )
                covered[name].append(draw.sides[0])
    for name, (low, high) in (("large", (96 * 0.8, 96 * 1.6)), ("small", (64 * 0.6, 64 * 1.2))):
        assert min(covered[name]) >= round(low)
        assert max(covered[name]) <= round(high)
        middle = sum(covered[name]) / len(covered[name])
        assert abs(middle - (low + high) / 2) < 0.1 * (high - low), "uniform between"


def test_a_crop_is_its_part_of_the_region_at_the_size_of_the_network() -> None:
    """In a volume of ramps, a voxel says where it lies: a crop begins, ends and steps where it was drawn."""
    crop = plain(40)
    views = DINOViews(crop, **SMALL | {"zoom": (0.5, 2.5), "local_zoom": (0.5, 2.0)})
    batch = read(crop, range(2), shape=(40, 40, 40))
    ramp = torch.arange(40.0)
    batch["region"] = [ramp[:, None, None] + 100 * ramp[:, None] + 10_000 * ramp for _ in range(2)]
    seen = views(batch)
    for index, key in enumerate(batch["key"]):
        large, small, _ = views.draw(key)
        for name, draws, size in (("globals", large, 16), ("locals", small, 8)):
            for which, draw in enumerate(draws):
                found = seen[name][index, which, 0].double()
                for axis, weight in enumerate((1, 100, 10_000)):
                    step = draw.sides[axis] / size
                    moved = (found.narrow(axis, size // 2, 1) - found.narrow(axis, size // 2 - 1, 1)) / weight
                    assert torch.allclose(moved, torch.full_like(moved, step), rtol=1e-2), (name, axis)
                middle = [low + (side - 1) / 2 for low, side in zip(draw.low, draw.sides, strict=True)]
                expected = middle[0] + 100 * middle[1] + 10_000 * middle[2]
                assert float(found.mean()) == pytest.approx(expected, rel=1e-3)


def test_a_zoom_that_does_not_fit_is_narrowed_and_one_that_cannot_is_refused() -> None:
    views = DINOViews(SpatialCrop((32, 24, 40)), **SMALL | {"zoom": (1.0, 2.0)})
    assert views.zoom == (1.0, 1.5)
    with pytest.raises(ValueError, match=r"zoom \[1.6, 2.0\] of crops of \[16, 16, 16\] does not fit into patch_size"):
        DINOViews(SpatialCrop(24), **SMALL | {"zoom": (1.6, 2.0)})
    with pytest.raises(ValueError, match=r"cannot make quarter turns; add --augmentation#rot90_probability 0"):
        DINOViews(SpatialCrop(24), **SMALL | {"spacing_mm": [2.0, 1.0, 1.0]}, augmentation=CropAugmentation())
    for settings, said in (
        ({"block_size": 12}, "not a multiple of block_size 12"),
        ({"hidden_ratio": (0.01, 0.5)}, "must hide at least one and not all"),
        ({"local_crops": 0}, "local_crops 0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            DINOViews(SpatialCrop(24), **SMALL | settings)


# what is hidden, and the schedules


def test_all_samples_of_a_step_hide_as_many_blocks_and_steps_differ() -> None:
    settings = {"block_size": 4, "hidden_ratio": (0.1, 0.5)}
    counts = []
    for step in range(12):
        seen = DINOViews(plain(24), **SMALL | settings)(read(plain(24), range(4 * step, 4 * step + 4), shape=(24,) * 3))
        hidden, places = seen["hidden"].flatten(1), seen["places"]
        assert torch.equal(hidden.sum(1), torch.full((4,), places.shape[1]))
        assert bool(hidden.gather(1, places).all()), "the places are the hidden blocks"
        assert all(len(row.unique()) == len(row) for row in places)
        assert len({tuple(row.tolist()) for row in places}) == 4, "each sample its own"
        counts.append(places.shape[1])
    assert 6 <= min(counts) < max(counts) <= 32
    assert len(set(counts)) > 4


def test_progress_follows_from_epoch_and_sample() -> None:
    views = DINOViews(plain(24), **SMALL, steps=[40, 10])

    def progress(epoch: int, first: int, of: DINOViews = views) -> float:
        return float(of(read(plain(24), [first], shape=(24,) * 3, epoch=epoch))["progress"])

    assert [progress(1, 0), progress(1, 7), progress(2, 0), progress(4, 39)] == [0, 1 / 40, 10 / 40, 39 / 40]
    assert progress(9, 0) == 1, "of a run that went on for longer"
    assert progress(1, 0, views.plain()) == 1, "validation is at the end of the schedules"


def test_validation_sees_the_same_crops_as_they_are() -> None:
    views = DINOViews(plain(24), **SMALL, bias=BiasField(probability=1), augmentation=CropAugmentation())
    batch = read(plain(24), range(2), shape=(24,) * 3)
    augmented, plainly, again = views(batch), views.plain()(batch), DINOViews(plain(24), **SMALL)(batch)
    assert torch.equal(plainly["globals"], again["globals"])
    assert torch.equal(augmented["hidden"], again["hidden"])
    differs = [
        (a - b).abs().amax((1, 2, 3, 4)) > 0 for a, b in zip(augmented["globals"], again["globals"], strict=True)
    ]
    assert all(bool(one.all()) for one in differs)
    assert not torch.equal(augmented["globals"][0, 0], augmented["globals"][0, 1])


# loss


def plain_loss(pred: dict[str, Tensor], progress: float) -> tuple[float, float, float]:
    """Write the paper's loss out in plain numbers: the parts of crops and of blocks, and KoLeo."""
    temperature = 0.04 + 0.03 * min(progress / 0.1, 1)

    def shared_out(rows: list[list[float]]) -> list[list[float]]:
        table = [[math.exp(cosine / temperature) for cosine in row] for row in rows]
        for _ in range(3):
            sums = [sum(column) for column in zip(*table, strict=True)]
            table = [[value / total for value, total in zip(row, sums, strict=True)] for row in table]
            table = [[value / sum(row) for value in row] for row in table]
        return table

    def surprise(target: list[float], said: list[float]) -> float:
        total = sum(math.exp(cosine / 0.1) for cosine in said)
        return -sum(p * (cosine / 0.1 - math.log(total)) for p, cosine in zip(target, said, strict=True))

    teacher, student = pred["teacher"].double().tolist(), pred["student"].double().tolist()
    targets = shared_out([row for sample in teacher for row in sample])
    crops = [
        surprise(targets[2 * sample + t], student[sample][s])
        for sample in range(len(teacher))
        for t in range(2)
        for s in range(len(student[0]))
        if s != t
    ]
    dense = shared_out([row for sample in pred["teacher_dense"].double().tolist() for row in sample])
    said = [row for sample in pred["student_dense"].double().tolist() for row in sample]
    blocks = [surprise(target, row) for target, row in zip(dense, said, strict=True)]
    spread = []
    for crop in range(2):
        units = [[v / math.hypot(*row[crop]) for v in row[crop]] for row in pred["pooled"].double().tolist()]
        for i, one in enumerate(units):
            spread.append(-math.log(min(math.dist(one, other) for j, other in enumerate(units) if j != i)))
    return sum(crops) / len(crops), sum(blocks) / len(blocks), sum(spread) / len(spread)


def answers(samples: int = 3, prototypes: int = 7, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"student": (samples, 5), "teacher": (samples, 2), "student_dense": (samples, 4)}
    shapes["teacher_dense"] = shapes["student_dense"]
    pred = {name: 2 * torch.rand(*shape, prototypes, generator=generator) - 1 for name, shape in shapes.items()}
    return pred | {"pooled": torch.randn(samples, 2, 6, generator=generator)}


@pytest.mark.parametrize("progress", [0.0, 0.05, 1.0])
def test_the_loss_is_the_papers_written_out(progress: float) -> None:
    for seed in range(3):
        loss = DINOLoss(teacher_temperature=[0.04, 0.07], dense_weight=0.7, koleo_weight=0.2)
        pred = answers(seed=seed)
        found = float(loss(pred, {"progress": progress}))
        crops, blocks, spread = plain_loss(pred, progress)
        assert [float(loss.terms[name]) for name in ("crops", "blocks", "spread")] == pytest.approx(
            [crops, blocks, spread], abs=1e-5
        )
        assert found == pytest.approx(crops + 0.7 * blocks + 0.2 * spread, abs=1e-5)


def test_prototypes_are_asked_for_equally_often() -> None:
    cosines = torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 0, 0, 0, 3])
    shares = sinkhorn(cosines / 4, temperature=0.05, iterations=50)
    assert torch.allclose(shares.sum(1), torch.ones(40), atol=1e-5)
    assert torch.allclose(shares.sum(0), torch.full((5,), 8.0), atol=1e-3), "though one was liked by all"
    same = sinkhorn(torch.full((6, 4), -1.0), temperature=0.025)
    assert torch.allclose(same, torch.full((6, 4), 0.25)), "one answer for all is shared out, and no number overflows"


def test_cold_temperatures_stay_finite_and_none_is_refused() -> None:
    cosines = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    assert torch.allclose(sinkhorn(cosines, temperature=1e-3), torch.eye(3))
    crowded = sinkhorn(torch.tensor([[1.0, -1.0]] * 4), temperature=1e-3)
    assert torch.allclose(crowded, torch.full((4, 2), 0.5)), "shared out, however little the second is liked"
    with pytest.raises(ValueError, match=r"temperatures 0.1 and \[0, 0.07\] must be greater than 0"):
        DINOLoss(teacher_temperature=[0, 0.07])


def test_koleo_is_the_distance_to_the_nearest() -> None:
    axes = torch.eye(3)
    assert float(koleo(axes * 5)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)
    near = torch.tensor([[1.0, 0, 0], [math.cos(0.1), math.sin(0.1), 0], [0, 0, 1.0]])
    gap = 2 * math.sin(0.05)
    assert float(koleo(near)) == pytest.approx(-(2 * math.log(gap) + math.log(math.sqrt(2))) / 3, abs=1e-5)
    alone = torch.randn(1, 3, requires_grad=True)
    assert float(koleo(alone).detach()) == 0
    koleo(alone).backward()


# method


def method(name: str, **settings: Any) -> DINO:
    torch.manual_seed(0)
    sizes = {"hidden_features": 32, "bottleneck_features": 16, "prototypes": 24}
    return DINO(BACKBONES[name](with_decoder=False), **sizes | settings)


TEACHERS = {"backbone": "student", "teacher_head": "head", "teacher_dense_head": "dense_head"}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_student_learns_and_the_teacher_gets_no_gradient(name: str) -> None:
    dino, seen = method(name, momentum=[0.5, 0.5]), views_of()
    pred = dino.train()(seen)
    DINOLoss()(pred, seen).backward()
    still = unmoved(dino)
    assert {key.split(".")[0] for key in still} == set(TEACHERS)
    assert all(dino.get_parameter(key).grad is None for key in still)
    assert still == {key for key, _ in dino.named_parameters() if key.split(".")[0] in TEACHERS}
    assert not any(pred[key].requires_grad for key in ("teacher", "teacher_dense", "embedding", "features"))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_teacher_is_a_moving_average_of_the_student_in_training_only(name: str) -> None:
    dino, seen = method(name, momentum=[0.75, 1.0]), views_of()
    before = {key: value.clone() for key, value in dino.state_dict().items()}
    with torch.no_grad():
        for part in TEACHERS.values():
            for weight in dino.get_submodule(part).parameters():
                weight.add_(1.0)
    dino.eval()(seen)
    assert all(torch.equal(before[key], value) for key, value in dino.state_dict().items() if "teach" in key)
    dino.train()(seen | {"progress": 0.0})
    after = dino.state_dict()
    moved = [key for key in before if key.split(".")[0] in TEACHERS]
    assert len(moved) > 20
    for key in moved:
        torch.testing.assert_close(after[key], before[key] + 0.25, rtol=1e-5, atol=1e-5)
    dino(seen | {"progress": 1.0})
    assert all(torch.equal(after[key], dino.state_dict()[key]) for key in moved), "at the end it stands still"
    assert not dino.backbone.training
    assert dino.student.training


@pytest.mark.parametrize("name", BACKBONES)
def test_the_student_does_not_see_hidden_blocks_and_the_teacher_does(name: str) -> None:
    dino, seen = method(name).eval(), views_of()
    spread = seen["hidden"][:, None].repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = seen["globals"].clone()
    other[:, 0] += 3.0 * spread
    one, two = dino(seen), dino(seen | {"globals": other})
    for key in ("student", "student_dense"):
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)
    assert float((one["teacher_dense"] - two["teacher_dense"]).abs().max()) > 1e-3
    assert float((one["teacher"][:, 0] - two["teacher"][:, 0]).abs().max()) > 1e-4
    other = seen["globals"].clone()
    other[:, 0] += 3.0 * ~spread
    three = dino(seen | {"globals": other})
    assert float((one["student_dense"] - three["student_dense"]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("name", BACKBONES)
def test_small_crops_come_to_say_what_the_teacher_says_of_the_large_ones(name: str) -> None:
    dino, seen, loss = method(name, momentum=[0.9, 0.9]), views_of(4), DINOLoss(koleo_weight=0.0)

    def told(pred: dict[str, Tensor]) -> float:
        targets = sinkhorn(pred["teacher"].flatten(0, 1), temperature=0.04).view(4, 2, -1).mean(1)
        likely = (pred["student"][:, 2:].detach() / 0.1).log_softmax(-1).mean(1) @ targets.T  # of the small crops
        return float(likely.diag().mean() - likely.mean())

    losses, first = fit(dino, loss, seen, steps=1)
    more, last = fit(dino, loss, seen, steps=15)
    assert more[-1] < 0.9 * losses[0]
    assert told(last) > told(first) + 0.1, "of the own volume, more than of others"


@pytest.mark.parametrize("name", BACKBONES)
def test_what_kind_a_crop_is_says_nothing_to_the_heads(name: str) -> None:
    """Large crops, those with hidden blocks, and small ones differ more than two crops of a kind do."""
    dino, seen, heard = method(name), views_of(4), {}
    for key in ("head", "teacher_head", "dense_head", "teacher_dense_head"):
        dino.get_submodule(key).register_forward_pre_hook(lambda _, given, key=key: heard.setdefault(key, given[0]))
    dino.train()(seen)
    large, small = heard["head"][:, :2], heard["head"][:, 2:]
    kinds = {"hidden": large[:, 0], "whole": large[:, 1], "small": small, "teacher": heard["teacher_head"]}
    kinds |= {"blocks": heard["dense_head"], "teacher's blocks": heard["teacher_dense_head"]}
    for kind, x in kinds.items():
        rows = x.detach().flatten(0, -2)
        assert float(rows.mean(0).abs().max()) < 1e-2, kind
        assert float(rows.square().mean()) == pytest.approx(1, abs=0.1), kind


def test_running_statistics_are_those_of_the_batches() -> None:
    norm, generator = RunningNorm(5, share=0.25), torch.Generator().manual_seed(0)
    first, second = (3 + 0.01 * torch.randn(2, 30, 5, generator=generator)).unbind()
    assert torch.equal(norm(first), first * (1 + 1e-5) ** -0.5), "nothing is known yet"
    norm.update(first)
    torch.testing.assert_close(norm(first).mean(0), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(norm.variance, first.var(0, correction=0), rtol=1e-3, atol=0)
    norm.update(second)
    torch.testing.assert_close(norm.mean, (first.mean(0) + second.mean(0)) / 2, atol=1e-6, rtol=0)
    before = norm.mean.clone()
    for _ in range(3):
        norm.update(second)
    weight = (1 - 1 / 3) * (1 - 1 / 4) * (1 - 0.25)
    torch.testing.assert_close(norm.mean, second.mean(0) + weight * (before - second.mean(0)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("momentum", [[0.9, 1.1], [1.0, 0.9], [-0.1, 0.5]])
def test_a_teacher_that_cannot_follow_is_refused(momentum: list[float]) -> None:
    with pytest.raises(ValueError, match="must rise within 0 and 1"):
        method("unet", momentum=momentum)
