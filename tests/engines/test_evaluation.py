# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Evaluation of files: what is scored, what is refused, what is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

from common.bundles import read_config
from common.data.cases import case_name
from common.data.listing.case_tables import CaseTable
from common.engines import evaluate_predictions
from common.errors import DataError, SettingsError

from ..conftest import ROOT

AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])
LABELS = ["background", "a", "b"]


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def cube(value: int = 1, *, shift: int = 0, side: int = 8) -> np.ndarray:
    out = np.zeros((20, 16, 16), np.uint8)
    out[4 + shift : 4 + shift + side, 4:12, 4:12] = value
    return out


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Six cases: class a predicted 0, 1, ... voxels beside its reference; class b in the first two alone."""
    for index in range(6):
        reference, prediction = cube(), cube(shift=index)
        if index < 2:
            reference[0, :, :4] = 2
        if index < 1:
            prediction[0, :, :4] = 2
        save(tmp_path / "data" / "images" / f"case_{index}.nii.gz", np.ones((20, 16, 16), np.float32))
        save(tmp_path / "data" / "labels" / f"case_{index}.nii.gz", reference)
        save(tmp_path / "predictions" / f"case_{index}.nii.gz", prediction)
    return tmp_path


def evaluate(folder: Path, **settings: Any) -> dict[str, float | None]:
    given = {"predictions": str(folder / "predictions"), "dataset_dir": str(folder / "data"), "labels": LABELS}
    return evaluate_predictions(**given | {"output_dir": str(folder / "out"), "resamples": 200} | settings)


def rows(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with open(folder / "out" / "scores.csv", newline="", encoding="utf-8") as stream:
        return {(row["case"], row["class"]): row for row in csv.DictReader(stream)}


def content(folder: Path) -> dict[str, Any]:
    def refuse(value: str) -> None:
        raise AssertionError(f"{value} is not JSON")

    return json.loads((folder / "out" / "scores.json").read_text(), parse_constant=refuse)


def test_scores_means_and_files(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = evaluate(folders)
    expected = [1 - index / 8 for index in range(6)]
    assert means["a"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert means["b"] == 0.5, "one found, one missed, four cases where neither holds it"
    assert means["mean"] == pytest.approx((np.mean(expected) + 0.5) / 2, rel=1e-5)
    table = rows(folders)
    assert [float(table[f"case_{i}", "a"]["dice"]) for i in range(6)] == pytest.approx(expected)
    assert [float(table[f"case_{i}", "a"]["hd95_mm"]) for i in range(6)] == pytest.approx(range(6))
    assert float(table["case_3", "a"]["reference_ml"]) == pytest.approx(8**3 * 3 / 1000), "spacing of the file"
    assert table["case_1", "b"]["hd95_mm"] == "inf"
    assert table["case_2", "b"]["dice"] == table["case_2", "b"]["volume_error_percent"] == ""
    written = content(folders)
    whole = written["summary"]["all"]
    low, high = whole["classes"]["a"]["dice"]["interval"]
    assert low < means["a"] < high
    assert [whole["classes"]["b"][key] for key in ("one_empty", "both_empty")] == [1, 4]
    assert whole["classes"]["b"]["hd95_mm"]["cases"] == 1
    assert written["settings"]["tolerance_mm"] == 1.0
    assert written["settings"]["classes"] == {"a": [1], "b": [2]}
    assert written["skipped"] == {}
    assert (folders / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "6 case(s) scored" in printed
    assert "b: in 1 case(s) only prediction or reference holds it" in printed
    assert "b: in 4 case(s) neither holds it" in printed


def test_the_number_of_workers_changes_nothing(folders: Path) -> None:
    texts = []
    for workers in (1, 3):
        evaluate(folders, num_workers=workers)
        texts.append([(folders / "out" / name).read_bytes() for name in ("scores.csv", "scores.json", "scores.png")])
    assert texts[0] == texts[1]


def test_groups_of_a_table(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folders / "cases.csv"
    table.write_bytes(
        "\ufeffcase;scanner;centre\ncase_0.nii.gz;x;A\ncase_1;x;A\ncase_2;y;B\ncase_3;y;\nelse;y;C\n".encode()
    )
    evaluate(folders, groups=str(table), group="centre")
    groups = content(folders)["summary"]["groups"]
    assert {name: group["cases"] for name, group in groups.items()} == {"A": 2, "B": 1, "unknown": 3}
    assert groups["A"]["classes"]["a"]["dice"]["mean"] == pytest.approx(15 / 16)
    assert groups["B"]["classes"]["a"]["dice"] == {"mean": 0.75, "interval": None, "cases": 1}
    assert rows(folders)["case_1", "a"]["group"] == "A"
    assert "centre A" in capsys.readouterr().out
    with pytest.raises(DataError, match="no column 'site'; its columns are case, scanner, centre"):
        evaluate(folders, groups=str(table), group="site")
    with pytest.raises(SettingsError, match="--group centre"):
        evaluate(folders, groups=str(table))
    with pytest.raises(DataError, match="cannot be read"):
        evaluate(folders, groups=str(folders / "none.csv"), group="centre")
    table.write_text("case,centre\nother,A\n")
    with pytest.raises(DataError, match=r"no case has a centre: the cases are called case_\d"):
        evaluate(folders, groups=str(table), group="centre")
    table.write_text("case,centre\ncase_0,A\ncase_0,B\n")
    with pytest.raises(DataError, match="case_0 into 'A' and 'B'"):
        CaseTable(table, columns=["centre"])


def test_several_columns_bands_and_patients(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folders / "cases.csv"
    told = ["case,site,age,who", *(f"case_{i},{'AB'[i % 2]},{30 + 10 * i},p{i // 2}" for i in range(5)), "case_5,,,p2"]
    table.write_text("\n".join(told) + "\n")
    evaluate(folders, groups=str(table), group="site,age:40", patient="who")
    written = content(folders)
    assert written["summary"]["all"]["patients"] == 3
    assert {name: each["cases"] for name, each in written["summary"]["groups"].items()} == {
        "site A": 3,
        "site B": 2,
        "site unknown": 1,
        "age 40 and above": 4,
        "age below 40": 1,
        "age unknown": 1,
    }
    found = written["by_group"]
    assert {name: each["patients"] for name, each in found["site"]["groups"].items()} == {"A": 3, "B": 2}
    assert [found[column]["missing"] for column in ("site", "age")] == [1, 1]
    for name in "AB":
        same = written["summary"]["groups"][f"site {name}"]["mean"]["dice"]
        assert found["site"]["groups"][name]["score"] == pytest.approx(same["mean"], abs=1e-5)
        assert found["site"]["groups"][name]["interval"] == pytest.approx(same["interval"], abs=1e-5)
    assert found["age"]["gap"] is None
    row = rows(folders)["case_1", "a"]
    assert (row["group_site"], row["group_age"], row["patient"]) == ("B", "40 and above", "p0")
    (last,) = (case for case in written["cases"] if case["case"] == "case_5")
    assert last["group"] == {"site": "unknown", "age": "unknown"}
    printed = capsys.readouterr().out
    assert "too few patients, fewer than 10, to say anything of A (3), B (2)" in printed
    assert "site: 1 case(s) have none and are in no group" in printed
    assert "intervals over 3 patients" in printed
    assert (folders / "out" / "groups.png").read_bytes().startswith(b"\x89PNG")
    assert "Groups of cases" in (folders / "out" / "report.html").read_text("utf-8")
    evaluate(folders)
    assert not (folders / "out" / "groups.png").exists(), "of an earlier evaluation"
    table.write_text("\n".join(told).replace("p2", "") + "\n")
    with pytest.raises(
        DataError, match=r"case_\d has no 'who'; add it to the table or the datalist, or drop --patient"
    ):
        evaluate(folders, groups=str(table), patient="who")


def test_what_a_case_is_called() -> None:
    assert case_name({"image": "/data/sub-1_T1w.nii.gz"}) == "sub-1_T1w"
    assert case_name({"image": ["/data/t1.nii", "/data/t2.nii"]}) == "t1"
    assert case_name({"image": ["/data/t1.nii", "/data/t2.nii"], "name": "sub-1"}) == "sub-1"


def test_groups_of_a_datalist(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of an entry, as they come from the datalist's reader."""
    data = folders / "data"
    cases = [
        {
            "image": f"i{i}",
            "label": str(data / "labels" / f"case_{i}.nii.gz"),
            "name": f"case_{i}",
            "centre": "AB"[i % 2],
        }
        for i in range(6)
    ]
    lists = {"training": cases[:4], "validation": cases[4:]}
    monkeypatch.setattr("common.engines.evaluation.labelled_lists", lambda *_, **__: lists)
    evaluate(folders, group="centre")
    assert [group["cases"] for group in content(folders)["summary"]["groups"].values()] == [3, 3]
    evaluate(folders, group="centre", split="validation")
    assert [case["case"] for case in content(folders)["cases"]] == ["case_4", "case_5"]


def test_classes_of_a_dataset_json(folders: Path) -> None:
    file = folders / "dataset.json"
    file.write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2}}))
    assert evaluate(folders, labels=str(file)) == evaluate(folders)


def test_regions_and_ignored_voxels(folders: Path) -> None:
    reference = cube(1)
    reference[4:6][reference[4:6] == 1] = 2
    reference[6:10] = 3  # no verdict
    save(folders / "data" / "labels" / "case_0.nii.gz", reference)
    prediction = cube(1)
    prediction[6:10] = 2
    save(folders / "predictions" / "case_0.nii.gz", prediction)
    means = evaluate(folders, regions={"both": [1, 2], "b alone": [2]}, ignore_label=3)
    assert set(means) == {"both", "b alone", "mean"}
    own = rows(folders)
    assert float(own["case_0", "both"]["dice"]) == float(own["case_0", "both"]["nsd"]) == 1.0
    assert float(own["case_0", "b alone"]["dice"]) == 0.0
    assert float(own["case_0", "both"]["reference_ml"]) == pytest.approx(4 * 64 * 3 / 1000, rel=1e-5)
    with pytest.raises(SettingsError, match="ignore_label is 1"):
        evaluate(folders, ignore_label=1)
    with pytest.raises(SettingsError, match="region 'x'"):
        evaluate(folders, regions={"x": [7]})


def test_the_ignored_label_of_a_dataset_json_counts_nowhere(folders: Path) -> None:
    file = folders / "dataset.json"
    file.write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}))
    reference, prediction = cube(1), cube(1)
    reference[6:10], prediction[6:10] = 3, 2
    save(folders / "data" / "labels" / "case_0.nii.gz", reference)
    save(folders / "predictions" / "case_0.nii.gz", prediction)
    evaluate(folders, labels=str(file))
    assert float(rows(folders)["case_0", "a"]["dice"]) == 1.0
    assert rows(folders)["case_0", "b"]["dice"] == ""
    assert content(folders)["settings"]["ignore_label"] == 3


def test_values_as_an_atlas_numbers_them(folders: Path) -> None:
    before = evaluate(folders)
    numbers = np.array([0, 354, 614_454_277], np.int32)
    for path in [*(folders / "predictions").iterdir(), *(folders / "data" / "labels").iterdir()]:
        save(path, numbers[np.asarray(nib.load(path).dataobj)])
    assert evaluate(folders, labels={"background": 0, "a": 354, "b": 614_454_277}) == before


def test_predictions_in_another_order_of_axes_are_scored_as_they_lie(folders: Path) -> None:
    before = evaluate(folders)
    files = sorted((folders / "predictions").iterdir())
    for codes, path in zip(("LAS", "PIR", "SRA", "LPS", "ASR", "IPL"), files, strict=True):
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
        nib.save(image.as_reoriented(turn), path)
    assert evaluate(folders) == before


def test_a_tilted_gantry_makes_smaller_voxels(folders: Path) -> None:
    """The sides of the voxels stay 1, 1 and 3 mm; at 25 degrees their volume is 3 mm^3 times the cosine."""
    tilted = AFFINE.copy()
    tilted[1:3, 2] = 3 * np.sin(np.deg2rad(25)), 3 * np.cos(np.deg2rad(25))
    for path in [*(folders / "predictions").iterdir(), *(folders / "data" / "labels").iterdir()]:
        save(path, np.asarray(nib.load(path).dataobj), tilted)
    evaluate(folders)
    own = rows(folders)["case_3", "a"]
    assert float(own["reference_ml"]) == pytest.approx(8**3 * 3 * np.cos(np.deg2rad(25)) / 1000, rel=1e-5)
    assert float(own["hd95_mm"]) == pytest.approx(3, rel=1e-5), "moved along an axis that is not slanted"


def _nan() -> np.ndarray:
    values = cube().astype(np.float32)
    values[0, 0, 0] = np.nan
    return values


BAD = {
    "another grid": (cube()[:-1], AFFINE, "do not share one grid"),
    "a millimetre off": (cube(), AFFINE * [[1.06], [1], [1], [1]], r"1\.14 mm apart, with voxels of 1 x 1 x 3 mm"),
    "another place": (cube(), AFFINE + np.eye(4)[:, [3, 0, 1, 2]] * 5, "do not share one grid"),
    "not finite": (_nan(), AFFINE, "holds the value nan"),
    "probabilities": (cube() * np.float32(0.4), AFFINE, r"holds the value 0\.4; a label map holds whole numbers"),
    "another class": (cube(7), AFFINE, "holds the values 7, but the classes are"),
    "negative": (cube().astype(np.int16) * -1, AFFINE, "holds the values -1"),
    "four dimensions": (cube()[..., None].repeat(2, -1), AFFINE, "4 dimensions"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_prediction_is_named_and_the_others_are_scored(
    what: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, affine, words = BAD[what]
    save(folders / "predictions" / "case_0.nii.gz", values, affine)
    means = evaluate(folders)
    assert means["a"] == pytest.approx(np.mean([1 - index / 8 for index in range(1, 6)]), rel=1e-5)
    reason = content(folders)["skipped"]["case_0"]
    assert "predictions/case_0.nii.gz" in reason
    assert reason in capsys.readouterr().out
    with pytest.raises(DataError, match=words):
        evaluate(folders, strict=True)


def test_whole_numbers_stored_as_decimals_are_labels(folders: Path) -> None:
    before = evaluate(folders)
    for path in (folders / "predictions").iterdir():
        save(path, np.asarray(nib.load(path).dataobj).astype(np.float64))
    assert evaluate(folders) == before


def test_missing_predictions_are_no_zeros(folders: Path) -> None:
    (folders / "predictions" / "case_5.nii.gz").unlink()
    assert evaluate(folders)["a"] == pytest.approx(np.mean([1 - index / 8 for index in range(5)]), rel=1e-5)
    assert "run the inference config" in content(folders)["skipped"]["case_5"]
    for path in (folders / "predictions").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="Nothing is left"):
        evaluate(folders)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("tolerance_mm", -1),
        ("tolerance_mm", "far"),
        ("resamples", 1.5),
        ("seed", -1),
        ("split", "test"),
        ("labels", "a"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting: str, value: object, folders: Path) -> None:
    with pytest.raises(SettingsError, match=f"{setting} is"):
        evaluate(folders, **{setting: value})


def test_the_config_hands_on_every_setting(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = ConfigParser(read_config("bundles/mae_resenc_l/configs/evaluate.yaml"))
    settings = {"predictions": str(folders / "predictions"), "dataset_dir": str(folders / "data"), "labels": LABELS}
    settings |= {"output_dir": str(folders / "out"), "regions": {"both": [1, 2]}, "tolerance_mm": 2.0, "seed": 3}
    settings |= {"resamples": 0, "split": "validation", "num_workers": 1}
    parser.update(settings)
    means = parser.get_parsed_content("evaluation")
    assert set(means) == {"both", "mean"}
    written = content(folders)
    assert {name: written["settings"][name] for name in ("tolerance_mm", "seed", "resamples", "split")} == {
        name: settings[name] for name in ("tolerance_mm", "seed", "resamples", "split")
    }
    assert len(written["cases"]) == 1
    assert written["summary"]["all"]["mean"]["dice"]["interval"] is None
