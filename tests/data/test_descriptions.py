# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The keys of a dataset.json mean what they mean to nnU-Net and the Decathlon; what is not followed is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data import labelled_lists, segmentation_task
from common.errors import DataError, SettingsError
from common.tasks import SegmentationTask

from ..conftest import blobs, write_volume


def described(folder: Path, labels: dict[str, Any], **more: Any) -> SegmentationTask:
    file = folder / "dataset.json"
    file.write_text(json.dumps({"channel_names": {"0": "T1"}, "labels": labels, **more}))
    return segmentation_task(str(file))


def logits(task: SegmentationTask, *rows: list[float]) -> torch.Tensor:
    """Rows are voxels, columns outputs."""
    return torch.tensor(rows).T.reshape(1, task.outputs, len(rows), 1, 1)


def test_regions_are_painted_with_the_values_that_the_file_orders(tmp_path: Path) -> None:
    """As in BraTS: necrosis 1, edema 2, enhancing 3; nnU-Net paints whole with 2, core with 1 and enhancing with 3."""
    labels = {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3}
    task = described(tmp_path, labels, regions_class_order=[2, 1, 3])
    assert (task.names, task.painted) == (["whole", "core", "enhancing"], [2, 1, 3])
    voxels = logits(task, [1, -1, -1], [1, 1, -1], [1, 1, 1], [-1, -1, -1], [-1, -1, 1])
    assert task.decode(voxels).flatten().tolist() == [2, 1, 3, 0, 3]
    assert task.decode_outputs(voxels[0][:, None]).flatten().tolist() == [2, 1, 3, 0, 3]
    other = described(tmp_path, labels, regions_class_order=[3, 2, 1])
    assert other.decode(voxels).flatten().tolist() == [3, 2, 1, 0, 1], "also where no region holds the value itself"
    assert described(tmp_path, labels).painted == [2, 1, 3], "without an order, the value that no later region holds"


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        ({"background": 0, "a": [1, 2], "b": 2}, {"regions_class_order": [1]}, "label value for each of a, b"),
        ({"background": 0, "a": [1, 2], "b": 2}, {"regions_class_order": [1, 7]}, "the classes are 0 to 2"),
        ({"background": 0, "a": 1, "b": 1}, {}, "calls the value 1 both 'a' and 'b'"),
        ({"background": 0, "a": "x"}, {}, "cannot be read as a dataset.json"),
        ({"0": "background", "1": "x", "2": "x"}, {}, "calls several values 'x'"),
        ({"a": 1, "b": 2}, {}, "background first"),
        ({"background": 0, "a": 1, "ignore": 1}, {}, "beyond the classes, which are 0 to 1"),
    ],
)
def test_files_that_say_no_task(tmp_path: Path, labels: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        described(tmp_path, labels, **more)


def test_a_list_of_one_value_is_a_class(tmp_path: Path) -> None:
    """nnU-Net trains regions only if a list holds more than one value; the order of regions then says nothing."""
    task = described(tmp_path, {"background": 0, "a": [1], "b": 2}, regions_class_order=[1, 2])
    assert (task.regions, task.names, task.values, task.outputs) == (None, ["a", "b"], [(1,), (2,)], 3)


def test_regions_of_the_command_line_stand_above_those_of_the_file(tmp_path: Path) -> None:
    described(tmp_path, {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, regions_class_order=[1, 2])
    task = segmentation_task(str(tmp_path / "dataset.json"), regions={"core": [2]}, ignore_label=9)
    assert (task.names, task.painted, task.ignore_label) == (["core"], [2], 9)
    kept = segmentation_task(str(tmp_path / "dataset.json"))
    assert (list(kept.labels), kept.ignore_label) == (["background", "label 1", "core"], 3)


def test_what_is_not_followed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"name": "x", "licence": "y", "numTraining": 3, "file_ending": ".nii.gz", "reference": "z"}
    described(tmp_path, {"background": 0, "a": 1}, **known)
    assert capsys.readouterr().out == ""
    described(
        tmp_path,
        {"background": 0, "a": 1},
        channel_names={"0": "CT", "1": "PET", "2": "noNorm"},
        overwrite_image_reader_writer="SimpleITKIO",
        file_ending=".tif",
        own=1,
    )
    printed = capsys.readouterr().out
    assert "says overwrite_image_reader_writer, own, which is not followed here" in printed
    assert (
        "calls a channel CT, by which nnU-Net normalises in a way of its own; --normalization ct does that" in printed
    )
    assert "a channel noNorm" in printed
    assert "PET" not in printed
    assert "its files end in .tif, which are not read here; convert them" in printed


def test_the_files_of_each_case_may_be_listed(tmp_path: Path) -> None:
    """nnU-Net takes the files under ``dataset`` instead of those in imagesTr and labelsTr."""
    for index in range(3):
        image, mask = blobs(index)
        write_volume(tmp_path / "elsewhere" / f"scan{index}_t1.nii.gz", image)
        write_volume(tmp_path / "elsewhere" / f"scan{index}_t2.nii.gz", image + 1)
        write_volume(tmp_path / "raw" / "labelsTr" / f"seg{index}.nii.gz", mask)
        write_volume(tmp_path / "raw" / "imagesTr" / f"unlisted{index}_0000.nii.gz", image)
    listed = {
        f"case {index}": {
            "images": [str(tmp_path / "elsewhere" / f"scan{index}_t1.nii.gz"), f"../elsewhere/scan{index}_t2.nii.gz"],
            "label": f"labelsTr/seg{index}.nii.gz",
        }
        for index in range(3)
    }
    described(tmp_path / "raw", {"background": 0, "a": 1}, dataset=listed)
    cases = labelled_lists(str(tmp_path / "raw"), channels=2, fold="all")["training"]
    assert [case["name"] for case in cases] == ["case 0", "case 1", "case 2"]
    assert [Path(file).resolve().name for file in cases[1]["image"]] == ["scan1_t1.nii.gz", "scan1_t2.nii.gz"]
    assert Path(cases[1]["label"]).name == "seg1.nii.gz"
    described(tmp_path / "raw", {"background": 0, "a": 1}, dataset=["case 0"])
    with pytest.raises(DataError, match="lists cases under dataset, but not as images and a label"):
        labelled_lists(str(tmp_path / "raw"), channels=2)


def test_values_as_an_atlas_numbers_them(tmp_path: Path) -> None:
    labels = {"background": 0, "pons": 614_454_277, "medulla": 354, "ignore": 255}
    task = described(tmp_path, labels)
    assert task.plain_labels == {"background": 0, "medulla": 354, "pons": 614_454_277}
    assert (task.names, task.values, task.outputs) == (["medulla", "pons"], [(354,), (614_454_277,)], 3)
    assert task.known == [0, 354, 614_454_277, 255]
    voxels = logits(task, [0.0, 1, 2], [2, 1, 0], [0, 3, 1])
    for found in (task.decode(voxels), task.decode_outputs(voxels[0][:, None])):
        assert found.dtype == torch.int32
        assert found.flatten().tolist() == [614_454_277, 0, 354]
        assert task.indices(found).flatten().tolist() == [2, 0, 1]
    assert SegmentationTask({"background": 0, "a": 1}).plain_labels == ["background", "a"]
    assert SegmentationTask(["background", *map(str, range(256))]).dtype == torch.int16
    assert SegmentationTask({"b": 0, "a": 2**40}).dtype == torch.int64
