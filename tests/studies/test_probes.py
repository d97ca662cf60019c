# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from common.data import SegmentationTask, labelled_lists
from common.engines.features import draw_voxels
from common.errors import DataError, SettingsError, WeightsError, sentence
from tools.choosing import probes
from tools.choosing.probes import (
    Encoder,
    Rules,
    Voxels,
    mean_score,
    paired_difference,
    probe_encoder,
    probe_voxels,
)

from .encoders import LABELS, NARROW, train

TASK = SegmentationTask(LABELS)
SMALL = {"patch_size": [24, 24, 24]}


def known(cases: int, *, signal: float, seed: int = 0, task: SegmentationTask = TASK, width: int = 12) -> list[Voxels]:
    """Voxels whose features hold their class as strongly as told."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(cases):
        labels = np.repeat(np.arange(len(task.labels)), [80, *[30] * (len(task.labels) - 1)])
        features = rng.standard_normal((len(labels), width)) + signal * np.eye(width)[labels]
        weights = np.where(labels == 0, 20.0, 3.0)
        found.append(Voxels(f"case_{index}", (100 * features).astype(np.float32), labels, weights))
    return found


def test_every_kind_of_voxel_is_drawn_and_counts_what_it_stands_for() -> None:
    labels = np.zeros((30, 30, 30), int)
    labels[5:9, 5:9, 5:9], labels[20, 20, 20], labels[0, 0] = 1, 2, 9
    task = SegmentationTask(["background", "a", "b"], ignore_label=9)
    points, values, weights = draw_voxels(labels, task, count=40, rng=np.random.default_rng(0))
    assert np.array_equal(labels[tuple(points.T)], values)
    assert len({tuple(point) for point in points.tolist()}) == len(points), "no voxel twice"
    for value in (0, 1, 2):
        assert weights[values == value].sum() == pytest.approx((labels == value).sum())
    assert [int((values == value).sum()) for value in (0, 1, 2, 9)] == [80, 40, 1, 0]
    near = np.abs(points[values == 0][:40, None] - np.argwhere((labels == 1) | (labels == 2))[None]).max(2).min(1)
    assert near.max() <= 5
    far = np.abs(points[values == 0][40:, None] - np.argwhere((labels == 1) | (labels == 2))[None]).max(2).min(1)
    assert far.min() > 5


def test_the_score_of_drawn_voxels_is_that_of_the_volume() -> None:
    """Average precision with weights estimates that of all voxels, though classes are drawn alike."""
    rng = np.random.default_rng(0)
    labels = (rng.random((24, 24, 24)) < 0.02).astype(int)
    score = rng.standard_normal(labels.shape) + 2.0 * labels
    whole = average_precision_score(labels.ravel(), score.ravel())
    found = []
    for seed in range(20):
        task = SegmentationTask(["background", "a"])
        points, values, weights = draw_voxels(labels, task, count=600, rng=np.random.default_rng(seed))
        found.append(average_precision_score(values, score[tuple(points.T)], sample_weight=weights))
    assert np.mean(found) == pytest.approx(whole, abs=0.02)


def test_what_features_hold_is_told_and_noise_is_not() -> None:
    strong, weak, none = (probe_voxels(known(6, signal=s), TASK, resamples=200) for s in (4.0, 1.5, 0.0))
    assert strong.estimate > 0.9 > weak.estimate > none.estimate
    chance = 90 / (1600 + 180)  # of one class, by weight
    assert none.estimate < 2 * chance + 0.05
    assert strong.scores.shape == (6, 2)
    assert strong.interval is not None
    assert strong.interval[0] <= strong.estimate <= strong.interval[1]
    assert sorted(set(strong.fold)) == [0, 1, 2, 3, 4]
    gap = paired_difference(strong.scores, weak.scores)
    assert gap["interval"][0] > 0
    assert gap["estimate"] == pytest.approx(strong.estimate - weak.estimate)


def test_a_case_is_never_judged_by_what_was_fitted_on_it() -> None:
    """Every case has a signature of its own that tells its labels in a way that no other case shares."""
    rng = np.random.default_rng(0)
    voxels = known(8, signal=0.0, width=64)
    for one in voxels:
        one.features += (300 * np.eye(3)[one.labels] @ rng.standard_normal((3, 64))).astype(np.float32)
    assert probe_voxels(voxels, TASK, resamples=0).estimate < 0.7, "of clusters in a chance order"
    pairs = [Voxels(f"{one.case}_{k}", one.features, one.labels, one.weights) for one in voxels[:4] for k in range(2)]
    torn = probe_voxels(pairs, TASK, folds=4, resamples=0)
    whole = probe_voxels(pairs, TASK, folds=4, resamples=50, groups=[one.case[:6] for one in pairs])
    assert torn.estimate > whole.estimate + 0.2
    for group in range(4):
        assert whole.fold[2 * group] == whole.fold[2 * group + 1]


def test_regions_and_absent_classes() -> None:
    task = SegmentationTask(["background", "edema", "core"], regions={"whole": [1, 2], "core": [2]})
    voxels = known(5, signal=3.0, task=task)
    kept = voxels[0].labels != 2
    voxels[0] = Voxels("case_0", *(a[kept] for a in (voxels[0].features, voxels[0].labels, voxels[0].weights)))
    found = probe_voxels(voxels, task, resamples=100)
    assert found.classes == ["whole", "core"]
    assert np.isnan(found.scores).tolist() == [[False, True], *[[False, False]] * 4]
    assert found.estimate > 0.8
    assert found.as_plain()["cases"]["case_0"]["core"] is None
    assert "fewer than 6" in found.notes[0]
    third = SegmentationTask([*LABELS, "never"])
    lacking = probe_voxels(known(5, signal=3.0), third, resamples=0)
    assert any("no case holds never" in note for note in lacking.notes)
    alone = known(4, signal=3.0, task=third)  # one class in a single case: nobody could learn it
    for one in alone[1:]:
        one.labels[one.labels == 3] = 0
    assert probe_voxels(alone, third, resamples=0).scores[0, 2] == pytest.approx(90 / (1600 + 270))


def test_too_little_to_judge_is_told() -> None:
    with pytest.raises(DataError, match=r"there is 1 labelled case, .* give at least 2"):
        probe_voxels(known(1, signal=1.0), TASK)
    with pytest.raises(DataError, match="1 group of labelled cases"):
        probe_voxels(known(3, signal=1.0), TASK, groups=["p"] * 3)
    with pytest.raises(SettingsError, match="folds is 1"):
        probe_voxels(known(3, signal=1.0), TASK, folds=1)
    empty = known(3, signal=1.0)
    for one in empty:
        one.labels[:] = 0
    with pytest.raises(DataError, match="no label map marks any class"):
        probe_voxels(empty, TASK)
    rare = known(10, signal=1.0)
    for one in rare[1:]:
        one.labels[:] = 0
    with pytest.raises(DataError, match=r"only 1 of 10 cases hold any class, .*; give more cases that hold one$"):
        probe_voxels(rare, TASK)
    full = known(3, signal=1.0)
    for one in full:
        one.labels[:] = 1
    with pytest.raises(DataError, match="hold nothing but along; give more cases that hold something else"):
        probe_voxels(full, TASK)
    assert probe_voxels(known(2, signal=3.0), TASK, resamples=50).chosen == [probes.STRENGTHS[0]] * 2


def test_folds_that_lack_classes_are_told_from_the_label_maps(tmp_path: Path) -> None:
    """With two cases that hold a class, it depends on the folds; one for each case always serves."""
    cases = []
    for index in range(10):
        labels = np.zeros((8, 8, 8), np.uint8)
        labels[:4, 0, 0] = [1, 2, 1, 2] if index < 2 else 0
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / f"c{index}.nii.gz")
        cases.append({"image": str(tmp_path / f"c{index}.nii.gz"), "label": str(tmp_path / f"c{index}.nii.gz")})
    probes.check_classes(cases, TASK, folds=10)
    told = []
    for seed in range(20):
        try:
            probes.check_classes(cases, TASK, folds=2, seed=seed)
        except DataError as error:
            told.append(str(error))
    assert 0 < len(told) < 20
    assert told[0].startswith("only 2 of 10 cases hold any class")
    assert told[0].endswith("give more cases that hold one, or more --folds than 2")
    with pytest.raises(DataError, match="only 1 of 9 cases"):
        probes.check_classes(cases[1:], TASK, folds=9)


def test_differences_are_paired_and_leave_out_what_one_lacks() -> None:
    rng = np.random.default_rng(0)
    first = rng.uniform(0.2, 0.9, (12, 2))
    second = first - 0.02 + 0.005 * rng.standard_normal((12, 2))
    second[0] = np.nan
    found = paired_difference(first, second)
    assert found["units"] == 11
    assert 0.01 < found["interval"][0] < found["estimate"] < found["interval"][1] < 0.03
    assert paired_difference(first, second, groups=[str(i // 2) for i in range(12)])["units"] == 6
    assert paired_difference(first[:1], first[:1])["interval"] is None
    assert mean_score(np.array([[1.0, 0.0], [np.nan, 0.5]])) == 0.625


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("trained"), steps=[25, 150], bundle="mae_resenc_l")


def test_encoders_of_known_quality_are_put_in_order(task_folder: Path, trained: list[Path], tmp_path: Path) -> None:
    cases = labelled_lists(str(task_folder), fold="all")["training"]
    half, full = (Encoder("mae_resenc_l", str(file), settings=SMALL) for file in trained)
    drawn = [Encoder("mae_resenc_l", seed=s, settings={**SMALL, **NARROW["resenc_l"]}) for s in range(2)]
    found = []
    for index, encoder in enumerate([full, half, *drawn]):
        result = probe_encoder(encoder, cases, task=TASK, folder=tmp_path / str(index), rules=Rules(resamples=500))
        found.append(np.array([[row[name] for name in TASK.names] for row in result["cases"].values()]))
    for better, worse in ((0, 1), (1, 2), (1, 3), (0, 2)):
        assert paired_difference(found[better], found[worse])["interval"][0] > 0.05, (better, worse)
    apart = paired_difference(found[2], found[3])["interval"]
    assert apart[0] < 0.05, "two draws of one network are no better and worse encoders"
    assert "encoder covered 100.0 %" in (tmp_path / "0" / "log.txt").read_text()


@pytest.mark.parametrize("backbone", ["resenc_l", "primus_m"])
def test_a_probe_is_kept_and_a_cut_one_goes_on(
    backbone: str, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = labelled_lists(str(task_folder), fold="all")["training"][:3]
    encoder = Encoder(f"mae_{backbone}", settings={**SMALL, **NARROW[backbone]})
    told: list[str] = []
    options: dict[str, Any] = {"task": TASK, "rules": Rules(resamples=50, count=60), "tell": told.append}
    whole = probe_encoder(encoder, cases, folder=tmp_path / "whole", **options)
    assert probe_encoder(encoder, cases, folder=tmp_path / "whole", **options) == whole
    assert told == [f"mae_{backbone}: kept, probed before"]
    assert not (tmp_path / "whole" / "voxels").exists()
    asked: list[int] = []
    real = probes.VolumeEmbedder.at

    def at(self: Any, image: Any, points: Any) -> Any:
        asked.append(len(points))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, image, points)

    monkeypatch.setattr(probes.VolumeEmbedder, "at", at)
    with pytest.raises(KeyboardInterrupt):
        probe_encoder(encoder, cases, folder=tmp_path / "cut", **options)
    assert probe_encoder(encoder, cases, folder=tmp_path / "cut", **options) == whole
    assert len(asked) == 4, "the two that were done are not encoded again"
    other = Encoder(f"mae_{backbone}", seed=1, settings={**SMALL, **NARROW[backbone]})
    assert probe_encoder(other, cases, folder=tmp_path / "whole", **options)["digest"] != whole["digest"]


def test_weights_that_do_not_fit_are_told(trained: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no bundle 'nope'; choose one of .*mae_primus_m"):
        Encoder("nope").resolved()
    with pytest.raises(WeightsError, match=r"no pre-trained encoder .*none.pt; correct the path"):
        Encoder("mae_resenc_l", str(tmp_path / "none.pt")).resolved()
    wrong = Encoder("mae_resenc_l", str(trained[0]), settings={**SMALL, "features_per_stage": [8, 8, 8]})
    with pytest.raises(Exception) as caught:  # noqa: PT011
        wrong.load(tmp_path)
    assert "is of another network" in str(sentence(caught.value))
    about = json.loads(trained[0].with_suffix(".json").read_text())
    assert Encoder("mae_resenc_l", str(trained[0])).resolved() == {
        "features_per_stage": about["settings"]["features_per_stage"],
        "blocks_per_stage": about["settings"]["blocks_per_stage"],
        "spacing_mm": 1.0,
    }
