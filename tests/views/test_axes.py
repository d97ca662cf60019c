# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Mirrors along the axes that may be mirrored, and a word where they would exchange classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

from common.bundles import read_config
from common.engines import GaussianSlidingWindow
from common.errors import SettingsError
from common.methods.models_genesis import GenesisViews
from common.transforms import volume_preprocessing
from common.views import CropAugmentation, SpatialCrop, axis_numbers, tell_mirroring, view_stream

from ..conftest import BUNDLES, ROOT


def mirrored(kind: str, axes: list[int | str]) -> set[int]:
    """Return which axes are mirrored in any of a hundred draws."""
    crop = SpatialCrop(4, rotation_probability=0, zoom_probability=0, mirror_axes=axes)
    found: set[int] = set()
    for index in range(100):
        if kind == "crop":
            flips = crop.draw(np.random.default_rng(index), (9, 9, 9)).flips
        elif kind == "augmentation":
            flips = CropAugmentation(mirror_axes=axes).draw(view_stream((0, 0, index))).flips
        else:
            drawn = (
                GenesisViews(SpatialCrop(24), shuffle_boxes=1, mirror_axes=axes).draw(view_stream((0, 0, index))).flips
            )
            flips = tuple(axis in drawn for axis in range(3))
        found |= {axis for axis in range(3) if flips[axis]}
    return found


@pytest.mark.parametrize("kind", ["crop", "augmentation", "genesis"])
def test_only_the_axes_that_may_be_mirrored_are(kind: str) -> None:
    assert mirrored(kind, [0, 1, 2]) == {0, 1, 2}
    assert mirrored(kind, [0, 1]) == {0, 1}
    assert mirrored(kind, ["left-right"]) == {2}
    assert mirrored(kind, []) == set()


def test_what_is_left_out_moves_no_other_draw() -> None:
    for index in range(20):
        whole, part = (
            SpatialCrop(4, mirror_axes=axes).draw(np.random.default_rng(index), (9, 9, 9))
            for axes in ([0, 1, 2], [0, 1])
        )
        assert (whole.low, whole.matrix, whole.flips[:2]) == (part.low, part.matrix, part.flips[:2])
        whole, part = (
            CropAugmentation(mirror_axes=axes).draw(view_stream((0, 0, index))) for axes in ([0, 1, 2], [0, 1])
        )
        assert whole.flips[:2] == part.flips[:2]
        assert (whole.gamma, whole.brightness, whole.quarter_turns) == (part.gamma, part.brightness, part.quarter_turns)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_the_last_axis_of_canonical_arrays_is_left_right(tmp_path: Path, codes: str) -> None:
    """Bright on the patient's right, whatever the file's axes: after the chain that is the upper end of axis 2."""
    image = np.random.default_rng(0).standard_normal((10, 12, 8)).astype(np.float32)
    image[6:] += 100  # RAS: towards the right
    turn = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), nib.orientations.axcodes2ornt(codes))
    nib.save(nib.Nifti1Image(image, np.eye(4)).as_reoriented(turn), tmp_path / "a.nii.gz")
    out = volume_preprocessing()({"image": str(tmp_path / "a.nii.gz")})["image"][0]
    assert float(out[:, :, 6:].min()) > float(out[:, :, :6].max())


def test_words_and_numbers() -> None:
    assert axis_numbers(["Left-Right", 0]) == axis_numbers(("slice", "column")) == (0, 2)
    assert GaussianSlidingWindow(4, mirror_axes=["row"]).flips == [[], [3]]
    for wrong in ([3], ["left"], [True], [0.5]):
        with pytest.raises(SettingsError, match=r"mirror_axes is .*list axes of the array, 0 \(slice"):
            axis_numbers(wrong)  # type: ignore[arg-type]


SIDED = ["left hippocampus", "Hippocampus_R", "Hippocampus_L"]


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (SIDED, {"axes": [0, 1, 2]}, ["3 class(es)", "along left-right", '--mirror_axes "[0,1]"']),
        (SIDED, {"axes": [2]}, ['--mirror_axes "[]"']),
        (SIDED, {"axes": [0, 1]}, []),
        (SIDED, {"axes": [0], "reorient": False}, ["of which one runs left-right", '--mirror_axes "[]"']),
        (["edema", "core"], {"axes": [0, 1, 2]}, []),
        (["S", "M", "L", "cleft lip", "brightness"], {"axes": [0, 1, 2]}, []),
        (["ctx-lh-insula"], {"axes": [0, 1, 2]}, ["ctx-lh-insula"]),
        (["RightKidney"], {"axes": [0, 1, 2]}, ["RightKidney"]),
        (["edema"], {"axes": [0, 2], "trained": [0, 1]}, ["saw no mirrors along [2]"]),
        (["edema"], {"axes": [0, 2], "trained": [0, 1, 2]}, []),
    ],
)
def test_a_word_where_mirrors_exchange_classes(
    names: list[str], options: dict[str, Any], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tell_mirroring(names, **options)
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed
    assert bool(printed) == bool(words)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_setting_reaches_every_view_of_every_bundle(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for config in ("pretrain", "train", "train_classification"):
        parser = ConfigParser(read_config(f"bundles/{bundle}/configs/{config}.yaml"))
        parser["mirror_axes"] = [0, 1]
        for name in ("spatial", "augmentation"):
            if name in parser.config and parser.config[name]["_target_"].startswith("common.views."):
                view = parser.get_parsed_content(name)
                assert view.mirror_axes == (0, 1) or view.flip_probability == 0, (config, name)
        if "GenesisViews" in str(parser.config.get("views", "")):
            assert parser.get_parsed_content("views").mirror_axes == (0, 1)
    assert parser.get_parsed_content("mirrored#axes") == [0, 1]
    parser["flip_probability"] = 0.0
    parser.parse(reset=True)
    assert parser.get_parsed_content("mirrored#axes") == []
