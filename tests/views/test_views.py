# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from scipy.stats import kstest

from common.views import SpatialCrop, SpatialDraw, draw_hidden_blocks, reading_stream, step_seed, view_stream


def plain(size: int | tuple[int, int, int]) -> SpatialCrop:
    return SpatialCrop(size, rotation_probability=0, zoom_probability=0, flip_probability=0)


def cut(crop: SpatialCrop, draw: SpatialDraw, volume: np.ndarray) -> np.ndarray:
    region = volume[tuple(slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True))]
    return crop.apply(torch.from_numpy(region.copy()), draw).numpy()


def test_a_plain_crop_is_the_volume_itself() -> None:
    volume = np.random.default_rng(0).standard_normal((20, 18, 22)).astype(np.float32)
    crop = plain(8)
    for index in range(20):
        draw = crop.draw(reading_stream((0, 0, index)), volume.shape)
        where = tuple(slice(n, n + 8) for n in draw.low)
        np.testing.assert_array_equal(cut(crop, draw, volume), volume[where])


def test_a_volume_smaller_than_the_crop_is_centred_in_zeros() -> None:
    volume = np.ones((4, 20, 5), np.float32)
    crop = plain(8)
    seen = {crop.draw(reading_stream((0, 0, i)), volume.shape).low[2] for i in range(50)}
    assert seen <= {-1, -2}
    out = cut(crop, crop.draw(reading_stream((0, 0, 0)), volume.shape), volume)
    assert out.sum() == 4 * 8 * 5
    assert out[:2].sum() == out[6:].sum() == 0


def test_rotation_and_zoom_equal_a_reference_interpolation() -> None:
    rng = np.random.default_rng(1)
    volume = np.pad(rng.standard_normal((30, 28, 32)).astype(np.float32), 4)
    crop = SpatialCrop(16, rotation_probability=1, zoom_probability=1, flip_probability=0)
    for index in range(5):
        draw = crop.draw(reading_stream((3, 0, index)), volume.shape)
        matrix, half = np.array(draw.matrix), (16 - 1) / 2
        offset = np.array(draw.low) + half - matrix @ np.full(3, half)
        expected = affine_transform(volume, matrix, offset, (16, 16, 16), order=1, mode="grid-constant")
        np.testing.assert_allclose(cut(crop, draw, volume), expected, atol=2e-4)


def test_the_region_read_is_all_that_the_crop_needs() -> None:
    """What lies outside the region does not change the crop."""
    rng = np.random.default_rng(2)
    volume = rng.standard_normal((40, 40, 40)).astype(np.float32)
    crop = SpatialCrop(12, rotation_probability=1, zoom_probability=1)
    for index in range(5):
        draw = crop.draw(reading_stream((4, 0, index)), volume.shape)
        whole = SpatialDraw(draw.low, draw.matrix, draw.flips, (0, 0, 0), volume.shape)
        np.testing.assert_allclose(cut(crop, draw, volume), cut(crop, whole, volume), atol=2e-4)


def test_flips_turn_the_crop() -> None:
    volume = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    draw = SpatialDraw((0, 0, 0), None, (True, False, True), (0, 0, 0), (8, 8, 8))
    np.testing.assert_array_equal(cut(plain(8), draw, volume), volume[::-1, :, ::-1])


def test_probabilities_and_ranges_are_the_published_ones() -> None:
    crop = SpatialCrop(16)
    draws = [crop.draw(reading_stream((0, 1, i)), (64, 64, 64)) for i in range(4000)]
    share = np.mean([draw.matrix is not None for draw in draws])
    assert share == pytest.approx(0.36, abs=0.03)
    assert np.mean([draw.flips for draw in draws], axis=0) == pytest.approx([0.5] * 3, abs=0.04)
    zooms = np.array([np.linalg.det(draw.matrix) ** (1 / 3) for draw in draws if draw.matrix is not None])
    zoomed = zooms[np.abs(zooms - 1) > 1e-6]
    assert len(zoomed) / len(draws) == pytest.approx(0.2, abs=0.03)
    assert 0.7 <= zoomed.min() < 0.72
    assert 1.38 < zoomed.max() <= 1.4
    assert np.mean(zoomed < 1) == pytest.approx(0.5, abs=0.07)
    angles = []
    for draw in draws:
        if draw.matrix is not None:
            matrix = np.array(draw.matrix)
            matrix /= np.linalg.det(matrix) ** (1 / 3)
            assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
            angles.append(np.degrees(np.arcsin(np.clip(matrix[2, 1], -1, 1))))
    assert np.abs(angles).max() <= 45
    lows = np.array([draw.low for draw in draws])
    assert lows.min() == 0
    assert lows.max() == 64 - 16


@pytest.mark.parametrize("ratio", [0.6, 0.75, 0.9])
def test_the_hidden_share_is_exact_and_uniform(ratio: float) -> None:
    masks = torch.stack([draw_hidden_blocks((5, 4, 5), ratio, view_stream((0, 0, i))) for i in range(400)])
    assert (masks.flatten(1).sum(1) == int(ratio * 100)).all()
    assert (masks.float().mean(0) - int(ratio * 100) / 100).abs().max() < 0.12


def test_streams_differ_between_samples_and_repeat_for_one() -> None:
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    assert len({int(reading_stream(key).integers(2**62)) for key in keys}) == len(keys)
    assert len({int(torch.randint(2**62, (1,), generator=view_stream(key))) for key in keys}) == len(keys)
    assert len({step_seed(0, i, r) for i in range(20) for r in range(4)}) == 80
    assert torch.equal(torch.rand(5, generator=view_stream((1, 2, 3))), torch.rand(5, generator=view_stream((1, 2, 3))))


def test_a_centred_crop_takes_the_middle_and_pads_evenly() -> None:
    crop = SpatialCrop(8, rotation_probability=0, zoom_probability=0, flip_probability=0, centred=True)
    volume = torch.arange(20.0 * 8 * 4).view(20, 8, 4) + 1
    draw = crop.draw(np.random.default_rng(0), volume.shape)
    assert draw == crop.draw(np.random.default_rng(1), volume.shape)
    region = volume[draw.start[0] : draw.stop[0], draw.start[1] : draw.stop[1], draw.start[2] : draw.stop[2]]
    out = crop.apply(region, draw)
    assert torch.equal(out[..., 2:6], volume[6:14])
    assert (out[..., :2] == 0).all()
    assert (out[..., 6:] == 0).all()


def test_masks_are_taken_by_nearest_neighbour() -> None:
    crop = SpatialCrop(12, rotation_probability=1, zoom_probability=1)
    mask = (torch.rand(24, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for index in range(5):
        draw = crop.draw(np.random.default_rng(index), mask.shape)
        region = mask[draw.start[0] : draw.stop[0], draw.start[1] : draw.stop[1], draw.start[2] : draw.stop[2]]
        batch = {"anonymised": [region], "spatial": [draw]}
        assert set(crop(batch, name="anonymised").unique().tolist()) <= {0.0, 1.0}


def region_of(volume: torch.Tensor, draw: SpatialDraw) -> torch.Tensor:
    return volume[..., *[slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True)]]


@pytest.mark.parametrize("size", [(8, 8, 8), (5, 30, 9), (12, 7, 24)])
@pytest.mark.parametrize("shape", [(20, 18, 22), (8, 40, 5), (12, 7, 3)])
def test_the_centre_lies_inside_and_in_the_middle_if_there_is_room(
    size: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    crop = SpatialCrop(size, rotation_probability=0, zoom_probability=0, flip_probability=0)
    rng = np.random.default_rng(0)
    for index in range(60):
        centre = tuple(int(rng.integers(side)) for side in shape)
        draw = crop.draw(reading_stream((0, 0, index)), shape, centre=centre)
        uniform = crop.draw(reading_stream((0, 0, index)), shape)
        volume = torch.zeros(shape)
        volume[centre] = 1
        (seen,) = crop.apply(region_of(volume, draw), draw).nonzero().tolist()
        for at, low, side, n, elsewhere, voxel in zip(centre, draw.low, shape, size, uniform.low, seen, strict=True):
            assert voxel == at - low
            if side <= n:  # padded evenly, as without a centre
                assert low == elsewhere
            else:
                assert 0 <= low <= side - n
                assert voxel == n // 2 or low in (0, side - n)


def test_a_centre_moves_no_other_draw_and_must_lie_in_the_volume() -> None:
    crop = SpatialCrop(8)
    for index in range(50):
        at, anywhere = (
            crop.draw(reading_stream((0, 0, index)), (20, 20, 20), centre=centre) for centre in ((9, 9, 9), None)
        )
        assert at.low == (5, 5, 5)
        assert (at.matrix, at.flips) == (anywhere.matrix, anywhere.flips)
    with pytest.raises(ValueError, match=r"centre \(3, 20, 1\) lies outside a volume of \(20, 20, 20\)"):
        crop.draw(np.random.default_rng(0), (20, 20, 20), centre=(3, 20, 1))


def test_uniform_zoom_is_uniform_over_the_whole_range() -> None:
    crop = SpatialCrop(16, rotation_probability=0, zoom_probability=1, uniform_zoom=True)
    halves = SpatialCrop(16, rotation_probability=0, zoom_probability=1)
    count = 2000

    def distance(crop: SpatialCrop) -> float:
        draws = [crop.draw(reading_stream((0, 1, i)), (64, 64, 64)) for i in range(count)]
        factors = np.array([draw.matrix[0][0] for draw in draws if draw.matrix is not None])
        assert len(factors) == count
        return float(kstest(factors, "uniform", args=(0.7, 0.7)).statistic)

    limit = 1.63 / np.sqrt(count)  # exceeded by chance in 1 % of such samples
    assert distance(crop) < limit
    assert distance(halves) > 1.5 * limit  # 50 % instead of 43 % below 1


def test_channels_are_cut_alike() -> None:
    volume = torch.randn(3, 30, 28, 32, generator=torch.Generator().manual_seed(0))
    for probability in (0, 1):
        crop = SpatialCrop((16, 12, 20), rotation_probability=probability, zoom_probability=probability)
        for index in range(4):
            draw = crop.draw(reading_stream((1, 0, index)), volume.shape[1:])
            region = region_of(volume, draw)
            together = crop.apply(region, draw)
            assert torch.equal(together, torch.stack([crop.apply(channel, draw) for channel in region]))
            assert torch.equal(together, crop({"region": [region], "spatial": [draw]})[0])


def turned(size: int | tuple[int, int, int]) -> SpatialCrop:
    return SpatialCrop(size, rotation_probability=1, zoom_probability=1, uniform_zoom=True)


def shares(volume: np.ndarray, draw: SpatialDraw, size: tuple[int, int, int], label: int, outside: int) -> np.ndarray:
    """The trilinear share of one label at every voxel of a crop, by another package."""
    matrix, half = np.array(draw.matrix), (np.array(size) - 1) / 2
    offset = np.array(draw.low) + half - matrix @ half
    share = affine_transform(
        (volume == label).astype(np.float64),
        matrix,
        offset,
        size,
        order=1,
        mode="grid-constant",
        cval=float(label == outside),
    )
    return np.flip(share, [axis for axis in range(3) if draw.flips[axis]])


@pytest.mark.parametrize("outside", [0, -1])
@pytest.mark.parametrize("labels", [[0, 1], [-1, 0, 3, 255], [*range(40)]])
def test_label_maps_take_the_label_of_the_largest_trilinear_share(labels: list[int], outside: int) -> None:
    rng = np.random.default_rng(3)
    coarse = rng.choice(labels, (10, 9, 11)).astype(np.int16)
    volume = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)
    size = (24, 20, 22)
    crop = turned(size)
    known = sorted({*labels, outside})
    for index in range(4):
        draw = crop.draw(reading_stream((2, 0, index)), volume.shape)
        out = crop.apply_label(region_of(torch.from_numpy(volume), draw), draw, outside=outside)
        each = np.stack([shares(volume, draw, size, label, outside) for label in known])
        second, first = np.sort(each, axis=0)[-2:]
        clear = first - second > 1e-4
        assert clear.mean() > 0.99
        assert out.dtype == torch.int16
        assert (out.numpy() == np.array(known, np.int16)[each.argmax(0)])[clear].all()


def test_every_place_and_only_mixed_places_give_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU looks for places where labels meet, a GPU does not."""
    volume = torch.randint(0, 9, (8, 8, 8), generator=torch.Generator().manual_seed(0))
    volume = volume.repeat_interleave(4, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    crop = turned(20)
    draws = [crop.draw(reading_stream((5, 0, index)), volume.shape, centre=(0, 16, 31)) for index in range(4)]
    quick = [crop.apply_label(region_of(volume, draw), draw) for draw in draws]
    monkeypatch.setattr("common.views.spatial.mixed_cells", lambda labels: torch.ones_like(labels, dtype=torch.bool))
    for draw, expected in zip(draws, quick, strict=True):
        assert torch.equal(crop.apply_label(region_of(volume, draw), draw), expected)


def test_of_equal_shares_the_smallest_label_wins() -> None:
    half = tuple(tuple(0.5 * (i == j) for j in range(3)) for i in range(3))  # every second place between two voxels
    for values in ([7, 2, 9, 9, 1], [1, 9, 9, 2, 7]):
        volume = torch.tensor(values, dtype=torch.uint8).view(1, 1, 5)
        draw = SpatialDraw((0, 0, -2), half, (False,) * 3, (0, 0, 0), (1, 1, 5))
        out = plain((1, 1, 9)).apply_label(volume, draw)
        between = [min(pair) for pair in pairwise(values)]
        assert out.flatten().tolist() == [v for pair in zip(values, between, strict=False) for v in pair] + values[-1:]


def test_label_maps_invent_no_label_and_agree_with_a_thresholded_image() -> None:
    """Of two labels, the one with the larger share is the one of the interpolated indicator above one half."""
    inside = torch.nn.functional.interpolate(
        torch.randn(1, 1, 6, 6, 6, generator=torch.Generator().manual_seed(4)), size=(36, 36, 36), mode="trilinear"
    )[0, 0]
    label = torch.where(inside > 0, 255, 17).to(torch.uint8)
    crop = turned(24)
    for index in range(6):
        draw = crop.draw(reading_stream((6, 0, index)), label.shape)
        out = crop.apply_label(region_of(label, draw), draw)
        assert out.dtype == torch.uint8
        assert set(out.unique().tolist()) <= {0, 17, 255}
        share = crop.apply(region_of((label == 255).float(), draw), draw)
        within = crop.apply(region_of(torch.ones(label.shape), draw), draw) > 0.999
        clear = within & ((share - 0.5).abs() > 1e-3)
        assert clear.float().mean() > 0.6
        assert torch.equal(out[clear] == 255, share[clear] > 0.5)


def test_plain_label_maps_are_copies_with_the_outside_filled() -> None:
    label = torch.randint(0, 200, (6, 20, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    crop = SpatialCrop(8, rotation_probability=0, zoom_probability=0, flip_probability=1)
    draw = crop.draw(reading_stream((0, 0, 0)), label.shape)
    image = crop.apply(region_of(label, draw), draw)
    zero = crop.apply_label(region_of(label, draw), draw)
    assert zero.dtype == torch.uint8
    assert torch.equal(zero.float(), image)
    marked = crop.apply_label(region_of(label, draw), draw, outside=-1)
    assert marked.dtype == torch.int16  # an unsigned type has no place for it
    assert (marked == -1).sum() == 8**3 - 6 * 8 * 5
    assert torch.equal(marked.clamp(min=0).float(), image)
    with pytest.raises(ValueError, match="float32 has no integer labels"):
        crop.apply_label(torch.zeros(4, 4, 4), draw)


def test_a_volume_of_one_plane_stays_one_plane_when_it_is_turned() -> None:
    flat = torch.ones(1, 20, 20)
    quarter = ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))  # the crop's second axis runs along the first
    crop = plain(9)
    draw = SpatialDraw((-4, 4, 4), quarter, (False,) * 3, (0, 4, 4), (1, 13, 13))
    out = crop.apply(region_of(flat, draw), draw)
    expected = torch.zeros(9, 9, 9)
    expected[:, 4] = 1
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert torch.equal(crop.apply_label(region_of(flat.int(), draw), draw).float(), expected)
