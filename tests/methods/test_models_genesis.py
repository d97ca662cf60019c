# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.methods.models_genesis import (
    GenesisDraw,
    GenesisViews,
    RestorationLoss,
    RestorationNetwork,
    _shuffle,
    _shuffle_by_torch,
)
from common.networks import Primus, ResEncUNet
from common.views import SpatialCrop, reading_stream, view_stream

METHODS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: RestorationNetwork(ResEncUNet(features_per_stage=[8, 16], blocks_per_stage=[1, 1])),
    "transformer": lambda: RestorationNetwork(Primus(input_size=16, embed_dim=48, depth=2, num_heads=4)),
}
CLEAN: dict[str, Any] = {"shuffle_probability": 0.0, "intensity_probability": 0.0, "paint_probability": 0.0}
NO_BOXES = np.zeros((0, 2, 3), dtype=np.int64)


class ReadyCrops(SpatialCrop):
    """Hand over crops that are already cut."""

    def __call__(self, batch: dict[str, Any], name: str = "region") -> Tensor:
        return torch.stack(batch[name]).unsqueeze(1).float()


def ready(count: int, side: int = 16, **settings: Any) -> tuple[GenesisViews, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(side, side, side, generator=generator) for _ in range(count)]
    batch = {"region": crops, "key": [(0, 1, i) for i in range(count)], "anonymised": [crop > 1 for crop in crops]}
    return GenesisViews(ReadyCrops(side), **settings), batch


def spoil(**parts: Any) -> GenesisDraw:
    nothing: dict[str, Any] = {"shuffled": NO_BOXES, "curve": None, "inpainted": NO_BOXES, "kept": NO_BOXES}
    return GenesisDraw(flips=(), seeds=(1, 2), **{**nothing, **parts})


def draws(count: int, side: int = 160, **settings: Any) -> list[GenesisDraw]:
    views = GenesisViews(SpatialCrop(side), **settings)
    return [views.draw(view_stream((0, 0, i))) for i in range(count)]


# views


def test_views_repeat_for_a_key_and_differ_between_keys() -> None:
    crop = SpatialCrop(16, rotation_probability=0, zoom_probability=0, flip_probability=0)
    views, volume = GenesisViews(crop), torch.randn(16, 16, 16)

    def see(*indices: int) -> dict[str, Tensor]:
        keys = [(0, 1, i) for i in indices]
        spatial = [crop.draw(reading_stream(key), volume.shape) for key in keys]
        return views({"region": [volume] * len(keys), "spatial": spatial, "key": keys})

    first, again = see(0, 1, 2), see(1)
    assert set(first) == {"image", "target"}
    assert all(torch.equal(first[name][1:2], again[name]) for name in first)
    assert not torch.equal(first["image"][0], first["image"][1])


def test_flips_move_image_target_and_ignored_together() -> None:
    views, batch = ready(64, **CLEAN)
    seen = views(batch)
    assert torch.equal(seen["image"], seen["target"])
    assert seen["ignored"].dtype == torch.bool
    assert torch.equal(seen["ignored"], seen["target"] > 1)
    flips = [views.draw(view_stream(key)).flips for key in batch["key"]]
    expected = [crop.flip(axes) for crop, axes in zip(batch["region"], flips, strict=True)]
    assert torch.equal(seen["target"], torch.stack(expected).unsqueeze(1))
    assert {axis for axes in flips for axis in axes} == {0, 1, 2}


def test_the_target_stays_clean() -> None:
    views, batch = ready(16, flip_probability=0.0)
    seen = views(batch)
    assert torch.equal(seen["target"], torch.stack(batch["region"]).unsqueeze(1))
    spoiled = (seen["image"] != seen["target"]).flatten(1).any(1)
    assert spoiled.float().mean() > 0.9


@pytest.mark.parametrize(("side", "words"), [(13, "side of 13"), (9, "side of 9"), ((160, 8, 160), "side of 8")])
def test_crops_too_short_for_the_boxes_are_refused(side: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenesisViews(SpatialCrop(side))


@pytest.mark.parametrize("sides", [(14, 14, 14), (32, 32, 32), (20, 48, 31)])
def test_boxes_of_any_crop_lie_inside_it(sides: tuple[int, int, int]) -> None:
    views = GenesisViews(SpatialCrop(sides), shuffle_probability=1.0, shuffle_boxes=500)
    volume = torch.randn(sides)
    for i in range(40):
        draw = views.draw(view_stream((1, 0, i)))
        for boxes, margin in [(draw.shuffled, 0), (draw.inpainted, 3), (draw.kept, 3)]:
            assert np.all(boxes[:, 1] >= 1)
            assert np.all(boxes[:, 0] >= margin)
            assert np.all(boxes.sum(1) <= np.array(sides) - margin)
        assert views.apply(volume, draw).isfinite().all()


def test_shares_and_sizes_at_160_are_the_published_ones() -> None:
    many = draws(3000, shuffle_boxes=8)
    inside, outside = [d.inpainted for d in many], [d.kept for d in many]
    share = {
        "in": np.mean([len(boxes) > 0 for boxes in inside]),
        "out": np.mean([len(boxes) > 0 for boxes in outside]),
        "shuffled": np.mean([len(d.shuffled) > 0 for d in many]),
        "bent": np.mean([d.curve is not None for d in many]),
        "falling": np.mean([d.curve is not None and d.curve[0, 1] == 1 for d in many]),
        "unflipped": np.mean([d.flips == () for d in many]),
        "five boxes": np.mean([len(boxes) == 5 for boxes in outside if len(boxes)]),
    }
    expected = {
        "in": 0.18 * 0.95,  # the first box comes with 0.95 like the others
        "out": 0.72,
        "shuffled": 0.5,
        "bent": 0.9,
        "falling": 0.45,
        "unflipped": 0.6 + 0.4 * 0.4 * 0.6 / 3,  # no round, or two rounds along one axis
        "five boxes": 0.95**4,
    }
    assert share == pytest.approx(expected, abs=0.03)
    for boxes, shortest, longest in [
        ([d.shuffled for d in many], 1, 16),
        (inside, 26, 53),
        (outside, 69, 92),
    ]:
        sides = np.concatenate(boxes)[:, 1]
        assert sides.min(0).tolist() == [shortest] * 3
        assert sides.max(0).tolist() == [longest] * 3
        assert sides.mean(0) == pytest.approx([(shortest + longest) / 2] * 3, rel=0.03)


def test_ten_thousand_boxes_are_shuffled_or_none() -> None:
    assert {len(draw.shuffled) for draw in draws(20)} == {0, 10000}


# shuffle

SHUFFLES: dict[str, Callable[[np.ndarray, tuple[int, int, int], int], Tensor]] = {
    "host": lambda boxes, shape, seed: _shuffle(torch.zeros(shape), boxes, seed).long(),
    "device": lambda boxes, shape, seed: _shuffle_by_torch(boxes, shape, seed, torch.device("cpu")),
    "cuda": lambda boxes, shape, seed: _shuffle(torch.zeros(shape, device="cuda"), boxes, seed).cpu(),
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
shuffles = pytest.mark.parametrize("name", ["host", "device", pytest.param("cuda", marks=needs_cuda)])


def cut(volume: np.ndarray, box: np.ndarray) -> np.ndarray:
    return volume[tuple(slice(a, a + n) for a, n in box.T)]


@shuffles
@pytest.mark.parametrize("count", [3, 1000])
def test_later_boxes_overwrite_and_each_permutes_the_original(name: str, count: int) -> None:
    shape = (40, 50, 60)
    boxes = draws(1, side=40, shuffle_probability=1.0, shuffle_boxes=count)[0].shuffled
    source = SHUFFLES[name](boxes, shape, 5).numpy()
    place = np.arange(source.size).reshape(shape)
    writer = np.full(shape, -1)
    for number, box in enumerate(boxes):
        cut(writer, box)[...] = number
    source = source.reshape(shape)
    assert np.array_equal(source[writer < 0], place[writer < 0])
    for number, box in enumerate(boxes):
        taken = source[writer == number]
        assert len(np.unique(taken)) == len(taken)
        assert np.isin(taken, cut(place, box)).all()
        if np.all(cut(writer, box) == number):  # it is not overwritten, so nothing of it is lost
            assert np.array_equal(np.sort(taken), cut(place, box).ravel())


@shuffles
def test_every_permutation_of_a_box_is_equally_likely(name: str) -> None:
    count = 6000
    boxes = np.stack([np.array([[i, 0, 0], [1, 3, 1]]) for i in range(count)])
    source = SHUFFLES[name](boxes, (count, 3, 1), 7).view(count, 3) % 3
    seen = [int((source == torch.tensor(order)).all(1).sum()) for order in permutations(range(3))]
    assert sum(seen) == count
    assert sum((n - count / 6) ** 2 for n in seen) / (count / 6) < 20.5  # chi-squared of 5 degrees, p = 0.001


@shuffles
def test_no_place_of_a_large_box_is_preferred(name: str) -> None:
    boxes = np.stack([np.array([[8 * i, 0, 0], [8, 8, 8]]) for i in range(400)])
    source = SHUFFLES[name](boxes, (3200, 8, 8), 7).view(400, 512) % 512
    places = torch.arange(512).float()
    correlation = torch.corrcoef(torch.stack([source.float().mean(0), places]))[0, 1]
    assert abs(correlation) < 0.15  # of where values come from with where they go; its deviation is 1 / sqrt(512)
    assert (
        abs(float((source == torch.arange(512)).float().sum(1).mean()) - 1) < 0.2
    )  # fixed points: one per permutation


def test_shuffle_keeps_values_near_their_place() -> None:
    views = GenesisViews(SpatialCrop(48), **{**CLEAN, "shuffle_probability": 1.0})
    index = torch.stack(torch.meshgrid(*[torch.arange(48.0)] * 3, indexing="ij"))
    draw = views.draw(view_stream((0, 0, 0)))
    moved = torch.stack([views.apply(axis, draw) for axis in index]) - index
    assert moved.abs().amax((1, 2, 3)).tolist() == [3, 3, 3]  # sides are 1 to 48 // 10
    assert (moved != 0).any(0).float().mean() > 0.3


# intensity


def test_curves_are_exact_monotone_and_clamped() -> None:
    views = GenesisViews(SpatialCrop(32), **{**CLEAN, "intensity_probability": 1.0})
    t = torch.linspace(0, 1, 32**3, dtype=torch.float64)
    wide = torch.linspace(-3, 4, 32**3)
    falling = 0
    for i in range(60):
        draw = views.draw(view_stream((0, 0, i)))
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = draw.curve
        before, after = (
            a * (1 - t) ** 3 + 3 * b * t * (1 - t) ** 2 + 3 * c * t**2 * (1 - t) + d * t**3
            for a, b, c, d in [(x0, x1, x2, x3), (y0, y1, y2, y3)]
        )
        bent = views.apply(before.float().view(32, 32, 32), draw).flatten()
        assert torch.allclose(bent.double(), after, atol=1e-3)
        mapped = views.apply(wide.view(32, 32, 32), draw).flatten()
        assert mapped[wide <= 0].unique().tolist() == [y0]
        assert mapped[wide >= 1].unique().tolist() == [y3]
        steps = mapped.diff() * (y3 - y0)
        assert steps.min() >= -1e-6
        falling += int(y0 == 1)
    assert 15 < falling < 45


def test_the_straight_curve_changes_nothing_within_its_range() -> None:
    line = np.array([[0, 0], [1 / 3, 1 / 3], [2 / 3, 2 / 3], [1, 1]])
    crop = torch.randn(20, 20, 20)
    bent = GenesisViews(SpatialCrop(20)).apply(crop, spoil(curve=line))
    assert torch.allclose(bent, crop.clamp(0, 1), atol=1e-6)


# painting


@pytest.mark.parametrize("which", ["inpainted", "kept"])
def test_noise_fills_boxes_or_everything_but_boxes(which: str) -> None:
    crop = torch.randn(32, 32, 32) + 10
    boxes = np.array([[[3, 4, 5], [6, 7, 8]], [[5, 6, 7], [9, 9, 9]]])
    painted = GenesisViews(SpatialCrop(32)).apply(crop, spoil(**{which: boxes}))
    inside = np.zeros(crop.shape, dtype=bool)
    for box in boxes:
        cut(inside, box)[...] = True
    noisy = torch.from_numpy(inside if which == "inpainted" else ~inside)
    noise = painted[noisy]
    assert torch.equal(painted[~noisy], crop[~noisy])
    assert 0 <= noise.min() < 0.02
    assert 0.98 < noise.max() <= 1
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(noise.var()) == pytest.approx(1 / 12, abs=0.01)


def test_kept_boxes_show_the_shuffled_and_bent_crop() -> None:
    views = GenesisViews(SpatialCrop(32), shuffle_probability=1.0, intensity_probability=1.0)
    crop, full = torch.randn(32, 32, 32), views.draw(view_stream((0, 0, 3)))
    box = np.array([[[4, 4, 4], [15, 16, 17]]])
    parts = {"shuffled": full.shuffled, "curve": full.curve}
    painted, unpainted = views.apply(crop, spoil(**parts, kept=box)), views.apply(crop, spoil(**parts))
    assert np.array_equal(cut(painted.numpy(), box[0]), cut(unpainted.numpy(), box[0]))


# method and loss


def test_ignored_voxels_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    target, reconstruction = torch.randn(2, 2, 1, 8, 8, 8, generator=generator)
    ignored = torch.rand(2, 1, 8, 8, 8, generator=generator) < 0.3
    loss, whole = RestorationLoss(), (reconstruction - target).square()
    assert float(loss({"reconstruction": reconstruction}, {"target": target})) == pytest.approx(float(whole.mean()))
    batch = {"target": target, "ignored": ignored}
    expected = pytest.approx(float(whole[~ignored].mean()))
    assert float(loss({"reconstruction": reconstruction}, batch)) == expected
    reconstruction = torch.where(ignored, torch.full_like(target, 1e3), reconstruction)
    assert float(loss({"reconstruction": reconstruction}, batch)) == expected
    batch["ignored"] = torch.ones_like(ignored)
    assert float(loss({"reconstruction": reconstruction}, batch)) == 0


def test_the_loss_is_computed_in_float32() -> None:
    target = torch.full((1, 1, 4, 4, 4), 300.0)
    loss = RestorationLoss()({"reconstruction": torch.zeros(1, 1, 4, 4, 4, dtype=torch.float16)}, {"target": target})
    assert float(loss) == 90000  # more than a float16 holds


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    views, batch = ready(2)
    method, seen = METHODS[name]().train(), views(batch)
    RestorationLoss()(method(seen), seen).backward()
    assert [n for n, p in method.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", METHODS)
def test_it_learns(name: str) -> None:
    torch.manual_seed(0)
    views, batch = ready(4)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 3, 16)] * 3, indexing="ij"))
    batch["region"] = [torch.sin(grid * (1 + i / 4)).sum(0) - 1 for i in range(4)]
    method, seen = METHODS[name]().train(), views({key: batch[key] for key in ("region", "key")})
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        loss = RestorationLoss()(method(seen), seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < 0.7 * seen["target"].var()  # better than the best constant answer
