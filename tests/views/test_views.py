# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from common.views import SpatialCrop, SpatialDraw, draw_hidden_blocks, reading_stream, step_seed, view_stream


def plain(size: int) -> SpatialCrop:
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
