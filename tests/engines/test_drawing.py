# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import matplotlib.colors
import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from common.drawing import _COLOURS, busiest, draw_overlay, draw_planes, draw_prediction


def shows(path: Path, value: int) -> int:
    """Return how many pixels of a picture have the colour of a class."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return int((np.abs(pixels - matplotlib.colors.to_rgb(_COLOURS[value - 1])).max(-1) < 0.02).sum())


def test_an_overlay_shows_every_class_of_every_map(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(10, 40, 30)).astype(np.float32)
    prediction = np.zeros(image.shape, np.int16)
    prediction[2:8, 5:20, 5:20] = 1
    reference = prediction.copy()
    reference[2:8, 22:32, 5:20] = 3
    names = ["background", "a", "b", "c"]
    draw_overlay(image, {"prediction": prediction}, tmp_path / "one.png", labels=names, spacing_mm=(6, 1, 1))
    draw_overlay(image, {"prediction": prediction, "reference": reference}, tmp_path / "two.png", labels=names)
    draw_overlay(image, {"prediction": prediction * 0}, tmp_path / "none.png", labels=names, title="case")
    assert [shows(tmp_path / "one.png", value) > 200 for value in (1, 2, 3)] == [True, False, False]
    assert [shows(tmp_path / "two.png", value) > 200 for value in (1, 2, 3)] == [True, False, True]
    assert shows(tmp_path / "none.png", 1) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.png", "one.png", "two.png"]


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_extreme_images_are_drawn(tmp_path: Path, value: float) -> None:
    marks = np.full((4, 4, 4), 300)  # a value without a name, up to every border
    draw_overlay(np.full((4, 4, 4), value), {"prediction": marks}, tmp_path / "x.png", labels=["background", "a"])
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_slices_are_where_most_is_marked() -> None:
    marked = np.zeros((9, 8, 7), bool)
    marked[3:6, 2, 5] = True
    marked[4, 3, 5] = True
    assert [busiest(marked, axis) for axis in range(3)] == [4, 2, 5]
    assert busiest(np.zeros((9, 8, 7), bool), 0) == 4


def test_files_are_drawn_in_canonical_axes(tmp_path: Path) -> None:
    """However the file is stored, the picture is the same."""
    voxels = np.random.default_rng(0).normal(size=(12, 14, 10)).astype(np.float32)
    marks = np.zeros(voxels.shape, np.uint8)
    marks[2:6, 3:9, 1:4] = 1
    pictures = []
    for codes in ("RAS", "LIA"):
        ours = nib.orientations.axcodes2ornt(codes)
        turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), ours)
        for name, values in (("image", voxels), ("marks", marks)):
            nib.save(nib.Nifti1Image(values, np.diag([1, 1, 2, 1])).as_reoriented(turn), tmp_path / f"{name}.nii.gz")
        files = (str(tmp_path / "image.nii.gz"), tmp_path / "marks.nii.gz")
        draw_prediction(*files, tmp_path / f"{codes}.png", labels=["background", "a"])
        pictures.append(matplotlib.image.imread(tmp_path / f"{codes}.png"))
    assert np.array_equal(*pictures)


def test_planes_show_the_slices_of_the_reference_under_every_map(tmp_path: Path) -> None:
    """A column for the scan and each map, a row for each plane; a prediction elsewhere does not move the slices."""
    voxels = np.random.default_rng(0).normal(size=(12, 14, 10)).astype(np.float32)
    truth, far = np.zeros((2, *voxels.shape), np.uint8)
    truth[2:6, 3:9, 1:3] = 1
    far[7:, 10:, 6:] = 2
    for name, values in {"image": voxels, "truth": truth, "far": far, "both": truth + far}.items():
        nib.save(nib.Nifti1Image(values, np.diag([1, 1, 2, 1])), tmp_path / f"{name}.nii")
    image, reference = tmp_path / "image.nii", {"label": tmp_path / "truth.nii"}
    maps = {**reference, "elsewhere": tmp_path / "far.nii", "a name that is longer than a line": tmp_path / "both.nii"}
    figure = draw_planes(image, maps, labels=["background", "a"], planes=("axial", "sagittal"))
    panels = np.array(figure.axes).reshape(2, 4)
    assert [panel.get_title() for panel in panels[0]] == [
        *("scan", "label", "elsewhere"),
        "a name that is\nlonger than a line",
    ]
    assert [row[0].get_ylabel() for row in panels] == ["axial", "sagittal"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "value 2"]
    for row, (cut, ratio) in zip(panels, ((np.s_[:, :, 2], 1), (np.s_[4, :, :], 2)), strict=True):
        for panel, marks in zip(row, (truth * 0, truth, far, truth + far), strict=True):
            under, over = panel.get_images()
            assert np.array_equal(under.get_array(), voxels[cut].T)
            assert np.array_equal(over.get_array().mask, marks[cut].T == 0)
            assert panel.get_aspect() == ratio
    figure.savefig(tmp_path / "planes.png", dpi=130)
    assert shows(tmp_path / "planes.png", 1) > 20, "the legend; over the scan a colour is mixed with it"
