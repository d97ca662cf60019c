# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Resampled label maps: the largest share wins everywhere, and no place is left without a label."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree

from common.transforms import volume_preprocessing
from common.transforms.geometry import resample_linear
from common.transforms.votes import nearest_voxels, resample_label

SHAPES = [((8, 9, 10), (12, 7, 15)), ((12, 10, 8), (6, 5, 4)), ((6, 7, 8), (12, 14, 16)), ((1, 5, 6), (3, 7, 4))]


def parcels(count: int, side: int = 40) -> np.ndarray:
    """Fill a cube with regions that touch, without any background."""
    points = np.random.default_rng(1).uniform(0, side, (count, 3))
    places = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    return (cKDTree(points).query(places)[1] + 1).reshape((side,) * 3)


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("axis", [None, 0])
def test_the_largest_linear_share_wins_and_the_larger_label_on_a_tie(
    old: tuple[int, ...], new: tuple[int, ...], axis: int | None
) -> None:
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 5, old))[None]
    shares = torch.stack([resample_linear((labels == value).float(), new, axis)[0] for value in range(5)])
    found, best = resample_label(labels, new, axis), shares.max(0).values
    assert (shares.gather(0, found)[0] > best - 1e-6).all()
    if all(b == 2 * a or 2 * b == a for a, b in zip(old, new, strict=True)):  # shares are exact
        assert torch.equal(found[0], torch.where(shares == best, torch.arange(5).view(-1, 1, 1, 1), -1).max(0).values)


@pytest.mark.parametrize(("spacing", "target"), [(1.0, 0.7), (0.8, 1.0), (1.0, 2.0)])
def test_no_hole_between_classes(spacing: float, target: float, tmp_path: Path) -> None:
    """With a threshold of one half for each class, up to a hundredth of these voxels would be background."""
    label = parcels(95)
    image = np.random.default_rng(0).normal(100, 10, label.shape).astype(np.float32)
    affine = np.diag([spacing] * 3 + [1.0])
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), tmp_path / "label.nii.gz")
    files = {key: str(tmp_path / f"{key}.nii.gz") for key in ("image", "label")}
    out = volume_preprocessing(["image", "label"], spacing_mm=target)(files)["label"].as_tensor()
    assert int((out == 0).sum()) == 0
    assert set(torch.unique(out).tolist()) == set(range(1, 96))


def test_an_ignored_label_is_a_label_like_any_other() -> None:
    """Between classes and what is ignored no background appears, and what is ignored takes no more than its share."""
    label = parcels(12)
    label[label == 7] = 255
    out = resample_label(torch.from_numpy(label)[None], (29, 53, 31))[0].numpy()
    assert (out != 0).all()
    assert (out == 255).mean() == pytest.approx((label == 255).mean(), rel=0.03)


def test_labels_may_be_any_numbers() -> None:
    values = torch.tensor([0, 3, 315, 614_454_277, 2**40])
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (9, 8, 7)))[None]
    assert torch.equal(resample_label(values[labels], (13, 6, 9)), values[resample_label(labels, (13, 6, 9))])


@pytest.mark.parametrize("old", [1, 2, 5, 17, 100, 233])
def test_the_nearest_slice_is_scipys(old: int) -> None:
    for new in range(1, 250, 3):
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        expected = map_coordinates(np.arange(old), centres[None], order=0, mode="nearest")
        assert np.array_equal(nearest_voxels(old, new).numpy(), expected)
