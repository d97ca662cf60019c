# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Every kind of bad file ends in a sentence that names it and says what to do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.data import (
    SegmentationTask,
    StoreSettings,
    VolumeStore,
    check_first_labels,
    image_list,
    labelled_lists,
    pretraining_lists,
    usable_cases,
)
from common.data.checking.checks import check_case
from common.errors import DataError, SettingsError

from ..conftest import blobs, write_volume

BALL = SegmentationTask(["background", "ball"])


def truncated(path: Path) -> None:
    write_volume(path, blobs(0)[0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def header_only(path: Path) -> None:
    write_volume(path, blobs(0)[0])
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:400]))


def with_value(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        image = blobs(0)[0]
        image[3, 4, 5] = value
        write_volume(path, image)

    return write


def zero_spacing(path: Path) -> None:
    image = nib.Nifti1Image(blobs(0)[0], None)
    image.header["pixdim"][1:4] = [1.0, 0.0, 1.0]
    image.header["sform_code"], image.header["qform_code"] = 0, 0
    nib.save(image, path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[84:88] = np.float32(0).tobytes()  # pixdim[2]
    raw[252:256] = b"\0" * 4  # no qform, no sform
    path.write_bytes(gzip.compress(bytes(raw)))


def colours(path: Path) -> None:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), kind), np.eye(4)), path)


NOISE = np.random.default_rng(0).random((8, 8, 8, 2), np.float32)

BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated gzip": (truncated, "cut short or damaged"),
    "truncated image": (header_only, "cut short or damaged"),
    "not an image": (lambda path: path.write_text("hello"), "cannot be read as NIfTI"),
    "empty file": (lambda path: path.write_bytes(b""), "cannot be read as NIfTI"),
    "4-D": (lambda path: write_volume(path, NOISE), "4 dimensions"),
    "2-D": (lambda path: write_volume(path, NOISE[..., 0, 0]), "2 dimensions"),
    "one slice": (lambda path: write_volume(path, NOISE[..., :1, 0]), "at least 2 voxels"),
    "NaN": (with_value(np.nan), "1 voxels that are NaN or infinite"),
    "infinite": (with_value(np.inf), "1 voxels that are NaN or infinite"),
    "constant": (lambda path: write_volume(path, np.full((8, 8, 8), 3.0, np.float32)), "constant (3 everywhere)"),
    "zero spacing": (zero_spacing, "correct its header"),
    "absurd spacing": (lambda path: write_volume(path, blobs(0)[0], spacing=5000.0), "correct its header"),
    "box": (
        lambda path: write_volume(path, np.pad(np.ones((8, 8, 8), np.float32), 4)),
        "is constant where it is not zero",
    ),
    "colours": (colours, "save plain numbers"),
    "missing": (lambda path: None, "there is no file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    make, words = BAD[kind]
    make(path)
    with pytest.raises(DataError) as stored:
        VolumeStore(tmp_path / "store", StoreSettings()).prepare_one({"image": str(path)})
    raised = [stored]
    if kind != "box":  # seen only after cropping
        with pytest.raises(DataError) as checked:
            check_case({"image": str(path)})
        raised.append(checked)
    for error in raised:
        assert "scan.nii.gz" in str(error.value)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    assert list((tmp_path / "store").iterdir()) == []


def label_case(folder: Path, mask: np.ndarray, **options: float) -> dict[str, str]:
    image = write_volume(folder / "image.nii.gz", blobs(0)[0])
    return {"image": str(image), "label": str(write_volume(folder / "label.nii.gz", mask, **options))}


@pytest.mark.parametrize(
    ("mask", "options", "words"),
    [
        (blobs(0)[1][:-1], {}, "do not share one grid"),
        (blobs(0)[1], {"spacing": 1.5}, "do not share one grid"),
        (blobs(0)[1] * 4, {}, "holds the values 4"),
        (blobs(0)[1] * 0.5, {}, "holds the value 0.5"),
    ],
)
def test_bad_labels(mask: np.ndarray, options: dict[str, float], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as error:
        check_case(label_case(tmp_path, mask.astype(np.float32), **options), task=BALL)
    assert "label.nii.gz" in str(error.value)


def test_one_bad_case_is_skipped_or_fatal(labelled: Path) -> None:
    truncated(labelled / "images" / "case_0.nii.gz")
    cases = [case for part in labelled_lists(str(labelled)).values() for case in part]
    assert len(usable_cases(cases, task=BALL)) == 4
    with pytest.raises(DataError, match="case_0"):
        usable_cases(cases, task=BALL, strict=True)
    with pytest.raises(DataError, match="Nothing is left"):
        usable_cases([case for case in cases if "case_0" in case["image"]])
    for wrong in (["background"], "lesion", ["a", "a"]):
        with pytest.raises(SettingsError, match="background first"):
            SegmentationTask(wrong)


def test_names_of_classes_are_held_against_the_first_label_maps(labelled: Path) -> None:
    cases = labelled_lists(str(labelled), fold="all")["training"]
    check_first_labels(cases, BALL)
    for index in range(3):
        mask = blobs(index)[1] * (4 if index else 1)
        write_volume(labelled / "labels" / f"case_{index}.nii.gz", mask)
    check_first_labels(cases, BALL)  # one of the three is as it should be, so the others are what is wrong
    write_volume(labelled / "labels" / "case_0.nii.gz", blobs(0)[1] * 2)
    with pytest.raises(SettingsError, match=r"case_0.nii.gz holds the values 2, .* --labels.* each of the 3 first"):
        check_first_labels(cases, BALL)
    truncated(labelled / "labels" / "case_0.nii.gz")  # which is judged later
    with pytest.raises(SettingsError, match=r"case_1.nii.gz holds the values 4, .* each of the 2 first"):
        check_first_labels(cases, BALL)


def test_folders(tmp_path: Path, labelled: Path) -> None:
    for function in (pretraining_lists, labelled_lists, image_list):
        with pytest.raises(DataError, match="there is no folder"):
            function(str(tmp_path / "nowhere"))
        with pytest.raises(DataError, match="--dataset_dir"):
            function("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file ending in"):
        pretraining_lists(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="holds no labelled data"):
        labelled_lists(str(tmp_path / "empty"))
    (labelled / "labels" / "case_3.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case_3\.nii\.gz has no label"):
        labelled_lists(str(labelled))


def test_datalists(tmp_path: Path, labelled: Path) -> None:
    path = tmp_path / "list.json"
    for content, words in (
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ('{"training": [{"image": ["a", "b"]}]}', "one path"),
        ("{}", "no entries"),
        ('{"training": [{"label": "x"}]}', 'needs an "image"'),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            pretraining_lists(datalist=str(path))
    with pytest.raises(DataError, match="cannot be read"):
        pretraining_lists(datalist=str(tmp_path / "none.json"))
    entry = {"image": "images/case_0.nii.gz", "label": "labels/case_0.nii.gz"}
    (labelled / "list.json").write_text(
        json.dumps({"training": [entry], "validation": [entry], "test": ["images/case_1.nii.gz"]})
    )
    lists = labelled_lists(datalist=str(labelled / "list.json"))
    assert lists["training"][0]["label"] == str(labelled / "labels" / "case_0.nii.gz")
    assert image_list(datalist=str(labelled / "list.json")) == [{"image": str(labelled / "images" / "case_1.nii.gz")}]
    path.write_text(json.dumps({"training": [{"image": "a.nii"}]}))
    with pytest.raises(DataError, match='has no "label"'):
        labelled_lists(datalist=str(path))


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (6, 1), (30, 5), (1000, 10)])
def test_validation_shares(tmp_path: Path, count: int, held_out: int) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"training": [f"{i}.nii" for i in range(count)]}))
    lists = pretraining_lists(datalist=str(tmp_path / "list.json"))
    assert len(lists["validation"]) == held_out
    assert len(lists["training"]) == count - held_out
    assert lists == pretraining_lists(datalist=str(tmp_path / "list.json"))


def test_pre_training_takes_nothing_but_images_of_a_list_with_labels(labelled: Path, tmp_path: Path) -> None:
    entries = [{"image": f"images/case_{i}.nii.gz", "label": f"labels/case_{i}.nii.gz", "age": 5} for i in range(5)]
    (labelled / "list.json").write_text(json.dumps({"training": entries[:4], "validation": entries[4:]}))
    lists = pretraining_lists(datalist=str(labelled / "list.json"))
    assert all(case.keys() == {"image"} for part in lists.values() for case in part)
    volume = VolumeStore(tmp_path / "store", StoreSettings()).prepare_one(lists["training"][0])
    assert volume.masks == ()


def test_labels_are_not_trained_on_and_a_lists_own_folder_comes_first(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [case["image"] for part in pretraining_lists(str(labelled)).values() for case in part]
    assert len(found) == 5
    assert not any("/labels/" in path for path in found)
    (tmp_path / "elsewhere" / "images").mkdir(parents=True)
    (tmp_path / "elsewhere" / "images" / "case_0.nii.gz").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (labelled / "list.json").write_text(json.dumps({"test": ["images/case_0.nii.gz"]}))
    assert image_list(datalist=str(labelled / "list.json"))[0]["image"] == str(labelled / "images" / "case_0.nii.gz")


def test_one_volume_is_trained_and_validated_on(images: Path) -> None:
    for path in sorted(images.iterdir())[1:]:
        path.unlink()
    lists = pretraining_lists(str(images))
    assert lists["training"] == lists["validation"]
