# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common.methods.jepa import JEPA, JEPALoss, JEPAViews, draw_hidden_boxes, isotropy
from common.views import SpatialCrop, VisibleBlocks
from tools.benchmarking.plain import LOSSES, plain_method

from .samples import BACKBONES, fit, plain, read, unmoved


def views_of(count: int = 2, first: int = 0, **settings: Any) -> dict[str, Any]:
    crop = plain(32)
    views = JEPAViews(crop, **{"block_size": 8, "batch_size": 4, "sparse": True} | settings)
    return views(read(crop, range(first, first + count), shape=(32,) * 3))


# what is hidden


@pytest.mark.parametrize("ratio", [0.1, 0.6, 0.9])
def test_boxes_hide_exactly_a_share_and_lie_together(ratio: float) -> None:
    grid, generator = [6, 7, 8], torch.Generator().manual_seed(0)
    touching = []
    for _ in range(20):
        hidden = draw_hidden_boxes(grid, ratio=ratio, box_share=[0.1, 0.2], generator=generator)
        assert int(hidden.sum()) == int(ratio * 6 * 7 * 8)
        pairs = [
            (hidden.narrow(axis, 1, side - 1) & hidden.narrow(axis, 0, side - 1)).sum()
            for axis, side in enumerate(grid)
        ]
        touching.append(float(sum(pairs)) / (3 * int(hidden.sum())))
    scattered = ratio * (1 - (1 / 6 + 1 / 7 + 1 / 8) / 3)
    assert sum(touching) / 20 > scattered + 0.05, "hidden blocks lie beside each other more than by chance"


def test_one_box_is_of_the_share_that_was_asked_for_wherever_it_lies() -> None:
    """As many blocks as are left to hide are cut from the last box, so it is looked at with all of the grid to hide."""
    grid, found = [20, 20, 20], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        share, *others = torch.rand(7, dtype=torch.float64, generator=generator).tolist()
        side = 20 * (0.1 + 0.1 * share) ** (1 / 3)
        lengths = [round(side * (0.75 + 0.5 * stretch)) for stretch in others[:3]]
        blocks = lengths[0] * lengths[1] * lengths[2]
        generator.manual_seed(seed)
        hidden = draw_hidden_boxes(grid, ratio=(blocks + 0.5) / 8000, box_share=[0.1, 0.2], generator=generator)
        where = hidden.nonzero()
        low, high = where.amin(0), where.amax(0)
        assert (high - low + 1).tolist() == lengths, "one box alone"
        assert len(where) == blocks
        found.append(low.tolist() + (19 - high).tolist())
    gaps = torch.tensor(found, dtype=torch.float32)
    assert torch.equal(gaps.amin(0), torch.zeros(6)), "to every face"
    assert float((gaps[:, :3] - gaps[:, 3:]).mean(0).abs().max()) < 3, "neither end is preferred"


def test_everywhere_is_hidden_at_times_and_the_middle_most_often() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_hidden_boxes([4, 4, 4], ratio=0.5, box_share=[0.1, 0.3], generator=generator) for _ in range(400)]
    often = torch.stack(drawn).float().mean(0)
    assert float(often.mean()) == pytest.approx(0.5)
    assert 0.1 < float(often.min()) <= float(often.max()) < 0.97
    assert float(often[1:3, 1:3, 1:3].min()) > float(often[::3, ::3, ::3].max()), "as boxes that lie within the crop do"
    assert float((often - often.flip(0, 1, 2)).abs().max()) < 0.2, "of the last box the first blocks are taken"


def test_places_and_seen_are_the_two_halves_of_the_grid() -> None:
    seen = views_of(3)
    hidden = seen["hidden"].flatten(1)
    assert seen["hidden"].shape == (3, 4, 4, 4)
    assert bool(hidden.gather(1, seen["places"]).all())
    assert not bool(hidden.gather(1, seen["seen"]).any())
    assert torch.equal(torch.cat([seen["places"], seen["seen"]], 1).sort(1).values, torch.arange(64).expand(3, 64))
    assert seen["visible_count"] == seen["seen"].shape[1] == 64 - int(0.6 * 64)
    assert len({tuple(row.tolist()) for row in seen["places"]}) == 3, "each sample its own"
    blocks, expected = seen["blocks"], VisibleBlocks.of(~seen["hidden"])
    assert torch.equal(blocks.where, expected.where)
    assert torch.equal(blocks.neighbours, expected.neighbours)


def test_progress_and_seed_follow_from_the_step() -> None:
    views = JEPAViews(plain(16), block_size=4, batch_size=4, steps=[40, 10])
    told = {
        (epoch, first): views(read(plain(16), [first], shape=(16,) * 3, epoch=epoch))
        for epoch, first in ((1, 0), (1, 3), (1, 4), (2, 0), (9, 0))
    }
    assert [one["progress"] for one in told.values()] == [0, 0, 1 / 40, 10 / 40, 1]
    seeds = [one["seed"] for one in told.values()]
    assert seeds[0] == seeds[1], "one step, whatever process and part a sample is in"
    assert len(set(seeds)) == 4
    at_its_end = JEPAViews(plain(16), block_size=4, batch_size=4)(read(plain(16), [0], shape=(16,) * 3))
    assert at_its_end["progress"] == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block_size": 5}, "is not a multiple of block_size 5"),
        ({"hidden_ratio": 0.001}, "must hide at least one and not all"),
        ({"hidden_ratio": 1.0}, "must hide at least one and not all"),
        ({"box_share": [0.5, 0.2]}, r"box_share \[0.5, 0.2\] must be two numbers that rise within 0 and 1"),
        ({"box_share": [0.0, 0.2]}, "must be two numbers that rise"),
    ],
)
def test_views_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        JEPAViews(SpatialCrop(32), **{"block_size": 8} | settings)


# loss


def plain_isotropy(rows: list[list[float]], directions: list[list[float]]) -> float:
    """Write SIGReg out in plain numbers: the characteristic function as sums of sines and cosines."""
    total = 0.0
    for direction in directions:
        length = math.hypot(*direction)
        values = [sum(a * b for a, b in zip(row, direction, strict=True)) / length for row in rows]
        heights = []
        for t in (-5 + 10 * index / 16 for index in range(17)):
            real = sum(math.cos(t * value) for value in values) / len(values)
            imaginary = sum(math.sin(t * value) for value in values) / len(values)
            normal = math.exp(-t * t / 2)
            heights.append(((real - normal) ** 2 + imaginary**2) * normal)
        total += sum((a + b) / 2 * 10 / 16 for a, b in itertools.pairwise(heights))
    return total / len(directions)


def answers(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 5, 6, generator=generator) for name in ("prediction", "target", "context")}


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_loss_is_the_written_formula(with_teacher: bool) -> None:
    for seed in range(3):
        pred = answers(seed)
        loss = JEPALoss(isotropy_weight=0.5, directions=4, with_teacher=with_teacher)
        found = float(loss(pred, {"seed": 3 + seed}))
        pairs = zip(pred["prediction"].flatten().tolist(), pred["target"].flatten().tolist(), strict=True)
        error = sum((p - t) ** 2 for p, t in pairs) / pred["target"].numel()
        directions = torch.randn(6, 4, generator=torch.Generator().manual_seed(3 + seed)).T.tolist()
        sides = ["context"] if with_teacher else ["context", "target"]
        spread = sum(plain_isotropy(pred[side].flatten(0, 1).tolist(), directions) for side in sides) / len(sides)
        assert [float(loss.terms[name]) for name in ("prediction", "isotropy")] == pytest.approx(
            [error, spread], abs=1e-5
        )
        assert found == pytest.approx(error + 0.5 * spread, abs=1e-5)
        assert float(LOSSES["JEPALoss"](loss, pred, {"seed": 3 + seed})) == pytest.approx(found, abs=1e-5)
        assert float(JEPALoss()(pred, {"seed": 3})) == pytest.approx(error, abs=1e-5), "the error alone by default"


def test_isotropy_is_near_0_for_a_normal_distribution_and_for_no_other() -> None:
    normal = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    found = {
        "normal": normal,
        "wide": normal * 3,
        "narrow": normal * 0.3,
        "moved": normal + 1,
        "on a line": normal[:, :1].expand(-1, 8),
    }
    scores = {name: float(isotropy(features, seed=0)) for name, features in found.items()}
    assert scores.pop("normal") < 2e-3
    assert min(scores.values()) > 0.02, scores


def test_one_answer_for_all_scores_what_is_said() -> None:
    """Of normalised features that are all the same, the mean over directions is an integral with a closed form."""
    same = F.layer_norm(torch.randn(400, generator=torch.Generator().manual_seed(0)), [400]).expand(10, -1)
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    assert expected == pytest.approx(1.06, abs=0.005)
    assert float(isotropy(same, seed=0, directions=4000)) == pytest.approx(expected, rel=0.05)


def test_isotropy_pulls_apart_what_is_one() -> None:
    features = torch.nn.Parameter(0.05 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([features], lr=0.05)
    for step in range(120):
        optimizer.zero_grad()
        isotropy(features, seed=step, directions=32).backward()
        optimizer.step()
    spread = torch.linalg.eigvalsh(torch.cov(features.detach().T))
    assert 0.5 < float(spread.min()) <= float(spread.max()) < 1.6, "a variance of 1 in every direction"


def test_weights_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="one answer for all would be perfect; add --isotropy_weight 1"):
        JEPALoss(with_teacher=False)
    with pytest.raises(ValueError, match=r"isotropy_weight -0.5 must be at least 0"):
        JEPALoss(isotropy_weight=-0.5)


# method


def method(name: str, **settings: Any) -> JEPA:
    torch.manual_seed(0)
    sizes = {"grid": [4, 4, 4], "predictor_dim": 24, "predictor_depth": 2, "predictor_heads": 2}
    return JEPA(BACKBONES[name](with_decoder=False), **sizes | settings)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_learns_learns_and_the_target_encoder_gets_no_gradient(name: str) -> None:
    jepa, seen = method(name), views_of()
    pred = jepa.train()(seen)
    JEPALoss(isotropy_weight=0.1)(pred, seen).backward()
    still = unmoved(jepa)
    assert still == {key for key, _ in jepa.named_parameters() if key.startswith("backbone.")}
    assert all(jepa.get_parameter(key).grad is None for key in still)
    assert not pred["target"].requires_grad
    assert not pred["features"].requires_grad


@pytest.mark.parametrize("name", BACKBONES)
def test_without_a_teacher_one_encoder_learns_from_both_sides(name: str) -> None:
    jepa, seen = method(name, teacher_momentum=None), views_of()
    pred = jepa.train()(seen)
    assert jepa.backbone.training
    assert pred["target"].requires_grad
    JEPALoss(isotropy_weight=1.0, with_teacher=False)(pred, seen).backward()
    assert unmoved(jepa) == set()
    assert not any(key.startswith("student.") for key in jepa.state_dict())


@pytest.mark.parametrize("name", BACKBONES)
def test_nothing_of_hidden_blocks_reaches_the_prediction(name: str) -> None:
    jepa, seen = method(name).eval(), views_of()
    hidden = seen["hidden"][:, None].repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    noise = 3.0 * torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = jepa(seen), jepa(seen | {"image": seen["image"] + noise * hidden})
        other = jepa(seen | {"image": seen["image"] + noise * ~hidden})
    for key in ("prediction", "context"):
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)
    assert float((one["target"] - two["target"]).abs().max()) > 1e-2
    assert float((one["prediction"] - other["prediction"]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", BACKBONES)
def test_targets_are_the_whole_crops_features_normalised(name: str) -> None:
    jepa, seen = method(name).eval(), views_of()
    with torch.no_grad():
        pred, maps = jepa(seen), jepa.backbone.encode(seen["image"])
    sample, which = 1, 7
    place = int(seen["places"][sample, which])
    z, y, x = place // 16, place // 4 % 4, place % 4
    expected = []
    for values in maps:
        side = values.shape[2] // 4
        block = values[sample, :, z * side : (z + 1) * side, y * side : (y + 1) * side, x * side : (x + 1) * side]
        expected.append(F.layer_norm(block.mean((1, 2, 3)), [values.shape[1]]))
    for found in (pred["target"][sample, which], pred["features"][sample, :, z, y, x]):
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_teacher_follows_once_a_step_and_only_in_training(name: str) -> None:
    jepa, seen = method(name, teacher_momentum=[0.75, 1.0]), views_of(1)
    assert jepa.student is not None
    before = {key: value.clone() for key, value in jepa.backbone.state_dict().items()}
    with torch.no_grad():
        for weight in jepa.student.parameters():
            weight.add_(1.0)
        jepa.eval()(seen | {"progress": 0.0})
        assert all(torch.equal(before[key], value) for key, value in jepa.backbone.state_dict().items())
        for _ in range(3):  # the parts of one step
            jepa.train()(seen | {"progress": 0.0})
        for key, value in jepa.backbone.state_dict().items():
            torch.testing.assert_close(value, before[key] + 0.25, rtol=1e-5, atol=1e-5)
        jepa(seen | {"progress": 0.5, "seed": seen["seed"] + 1})
    for key, value in jepa.backbone.state_dict().items():
        torch.testing.assert_close(value, before[key] + 0.25 + 0.75 * 0.125, rtol=1e-5, atol=1e-5)
    assert not jepa.backbone.training
    assert jepa.student.training


def test_the_parts_of_a_batch_add_up_to_it() -> None:
    """Accumulated as the trainer does. A teacher that moved between two parts would give the second other targets."""
    gradients = []
    for parts in ([views_of(4)], [views_of(2), views_of(2, first=2)]):
        jepa = method("unet", teacher_momentum=[0.5, 1.0]).train()
        assert jepa.student is not None
        with torch.no_grad():
            for weight in jepa.student.parameters():
                weight.mul_(1.1)
        for seen in parts:
            (JEPALoss()(jepa(seen), seen) / len(parts)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in jepa.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "none"])
def test_it_is_the_same_written_plainly(name: str, teacher: bool) -> None:
    """Masks spread over voxels, attention as a softmax, formulas as loops: the same loss and the same gradients."""
    crop = plain(16)  # for which the transformer's own table of positions is made
    seen = JEPAViews(crop, block_size=8, sparse=True)(read(crop, range(2), shape=(16,) * 3))
    jepa = method(name, grid=[2, 2, 2], teacher_momentum=[0.5, 1.0] if teacher else None)
    loss, other = JEPALoss(isotropy_weight=0.3, directions=3, with_teacher=teacher), plain_method(jepa, peer=True)
    mine, theirs = loss(jepa.train()(seen), seen), LOSSES["JEPALoss"](loss, other.train()(seen), seen)
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    mine.backward()
    theirs.backward()
    lengths = [
        torch.nn.utils.get_total_norm([p.grad for p in each.parameters() if p.grad is not None])
        for each in (jepa, other)
    ]
    torch.testing.assert_close(*lengths, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", BACKBONES)
def test_hidden_features_come_to_be_predicted(name: str) -> None:
    jepa, seen = method(name, teacher_momentum=[1.0, 1.0]), views_of()
    losses, pred = fit(jepa, JEPALoss(), seen, steps=25, lr=5e-3)
    constant = (pred["target"] - pred["target"].mean((0, 1))).square().mean()
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < 0.9 * float(constant), "better than the mean of all targets"


def test_momentum_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="must rise within 0 and 1"):
        method("unet", teacher_momentum=[1.0, 0.9])
