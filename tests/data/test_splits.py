# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Splits keep subjects together and stay as they are when data are added; filters count what they remove."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import pretraining_lists
from common.data.checking.filters import Filters, voxel_digest
from common.data.checking.survey import Measures, hints, measure, survey
from common.data.listing.splits import kept_parts, split_by_subject, subjects_of, validation_count
from common.errors import DataError, SettingsError

from ..conftest import blobs, write_volume


def cases_of(subjects: range | list[int], *, volumes: int = 2) -> list[dict[str, Any]]:
    return [
        {"image": f"/d/{s}_{v}.nii.gz", "dataset": f"ds{s % 3}", "subject": f"sub-{s}"}
        for s in subjects
        for v in range(volumes)
    ]


def split(cases: list[dict[str, Any]], **options: Any) -> dict[str, list[dict[str, Any]]]:
    return split_by_subject(cases, subjects_of(cases, "/d"), **({"seed": 1} | options))


@settings(max_examples=60, deadline=None)
@given(first=st.integers(2, 400), more=st.integers(0, 400), seed=st.integers(0, 9), order=st.randoms())
def test_adding_data_moves_nobody(first: int, more: int, seed: int, order: random.Random) -> None:
    before = split(cases_of(range(first)), seed=seed)
    kept = kept_parts(before, "/d")
    grown = cases_of(range(first + more))
    order.shuffle(grown)
    after = kept_parts(split(grown, seed=seed, kept=kept), "/d")
    assert {subject: after[subject] for subject in kept} == kept
    assert sum(part == "validation" for part in after.values()) == max(
        validation_count(first), validation_count(first + more)
    )


def test_subjects_stay_together_in_any_order_and_the_seed_matters() -> None:
    cases = cases_of(range(700))
    lists = split(cases)
    held = {case["subject"] for case in lists["validation"]}
    assert len(held) == 7
    assert len(lists["validation"]) == 14
    assert held.isdisjoint(case["subject"] for case in lists["training"])
    shuffled = random.Random(3).sample(cases, len(cases))
    assert {case["subject"] for case in split(shuffled)["validation"]} == held
    assert {case["subject"] for case in split(cases, seed=2)["validation"]} != held
    lists["training"].append(lists["validation"][0])
    with pytest.raises(DataError, match="both in training and in validation"):
        kept_parts(lists, "/d")
    alone = split(cases_of(range(1)))
    assert alone["training"] == alone["validation"]
    assert len(split(cases_of(range(30), volumes=1), least=8)["validation"]) == 8


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({}, "d/ds1/sub-{:02}/anat/x_T1w.nii.gz"),
        ({}, "d/scan {}.nii.gz"),
        ({"dataset": "ds9"}, "d/sub-{:02}/x_T1w.nii.gz"),
        ({"dataset": "ds9"}, "d/scan {}.nii.gz"),
    ],
)
def test_a_subject_that_a_list_names_is_the_one_that_it_was(columns: dict[str, Any], names: str) -> None:
    cases = [{"image": f"/r/{names.format(index)}", **columns} for index in range(12)]
    subjects = subjects_of(cases, "/r")
    written = [
        case | {"subject": subject.removeprefix(f"{case.get('dataset', '')}/")}
        for case, subject in zip(cases, subjects, strict=True)
    ]
    assert subjects_of(written, "/r") == subjects
    assert len(set(subjects)) == 12


def test_a_list_of_one_subject_is_no_split() -> None:
    alone = split(cases_of(range(1)))
    assert kept_parts(alone, "/d") == {}
    grown = split(cases_of(range(20)), kept=kept_parts(alone, "/d"))
    assert not {case["subject"] for case in grown["training"]} & {case["subject"] for case in grown["validation"]}


def test_volumes_are_measured_in_axes_of_space_and_with_their_steps(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((20, 300, 40)).astype(np.float32)
    affine = np.array([[0, 0, -3.0, 0], [2.0, 0, 0, 0], [0, -0.5, 0, 0], [0, 0, 0, 1]])  # axes to P, S, L
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    measures, voxels, spacing = measure({"image": str(tmp_path / "a.nii.gz")})
    assert voxels.shape == (40, 20, 150)
    assert spacing.tolist() == [3.0, 2.0, 1.0], "of the second axis every other voxel"
    assert measures.extent_mm == (120.0, 40.0, 150.0)
    np.testing.assert_allclose(voxels[0, 3, -1], values[3, 0, -1])
    values[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="1 voxels that are NaN or infinite"):
        measure({"image": str(tmp_path / "a.nii.gz")})


def test_folders_are_split_by_subject_and_the_same_when_asked_again(tmp_path: Path) -> None:
    for subject in range(8):
        for session in range(3):
            file = tmp_path / f"sub-{subject:02d}" / f"ses-{session}" / f"sub-{subject:02d}_ses-{session}_T1w.nii.gz"
            file.parent.mkdir(parents=True)
            file.touch()
    lists = pretraining_lists(str(tmp_path))
    assert len(lists["validation"]) == 3
    assert len({Path(case["image"]).parts[-3] for case in lists["validation"]}) == 1
    assert lists == pretraining_lists(str(tmp_path))
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    again = pretraining_lists(str(moved))
    assert [Path(c["image"]).name for c in again["validation"]] == [Path(c["image"]).name for c in lists["validation"]]


@pytest.fixture
def volumes(tmp_path: Path) -> list[dict[str, Any]]:
    """Seven volumes: one small, one coarse, one equal to the first in another format and type, one unreadable."""
    image = np.round(blobs(0)[0])
    cases = []
    for number, (name, values, spacing) in enumerate(
        [
            ("a.nii.gz", image, 1.0),
            ("b.nii.gz", image + np.eye(24, 28)[..., None], 1.0),
            ("small.nii.gz", image[:8], 1.0),
            ("coarse.nii.gz", image, 4.0),
            ("bad.nii.gz", image, 1.0),
        ]
    ):
        path = write_volume(tmp_path / "v" / name, values, spacing=spacing)
        cases.append({"image": str(path), "subject": f"s{number}", "modality": "T1w" if number % 2 else "T2w"})
    cases[1]["quality"], cases[2]["quality"] = 4.5, 2
    (tmp_path / "v" / "bad.nii.gz").write_bytes(b"nothing")
    nib.save(nib.Nifti1Image(image.astype(np.int16), np.eye(4)), tmp_path / "v" / "copy.nii")
    cases.append({"image": str(tmp_path / "v" / "copy.nii"), "subject": "s5", "modality": "t1W"})
    return cases


def names(cases: list[dict[str, Any]]) -> list[str]:
    return [Path(case["image"]).name.split(".")[0] for case in cases]


@pytest.mark.parametrize(
    ("options", "left", "removed"),
    [
        ({}, ["a", "b", "small", "coarse", "bad", "copy"], {}),
        ({"modality": ("T1W",)}, ["b", "coarse", "copy"], {"other modality": 3}),
        ({"max_quality_score": 4}, ["a", "small", "coarse", "bad", "copy"], {"quality score too high": 1}),
        ({"min_size": 20}, ["a", "b", "coarse", "copy"], {"unreadable": 1, "too small": 1}),
        ({"spacing_mm": (0.5, 2)}, ["a", "b", "small", "copy"], {"unreadable": 1, "spacing out of range": 1}),
        ({"duplicates": True}, ["a", "b", "small"], {"unreadable": 1, "duplicate": 2}),
        ({"include": ("v/a.nii.gz", "s1", "co*")}, ["a", "b", "coarse", "copy"], {"not in include": 2}),
        ({"exclude": ("*.nii.gz",)}, ["copy"], {"in exclude": 5}),
        (
            {"exclude": ("s5",), "modality": ("T2w",), "min_size": 20},
            ["a"],
            {"in exclude": 1, "other modality": 2, "unreadable": 1, "too small": 1},
        ),
    ],
)
def test_filters(
    options: dict[str, Any], left: list[str], removed: dict[str, int], volumes: list[dict[str, Any]], tmp_path: Path
) -> None:
    result = Filters(**options).apply(volumes, root=tmp_path)
    assert names(result.cases) == left
    assert result.removed == removed
    assert sum(removed.values()) + len(left) == len(volumes)
    assert bool(result.notes) == ("max_quality_score" in options)


def test_filters_that_leave_nothing_or_make_no_sense(volumes: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"nothing is left of 6 volumes \(other modality 6\)"):
        Filters(modality=("CT",)).apply(volumes)
    for wrong in ({"spacing_mm": (3, 1)}, {"spacing_mm": (3,)}, {"min_size": 0}):
        with pytest.raises(SettingsError):
            Filters(**wrong)  # type: ignore[arg-type]


def test_digests_are_kept_until_a_file_changes(volumes: list[dict[str, Any]], tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    wanted = Filters(duplicates=True).apply(volumes, cache=cache).cases
    kept = json.loads(cache.read_text())
    assert set(kept.values()) == {voxel_digest(volumes[row]["image"]) for row in (0, 1, 3)}, "one shape is alone"
    cache.write_text(json.dumps(dict.fromkeys(kept, "same")))
    assert names(Filters(duplicates=True).apply(volumes, cache=cache).cases) == ["a", "small"]
    for case in volumes:
        if "bad" not in case["image"]:
            values = np.array(nib.load(case["image"]).dataobj)
            nib.save(nib.Nifti1Image(values, np.eye(4)), case["image"])
    assert names(Filters(duplicates=True).apply(volumes, cache=cache).cases) == names(wanted)
    cache.write_text("{")
    assert names(Filters(duplicates=True).apply(volumes, cache=cache).cases) == names(wanted)


def moved(image: np.ndarray) -> np.ndarray:
    """Shift the object between lines of k-space, as a head that moves while they are taken."""
    rng = np.random.default_rng(0)
    lines = np.fft.fftn(image)
    phase = np.exp(2j * np.pi * np.cumsum(rng.normal(0, 0.1, lines.shape[0])))
    return np.abs(np.fft.ifftn(lines * phase[:, None, None])).astype(np.float32)


def test_quality_hints_warn_of_what_is_odd_and_of_nothing_else(tmp_path: Path) -> None:
    kinds: dict[str, np.ndarray] = {}
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 40)] * 3, indexing="ij"))
    for number in range(22):
        rng = np.random.default_rng(number)
        head = (np.linalg.norm(grid * rng.uniform(1.3, 1.6, (3, 1, 1, 1)), axis=0) < 1) * rng.uniform(80, 120)
        kinds[f"good_{number}"] = (head + np.abs(rng.normal(0, 1, head.shape))).astype(np.float32)
    kinds["moved"] = moved(kinds["good_0"])
    kinds["empty"] = np.zeros_like(kinds["good_0"])
    kinds["empty"][3, 3, 3] = 1000
    kinds["cut"] = kinds["good_1"][15:25, 15:25, 15:25]
    kinds["cut"] = np.pad(np.kron(kinds["cut"], np.ones((4, 4, 4))), ((0, 1), (0, 0), (0, 0))).astype(np.float32)
    kinds["narrow"] = kinds["good_2"][:, :, :6]
    found = []
    for name, values in kinds.items():
        found.append(measure({"image": str(write_volume(tmp_path / f"{name}.nii.gz", values, spacing=4.0))})[0])
    told = hints(found, ["T1w"] * len(found))
    odd = {list(kinds)[row]: hint.split(":")[0] for row, hint in told.items()}
    assert odd == {
        "moved": "perhaps motion",
        "empty": "perhaps empty",
        "cut": "perhaps cut by the field of view",
        "narrow": "perhaps a wrong field of view",
    }
    (tmp_path / "bad.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        measure({"image": str(tmp_path / "bad.nii.gz")})
    assert hints([None, Measures(0.5, 0.1, 0.9, (200, 200, 200))], ["a", "a"]) == {}


def test_survey_reads_headers_only(volumes: list[dict[str, Any]]) -> None:
    cut = Path(volumes[0]["image"])
    cut.write_bytes(cut.read_bytes()[:2000])  # its voxels are gone
    found = survey(volumes)
    assert found.shape[1].tolist() == [24, 28, 26]
    assert found.spacing_mm[3].tolist() == [4, 4, 4]
    assert found.bytes[1] == Path(volumes[1]["image"]).stat().st_size
    assert sorted(found.problems) == [0, 4]
    assert "copy it again from its source" in found.problems[0], "so small a file ends within what a look unpacks"
    assert "cannot be read as NIfTI" in found.problems[4]
