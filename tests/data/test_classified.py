# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Tables of cases and classes, whatever is wrong with them, and splits that keep classes and patients."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data import CaseSampler, ClassificationTask, VolumeDataset, classified_lists, prediction_cases
from common.data.listing.classified import class_weights, fingerprints, target_digest
from common.data.listing.labelled import split_cases
from common.data.preparing.settings import volume_settings
from common.errors import DataError, SettingsError
from common.views import SpatialCrop

from ..conftest import blobs, write_volume


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten files that are only named, which is all that lists look at."""
    (tmp_path / "scans").mkdir()
    for index in range(10):
        (tmp_path / "scans" / f"case_{index}.nii.gz").touch()
    return tmp_path / "scans"


def table(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def rows(count: int = 10) -> str:
    return "case,diagnosis,acl,meniscus,patient\n" + "".join(
        f"case_{i},{['AD', 'CN'][i % 2]},{i % 2},{int(i < 4)},p{i // 2}\n" for i in range(count)
    )


def lists(folder: Path, text: str, **options: Any) -> dict[str, Any]:
    return classified_lists(
        str(folder), table=table(folder.parent / "t.csv", text), **{"target": "diagnosis", **options}
    )


def every(found: dict[str, Any]) -> dict[str, Any]:
    return {case["case"]: case["target"] for part in ("training", "validation") for case in found[part]}


def test_one_column_is_classes_and_several_are_labels(folder: Path) -> None:
    found = lists(folder, rows())
    assert found["task"] == ClassificationTask(("AD", "CN"))
    assert every(found) == {f"case_{i}": i % 2 for i in range(10)}
    assert lists(folder, rows(), classes=["CN", "AD"])["task"].names == ("CN", "AD")
    several = lists(folder, rows(), target=["acl", "meniscus"])
    assert several["task"] == ClassificationTask(("acl", "meniscus"), multilabel=True)
    assert every(several) == {f"case_{i}": [i % 2, int(i < 4)] for i in range(10)}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["", ".nii.gz"])
def test_tables_as_spreadsheets_write_them(folder: Path, delimiter: str, ending: str) -> None:
    text = "\ufeff" + rows().replace(",", delimiter)
    for index in range(10):
        text = text.replace(f"case_{index}{delimiter}", f" case_{index}{ending} {delimiter}")
    assert every(lists(folder, text.replace("\n", "\r\n"))) == {f"case_{i}": i % 2 for i in range(10)}


def test_numbers_are_sorted_as_numbers_and_written_alike(folder: Path) -> None:
    grades = ["10", "2.0", "2", "1", "10.0", "1", "2", "10", "1.0", "2"]
    text = "case,grade\n" + "".join(f"case_{i},{g}\n" for i, g in enumerate(grades))
    found = lists(folder, text, target="grade")
    assert found["task"].names == ("1", "2", "10")
    assert every(found)["case_4"] == 2


def test_paths_tell_images_of_one_name_apart(tmp_path: Path) -> None:
    for patient in ("sub-1", "sub-2", "sub-3", "sub-4"):
        (tmp_path / "d" / patient).mkdir(parents=True)
        (tmp_path / "d" / patient / "T1.nii.gz").touch()
    text = "case,sick\n" + "".join(f"sub-{i}/T1.nii.gz,{i % 2}\n" for i in (1, 2, 3, 4))
    found = lists(tmp_path / "d", text, target="sick")
    assert every(found) == {f"sub-{i}/T1": i % 2 for i in (1, 2, 3, 4)}
    assert all("/" not in case["name"] for case in found["training"])
    with pytest.raises(DataError, match=r"several images are called T1 \(sub-1/T1, sub-2/T1\)"):
        lists(tmp_path / "d", "case,sick\nT1,1\n", target="sick")


def test_channels_of_a_case_share_a_row(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for index in range(4):
        for channel in range(2):
            (tmp_path / "d" / f"c{index}_000{channel}.nii.gz").touch()
    text = "case,sick\n" + "".join(f"c{i},{i % 2}\n" for i in range(4))
    found = lists(tmp_path / "d", text, target="sick", channels=2)
    assert every(found) == {f"c{i}": i % 2 for i in range(4)}
    assert all(len(case["image"]) == 2 for case in found["training"])


def test_cases_without_class_are_told_and_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = rows().replace("case_3,CN", "case_3,").replace("case_4,AD", "case_4,n/a")
    assert set(every(lists(folder, text))) == {f"case_{i}" for i in range(10)} - {"case_3", "case_4"}
    printed = capsys.readouterr().out
    assert "2 of 10 cannot be used" in printed
    assert "case_3 has no 'diagnosis'" in printed
    with pytest.raises(DataError, match="case_3 has no 'diagnosis'"):
        lists(folder, text, strict=True)
    three = rows().replace("case_2,AD", "case_2,MCI")
    assert "case_2" not in every(lists(folder, three, classes=["AD", "CN"]))
    assert "is 'MCI', which is none of AD, CN" in capsys.readouterr().out


def test_images_without_row_and_rows_without_image_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lists(folder, rows(8) + "case_99,AD,0,0,p9\n")
    assert len(every(found)) == 8
    printed = capsys.readouterr().out
    assert "line 10: there is no image case_99" in printed
    assert "2 image(s) have no row" in printed


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "has no column case"),
        ("case,diagnosis\n", {}, "has no rows"),
        ("name,diagnosis\ncase_0,AD\n", {}, "has no column case; .*'name,diagnosis'"),
        ("case,diagnosis,case\na,b,c\n", {}, "two columns called 'case'"),
        ("case,diagnosis\ncase_0,AD,extra\n", {}, "line 2: 3 values for 2 columns"),
        ("case,diagnosis\n,AD\n", {}, "line 2: the column case is empty"),
        ("case,diagnosis\nother,AD\n", {}, "there is no image other"),
        ("case,diagnosis\ncase_0,AD\ncase_0,CN\n", {}, "line 3: case_0 has a row already"),
        ("case,diagnosis\ncase_0,AD\ncase_1,AD\n", {}, "holds only 'AD'; a target needs two"),
        ("case,diagnosis\ncase_0,\ncase_1,\n", {}, "holds nothing"),
        (rows(), {"target": "diagnose"}, "no column 'diagnose'; did you mean diagnosis"),
        (rows(), {"target": "case_id"}, "no column 'case_id'"),
        (rows(), {"target": "diagnosis", "group": "centre"}, "no column 'centre'"),
        (rows(), {"target": ["acl", "diagnosis"]}, "has 'AD' in 'diagnosis', where only 0 or 1"),
        (rows(), {"classes": ["AD", "MCI"]}, "no case of the class 'MCI'"),
        ("case,age\n" + "".join(f"case_{i},{i + 50.5}\n" for i in range(10)), {"target": "age"}, "10 different values"),
        (rows().replace("p2", ""), {"group": "patient"}, "has no 'patient'"),
        ('case,diagnosis\n"case_0,AD\ncase_1,CN\n', {}, "is no CSV"),
    ],
)
def test_every_bad_table_ends_in_a_sentence(folder: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        lists(folder, text, **options)


def test_settings_that_do_not_fit_end_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--target"):
        lists(folder, rows(), target="")
    with pytest.raises(SettingsError, match="--table"):
        classified_lists(str(folder), target="a")
    with pytest.raises(SettingsError, match="drop it"):
        lists(folder, rows(), target=["acl", "meniscus"], classes=["a", "b"])
    with pytest.raises(SettingsError, match="two or more"):
        lists(folder, rows(), classes=["AD"])
    with pytest.raises(DataError, match="cannot be read: No such file"):
        classified_lists(str(folder), table=str(tmp_path / "none.csv"), target="a")
    (tmp_path / "latin.csv").write_bytes("case,dx\ncase_0,Köln\n".encode("latin-1"))
    with pytest.raises(DataError, match="not text in UTF-8"):
        classified_lists(str(folder), table=str(tmp_path / "latin.csv"), target="dx")
    with pytest.raises(SettingsError, match="resize"):
        volume_settings(fit="pad", input_size=[8, 8, 8], spacing_mm=1.0)
    with pytest.raises(SettingsError, match="three sides"):
        volume_settings(fit="crop", input_size=[8, 8], spacing_mm=1.0)


def test_a_datalist_may_hold_the_classes(folder: Path, tmp_path: Path) -> None:
    entry = {i: {"image": str(folder / f"case_{i}.nii.gz"), "dx": ["ill", "well"][i % 2]} for i in range(10)}
    content = {"training": [entry[i] for i in range(6)], "validation": [entry[i] for i in range(6, 10)]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    found = classified_lists("", str(tmp_path / "list.json"), target="dx")
    assert [case["case"] for case in found["validation"]] == [f"case_{i}" for i in range(6, 10)]
    assert found["task"].names == ("ill", "well")
    folds = [classified_lists("", str(tmp_path / "list.json"), target="dx", fold=i, folds=3) for i in range(3)]
    assert sum(len(fold["validation"]) for fold in folds) == 6


# splits


def cohort(count: int, *, patients: bool = False) -> list[dict[str, Any]]:
    """Cases of three unequal classes; with ``patients``, one has one to four scans, all of one class."""
    rng = np.random.default_rng(0)
    cases: list[dict[str, Any]] = []
    while len(cases) < count:
        kind = str(rng.choice(["a", "b", "c"], p=[0.6, 0.3, 0.1]))
        patient = f"p{len(cases)}"
        for _ in range(int(rng.integers(1, 5)) if patients else 1):
            name = f"{len(cases):03d}"
            cases.append({"image": f"{name}.nii", "name": name, "kind": kind, "patient": patient})
    return cases[:count]


@pytest.mark.parametrize("patients", [False, True])
def test_stratified_folds_validate_each_case_once_and_keep_shares_and_patients(patients: bool) -> None:
    cases = cohort(200, patients=patients)
    share = {kind: count / len(cases) for kind, count in Counter(case["kind"] for case in cases).items()}
    group = "patient" if patients else None
    seen: Counter[str] = Counter()
    for fold in range(5):
        split = split_cases(cases, fold=fold, group=group, stratify=lambda case: case["kind"])
        validation = split["validation"]
        seen.update(case["name"] for case in validation)
        assert len(validation) + len(split["training"]) == 200
        assert not {c["patient"] for c in validation} & {c["patient"] for c in split["training"]}
        tolerance = 0.06 if patients else 0.03
        for kind, expected in share.items():
            own = sum(case["kind"] == kind for case in validation) / len(validation)
            assert own == pytest.approx(expected, abs=tolerance), (fold, kind)
    assert len(seen) == 200
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("validation_share", [0.1, 0.2, 0.3, 0.5])
def test_a_stratified_hold_out_has_the_share_asked_for(validation_share: float) -> None:
    cases = cohort(100)
    split = split_cases(cases, validation_share=validation_share, stratify=lambda case: case["kind"])
    assert len(split["validation"]) == round(100 * validation_share)
    counts = Counter(case["kind"] for case in cases)
    for kind, count in Counter(case["kind"] for case in split["validation"]).items():
        assert abs(count - validation_share * counts[kind]) < 1
    again = split_cases(cases[::-1], validation_share=validation_share, stratify=lambda case: case["kind"])
    assert again == split, "the order of the files does not matter"


def test_a_grouped_hold_out_is_near_the_share_and_tears_no_group() -> None:
    cases = cohort(100, patients=True)
    split = split_cases(cases, group="patient", stratify=lambda case: case["kind"])
    assert 10 <= len(split["validation"]) <= 30
    assert not {c["patient"] for c in split["validation"]} & {c["patient"] for c in split["training"]}


def test_kinds_too_rare_for_the_folds_are_told_and_spread(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [{"image": f"{i:02d}.nii", "kind": "rare" if i < 3 else "usual"} for i in range(30)]
    folds = [split_cases(cases, fold=i, stratify=lambda case: case["kind"])["validation"] for i in range(5)]
    assert sorted(sum(case["kind"] == "rare" for case in fold) for fold in folds) == [0, 0, 1, 1, 1]
    assert "(rare) have fewer cases than the 5 parts" in capsys.readouterr().out
    alone = split_cases(cases, fold=0, stratify=lambda case: case["image"])
    assert len(alone["validation"]) == 6
    assert "without regard" in capsys.readouterr().out


def test_absent_classes_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "case,dx\n" + "".join(f"case_{i},{'b' if i == 0 else 'a'}\n" for i in range(10))
    for fold in range(2):
        lists(folder, text, target="dx", fold=fold, folds=2)
    printed = capsys.readouterr().out
    assert "are b, which cannot be learned" in printed
    assert "are b, which is not scored" in printed


def test_weights_make_up_for_numbers() -> None:
    task = ClassificationTask(("a", "b", "c"))
    cases = [{"target": 0}] * 6 + [{"target": 1}] * 3 + [{"target": 2}]
    weights = class_weights(cases, task)
    assert weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert class_weights(cases, task, balance=False) is None
    assert class_weights([{"target": [1]}, {"target": [0]}, {"target": [0]}], ClassificationTask(("x",), True)) == [2.0]
    with pytest.raises(DataError, match="0 of 9 are c"):
        class_weights(cases[:9], task)


def test_a_changed_table_is_told_from_the_same_one() -> None:
    cases = [{"image": "a.nii", "target": 0}, {"image": "b.nii", "target": 1}]
    assert target_digest(cases) == target_digest(cases[::-1])
    assert target_digest(cases) != target_digest([cases[0], cases[1] | {"target": 0}])


def test_images_are_recognized_under_any_name(tmp_path: Path) -> None:
    one = write_volume(tmp_path / "a" / "scan_1.nii.gz", blobs(1)[0])
    two = write_volume(tmp_path / "b" / "scan_1.nii.gz", blobs(2)[0])
    copy = tmp_path / "c.nii.gz"
    copy.write_bytes(one.read_bytes())
    prints = [fingerprints([{"image": str(path)}])[0] for path in (one, two, copy)]
    assert prints[0] == prints[2] != prints[1]


# prediction


def test_cases_to_predict_carry_the_truth_where_it_is_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ClassificationTask(("AD", "CN"))
    cases = prediction_cases(str(folder), task=task, target="diagnosis")
    assert [case["target"] for case in cases] == [None] * 10
    text = rows(4).replace("case_1,CN", "case_1,").replace("case_2,AD", "case_2,MCI")
    cases = prediction_cases(str(folder), task=task, target="diagnosis", table=table(folder.parent / "t.csv", text))
    assert [case["target"] for case in cases] == [0, None, None, 1]
    assert "2 of 4 cases are predicted but cannot be scored" in capsys.readouterr().out


# volumes


@pytest.mark.parametrize("channels", [1, 2])
def test_resizing_shows_the_whole_volume_and_cropping_its_middle_at_one_scale(tmp_path: Path, channels: int) -> None:
    image, _ = blobs(0, (24, 20, 28))
    files = [write_volume(tmp_path / f"a_000{c}.nii.gz", image + c, spacing=2.0) for c in range(channels)]
    case = {"image": str(files[0]) if channels == 1 else list(map(str, files)), "name": "a", "case": "a", "target": 1}
    plain = SpatialCrop([16, 16, 16], rotation_probability=0, zoom_probability=0, flip_probability=0, centred=True)
    for fit, shape in (("resize", (16, 16, 16)), ("crop", (56, 40, 48))):
        settings = volume_settings(fit=fit, input_size=[16, 16, 16], spacing_mm=1.0, channels=channels)
        data = VolumeDataset([case], spatial=plain, store_dir=str(tmp_path / "store"), settings=settings)
        assert data.volumes[0].shape == shape
        sample = data[1, 0]
        assert sample["region"][0].shape == (channels, 16, 16, 16)
        assert sample["target"] == [1]
    low = [(n - 16) // 2 for n in (56, 40, 48)]
    middle = data.volumes[0].read(low, [n + 16 for n in low]).reshape(channels, 16, 16, 16)
    assert np.array_equal(sample["region"][0].numpy(), middle)


def test_bad_volumes_are_left_out_with_their_targets(tmp_path: Path) -> None:
    cases = []
    for index in range(4):
        path = write_volume(tmp_path / f"c{index}.nii.gz", blobs(index)[0])
        cases.append({"image": str(path), "name": f"c{index}", "case": f"c{index}", "target": index})
    Path(cases[1]["image"]).write_bytes(b"broken")
    settings = volume_settings(fit="resize", input_size=[8, 8, 8], spacing_mm=None)
    data = VolumeDataset(cases, spatial=SpatialCrop(8, centred=True), store_dir=str(tmp_path / "s"), settings=settings)
    assert [data[1, index]["target"] for index in range(len(data))] == [[0], [2], [3]]
    assert len(data.problems) == 1


def test_an_epoch_is_one_pass_in_an_order_of_its_own() -> None:
    sampler = CaseSampler(range(11), batch_size=4, accumulation_steps=2, seed=3)
    orders = []
    for epoch in (1, 2, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [2, 2, 2, 2, 2, 1]
        assert len(batches) == len(sampler)
        assert {at for batch in batches for at, _ in batch} == {epoch}
        orders.append([index for batch in batches for _, index in batch])
        assert sorted(orders[-1]) == list(range(11))
    assert orders[0] == orders[2] != orders[1]
    fixed = CaseSampler(range(3), batch_size=2)
    fixed.set_epoch(7)
    assert list(fixed) == [[(0, 0), (0, 1)], [(0, 2)]]
    with pytest.raises(SettingsError, match="multiple"):
        CaseSampler(range(3), batch_size=5, accumulation_steps=2, seed=0)


def test_targets_as_losses_want_them() -> None:
    assert torch.equal(ClassificationTask(("a", "b")).encode([1, 0]), torch.tensor([1, 0]))
    several = ClassificationTask(("a", "b"), multilabel=True)
    assert torch.equal(several.encode([[1, 0]]), torch.tensor([[1.0, 0.0]]))
    assert [several.stratum({"target": value}) for value in ([1, 1], [0, 1], [0, 0])] == ["a+b", "b", "none"]
