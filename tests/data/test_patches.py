# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from common.data import PatchDataset, SegmentationTask, check_headers, labelled_lists, preprocessing_settings
from common.data.prediction import PredictionDataset
from common.data.preparing.fingerprint import fingerprint, target_spacing
from common.engines.prediction import EachCase
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


def test_a_class_that_no_label_marks_is_told(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(labelled)
    assert "cannot be learned" not in capsys.readouterr().out
    dataset(labelled, task=SegmentationTask(["background", "ball", "cube"]))
    assert "none of the 5 labels marks a voxel of cube, which cannot be learned" in capsys.readouterr().out
    regions = {"whole": [1, 2], "core": [2]}
    dataset(labelled, task=SegmentationTask(["background", "ball", "cube"], regions=regions))
    assert "marks a voxel of core, which" in capsys.readouterr().out


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


def test_figures_of_the_foreground_leave_the_ignored_label_out(tmp_path: Path) -> None:
    """Metal that nobody outlined, at 900 HU beside organs at 60, decides nothing about how a CT is scaled."""
    rng = np.random.default_rng(0)
    organs = []
    for index in range(3):
        label = np.zeros((24, 22, 20), np.uint8)
        label[5:12, 5:12, 5:12], label[16:] = 1, 9
        image = rng.normal(-800, 50, label.shape)
        image[label == 1], image[label == 9] = rng.normal(60, 10, 343), rng.normal(900, 10, (label == 9).sum())
        organs.append(image[label == 1])
        write_volume(tmp_path / "images" / f"c{index}.nii.gz", image.astype(np.float32))
        write_volume(tmp_path / "labels" / f"c{index}.nii.gz", label)
    cases = labelled_lists(str(tmp_path), fold="all")["training"]
    options = {"normalization": "ct", "cache_dir": str(tmp_path / "store")}
    _, high, mean, std = preprocessing_settings(cases, ignore_label=9, **options)["normalization"][0]["ct"]
    expected = np.concatenate(organs)
    assert (mean, std) == pytest.approx((expected.mean(), expected.std()), abs=0.5)
    assert high == pytest.approx(np.percentile(expected, 99.5), abs=2)
    assert preprocessing_settings(cases, **options)["normalization"][0]["ct"][2] > 700, "as a class it counts"


def test_marks_outside_the_images_box_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image that was cut to the head, with a label of the whole: 2 x 3 x 4 voxels of it lie where nothing is."""
    task = SegmentationTask(["background", "ball", "stem"], ignore_label=9)
    for index in range(3):
        image, mask = blobs(index)
        if index < 2:
            image[:4] = image[:, :, -3:] = 0
            mask[:, :, -3:], mask[0] = 9, 9  # no verdict there: nothing is lost
        if index == 0:
            mask[1:3, 5:8, 2:6], mask[20, 20, 24] = 2, 1
        write_volume(tmp_path / "images" / f"c{index}.nii.gz", image)
        write_volume(tmp_path / "labels" / f"c{index}.nii.gz", mask)
    told = "1 of 3 labels mark voxels outside the box around what is not 0 in the image"
    for _ in range(2):  # when it is prepared, and when it is there
        data = dataset(tmp_path, task=task)
        printed = capsys.readouterr().out
        assert told in printed
        assert "c0 (24 of stem, 1 of ball)" in printed or "c0 (1 of ball, 24 of stem)" in printed
    assert {value: count for value, count in data.volumes[0].outside.items() if value != 9} == {1: 1, 2: 24}
    assert (1 in data.volumes[0].values, 2 in data.volumes[0].values) == (True, False)


def test_slanted_volumes_are_told(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tilted = np.eye(4)
    tilted[1:3, 2] = np.sin(np.deg2rad(25)), np.cos(np.deg2rad(25))
    for part, values in zip(("images", "labels"), blobs(3), strict=True):
        nib.save(nib.Nifti1Image(values, tilted), labelled / part / "case_3.nii.gz")
    told = r"note: 1 of 5 volumes have axes that are not at right angles, .* by up to 25.0 degrees \(.*case_3.nii.gz\)"
    for _ in range(2):  # when it is prepared, and when it is there
        dataset(labelled)
        assert re.search(told, capsys.readouterr().out)
    check_headers([{"image": str(file)} for file in sorted((labelled / "images").iterdir())])
    assert re.search(told, capsys.readouterr().out), "and before it is predicted"


def test_backgrounds_that_are_nearly_0_are_told_in_one_line(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((labelled / "images").iterdir())
    for index, share in ((1, 4), (3, 2)):  # one part in so many
        image, _ = blobs(index)
        image[: len(image) // share] = 1e-31
        write_volume(files[index], image.astype(np.float32))
    told = r"note: of 2 of 5 images up to 50% of the voxels \(.*case_3.nii.gz\) are nearly but not exactly 0"
    for _ in range(2):  # when it is prepared, and when it is there
        dataset(labelled)
        printed = capsys.readouterr()
        assert re.search(told, printed.out)
        assert (printed.out + printed.err).count("nearly") == 1
    cases: list[dict[str, Any]] = [{"image": str(file)} for file in files]
    each = EachCase(cases, cases, output_dir=str(tmp_path / "out"), labels=["background", "ball"], pictures=0)
    engine = SimpleNamespace(_iteration=lambda *_: {}, state=SimpleNamespace())
    for item in PredictionDataset(cases, transform=volume_preprocessing()):
        each(engine, {key: [value] for key, value in item.items()})  # type: ignore[arg-type]
    each.report()
    printed = capsys.readouterr()
    assert re.search(told, printed.out), "and when they are predicted"
    assert (printed.out + printed.err).count("nearly") == 1


def test_labels_as_an_atlas_numbers_them(tmp_path: Path) -> None:
    values = {"background": 0, "ball": 614_454_277, "stem": 354}
    for index in range(2):
        image, mask = blobs(index)
        label = mask.astype(np.int64) * 614_454_277
        label[2:5, 2:5, 2:5] = 354
        write_volume(tmp_path / "images" / f"c{index}.nii.gz", image)
        write_volume(tmp_path / "labels" / f"c{index}.nii.gz", label.astype(np.int32))
    data = dataset(tmp_path, task=SegmentationTask(values), patch=24)
    assert sorted(data.volumes[0].values) == [0, 354, 614_454_277]
    assert data.volumes[0].values[614_454_277] == blobs(0)[1].sum(), "to the last digit, and not as float32 rounds it"
    _, label = views(data, 6)
    assert label.dtype == torch.int32
    assert set(label.unique().tolist()) <= set(values.values())


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
