# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Two files lie on one grid if their voxels are the same places, in millimetres and in whatever order of axes."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.data import SegmentationTask
from common.errors import DataError
from common.transforms import RestoreSegmentationd, VolumeReader, read_volume, volume_preprocessing
from common.transforms.grids import AxesTurn, same_grid, slant_degrees, turn_onto

TURNS = [AxesTurn(order, flips) for order in permutations(range(3)) for flips in product((False, True), repeat=3)]


def rotation(degrees: float, first: int = 0, second: int = 1) -> np.ndarray:
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[[first, first, second, second], [first, second, first, second]] = (
        *(np.cos(angle), -np.sin(angle)),
        *(np.sin(angle), np.cos(angle)),
    )
    return turn


def judged(affine: np.ndarray, onto: np.ndarray, shape: tuple[int, int, int] = (256, 256, 192)) -> str:
    try:
        same_grid("a", shape, affine, onto="b", onto_shape=shape, onto_affine=onto, remedy="mend it")
    except DataError as error:
        return str(error)
    return "same"


def test_corners_decide_in_millimetres() -> None:
    """What is a small difference of an affine's entries becomes millimetres over hundreds of voxels."""
    for affine, told in (
        (rotation(0.55), "3.46 mm apart"),
        (np.diag([1.009, 1, 1, 1]), "2.29 mm apart"),
        (np.diag([1.0, 1, 1, 1]) + 0.3 * np.eye(4)[:, [3, 0, 1, 2]].T @ np.diag([0, 0, 0, 1]), "0.3 mm apart"),
    ):
        assert told in judged(affine, np.eye(4)), told
    half = np.diag([0.5, 0.5, 0.5, 1.0])
    assert "4.85 mm apart, with voxels of 0.5 x 0.5 x 0.5 mm" in judged(
        np.diag([0.5095, 0.5, 0.5, 1]), half, (512,) * 3
    )
    moved = np.eye(4)
    moved[0, 3] = 0.005  # a rounding error
    assert judged(moved, np.eye(4)) == "same"
    assert judged(np.eye(4).astype(np.float32) * np.float32(1 + 1e-6), np.eye(4)) == "same"
    thick = np.diag([0.4, 0.4, 5.0, 1.0])
    moved = thick.copy()
    moved[2, 3] = 0.2  # little for a slice, half a voxel within it
    assert "0.2 mm apart" in judged(moved, thick)


def test_shapes_that_no_turn_makes_equal() -> None:
    with pytest.raises(
        DataError, match=r"a \(4, 5, 6\) and b \(4, 5, 7\) do not share one grid \(their shapes differ\)"
    ):
        same_grid("a", (4, 5, 6), np.eye(4), onto="b", onto_shape=(4, 5, 7), onto_affine=np.eye(4), remedy="mend it")
    assert turn_onto((4, 5, 6), np.diag([2.0, 1, 1, 1]), (4, 5, 6), np.eye(4))[1] == 3.0
    assert turn_onto((4, 4, 4), rotation(90), (4, 4, 4), np.eye(4))[1] == 3.0, "turned about its first voxel"


@pytest.mark.parametrize("turn", TURNS)
def test_every_order_of_axes_is_found_and_undone(turn: AxesTurn) -> None:
    shape = (4, 6, 5)
    affine = rotation(31) @ rotation(-17, 1, 2) @ np.diag([0.7, 1.1, 2.0, 1.0])
    affine[:3, 3] = -31, 12.5, 7
    values = np.random.default_rng(0).standard_normal((*shape, 2))
    turned, its = turn.array(values), turn.affine(affine, shape)
    found, apart = turn_onto(turned.shape[:3], its, shape, affine)
    assert found == turn.inverse()
    assert apart < 1e-9
    assert np.array_equal(found.array(turned), values)
    assert torch.equal(
        turn.tensor(torch.from_numpy(values[None, ..., 0])), torch.from_numpy(turned[None, ..., 0].copy())
    )
    place = [turned.shape[axis] - 1 - axis for axis in range(3)]
    at = nib.affines.apply_affine(affine, np.argwhere(values[..., 0] == turned[tuple(place)][0])[0])
    np.testing.assert_allclose(nib.affines.apply_affine(its, place), at, atol=1e-9)


def test_codes_are_those_of_nibabel() -> None:
    affine = rotation(31) @ rotation(-17, 1, 2) @ np.diag([-0.7, 1.1, 2.0, 1.0])
    for codes in ("RAS", "SAR", "LPI", "PIR"):
        turn = AxesTurn.to_codes(affine, codes)
        assert "".join(nib.aff2axcodes(turn.affine(affine, (4, 5, 6)))) == codes
        ornt = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
        values = np.arange(120).reshape(4, 5, 6)
        assert np.array_equal(turn.array(values), nib.apply_orientation(values, ornt))


def test_slants() -> None:
    assert slant_degrees(rotation(31) @ np.diag([1, 2, 3, 1])) == pytest.approx(0, abs=1e-6)
    shear = np.eye(4)
    shear[0, 1] = 1.0
    assert slant_degrees(shear) == pytest.approx(45)


def scan(folder: Path, affine: np.ndarray) -> tuple[Path, np.ndarray]:
    """Write an image whose bright voxels are the label's, and zeros around."""
    rng = np.random.default_rng(0)
    label = np.zeros((14, 12, 10), np.uint8)
    label[3:9, 2:6, 3:5], label[9:12, 7:10, 6:9] = 1, 2
    image = np.zeros(label.shape, np.float32)
    image[1:-1, 1:, :-1] = (10 + rng.random(label.shape) + 100 * label)[1:-1, 1:, :-1]
    nib.save(nib.Nifti1Image(image, affine), folder / "image.nii.gz")
    return folder / "image.nii.gz", label


def agreement(case: dict) -> float:
    image, label = case["image"].as_tensor()[0], case["label"].as_tensor()[0]
    levels = torch.stack([image[label == value].mean() for value in (0, 1, 2)])
    return float(((image[..., None] - levels).abs().argmin(-1) == label).float().mean())


@pytest.mark.parametrize("turn", TURNS[::5])
@pytest.mark.parametrize("reorient", [True, False])
def test_a_label_in_another_order_of_axes_is_the_images(tmp_path: Path, turn: AxesTurn, reorient: bool) -> None:
    affine = rotation(20) @ np.diag([1.0, 1.3, 2.0, 1.0])
    image, label = scan(tmp_path, affine)
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "same.nii.gz")
    other = nib.Nifti1Image(turn.array(label), turn.affine(affine, label.shape))
    nib.save(other, tmp_path / "other.nii.gz")
    chain = volume_preprocessing(["image", "label"], spacing_mm=None, reorient=reorient)
    cases = [chain({"image": str(image), "label": str(tmp_path / name)}) for name in ("same.nii.gz", "other.nii.gz")]
    assert torch.equal(cases[0]["label"].as_tensor(), cases[1]["label"].as_tensor())
    assert torch.equal(cases[1]["label"].affine, cases[1]["image"].affine)
    assert agreement(cases[1]) == 1.0


@pytest.mark.parametrize("degrees", [44.9999999, 45.0, 45.0000001])
def test_axes_between_two_directions_are_turned_by_the_images_affine(tmp_path: Path, degrees: float) -> None:
    """Near 45 degrees a rounding error decides which axis leads where; a label's own would decide otherwise."""
    affine = rotation(degrees)
    image, label = scan(tmp_path, affine)
    chain = volume_preprocessing(["image", "label"])
    task = SegmentationTask(["background", "a", "b"])
    for other in (rotation(44.99999), rotation(45.00001), rotation(45).round(6)):
        nib.save(nib.Nifti1Image(label, other), tmp_path / "label.nii.gz")
        case = chain({"image": str(image), "label": str(tmp_path / "label.nii.gz")})
        assert agreement(case) == 1.0
    case["pred"] = torch.nn.functional.one_hot(case["label"].as_tensor()[0].long(), 3).movedim(-1, 0).float()
    restored = RestoreSegmentationd("pred", transform=chain, task=task)(case)["pred"].as_tensor()[0].numpy()
    inside = read_volume(image)[0] != 0
    assert np.array_equal(restored[inside], label[inside]), "and it comes back by the same turn"


def test_channels_may_differ_in_the_order_of_their_axes(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.3, 2.0, 1.0])
    image, _ = scan(tmp_path, affine)
    values = read_volume(image)[0]
    turn = AxesTurn((2, 0, 1), (True, False, True))
    nib.save(nib.Nifti1Image(2 * turn.array(values), turn.affine(affine, values.shape)), tmp_path / "second.nii.gz")
    out = volume_preprocessing(channels=2)({"image": [str(image), str(tmp_path / "second.nii.gz")]})["image"]
    torch.testing.assert_close(out[0], out[1])
    nib.save(nib.Nifti1Image(values, affine @ np.diag([1.1, 1, 1, 1])), tmp_path / "second.nii.gz")
    with pytest.raises(DataError, match=r"second.nii.gz \(14, 12, 10\) .* 1.3 mm apart"):
        VolumeReader().get_data([str(image), str(tmp_path / "second.nii.gz")])


def test_slanted_volumes_stay_at_their_places(tmp_path: Path) -> None:
    """A gantry that was tilted by 25 degrees: what is read off a resampled volume is what lies there in space."""
    tilt = np.deg2rad(25)
    affine = np.eye(4)
    affine[1:3, 2] = 2.5 * np.sin(tilt), 2.5 * np.cos(tilt)
    affine[:3, 3] = 5, -3, 8
    shape = (20, 24, 18)
    at = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    nib.save(nib.Nifti1Image((at @ [1, 2, 3] + 500).astype(np.float32), affine), tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image((at @ [0, 1, 1] > 40).astype(np.uint8), affine), tmp_path / "label.nii.gz")
    files = {key: str(tmp_path / f"{key}.nii.gz") for key in ("image", "label")}
    out = volume_preprocessing(["image", "label"], normalization="none")(files)
    image, label = out["image"], out["label"]
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), 1, rtol=0.02)
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"), -1)
    there = nib.affines.apply_affine(image.affine.numpy(), grid)
    inner = (slice(12, -12), slice(4, -4), slice(4, -4))  # slices of 2.5 mm are splined, with bends at both ends
    np.testing.assert_allclose(image[0].numpy()[inner], (there @ [1, 2, 3] + 500)[inner], atol=0.1)
    expected = there @ [0, 1, 1]
    sure = np.abs(expected - 40) > 2
    assert np.array_equal((label[0].numpy() > 0)[sure], (expected > 40)[sure])
