# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.transform import resize

from common.views import AugmentationDraw, CropAugmentation, view_stream

ONE_EACH = [
    AugmentationDraw(noise=(0.05, 3)),
    AugmentationDraw(blur_sigma=0.8),
    AugmentationDraw(brightness=1.2),
    AugmentationDraw(contrast=1.2),
    AugmentationDraw(zoom=0.6),
    AugmentationDraw(inverted_gamma=1.4),
    AugmentationDraw(gamma=0.8),
    AugmentationDraw(flips=(True, False, True)),
    AugmentationDraw(quarter_turns=1),
]
ALL_AT_ONCE = AugmentationDraw((0.1, 7), 0.7, 0.9, 1.1, 0.7, 0.8, 1.3, (False, True, True), 3)


def crop(*shape: int, seed: int = 0) -> np.ndarray:
    return gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1).astype(np.float32) * 5 + 1


def changed(image: np.ndarray, draw: AugmentationDraw) -> np.ndarray:
    return CropAugmentation(rot90_probability=0).apply(torch.from_numpy(image)[None, None], [draw])[0, 0].numpy()


def drawn(augmentation: CropAugmentation, count: int = 3000) -> list[AugmentationDraw]:
    return [augmentation.draw(view_stream((0, 0, index))) for index in range(count)]


def strengths(draws: list[AugmentationDraw], name: str) -> np.ndarray:
    values = [getattr(draw, name) for draw in draws]
    return np.array([value[0] if name == "noise" else value for value in values if value is not None])


@pytest.fixture(scope="module")
def published() -> list[AugmentationDraw]:
    return drawn(CropAugmentation())


@pytest.mark.parametrize(
    ("name", "share", "low", "high"),
    [
        ("noise", 0.1, 0, 0.1),
        ("blur_sigma", 0.2 * 0.5, 0.5, 1),
        ("brightness", 0.15, 0.75, 1.25),
        ("contrast", 0.15, 0.75, 1.25),
        ("zoom", 0.1 * 0.5, 0.5, 1),
        ("inverted_gamma", 0.1, 0.7, 1.5),
        ("gamma", 0.3, 0.7, 1.5),
    ],
)
def test_probabilities_and_ranges_are_the_published_ones(
    published: list[AugmentationDraw], name: str, share: float, low: float, high: float
) -> None:
    values = strengths(published, name)
    assert len(values) / len(published) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(published)))
    slack = 0.06 * (high - low)
    assert low <= values.min() < low + slack
    assert high - slack < values.max() <= high
    if name in ("contrast", "inverted_gamma", "gamma"):  # half on each side of 1, however wide the sides are
        assert np.mean(values < 1) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(len(values)))
        assert values[values < 1].mean() == pytest.approx((low + 1) / 2, abs=0.03)
        assert values[values > 1].mean() == pytest.approx((1 + high) / 2, abs=0.03)
    else:
        assert values.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / np.sqrt(12 * len(values)))


def test_mirrors_and_turns_are_drawn_evenly(published: list[AugmentationDraw]) -> None:
    flips = np.array([draw.flips for draw in published])
    assert flips.mean(0) == pytest.approx([0.5] * 3, abs=0.04)
    assert np.bincount(flips @ [1, 2, 4]) / len(flips) == pytest.approx([1 / 8] * 8, abs=0.03)
    turns = np.bincount([draw.quarter_turns for draw in published]) / len(published)
    assert turns == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.035)


def test_each_transform_fires_independently(published: list[AugmentationDraw]) -> None:
    fired = np.array([[value is not None for value in list(asdict(draw).values())[:7]] for draw in published])
    between = np.corrcoef(fired.T) - np.eye(7)
    assert np.abs(between).max() < 5 / np.sqrt(len(published))


def test_volume_fusion_differs_in_low_resolution_and_turns_alone(published: list[AugmentationDraw]) -> None:
    fusion = drawn(CropAugmentation(low_resolution_probability=0.25, rot90_probability=0))
    assert len(strengths(fusion, "zoom")) / len(fusion) == pytest.approx(0.125, abs=0.03)
    assert not any(draw.quarter_turns for draw in fusion)
    for field in fields(AugmentationDraw):
        if field.name not in ("zoom", "quarter_turns"):
            assert [getattr(d, field.name) for d in fusion] == [getattr(d, field.name) for d in published]


def test_probabilities_of_nought_and_one() -> None:
    names = [name for name in vars(CropAugmentation()) if name.endswith("_probability")]
    assert len(names) == 10
    never: dict[str, Any] = dict.fromkeys(names, 0.0)
    assert set(drawn(CropAugmentation(**never), 50)) == {AugmentationDraw()}
    always: dict[str, Any] = dict.fromkeys(names, 1.0)
    for draw in drawn(CropAugmentation(**always), 50):
        assert None not in asdict(draw).values()
        assert draw.flips == (True, True, True)
        assert draw.quarter_turns in (1, 2, 3)


def test_no_draw_no_change() -> None:
    image = crop(6, 7, 8)
    np.testing.assert_array_equal(changed(image, AugmentationDraw()), image)


def test_noise_is_normal_with_the_drawn_deviation() -> None:
    image = crop(32, 32, 32)
    noise = changed(image, AugmentationDraw(noise=(0.07, 11))) - image
    assert noise.mean() == pytest.approx(0, abs=4 * 0.07 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(0.07, rel=0.02)
    assert np.mean(noise**4) / np.mean(noise**2) ** 2 == pytest.approx(3, abs=0.12)
    assert abs(np.corrcoef(noise.ravel(), image.ravel())[0, 1]) < 0.03
    other = changed(image, AugmentationDraw(noise=(0.07, 12))) - image
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.03
    louder = changed(image, AugmentationDraw(noise=(0.14, 11))) - image
    np.testing.assert_allclose(louder, 2 * noise, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.5, 0.62, 0.63, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 12, 20), (3, 1, 2)])
def test_blur_is_that_of_scipy(sigma: float, shape: tuple[int, int, int]) -> None:
    image = crop(*shape)
    np.testing.assert_allclose(
        changed(image, AugmentationDraw(blur_sigma=sigma)), gaussian_filter(image, sigma), atol=1e-5
    )


def test_brightness_multiplies() -> None:
    image = crop(5, 6, 7)
    np.testing.assert_allclose(changed(image, AugmentationDraw(brightness=0.8)), image * 0.8, rtol=1e-6)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast_stretches_about_the_mean_within_the_old_range(factor: float) -> None:
    image = crop(12, 11, 10)
    out = changed(image, AugmentationDraw(contrast=factor))
    expected = (image.astype(np.float64) - image.mean()) * factor + image.mean()
    clipped = (expected < image.min()) | (expected > image.max())
    assert clipped.any() == (factor > 1)
    np.testing.assert_allclose(out, expected.clip(image.min(), image.max()), atol=1e-5)
    if factor > 1:
        assert (out.min(), out.max()) == (image.min(), image.max())


@pytest.mark.parametrize("gamma", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("negative", [False, True])
def test_gamma_bends_the_range_and_keeps_mean_and_deviation(gamma: float, negative: bool) -> None:
    image = crop(12, 11, 10)
    out = changed(image, AugmentationDraw(inverted_gamma=gamma) if negative else AugmentationDraw(gamma=gamma))
    x = -image.astype(np.float64) if negative else image.astype(np.float64)
    bent = ((x - x.min()) / (x.max() - x.min())) ** gamma
    expected = (bent - bent.mean()) / bent.std() * x.std() + x.mean()
    np.testing.assert_allclose(out, -expected if negative else expected, atol=2e-5)
    assert out.mean() == pytest.approx(image.mean(), abs=1e-5)
    assert out.std() == pytest.approx(image.std(), rel=1e-5)
    assert (np.argsort(out.ravel())[[0, -1]] == np.argsort(image.ravel())[[0, -1]]).all()


@pytest.mark.parametrize("zoom", [0.5, 0.63, 0.77, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 14, 21), (2, 1, 3)])
def test_low_resolution_is_nearest_down_and_cubic_spline_up(zoom: float, shape: tuple[int, int, int]) -> None:
    image = crop(*shape)
    coarse = [max(round(side * zoom), 1) for side in shape]
    seen = resize(image.astype(np.float64), coarse, order=0, mode="edge", anti_aliasing=False)
    expected = resize(seen, shape, order=3, mode="edge", anti_aliasing=False)
    np.testing.assert_allclose(changed(image, AugmentationDraw(zoom=zoom)), expected, atol=2e-5)


def test_low_resolution_picks_scipys_voxel_where_two_are_equally_near() -> None:
    """From 64 voxels to 49, the centre of the 25th lies between two of the 64; rounding decides in SciPy."""
    image = crop(64, 1, 1)
    seen = resize(image.astype(np.float64), (49, 1, 1), order=0, mode="edge", anti_aliasing=False)
    expected = resize(seen, image.shape, order=3, mode="edge", anti_aliasing=False)
    np.testing.assert_allclose(changed(image, AugmentationDraw(zoom=49 / 64)), expected, atol=2e-5)


def test_low_resolution_keeps_a_ramp_within_a_coarse_voxel_and_loses_the_finest_pattern() -> None:
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32)[:, None, None], (32, 8, 8)).copy()
    assert np.abs(changed(ramp, AugmentationDraw(zoom=0.6)) - ramp).max() <= 1
    board = (np.indices((16, 16, 16)).sum(0) % 2).astype(np.float32)
    assert changed(board, AugmentationDraw(zoom=0.5)).std() < 1e-6


def test_mirrors_and_turns_are_those_of_torch() -> None:
    image = crop(6, 6, 5)
    axes = (0, 1, 2)
    for code in range(8):
        flips = (bool(code & 1), bool(code & 2), bool(code & 4))
        for turns in range(4):
            mirrored = torch.from_numpy(image).flip([axis for axis in axes if flips[axis]])
            out = changed(image, AugmentationDraw(flips=flips, quarter_turns=turns))
            np.testing.assert_array_equal(out, torch.rot90(mirrored, turns, (0, 1)).numpy())


def test_mirrors_take_any_shape() -> None:
    image = crop(4, 5, 6)
    np.testing.assert_array_equal(changed(image, AugmentationDraw(flips=(True, True, False))), image[::-1, ::-1])


def test_the_order_is_the_published_one() -> None:
    image, expected = crop(10, 10, 8), crop(10, 10, 8)
    for name in (
        "noise",
        "blur_sigma",
        "brightness",
        "contrast",
        "zoom",
        "inverted_gamma",
        "gamma",
        "flips",
        "quarter_turns",
    ):
        expected = changed(expected, AugmentationDraw(**{name: getattr(ALL_AT_ONCE, name)}))
    np.testing.assert_array_equal(changed(image, ALL_AT_ONCE), expected)


@pytest.mark.parametrize("draw", [*ONE_EACH, ALL_AT_ONCE], ids=str)
def test_a_constant_crop_stays_constant(draw: AugmentationDraw) -> None:
    """As a crop of background is; nothing is divided by its zero range."""
    for value in (0.0, -2.0):
        out = changed(np.full((8, 8, 8), value, np.float32), draw)
        factor = 1 if draw.brightness is None else draw.brightness
        slack = 1e-5 if draw.noise is None else 6 * draw.noise[0]
        np.testing.assert_allclose(out, value * factor, atol=slack)


def test_a_batch_equals_its_crops_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [*ONE_EACH, ALL_AT_ONCE, *drawn(CropAugmentation(), 60)]
    images = torch.stack([torch.from_numpy(crop(12, 12, 10, seed=i)) for i in range(len(draws))])[:, None]
    augmentation = CropAugmentation()
    alone = torch.cat([augmentation.apply(images[i : i + 1], [draw]) for i, draw in enumerate(draws)])
    for voxels in (1, 5 * 12 * 12 * 10, 2**30):  # whatever is changed together
        monkeypatch.setattr("common.views.intensity._TOGETHER", voxels)
        torch.testing.assert_close(augmentation.apply(images, draws), alone, atol=2e-5, rtol=0)


def test_the_generators_decide_and_the_input_is_left_alone() -> None:
    images = torch.stack([torch.from_numpy(crop(8, 8, 8, seed=i)) for i in range(6)])[:, None]
    before = images.clone()
    augmentation = CropAugmentation(noise_probability=1)
    out = augmentation(images, [view_stream((1, 2, i)) for i in range(6)])
    assert torch.equal(images, before)
    assert torch.equal(out, augmentation(images, [view_stream((1, 2, i)) for i in range(6)]))
    turned = augmentation(images.flip(0), [view_stream((1, 2, i)) for i in reversed(range(6))])
    torch.testing.assert_close(turned.flip(0), out)
    assert not torch.equal(out, augmentation(images, [view_stream((1, 3, i)) for i in range(6)]))
    untouched = augmentation.apply(images, [AugmentationDraw()] * 6)
    untouched.zero_()
    assert torch.equal(images, before)


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    CropAugmentation(noise_probability=1)(torch.zeros(1, 1, 4, 4, 4), [view_stream((0, 0, 0))])
    assert torch.equal(torch.get_rng_state(), state)


def test_arithmetic_is_float32_under_autocast_and_for_half_crops() -> None:
    images = torch.from_numpy(crop(10, 10, 10)).half().expand(len(ONE_EACH), 1, 10, 10, 10)
    expected = CropAugmentation().apply(images.float(), ONE_EACH)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CropAugmentation().apply(images, ONE_EACH), expected)


def test_impossible_input_is_refused() -> None:
    streams = [torch.Generator()]
    with pytest.raises(ValueError, match="first two sides 4 and 5"):
        CropAugmentation()(torch.zeros(1, 1, 4, 5, 5), streams)
    plain = CropAugmentation(rot90_probability=0)
    assert plain(torch.zeros(1, 1, 4, 5, 6), streams).shape == (1, 1, 4, 5, 6)
    with pytest.raises(ValueError, match="first two sides 4 and 5"):
        plain.apply(torch.zeros(1, 1, 4, 5, 5), [AugmentationDraw(quarter_turns=2)])
    with pytest.raises(ValueError, match="1 draws for 2 crops"):
        plain.apply(torch.zeros(2, 1, 4, 4, 4), [AugmentationDraw()])
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4, 4\)"):
        plain.apply(torch.zeros(2, 3, 4, 4, 4), [AugmentationDraw()] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma_probability": 1.5}, "gamma_probability 1.5"),
        ({"channel_probability": -0.1}, "channel_probability -0.1"),
        ({"noise_std_range": (0.2, 0.1)}, r"noise_std_range \(0.2, 0.1\)"),
        ({"low_resolution_range": (0.5, 1.2)}, r"low_resolution_range \(0.5, 1.2\)"),
        ({"contrast_range": (1.1, 1.2)}, r"contrast_range \(1.1, 1.2\)"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropAugmentation(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_crops_without_waiting() -> None:
    draws = [*ONE_EACH, ALL_AT_ONCE]
    images = torch.stack([torch.from_numpy(crop(16, 16, 16, seed=i)) for i in range(len(draws))])[:, None]
    expected = CropAugmentation().apply(images, draws)
    on_gpu = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = CropAugmentation().apply(on_gpu, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), expected, atol=1e-4, rtol=0)


FINE_TUNING: dict[str, Any] = {
    "blur_per_axis": True,
    "low_resolution_probability": 0.25,
    "low_resolution_interpolation": "linear",
    "rot90_probability": 0,
}
CHANNELS = 3


@pytest.fixture(scope="module")
def of_channels() -> list[list[AugmentationDraw]]:
    augmentation = CropAugmentation(**FINE_TUNING)
    return [augmentation.draw_channels(view_stream((0, 0, index)), channels=CHANNELS) for index in range(3000)]


@pytest.mark.parametrize(
    ("name", "share", "share_of_channels", "low", "high"),
    [
        ("noise", 0.1, 1, 0, 0.1),
        ("blur_sigma", 0.2, 0.5, 0.5, 1),
        ("brightness", 0.15, 1, 0.75, 1.25),
        ("contrast", 0.15, 1, 0.75, 1.25),
        ("zoom", 0.25, 0.5, 0.5, 1),
        ("inverted_gamma", 0.1, 1, 0.7, 1.5),
        ("gamma", 0.3, 1, 0.7, 1.5),
    ],
)
def test_fine_tuning_draws_for_the_crop_and_then_for_each_channel(
    of_channels: list[list[AugmentationDraw]],
    name: str,
    share: float,
    share_of_channels: float,
    low: float,
    high: float,
) -> None:
    fired = np.array([[getattr(draw, name) is not None for draw in crop] for crop in of_channels])
    in_any = share * (1 - (1 - share_of_channels) ** CHANNELS)
    in_all = share * share_of_channels**CHANNELS
    for found, expected in (
        *((column, share * share_of_channels) for column in fired.T),
        (fired.any(1), in_any),
        (fired.all(1), in_all),
    ):
        slack = 4 * np.sqrt(expected * (1 - expected) / len(found))
        assert found.mean() == pytest.approx(expected, abs=slack)
    values = [
        [getattr(draw, name) for draw in crop]
        for crop, all_of_it in zip(of_channels, fired.all(1), strict=True)
        if all_of_it
    ]
    if name == "noise":  # one deviation, but voxels of each channel's own
        assert all(
            len({std for std, _ in crop}) == 1 and len({seed for _, seed in crop}) == CHANNELS for crop in values
        )
        values = [[crop[0][0]] for crop in values]
    found = np.array(values, float).reshape(len(values), -1)
    assert low <= found.min() <= found.max() <= high
    if found.shape[1] > 1:  # channels, and axes of blur
        between = np.corrcoef(found.T) - np.eye(found.shape[1])
        assert np.abs(between).max() < 5 / np.sqrt(len(found))
    means = {"contrast": (0.875 + 1.125) / 2, "inverted_gamma": (0.85 + 1.25) / 2, "gamma": (0.85 + 1.25) / 2}
    expected = means.get(name, (low + high) / 2)
    assert found.mean(0) == pytest.approx([expected] * found.shape[1], abs=4 * (high - low) / np.sqrt(12 * len(found)))


def test_channels_of_a_crop_are_mirrored_alike(of_channels: list[list[AugmentationDraw]]) -> None:
    assert all(len({(draw.flips, draw.quarter_turns) for draw in crop}) == 1 for crop in of_channels)
    assert np.mean([crop[0].flips for crop in of_channels], axis=0) == pytest.approx([0.5] * 3, abs=0.04)
    assert not any(draw.quarter_turns for crop in of_channels for draw in crop)


def test_more_channels_do_not_change_the_first_ones() -> None:
    for arguments in ({}, FINE_TUNING | {"blur_per_axis": False}):
        augmentation = CropAugmentation(**arguments)
        for index in range(200):
            two = augmentation.draw_channels(view_stream((0, 0, index)), channels=2)
            assert two[0] == augmentation.draw(view_stream((0, 0, index)))


def test_several_channels_equal_each_channel_alone(of_channels: list[list[AugmentationDraw]]) -> None:
    some = of_channels[:12]
    images = torch.from_numpy(crop(len(some), CHANNELS, 10, 9, 8))
    augmentation = CropAugmentation(**FINE_TUNING)
    together = augmentation.apply(images, [draw for one in some for draw in one])
    assert torch.equal(together, augmentation(images, [view_stream((0, 0, index)) for index in range(len(some))]))
    for channel in range(CHANNELS):
        alone = augmentation.apply(images[:, channel : channel + 1], [one[channel] for one in some])
        torch.testing.assert_close(together[:, channel : channel + 1], alone, atol=2e-5, rtol=0)
    same = images[:, :1].expand(-1, CHANNELS, -1, -1, -1)
    alike = augmentation.apply(same, [one[0] for one in some for _ in range(CHANNELS)])
    assert torch.equal(alike[:, 0], alike[:, 2])


def test_any_layout_of_several_channels_is_taken() -> None:
    images = torch.from_numpy(crop(2, 2, 6, 7, 8))
    draws = [
        AugmentationDraw(contrast=1.2, flips=(True, False, True)),
        AugmentationDraw(gamma=0.8, flips=(True, False, True)),
    ]
    expected = CropAugmentation(**FINE_TUNING).apply(images, draws * 2)
    last = images.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(CropAugmentation(**FINE_TUNING).apply(last, draws * 2), expected)
    for layout in (last, images.half(), images.flip(0).flip(0), images):
        out = CropAugmentation(**FINE_TUNING).apply(layout, draws * 2, in_place=True)
        torch.testing.assert_close(out, expected, atol=0.02 if layout.dtype == torch.half else 0, rtol=0)
    assert torch.equal(images, expected)  # the last one was written over


@pytest.mark.parametrize("sigma", [(0.5, 0.7, 1.0), (0.9, 0.5, 0.5)])
def test_blur_of_each_axis_is_that_of_scipy(sigma: tuple[float, float, float]) -> None:
    image = crop(9, 12, 20)
    blurred = changed(image, AugmentationDraw(blur_sigma=sigma))
    np.testing.assert_allclose(blurred, gaussian_filter(image, sigma), atol=1e-5)


@pytest.mark.parametrize("zoom", [0.5, 0.63, 0.77, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 14, 21), (2, 1, 3)])
def test_low_resolution_is_nearest_down_and_linear_up(zoom: float, shape: tuple[int, int, int]) -> None:
    image = crop(*shape)
    coarse = [max(round(side * zoom), 1) for side in shape]
    seen = resize(image.astype(np.float64), coarse, order=0, mode="edge", anti_aliasing=False)
    expected = resize(seen, shape, order=1, mode="edge", anti_aliasing=False)
    out = CropAugmentation(**FINE_TUNING).apply(torch.from_numpy(image)[None, None], [AugmentationDraw(zoom=zoom)])
    np.testing.assert_allclose(out[0, 0].numpy(), expected, atol=2e-5)


def test_label_maps_are_mirrored_and_turned_with_their_images() -> None:
    label = torch.randint(-1, 300, (4, 1, 6, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    before = label.clone()
    draws = [AugmentationDraw(gamma=1.3, flips=(bool(i & 1), bool(i & 2), True), quarter_turns=i) for i in range(4)]
    out = CropAugmentation.orient(label, draws)
    assert out.dtype == torch.int16
    assert torch.equal(label, before)
    bare = [AugmentationDraw(flips=draw.flips, quarter_turns=draw.quarter_turns) for draw in draws]
    assert torch.equal(out.float(), CropAugmentation().apply(label, bare))


def test_channels_that_would_part_are_refused() -> None:
    draws = [AugmentationDraw(), AugmentationDraw(flips=(True, False, False))]
    images = torch.zeros(1, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="channels of crop 0"):
        CropAugmentation().apply(images, draws)
    with pytest.raises(ValueError, match="first two sides 4 and 5"):
        CropAugmentation.orient(torch.zeros(1, 1, 4, 5, 4), [AugmentationDraw(quarter_turns=1)])
    with pytest.raises(ValueError, match="low_resolution_interpolation 'nearest'"):
        CropAugmentation(low_resolution_interpolation="nearest")
