# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from common.views import CropAugmentation, SegmentationViews, SpatialCrop, reading_stream, view_stream

FINE_TUNING: dict[str, Any] = {
    "blur_per_axis": True,
    "low_resolution_probability": 0.25,
    "low_resolution_interpolation": "linear",
    "rot90_probability": 0.0,
}
SIZE = (20, 24, 16)
SHAPE = (40, 36, 44)
NOTHING = dict.fromkeys((name for name in vars(CropAugmentation()) if name.endswith("_probability")), 0.0)


def smooth(channels: int = 2, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    noise = np.random.default_rng(0).standard_normal((channels, *shape))
    image = np.stack([gaussian_filter(channel, 3) for channel in noise])
    return torch.from_numpy(image / image.std()).float()


def batch_of(spatial: SpatialCrop, image: Tensor, label: Tensor, *, count: int = 6, **draw: Any) -> dict[str, Any]:
    batch: dict[str, Any] = {"region": [], "label_region": [], "spatial": [], "key": []}
    for index in range(count):
        key = (0, 1, index)
        drawn = spatial.draw(reading_stream(key), label.shape, **draw)
        where = [slice(a, b) for a, b in zip(drawn.start, drawn.stop, strict=True)]
        batch["region"].append(image[:, *where])
        batch["label_region"].append(label[*where])
        batch["spatial"].append(drawn)
        batch["key"].append(key)
    return batch


@pytest.mark.parametrize("rotates", [0, 1])
@pytest.mark.parametrize("zooms", [0, 1])
@pytest.mark.parametrize("mirrored_by", ["neither", "crop", "augmentation", "both"])
def test_image_and_label_stay_together(rotates: int, zooms: int, mirrored_by: str) -> None:
    """A threshold of the transformed image is the transformed threshold, but for voxels at its very border."""
    window = np.prod(np.meshgrid(*map(np.hanning, SHAPE), indexing="ij"), axis=0)
    image = smooth() * torch.from_numpy(window).float()  # goes to 0, as it is outside the volume
    label = (image[1] > 0.3).to(torch.uint8)
    half_a_voxel = 0.5 * sum(float(image[1].diff(dim=axis).abs().max()) for axis in range(3))
    spatial = SpatialCrop(
        SIZE,
        rotation_probability=rotates,
        zoom_probability=zooms,
        uniform_zoom=True,
        flip_probability=float(mirrored_by in ("crop", "both")),
    )
    flips = {"flip_probability": 0.5 if mirrored_by in ("augmentation", "both") else 0.0}
    views = SegmentationViews(spatial, augmentation=CropAugmentation(**NOTHING | flips))
    made = views(batch_of(spatial, image, label))
    assert made["image"].dtype == torch.float32
    assert made["label"].dtype == torch.uint8
    seen = made["image"][:, 1:]
    wrong = (made["label"] == 1) != (seen > 0.3)
    if rotates or zooms:
        assert 0 < wrong.float().mean() < 0.02
        assert (seen[wrong] - 0.3).abs().max() < half_a_voxel
    else:
        assert not wrong.any()
    for axis in (2, 3, 4):  # one voxel further and it would show
        shifted = (made["label"].roll(1, axis) == 1) != (seen > 0.3)
        assert shifted.float().mean() > wrong.float().mean() + 0.01


def test_intensities_leave_the_label_alone_and_mirrors_turn_both() -> None:
    image, spatial = smooth(), SpatialCrop(SIZE, uniform_zoom=True)
    label = (image[0] > 0).long() + (image[1] > 0).long()
    batch = batch_of(spatial, image, label, count=12)
    bare = SegmentationViews(spatial)(batch)
    still = SegmentationViews(spatial, augmentation=CropAugmentation(**FINE_TUNING, flip_probability=0))(batch)
    full = SegmentationViews(spatial, augmentation=CropAugmentation(**FINE_TUNING))(batch)
    assert torch.equal(still["label"], bare["label"])
    assert not torch.equal(still["image"], bare["image"])
    for index, key in enumerate(batch["key"]):
        flips = CropAugmentation(**FINE_TUNING).draw(view_stream(key)).flips
        axes = [axis + 1 for axis, flip in enumerate(flips) if flip]
        for name in ("image", "label"):
            assert torch.equal(full[name][index], still[name][index].flip(axes))


def test_the_augmentation_is_drawn_from_each_samples_own_stream() -> None:
    image, spatial = smooth(), SpatialCrop(SIZE)
    label = (image[0] > 0).long()
    views = SegmentationViews(spatial, augmentation=CropAugmentation(**FINE_TUNING))
    batch = batch_of(spatial, image, label)
    made, again = views(batch), views(batch)
    backwards = views({name: value[::-1] for name, value in batch.items()})
    crops = views.augmentation(spatial(batch), [view_stream(key) for key in batch["key"]])  # type: ignore[misc]
    assert torch.equal(made["image"], crops)
    for name in ("image", "label"):
        assert torch.equal(made[name], again[name])
        torch.testing.assert_close(made[name], backwards[name].flip(0), atol=2e-5, rtol=0)


def test_validation_changes_nothing() -> None:
    image = smooth()
    label = torch.randint(0, 5, SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    spatial = SpatialCrop(SIZE, rotation_probability=0, zoom_probability=0, flip_probability=0)
    batch = batch_of(spatial, image.half(), label, centre=(39, 0, 20))
    made = SegmentationViews(spatial)(batch)
    assert torch.equal(made["image"][3], image[:, 20:40, 0:24, 12:28].half().float())
    assert torch.equal(made["label"][3, 0], label[20:40, 0:24, 12:28])


def test_an_ignored_label_is_carried_and_a_negative_one_becomes_background() -> None:
    image = smooth()
    label = torch.where(image[0] > 0.5, 255, torch.where(image[0] < -0.5, -1, 3)).to(torch.int16)
    spatial = SpatialCrop(SIZE, rotation_probability=0.5, zoom_probability=0.5, uniform_zoom=True)
    batch = batch_of(spatial, image, label)
    made = SegmentationViews(spatial, augmentation=CropAugmentation(**FINE_TUNING))(batch)
    assert made["label"].dtype == torch.int16
    assert made["label"].unique().tolist() == [0, 3, 255]


def test_the_image_is_zero_where_asked_for() -> None:
    image = smooth() + 10
    outside = image[0] > 10.5
    label = torch.where(outside, -1, 2).to(torch.int8)
    image[:, outside] = 0
    spatial = SpatialCrop((20, 48, 16), rotation_probability=0.5, zoom_probability=0.5, uniform_zoom=True)
    batch = batch_of(spatial, image, label)  # higher than the volume: the crop reaches beyond it
    augmentation = CropAugmentation(**FINE_TUNING | {"noise_probability": 1.0})
    kept = SegmentationViews(spatial, augmentation=augmentation)(batch)
    made = SegmentationViews(spatial, augmentation=augmentation, zero_outside=True)(batch)
    assert made["label"].unique().tolist() == [0, 2]
    background = (made["label"] == 0).expand_as(made["image"])
    assert 0.2 < background.float().mean() < 0.8
    assert (made["image"][background] == 0).all()
    assert (kept["image"][background] != 0).float().mean() > 0.99  # noise
    assert torch.equal(made["image"][~background], kept["image"][~background])
    unsigned = {**batch, "label_region": [region.clamp(min=0).to(torch.uint8) for region in batch["label_region"]]}
    within = SegmentationViews(spatial, zero_outside=True)(unsigned)
    assert (within["image"][:, :, 0] == 0).sum() <= (made["image"][:, :, 0] == 0).sum()


def test_unequal_places_are_refused() -> None:
    spatial = SpatialCrop(SIZE)
    batch = batch_of(spatial, smooth(), torch.zeros(SHAPE, dtype=torch.uint8), count=1)
    batch["label_region"] = [batch["label_region"][0][1:]]
    with pytest.raises(ValueError, match="has a label map of"):
        SegmentationViews(spatial)(batch)


def test_autocast_changes_nothing() -> None:
    image, spatial = smooth(), SpatialCrop(SIZE, rotation_probability=1, zoom_probability=1)
    batch = batch_of(spatial, image.half(), (image[0] > 0).to(torch.uint8))
    always = {name: 1.0 for name in NOTHING if name != "rot90_probability"}
    views = SegmentationViews(spatial, augmentation=CropAugmentation(**FINE_TUNING | always))
    expected = views(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = views(batch)
    for name in ("image", "label"):
        assert made[name].dtype == expected[name].dtype
        assert torch.equal(made[name], expected[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_views_without_waiting() -> None:
    image, spatial = smooth(), SpatialCrop(SIZE, rotation_probability=0.5, zoom_probability=0.5, uniform_zoom=True)
    label = (image[0] > 0).to(torch.int16) - (image[1] > 1).to(torch.int16)
    views = SegmentationViews(spatial, augmentation=CropAugmentation(**FINE_TUNING), zero_outside=True)
    batch = batch_of(spatial, image, label)
    expected = views(batch)
    on_gpu = {name: [v.cuda() for v in values] if "region" in name else values for name, values in batch.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = views(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same = made["label"].cpu() == expected["label"]
    assert same.float().mean() > 0.9999  # but for places where two labels have equal shares
    torch.testing.assert_close(made["image"].cpu() * same, expected["image"] * same, atol=1e-3, rtol=0)
