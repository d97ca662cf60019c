# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirstd, Invertd
from skimage.transform import resize

from common.data.checking.survey import hints, measure
from common.transforms import AtomicNibabelWriter, ResampleToSpacingd, volume_preprocessing
from common.transforms.geometry import SliceAxisFirstd, resampled_shape, slice_axis
from common.transforms.preprocessing import NormalizeChannelsd, load_volumes

ORIENTATIONS = ["RAS", "LPS", "SRA", "PIR"]


def oblique(codes: str, spacing: tuple[float, float, float]) -> np.ndarray:
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (1, 1, 1))
    affine = np.linalg.inv(affine) @ np.diag([*spacing, 1.0])
    affine[:3, 3] = [-31.0, 12.5, 7.0]
    return affine


def smooth_case(
    folder: Path, codes: str, spacing: tuple[float, float, float] = (1.0, 1.5, 2.0)
) -> tuple[Path, np.ndarray]:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (30, 26, 22)], indexing="ij"))
    ball = (np.linalg.norm(grid, axis=0) < 0.6).astype(np.uint8)
    image = np.zeros(ball.shape, np.float32)
    image[2:-1, 1:-3, 2:-2] = (10 + grid.sum(0) + 5 * ball)[2:-1, 1:-3, 2:-2]
    affine = oblique(codes, spacing)
    nib.save(nib.Nifti1Image(image, affine), folder / "image.nii.gz")
    nib.save(nib.Nifti1Image(ball, affine), folder / "label.nii.gz")
    return folder, affine


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("reorient", [True, False])
def test_predictions_come_back_to_the_files_own_grid(tmp_path: Path, codes: str, reorient: bool) -> None:
    smooth_case(tmp_path, codes)
    chain = volume_preprocessing(["image", "label"], reorient=reorient)
    case = chain({"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz")})
    label = case["label"].as_tensor()[0]
    case["pred"] = MetaTensor(torch.stack([1 - label, label]).float())
    back = Invertd("pred", transform=chain, orig_keys="image", nearest_interp=False)(case)["pred"]
    original = nib.load(tmp_path / "label.nii.gz")
    assert back.shape[1:] == original.shape
    np.testing.assert_allclose(back.affine, original.affine, atol=1e-6)
    predicted, truth = back.argmax(0).numpy() == 1, np.asarray(original.dataobj) == 1
    assert 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()) > 0.95


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_canonical_axes_do_not_depend_on_how_the_file_was_stored(tmp_path: Path, codes: str) -> None:
    image = np.random.default_rng(0).standard_normal((10, 12, 8)).astype(np.float32)
    reference = nib.Nifti1Image(image, np.eye(4))
    own = nib.orientations.axcodes2ornt(codes)
    turned = reference.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), own))
    assert "".join(nib.aff2axcodes(turned.affine)) == codes
    nib.save(turned, tmp_path / "turned.nii.gz")
    out = volume_preprocessing("image")({"image": str(tmp_path / "turned.nii.gz")})["image"]
    expected = image.transpose(2, 1, 0)
    np.testing.assert_allclose(out[0], (expected - expected.mean()) / expected.std(), atol=1e-4)


def test_own_axes_are_the_files_reversed(tmp_path: Path) -> None:
    image = np.random.default_rng(0).standard_normal((10, 12, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "lps.nii.gz")
    out = volume_preprocessing("image", reorient=False)({"image": str(tmp_path / "lps.nii.gz")})["image"]
    expected = image.transpose(2, 1, 0)
    np.testing.assert_allclose(out[0], (expected - expected.mean()) / expected.std(), atol=1e-4)


def test_shape_and_slice_rules() -> None:
    assert resampled_shape((10, 10, 10), (0.5, 1.0, 1.25), (1.0, 1.0, 1.0)) == [5, 10, 12]  # 12.5 rounds to even
    assert slice_axis((1.0, 1.0, 3.5), (1.0, 1.0, 1.0)) == 2
    assert slice_axis((3.5, 1.0, 3.5), (1.0, 1.0, 1.0)) is None
    assert slice_axis((1.0, 1.0, 1.0), (4.0, 1.0, 1.0)) == 0
    assert slice_axis((1.0, 1.0, 3.0), (1.0, 1.0, 1.0)) is None


def metatensor(values: np.ndarray, spacing: tuple[float, float, float]) -> MetaTensor:
    return MetaTensor(
        torch.from_numpy(values)[None], affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    )


def test_isotropic_images_are_resampled_by_cubic_splines() -> None:
    values = np.random.default_rng(0).standard_normal((10, 12, 14)).astype(np.float32)
    out = ResampleToSpacingd("image", spacing_mm=1.0)({"image": metatensor(values, (2.0, 2.0, 2.0))})["image"]
    expected = resize(values, (20, 24, 28), order=3, mode="edge", anti_aliasing=False)
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.diag(out.affine), [1, 1, 1, 1])
    np.testing.assert_allclose(out.affine[:3, 3], -0.5)  # the first voxel's centre moves towards the volume's corner


@pytest.mark.parametrize(
    ("old", "new", "spacing", "target"),
    [
        ((21, 40, 33), (25, 38, 90), (1.2, 0.95, 2.73), (1.0, 1.0, 1.0)),  # more columns than are done at once
        ((1, 9, 70), (2, 9, 35), (2.0, 1.0, 0.5), (1.0, 1.0, 1.0)),
        ((6, 30, 20), (30, 27, 36), (5.0, 0.9, 1.8), (1.0, 1.0, 1.0)),  # slice by slice
        ((30, 20, 6), (27, 36, 6), (0.9, 1.8, 5.0), (1.0, 1.0, 5.0)),
    ],
)
def test_resampled_images_are_those_of_scikit_image_to_the_last_bit(
    old: tuple[int, ...], new: tuple[int, ...], spacing: tuple[float, ...], target: tuple[float, ...]
) -> None:
    values = np.random.default_rng(0).standard_normal((2, *old)).astype(np.float32)
    image = MetaTensor(torch.from_numpy(values), affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))
    out = ResampleToSpacingd("image", spacing_mm=target)({"image": image})["image"]
    axis = slice_axis(spacing, target)
    for found, channel in zip(out, values, strict=True):
        expected = channel
        if axis is None:
            expected = resize(channel, new, order=3, mode="edge", anti_aliasing=False)
        else:
            plane = [n for a, n in enumerate(new) if a != axis]
            planes = [
                resize(one, plane, order=3, mode="edge", anti_aliasing=False) for one in np.moveaxis(channel, axis, 0)
            ]
            expected = np.repeat(np.stack(planes, axis), new[axis] // old[axis], axis)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_thick_slices_are_not_blended() -> None:
    values = np.zeros((4, 8, 8), np.float32)
    values[2] = 1.0
    out = ResampleToSpacingd("image", spacing_mm=1.0)({"image": metatensor(values, (5.0, 1.0, 1.0))})["image"]
    assert out.shape[1:] == (20, 8, 8)
    assert set(np.unique(out.as_tensor().numpy()).tolist()) == {0.0, 1.0}
    assert out[0, 10:15].min() == 1.0
    assert out[0, :10].max() == 0.0


def test_labels_keep_their_values() -> None:
    values = np.random.default_rng(0).integers(0, 4, (10, 10, 10)).astype(np.int16)
    out = ResampleToSpacingd("label", spacing_mm=0.7)({"label": metatensor(values, (1.0, 1.0, 1.0))})["label"]
    assert set(np.unique(out.as_tensor().numpy()).tolist()) <= {0, 1, 2, 3}


def test_no_spacing_leaves_the_volume() -> None:
    values = np.random.default_rng(0).standard_normal((5, 6, 7)).astype(np.float32)
    out = ResampleToSpacingd("image", spacing_mm=None)({"image": metatensor(values, (2.0, 1.0, 3.0))})["image"]
    np.testing.assert_array_equal(out[0], values)
    with pytest.raises(ValueError, match="positive"):
        ResampleToSpacingd("image", spacing_mm=[1.0, 0.0, 1.0])


def test_a_failed_write_leaves_no_half_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writer() -> AtomicNibabelWriter:
        made = AtomicNibabelWriter()
        made.set_data_array(torch.zeros(1, 4, 4, 4))
        made.set_metadata({"affine": np.eye(4)})
        return made

    writer().write(str(tmp_path / "ok.nii.gz"))
    assert nib.load(tmp_path / "ok.nii.gz").shape == (4, 4, 4)
    monkeypatch.setattr("nibabel.save", lambda image, path: (Path(path).write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        writer().write(str(tmp_path / "bad.nii.gz"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ok.nii.gz"]


def test_a_background_that_is_nearly_0_is_noted_with_its_share(tmp_path: Path) -> None:
    folder, affine = smooth_case(tmp_path, "RAS")
    image = np.asarray(nib.load(folder / "image.nii.gz").dataobj)
    chain = volume_preprocessing()
    plain = chain({"image": str(folder / "image.nii.gz")})["image"]
    assert plain.meta["nearly_zero"] == 0
    noisy = np.where(image == 0, np.float32(1e-31), image)
    nib.save(nib.Nifti1Image(noisy, affine), tmp_path / "noisy.nii.gz")
    made = chain({"image": str(tmp_path / "noisy.nii.gz")})["image"]
    share = float((image == 0).mean())
    assert made.meta["nearly_zero"] == pytest.approx(share)
    assert made.numel() > plain.numel(), "it is not cropped, as in nnU-Net"
    found = hints([measure({"image": str(tmp_path / name)})[0] for name in ("noisy.nii.gz", "image.nii.gz")], ["a"] * 2)
    assert f"{share:.0%} of its voxels are nearly but not exactly 0" in found[0]
    assert "nearly" not in found[1]


@pytest.mark.parametrize("stored", [np.int16, np.float32, np.float64])
def test_a_canonical_file_is_turned_without_a_copy(tmp_path: Path, stored: type) -> None:
    """Preparing is as quick as the file's own order in memory lets it be."""
    values = np.arange(120, dtype=stored).reshape(6, 5, 4)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "image.nii")
    read = load_volumes("image")({"image": str(tmp_path / "image.nii")})
    assert (read["image"].dtype, read["image"].stride()) == (torch.float32, (1, 6, 30))
    turned = SliceAxisFirstd("image")(EnsureChannelFirstd("image")(read))["image"]
    assert turned.data_ptr() == read["image"].data_ptr()
    assert turned.is_contiguous()
    assert np.array_equal(turned[0].numpy(), values.transpose(2, 1, 0))


def test_zscore_is_the_mean_and_deviation_of_all_voxels() -> None:
    image = torch.rand(2, 7, 6, 5, dtype=torch.float32) * 900 - 20
    given = image.clone()
    found = NormalizeChannelsd("image", schemes=["zscore"])({"image": image})["image"]
    exact = (image.double() - image.double().mean((1, 2, 3), keepdim=True)) / image.double().std(
        (1, 2, 3), correction=0, keepdim=True
    )
    torch.testing.assert_close(found.double(), exact, atol=2e-6, rtol=0)
    assert torch.equal(image, given), "the input is not changed"
    assert not NormalizeChannelsd("image", schemes=["zscore"])({"image": torch.ones(1, 3, 3, 3)})["image"].any()
