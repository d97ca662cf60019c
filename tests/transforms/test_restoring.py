# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Labels come back to where they were: bit for bit as by MONAI's own inverse, whatever the file's axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd

from common.data import SegmentationTask
from common.errors import SettingsError
from common.transforms import KeepLargestComponentd, RestoreSegmentationd, SaveProbabilitiesd, volume_preprocessing
from common.transforms.geometry import resample_linear
from common.transforms.restoring import Decision
from common.transforms.writing import header_like

TASK = SegmentationTask(["background", "a", "b", "c"])
REGIONS = SegmentationTask(["background", "a", "b"], regions={"whole": [1, 2], "core": [2]})


def written(folder: Path, *, spacing: tuple[float, float, float], codes: str = "LIA") -> Path:
    """Write an image whose outer voxels are 0, with axes ``codes``, turned by 20 degrees."""
    rng = np.random.default_rng(3)
    voxels = np.zeros((17, 15, 13), np.float32)
    voxels[2:-3, 1:-2, 3:-1] = rng.uniform(1, 2, (12, 12, 9))
    turn, angle = np.eye(4), np.deg2rad(20)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    axes = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), voxels.shape)
    affine = turn @ np.linalg.inv(axes) @ np.diag([*spacing, 1])
    affine[:3, 3] = [-31.25, 12.5, 7.125]
    path = folder / "scan.nii.gz"
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def predicted(chain: Compose, path: Path, outputs: int) -> dict[str, Any]:
    case = chain({"image": str(path)})
    torch.manual_seed(0)
    case["pred"] = torch.randn(outputs, *case["image"].shape[1:])
    return case


def the_straight_way(case: dict[str, Any], chain: Compose) -> torch.Tensor:
    """Bring all logits to the file's grid with MONAI's inverse, as one would without thinking of memory."""
    options = {"transform": chain, "orig_keys": "image", "nearest_interp": False}
    return Invertd("pred", **options)(case | {"pred": MetaTensor(case["pred"])})["pred"].as_tensor()


@pytest.mark.parametrize("spacing_mm", [None, 1.0, [2.0, 0.8, 1.0]])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.3, 0.7, 2.0), (1.0, 1.0, 6.0)])
@pytest.mark.parametrize("reorient", [True, False])
def test_labels_equal_those_of_monais_inverse(
    tmp_path: Path, spacing: tuple[float, float, float], spacing_mm: Any, reorient: bool
) -> None:
    path = written(tmp_path, spacing=spacing)
    chain = volume_preprocessing("image", spacing_mm=spacing_mm, reorient=reorient)
    case = predicted(chain, path, 4)
    logits = the_straight_way(case, chain)
    crop = torch.from_numpy(np.asarray(nib.load(path).dataobj) != 0)[None]
    expected = torch.where(crop, TASK.decode(logits[None])[0], 0)
    found = RestoreSegmentationd("pred", transform=chain, task=TASK)(case)["pred"]
    assert found.dtype == torch.uint8
    assert torch.equal(found.as_tensor(), expected)
    assert np.array_equal(found.affine.numpy(), nib.load(path).affine), "to the last bit"
    assert found.meta["filename_or_obj"] == "scan.nii.gz"


@pytest.mark.parametrize("spacing_mm", [None, 1.0, [2.0, 0.8, 1.0], [0.3, 3.0, 2.0]])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.3, 0.7, 2.0), (1.0, 1.0, 6.0), (6.0, 1.0, 1.0)])
@pytest.mark.parametrize("task", [TASK, REGIONS])
def test_what_is_decided_while_logits_come_is_the_same(
    tmp_path: Path, spacing: tuple[float, float, float], spacing_mm: Any, task: SegmentationTask
) -> None:
    chain = volume_preprocessing("image", spacing_mm=spacing_mm, reorient=False)
    case = predicted(chain, written(tmp_path, spacing=spacing), task.outputs)
    expected = RestoreSegmentationd("pred", transform=chain, task=task)(dict(case))["pred"].as_tensor()
    depth = case["pred"].shape[1]
    for sizes in ([1] * depth, [depth], [3, 1, depth]):
        decision, rest = Decision(case["image"], transform=chain, task=task), case["pred"].clone()
        for size in sizes:
            decision.take(rest[:, :size])
            rest[:, :size] = float("nan")  # taken is taken
            rest = rest[:, size:]
        found = RestoreSegmentationd("pred", transform=chain, task=task)(case | {"pred": decision.labels()})["pred"]
        assert torch.equal(found.as_tensor(), expected)


@pytest.mark.parametrize(("shape", "axis"), [((23, 9, 6), None), ((23, 9, 6), 0), ((3, 5, 23), 2), ((7, 8, 9), None)])
def test_some_slices_are_those_of_the_whole(shape: tuple[int, int, int], axis: int | None) -> None:
    logits = torch.randn(2, 7, 8, 9)
    whole = resample_linear(logits, shape, axis)
    parts = [resample_linear(logits, shape, axis, slices=slice(start, start + 4)) for start in range(0, shape[0], 4)]
    assert torch.equal(torch.cat(parts, 1), whole)
    if axis is None:
        trilinear = torch.nn.functional.interpolate(logits[None], size=shape, mode="trilinear")[0]
        torch.testing.assert_close(whole, trilinear, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", [TASK, REGIONS])
def test_one_output_at_a_time_decides_as_all_together(task: SegmentationTask) -> None:
    logits = torch.randint(-3, 4, (1, task.outputs, 9, 8, 7)).float()  # with many ties
    assert torch.equal(task.decode_outputs(logits[0][:, None]), task.decode(logits)[0])


@pytest.mark.parametrize("task", [TASK, REGIONS])
def test_probabilities(tmp_path: Path, task: SegmentationTask) -> None:
    path = written(tmp_path, spacing=(1.3, 0.7, 2.0), codes="LPS")
    chain = volume_preprocessing("image", spacing_mm=1.0)
    case = predicted(chain, path, task.outputs) | {"case": "name"}
    steps = [
        SaveProbabilitiesd("pred", transform=chain, task=task, output_dir=str(tmp_path / "probabilities")),
        RestoreSegmentationd("pred", transform=chain, task=task),
    ]
    labels = Compose(steps)(case)["pred"].as_tensor()[0].numpy()
    file = nib.load(tmp_path / "probabilities" / "name_probabilities.nii.gz")
    assert file.shape == (*labels.shape, task.outputs)
    assert file.get_data_dtype() == np.float32
    assert np.array_equal(file.affine, nib.load(path).affine)
    found = np.asarray(file.dataobj)
    logits, crop = the_straight_way(case, chain), np.asarray(nib.load(path).dataobj) != 0
    expected = (logits.sigmoid() if task.regions else logits.softmax(0)).numpy()
    np.testing.assert_allclose(np.moveaxis(found, 3, 0)[:, crop], expected[:, crop], atol=1e-5)
    if task.regions:
        assert (found[~crop] == 0).all()
    else:
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
        assert (found[~crop] == [1, 0, 0, 0]).all()
        assert np.array_equal(found.argmax(-1), labels)
    assert [p.name for p in (tmp_path / "probabilities").iterdir()] == [file.get_filename().rsplit("/")[-1]]


def test_a_trace_that_is_another_ones_is_refused(tmp_path: Path) -> None:
    chain = volume_preprocessing("image")
    case = predicted(chain, written(tmp_path, spacing=(1.0, 1.0, 1.0)), 4)
    case["image"].applied_operations.pop()
    with pytest.raises(TypeError, match="CropForeground"):
        RestoreSegmentationd("pred", transform=chain, task=TASK)(case)


def test_headers_keep_the_geometry_and_nothing_else(tmp_path: Path) -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    image = nib.Nifti1Image(np.zeros((4, 5, 6, 2), np.int16), affine)
    image.header.set_slope_inter(2.0, 1.0)
    image.header["cal_max"] = 7
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a name"))
    image.set_sform(affine, code=4)
    image.set_qform(affine @ np.diag([1, 1, -1, 1]), code=2)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "image.nii.gz")
    header = header_like(tmp_path / "image.nii.gz", (4, 5, 6), np.uint8)
    source = nib.load(tmp_path / "image.nii.gz").header
    for name in ("srow_x", "quatern_d", "qoffset_z", "sform_code", "qform_code", "xyzt_units"):
        assert np.array_equal(header[name], source[name]), name
    assert header.get_data_shape() == (4, 5, 6)
    assert header.get_zooms() == (2, 3, 4)
    assert len(header.extensions) == 0
    assert header["cal_max"] == 0


def label_map() -> MetaTensor:
    """Class 1: a block and a speck; class 2: a speck that touches the block's corner, and a larger one far away."""
    labels = torch.zeros(1, 12, 12, 12, dtype=torch.uint8)
    labels[0, :4, :4, :4] = 1
    labels[0, 8, 0, 0] = 1
    labels[0, 4, 4, 4] = 2
    labels[0, 9:11, 9:11, 9:11] = 2
    return MetaTensor(labels)


@pytest.mark.parametrize(
    ("which", "task", "kept"),
    [
        (True, SegmentationTask(["background", "a", "b"]), {1: 64, 2: 8}),
        (["a"], SegmentationTask(["background", "a", "b"]), {1: 64, 2: 9}),
        ("foreground", SegmentationTask(["background", "a", "b"]), {1: 64, 2: 1}),  # corners connect
        (["whole"], REGIONS, {1: 64, 2: 1}),
        (["core"], REGIONS, {1: 65, 2: 8}),
        (True, SegmentationTask(["background", "a", "b", "absent"]), {1: 64, 2: 8}),
    ],
)
def test_largest_components(which: Any, task: SegmentationTask, kept: dict[int, int]) -> None:
    before = label_map()
    found = KeepLargestComponentd("pred", task=task, which=which)({"pred": before})["pred"]
    assert {value: int((found == value).sum()) for value in kept} == kept
    assert torch.equal(before.as_tensor(), label_map().as_tensor()), "the input is left as it is"
    with pytest.raises(SettingsError, match="largest_component names 'nothing'"):
        KeepLargestComponentd("pred", task=task, which=["nothing"])
