# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Labelled data in every form that users have, its splits, and how the store keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from sklearn.model_selection import KFold

from common.data import (
    SegmentationTask,
    StoreSettings,
    VolumeStore,
    every_image,
    image_list,
    labelled_lists,
    segmentation_task,
    split_cases,
)
from common.data.cases import case_name
from common.data.checking.checks import check_case, check_channels
from common.data.listing.datalists import channel_cases
from common.data.listing.descriptions import contradicted
from common.errors import DataError, SettingsError

from ..conftest import blobs, write_volume


def names(lists: dict) -> set[str]:
    return {case_name(case) for part in lists.values() for case in part}


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    """An nnU-Net raw folder of six cases with two channels."""
    folder = tmp_path / "Dataset007_Balls"
    for index in range(6):
        image, mask = blobs(index)
        write_volume(folder / "imagesTr" / f"ball_{index:03d}_0000.nii.gz", image)
        write_volume(folder / "imagesTr" / f"ball_{index:03d}_0001.nii.gz", 200 - image)
        write_volume(folder / "labelsTr" / f"ball_{index:03d}.nii.gz", mask)
    write_volume(folder / "imagesTs" / "ball_009_0000.nii.gz", image)
    write_volume(folder / "imagesTs" / "ball_009_0001.nii.gz", image)
    content = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "ball": 1, "ignore": 2}}
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 6, "file_ending": ".nii.gz"}))
    return folder


def test_an_nnunet_folder(nnunet: Path) -> None:
    lists = labelled_lists(str(nnunet), channels=2)
    assert names(lists) == {f"ball_{index:03d}" for index in range(6)}
    case = lists["training"][0]
    assert [Path(file).name[-12:] for file in case["image"]] == ["_0000.nii.gz", "_0001.nii.gz"]
    assert Path(case["label"]).name == f"{case['name']}.nii.gz"
    assert [case["name"] for case in image_list(str(nnunet), channels=2)] == ["ball_009"]
    task = segmentation_task(str(nnunet / "dataset.json"))
    assert (list(task.labels), task.ignore_label) == (["background", "ball"], 2)
    assert names(labelled_lists(str(nnunet), channels=None)) == names(lists)
    with pytest.raises(DataError, match=r"has the channels _0000, _0001, but --channels is 3"):
        labelled_lists(str(nnunet), channels=3)


def test_numbers_at_the_end_of_names_are_not_always_channels(tmp_path: Path) -> None:
    files = [Path(f"scan_{number:04d}.nii.gz") for number in range(3)]
    assert [case_name(case) for case in channel_cases(files)] == ["scan_0000", "scan_0001", "scan_0002"]
    assert [case_name(case) for case in channel_cases(files[:1])] == ["scan"], "nnU-Net's name of one channel"
    for index in range(2):
        image, mask = blobs(index)
        write_volume(tmp_path / "images" / f"scan_{index:04d}.nii.gz", image)
        write_volume(tmp_path / "labels" / f"scan_{index:04d}.nii.gz", mask)
    assert names(labelled_lists(str(tmp_path))) == {"scan_0000", "scan_0001"}


@pytest.mark.parametrize("channels", [1, 2])
def test_files_of_one_name_in_several_folders_are_told_apart_by_these(channels: int, tmp_path: Path) -> None:
    endings = [""] if channels == 1 else ["_0000", "_0001"]
    for index, name in enumerate(("siteA/scan", "siteB/deep/Scan", "siteB/other", "scan")):
        image, mask = blobs(index)
        for ending in endings:
            write_volume(tmp_path / "images" / f"{name}{ending}.nii.gz", image)
        write_volume(tmp_path / "labels" / f"{name}.nii.gz", mask)
    lists = labelled_lists(str(tmp_path), channels=channels, fold="all")["training"]
    assert [case_name(case) for case in lists] == ["scan", "siteA/scan", "siteB/deep/Scan", "siteB/other"]
    for case in lists:
        assert case["label"] == str(tmp_path / "labels" / f"{case['name']}.nii.gz")
        files = [str(tmp_path / "images" / f"{case['name']}{ending}.nii.gz") for ending in endings]
        assert case["image"] == (files[0] if channels == 1 else files)
    for found in (image_list, every_image):  # predictions and features are called as what they are compared with
        assert names({"all": found(str(tmp_path), channels=channels)}) == names({"all": lists})
    assert names(labelled_lists(str(tmp_path), channels=None)) == names({"all": lists}), "and references"
    for file in (tmp_path / "images").rglob("siteA/*"):
        file.rename(file.with_name(f"one{file.name}"))
    (tmp_path / "labels/siteA/scan.nii.gz").rename(tmp_path / "labels/onescan.nii.gz")
    for file in (tmp_path / "images").rglob("Scan*"):
        file.rename(file.with_name(f"two{file.name}"))
    (tmp_path / "labels/siteB/deep/Scan.nii.gz").rename(tmp_path / "labels/siteB/deep/twoScan.nii.gz")
    alone = labelled_lists(str(tmp_path), channels=channels)
    assert names(alone) == {"scan", "onescan", "twoScan", "other"}, "without need names hold no folders"
    (tmp_path / "labels/siteB/other.nii.gz").unlink()
    with pytest.raises(DataError, match=r"siteB/other(_0000)?.nii.gz has no label: .*labels/other.nii.gz is missing"):
        labelled_lists(str(tmp_path), channels=channels)


def test_cases_of_one_name_do_not_share_a_label(tmp_path: Path) -> None:
    for site in "AB":
        write_volume(tmp_path / "images" / site / "scan_0000.nii.gz", blobs(0)[0])
    write_volume(tmp_path / "labels" / "scan.nii.gz", blobs(0)[1])
    with pytest.raises(DataError, match=r"has no label: .*labels/A/scan(_0000)?.nii.gz is missing"):
        labelled_lists(str(tmp_path))
    assert len(image_list(str(tmp_path))) == 2, "nor is one of them lost"


def test_a_decathlon_folder_with_four_dimensional_images(tmp_path: Path) -> None:
    for index in range(3):
        image, mask = blobs(index)
        write_volume(tmp_path / "imagesTr" / f"brain_{index}.nii.gz", np.stack([image, -image], axis=-1))
        write_volume(tmp_path / "labelsTr" / f"brain_{index}.nii.gz", mask)
    entry = [{"image": f"./imagesTr/brain_{i}.nii.gz", "label": f"./labelsTr/brain_{i}.nii.gz"} for i in range(3)]
    content = {"labels": {"0": "background", "1": "tumour"}, "training": entry, "modality": {"0": "a", "1": "b"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    by_file = labelled_lists(datalist=str(tmp_path / "dataset.json"), channels=2)
    assert names(by_file) == names(labelled_lists(str(tmp_path), channels=2)) == {"brain_0", "brain_1", "brain_2"}
    task = segmentation_task(str(tmp_path / "dataset.json"))
    assert list(task.labels) == ["background", "tumour"]
    case = by_file["training"][0]
    check_case(case, task=task, channels=2)
    with pytest.raises(DataError, match="4 dimensions"):
        check_channels(case, 1)
    with pytest.raises(DataError, match="holds 2 channels, but --channels is 3"):
        check_channels(case, 3)
    store = VolumeStore(tmp_path / "store", StoreSettings(channels=2))
    volume = store.prepare_one(case)
    region = volume.read((2, 3, 4), (12, 11, 10))
    assert region.shape == (2, 10, 8, 6)
    np.testing.assert_allclose(region[0], -region[1], atol=2e-3)


def test_regions_of_an_nnunet_dataset(tmp_path: Path) -> None:
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}}))
    task = segmentation_task(str(file))
    assert task.names == ["whole", "core", "enhancing"]
    assert task.painted == [1, 2, 3]
    with pytest.raises(SettingsError, match="cannot be read"):
        segmentation_task(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": ["background"]}, "background first"),
        ({"labels": "lesion"}, "background first"),
        (
            {"labels": ["anterior", "posterior", "background"]},
            r"every score would be of another class; write --labels \"\['background', 'anterior', 'posterior'\]\"",
        ),
        ({"labels": ["edema", "core"]}, r"write --labels \"\['background', 'edema', 'core'\]\", or .*'edema': 0"),
        ({"labels": ["background", "x"], "ignore_label": 1}, "beyond the classes"),
        ({"labels": ["background", "x"], "regions": {"a": [2]}}, "foreground classes, which are 0 to 1"),
        ({"labels": ["background", "x", "y"], "regions": {"a": [1], "b": [1, 2]}}, "larger regions first"),
        ({"labels": ["background", "x"], "regions": ["a"]}, "write --regions"),
    ],
)
def test_tasks_that_make_no_sense(arguments: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        SegmentationTask(**arguments)


def test_any_name_of_the_background_that_is_said_with_its_value_is_kept() -> None:
    task = SegmentationTask({"not tumour": 0, "tumour": 1})
    assert (task.names, task.counted) == (["tumour"], True)
    assert SegmentationTask(task.plain_labels).plain_labels == {"not tumour": 0, "tumour": 1}
    assert SegmentationTask(["Background", "tumour"]).plain_labels == ["Background", "tumour"]


def test_names_are_held_against_the_dataset_json(tmp_path: Path) -> None:
    file = tmp_path / "dataset.json"
    assert contradicted(["background", "b"], file) is None, "there is none"
    for labels in (
        {"background": 0, "anterior": 1, "posterior": 2},
        {"0": "background", "1": "Anterior", "2": "posterior"},
    ):
        file.write_text(json.dumps({"labels": labels}))
        told = contradicted(["background", "posterior", "anterior"], file)
        assert told is not None
        assert told.startswith(f"labels calls the value 1 'posterior', and {file} calls 2 so")
        assert contradicted({"background": 0, "posterior": 1}, file) == told
        assert contradicted(["background", "anterior", "posterior"], file) is None
        assert contradicted(["background", "front", "back"], file) is None, "other names are nobody's mistake"
    file.write_text("{")
    assert contradicted(["background", "b"], file) is None


CASES = [{"image": f"/data/case_{index:02d}.nii.gz", "site": "abcd"[index // 5]} for index in range(20)]


def test_folds_are_those_of_nnunet_and_cover_every_case_once() -> None:
    expected = list(KFold(5, shuffle=True, random_state=12345).split(np.arange(20)))
    held_out = []
    for fold in range(5):
        lists = split_cases(CASES[::-1], fold=fold)
        held = [case_name(case) for case in lists["validation"]]
        assert held == [f"case_{index:02d}" for index in expected[fold][1]]
        assert len(lists["training"]) == 16
        held_out += held
    assert len(set(held_out)) == 20
    everything = split_cases(CASES, fold="all")
    assert everything["training"] == everything["validation"] == CASES


@pytest.mark.parametrize("fold", [None, 0, 1, 3])
def test_groups_are_never_torn_apart(fold: int | None) -> None:
    lists = split_cases(CASES, fold=fold, folds=4, group="site")
    sites = [{case["site"] for case in lists[part]} for part in ("training", "validation")]
    assert sites[0].isdisjoint(sites[1])
    assert len(sites[1]) == 1


def test_splits_from_a_file_and_what_they_lack(tmp_path: Path) -> None:
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([{"train": ["case_01"], "val": ["case_00", "case_02"]}]))
    lists = split_cases(CASES, splits=str(file))
    assert [case_name(case) for case in lists["validation"]] == ["case_00", "case_02"]
    with pytest.raises(SettingsError, match="has no fold 1; it holds 1"):
        split_cases(CASES, splits=str(file), fold=1)
    file.write_text(json.dumps([{"train": ["case_99"], "val": []}]))
    with pytest.raises(DataError, match="names case_99, which is not among the 20"):
        split_cases(CASES, splits=str(file))
    file.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        split_cases(CASES, splits=str(file))
    for fold, words in ((7, "does not exist among 5"), ("first", "must be a number"), (-1, "must be a number")):
        with pytest.raises(SettingsError, match=words):
            split_cases(CASES, fold=fold)
    with pytest.raises(SettingsError, match=r"3 case\(s\) or groups do not make 5 folds"):
        split_cases(CASES[:3], fold=0)
    with pytest.raises(DataError, match="has no 'centre'"):
        split_cases(CASES, group="centre")


def test_a_table_of_groups(labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("case,centre\n" + "".join(f"case_{i},{'AABBB'[i]}\n" for i in range(5)))
    lists = labelled_lists(str(labelled), groups=str(table), group="centre")
    assert [{case["centre"] for case in part} for part in lists.values()] in ([{"A"}, {"B"}], [{"B"}, {"A"}])
    table.write_text("name,centre\nx,A\n")
    with pytest.raises(DataError, match="column case"):
        labelled_lists(str(labelled), groups=str(table))
    table.write_text("case,centre\nother,A\n")
    with pytest.raises(DataError, match="names none of the cases"):
        labelled_lists(str(labelled), groups=str(table))


def test_the_store_keeps_labels_and_where_their_voxels_are(labelled: Path, tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings(spacing_mm=1.5))
    case = labelled_lists(str(labelled))["training"][0]
    volume = store.prepare_one(case)
    label = volume.read((0, 0, 0), volume.shape, mask="label")
    assert label.dtype == np.uint8
    assert dict(volume.values) == dict(zip(*np.unique(label, return_counts=True), strict=True))
    rng = np.random.default_rng(0)
    drawn = {volume.voxel([1], rng) for _ in range(2000)}
    assert drawn <= set(map(tuple, np.argwhere(label == 1)))
    assert len(drawn) > 0.9 * volume.values[1] * (1 - np.exp(-2000 / volume.values[1]))
    assert volume.voxel([7], rng) is None
    assert store.get(case) == volume
    write_volume(Path(case["label"]), np.zeros((24, 28, 26), np.uint8))
    assert store.get(case) is None, "another label is another case"
    assert list(store.prepare_one(case).values) == [0]


def test_labels_that_the_store_refuses(labelled: Path, tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    case = labelled_lists(str(labelled))["training"][0]
    for values, words in (
        (0.50001, "holds the value 0.50001;"),
        (-1.0, "holds the value -1"),
        (np.nan, "holds the value nan"),
    ):
        write_volume(Path(case["label"]), np.full((24, 28, 26), values, np.float32))
        with pytest.raises(DataError, match=words):
            store.prepare_one(case)
    write_volume(Path(case["label"]), np.zeros((24, 28, 25), np.uint8))
    with pytest.raises(DataError, match="do not share one grid"):
        store.prepare_one(case)
    nib.save(nib.Nifti1Image(np.zeros((24, 28, 26), np.uint8), np.diag([1, 1, 2, 1])), case["label"])
    with pytest.raises(DataError, match="do not share one grid"):
        store.prepare_one(case)
