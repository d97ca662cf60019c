# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import PatchDataset, SegmentationTask, labelled_lists, preprocessing_settings
from common.data.preparing.fingerprint import fingerprint, target_spacing
from common.errors import DataError, SettingsError
from common.transforms import volume_preprocessing
from common.views import SegmentationViews, SpatialCrop

from ..conftest import blobs, write_volume

BALL = SegmentationTask(["background", "ball"])


def dataset(folder: Path, *, patch: int = 8, task: SegmentationTask = BALL, **options: object) -> PatchDataset:
    channels = int(options.pop("channels", 1))  # type: ignore[call-overload]
    cases = labelled_lists(str(folder), channels=channels, fold="all")["training"]
    settings = preprocessing_settings(cases, channels=channels)
    arguments = {
        "spatial": SpatialCrop(patch, rotation_probability=0, zoom_probability=0, flip_probability=0),
        "store_dir": str(folder / "store"),
        "settings": settings,
        "seed": 0,
        "batch_size": 2,
    }
    return PatchDataset(cases, task=task, **{**arguments, **options})  # type: ignore[arg-type]


def views(data: PatchDataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    items = [data[1, index] for index in range(count)]
    batch = {key: [value for item in items for value in item[key]] for key in items[0]}
    made = SegmentationViews(data.spatial)(batch)
    return made["image"], made["label"]


def test_the_second_of_two_samples_shows_foreground(labelled: Path) -> None:
    _, label = views(dataset(labelled), 80)
    shown = label.flatten(1).any(1)
    assert shown[1::2].all()
    assert not shown[::2].all(), "the first lies anywhere"


@pytest.mark.parametrize(("batch", "forced"), [(1, 0), (2, 1), (3, 1), (4, 1), (8, 3)])
def test_the_share_of_foreground_is_nnunets(labelled: Path, batch: int, forced: int) -> None:
    """Samples from round(batch * 0.67) on; at batch 1 the rounding leaves none."""
    assert batch - dataset(labelled, batch_size=batch).first_forced == forced


def test_classes_and_cases_are_drawn_evenly_however_large(tmp_path: Path) -> None:
    task = SegmentationTask(["background", "large", "small", "absent"])
    for index in range(3):
        image, _ = blobs(index)
        label = np.zeros(image.shape, np.uint8)
        label[2:14, 2:14, 2:14] = 1
        label[20, 20, 20] = 2
        write_volume(tmp_path / "images" / f"c{index}.nii.gz", image)
        write_volume(tmp_path / "labels" / f"c{index}.nii.gz", label)
    data = dataset(tmp_path, task=task, patch=4)
    drawn: Counter[int] = Counter()
    sources: Counter[str] = Counter()
    for index in range(1, 600, 2):
        item = data[1, index]
        drawn[2 if (item["label_region"][0] == 2).any() else 1] += 1
        sources[item["path"][0]] += 1
    assert drawn[2] == pytest.approx(150, abs=45), "one voxel has the chance of a thousand"
    assert all(count == pytest.approx(100, abs=40) for count in sources.values())


def test_image_and_label_are_of_one_place(labelled: Path) -> None:
    """The ball is 80 brighter than noise of 10, so it can be told from the image alone."""
    image, label = views(dataset(labelled, patch=16), 20)
    inside, outside = image[label == 1], image[label == 0]
    assert float(inside.quantile(0.02)) > float(outside[outside != 0].quantile(0.9))


def test_draws_do_not_depend_on_what_was_read_before(labelled: Path) -> None:
    data, again = dataset(labelled), dataset(labelled)
    order = [(2, 5), (1, 0), (1, 3)]
    one, other = [data[name] for name in order], [again[name] for name in order[::-1]][::-1]
    for a, b in zip(one, other, strict=True):
        assert a["spatial"] == b["spatial"]
        assert torch.equal(a["region"][0], b["region"][0])


def test_a_case_smaller_than_the_patch(labelled: Path) -> None:
    image, label = views(dataset(labelled, patch=40), 4)
    assert image.shape == (4, 1, 40, 40, 40)
    assert label.flatten(1).any(1).all(), "all of the volume is in the patch"


def test_two_channels(labelled: Path) -> None:
    for path in sorted((labelled / "images").iterdir()):
        index = int(path.name[5])
        write_volume(path.with_name(f"case_{index}_0000.nii.gz"), blobs(index)[0])
        write_volume(path.with_name(f"case_{index}_0001.nii.gz"), 300 - blobs(index)[0])
        path.unlink()
    image, _ = views(dataset(labelled, channels=2, patch=24), 4)
    assert image.shape == (4, 2, 24, 24, 24)
    torch.testing.assert_close(image[:, 0], -image[:, 1], atol=5e-3, rtol=0)


def test_with_an_ignored_label_patches_lie_where_there_is_a_verdict(tmp_path: Path) -> None:
    """A scribble: two voxels are labelled, all else is ignored."""
    image, _ = blobs(0)
    label = np.full(image.shape, 2, np.uint8)
    label[4, 4, 4], label[20, 20, 20] = 1, 0
    write_volume(tmp_path / "images" / "a.nii.gz", image)
    write_volume(tmp_path / "labels" / "a.nii.gz", label)
    data = dataset(tmp_path, task=SegmentationTask(["background", "ball"], ignore_label=2), patch=6)
    _, shown = views(data, 20)
    assert (shown != 2).flatten(1).any(1).all()
    assert (shown == 0).any(), "the background voxel is a verdict too"


def test_labels_that_do_not_fit_are_left_out_and_empty_ones_are_told(
    labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_volume(labelled / "labels" / "case_0.nii.gz", blobs(0)[1] * 7)
    write_volume(labelled / "labels" / "case_1.nii.gz", blobs(1)[1] * 0)
    data = dataset(labelled)
    assert len(data.volumes) == 4
    told = capsys.readouterr().out
    assert "holds the values 7" in told
    assert "case_1" in told.split("mark nothing")[1]
    with pytest.raises(DataError, match="holds the values 7"):
        dataset(labelled, strict=True)
    for index in range(5):
        write_volume(labelled / "labels" / f"case_{index}.nii.gz", blobs(index)[1] * 0)
    with pytest.raises(DataError, match="none of the 5 labels marks a voxel of ball"):
        dataset(labelled)


def test_the_spacing_of_a_data_set() -> None:
    assert target_spacing([[3, 1, 1], [3, 1, 1], [1, 1, 1]], [[40, 200, 200]] * 3) == [3, 1, 1], "not coarse enough"
    coarse = [[5.0, 1.0, 1.0], [6.0, 1.0, 1.0], [4.0, 1.0, 1.0]]
    assert target_spacing(coarse, [[20, 200, 200]] * 3)[0] == pytest.approx(np.percentile([5, 6, 4], 10))
    assert target_spacing(coarse, [[90, 200, 200]] * 3)[0] == 5, "not few slices"
    fine = [[0.5, 1, 1]] + [[8.0, 1, 1]] * 3
    assert target_spacing(fine, [[20, 200, 200]] * 4)[0] == pytest.approx(np.percentile([0.5, 8, 8, 8], 10))
    wide = [[0.1, 1, 1]] * 2 + [[8.0, 1, 1]] * 3
    assert target_spacing(wide, [[20, 200, 200]] * 5)[0] == pytest.approx(1 + 1e-5), "never finer than in plane"


def test_what_preprocessing_a_data_set_gets(labelled: Path, tmp_path: Path) -> None:
    for index in range(5):
        image, mask = blobs(index)
        write_volume(labelled / "images" / f"case_{index}.nii.gz", image, spacing=1.5)
        write_volume(labelled / "labels" / f"case_{index}.nii.gz", mask, spacing=1.5)
    cases = labelled_lists(str(labelled), fold="all")["training"]
    settings = preprocessing_settings(cases, spacing_mm="median", normalization="ct", cache_dir=str(tmp_path / "store"))
    assert settings["spacing_mm"] == [1.5, 1.5, 1.5]
    low, high, mean, std = settings["normalization"][0]["ct"]
    balls = np.concatenate([blobs(index)[0][blobs(index)[1] > 0] for index in range(5)])
    assert [low, high] == pytest.approx(np.percentile(balls, [0.5, 99.5]), abs=1)
    assert (mean, std) == pytest.approx((balls.mean(), balls.std()), abs=0.3)
    (labelled / "images" / "case_0.nii.gz").touch()
    image = volume_preprocessing("image", **settings)({"image": cases[0]["image"]})["image"]
    raw = blobs(0)[0].clip(low, high)
    assert float(image.mean()) == pytest.approx((raw.mean() - mean) / std, abs=1e-3)
    # kept for the same files, found anew for others
    assert len(list((tmp_path / "store").glob("fingerprint-*"))) == 1
    fingerprint(cases[:2], cache_dir=str(tmp_path / "store"))
    assert len(list((tmp_path / "store").glob("fingerprint-*"))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spacing_mm": "finest"}, "median, pretrained or null"),
        ({"normalization": "minmax"}, "must be one of zscore"),
        ({"normalization": ["zscore", "ct", "none"], "channels": 2}, "or a list of 2"),
        ({"channels": 0}, "number of images"),
        ({"spacing_mm": "pretrained", "pretrained": "/nowhere.pt"}, "at what spacing"),
    ],
)
def test_preprocessing_that_does_not_exist(arguments: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        preprocessing_settings([], **arguments)


def test_masked_z_score_leaves_the_outside_at_zero(tmp_path: Path) -> None:
    image = np.zeros((20, 20, 20), np.float32)
    rng = np.random.default_rng(0)
    image[4:16, 4:16, 4:16] = 100 + 10 * rng.standard_normal((12, 12, 12))
    image[8, 8, 8] = 0  # a hole belongs to the inside
    image[0, 0, 0] = image[19, 19, 19] = 50  # so that nothing is cropped
    path = write_volume(tmp_path / "a.nii.gz", image)
    made = volume_preprocessing("image", normalization="zscore_nonzero")({"image": str(path)})["image"][0].numpy()
    inside = np.zeros(image.shape, bool)
    inside[4:16, 4:16, 4:16] = inside[0, 0, 0] = inside[19, 19, 19] = True
    assert np.all(made[~inside.transpose(2, 1, 0)] == 0)
    chosen = made[inside.transpose(2, 1, 0)]
    assert (chosen.mean(), chosen.std()) == pytest.approx((0, 1), abs=1e-4)
    assert made[8, 8, 8] < -5
