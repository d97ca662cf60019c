# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Groups and patients of cases: as tables tell them, kept together by splits, and refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.data.listing.case_tables import CaseTable
from common.data.listing.labelled import add_columns, split_cases, whole_patients
from common.data.listing.members import GroupColumn, group_columns, members_of
from common.errors import DataError, SettingsError

CASES = [f"sub-{index:02d}_T1w" for index in range(12)]


def test_columns_and_bands() -> None:
    age = GroupColumn("age", (40.0, 60.0))
    assert group_columns("site,sex,age:40,60") == [GroupColumn("site"), GroupColumn("sex"), age]
    assert group_columns(["site", "age:40,60"]) == group_columns("site, age: 40, 60") == [GroupColumn("site"), age]
    assert group_columns(("site", "sex")) == [GroupColumn("site"), GroupColumn("sex")]
    assert group_columns(None) == group_columns([]) == []
    assert [age.group_of(value, "c") for value in (0, 39.99, "40", 60, "N/A", None, "unknown")] == [
        *("below 40", "below 40", "40 to below 60", "60 and above", "", "", "")
    ]
    for wrong, words in (
        ("", "name columns"),
        ("age:old", "name columns"),
        ("site,,sex", "name columns"),
        ("site,site", "names site twice"),
        ("age:60,40", "age end at 60, 40; let them ascend"),
    ):
        with pytest.raises(SettingsError, match=words):
            group_columns(wrong)
    with pytest.raises(DataError, match="the age of sub-01 is 'old', not a number"):
        age.group_of("old", "sub-01")


def test_what_is_told_of_cases() -> None:
    rows: list[dict[str, Any]] = [{"site": "AB"[i % 2], "age": 20 + 5 * i, "who": i // 2} for i in range(12)]
    rows[3]["site"] = "n/a"
    del rows[4]["site"]
    found = members_of(CASES, rows, group="site,age:40", patient="who")
    assert found.groups["site"] == ["A", "B", "A", "", "", *"BABABAB"]
    assert found.groups["age"] == ["below 40"] * 4 + ["40 and above"] * 8
    assert found.patients == [str(i // 2) for i in range(12)]
    assert found.part([3, 0]).row(0) == {"group": {"site": "unknown", "age": "below 40"}, "patient": "1"}
    assert members_of(CASES, rows, group="site").row(1) == {"group": "B"}
    assert members_of(CASES, rows).row(1) == {"group": None}
    with pytest.raises(DataError, match="no case has a centre: the cases are called sub-00_T1w"):
        members_of(CASES, rows, group="centre")
    with pytest.raises(
        DataError, match=r"age has 12 different numbers in 12 cases; name ends of bands, such as --group age:"
    ):
        members_of(CASES, rows, group="age")
    rows[5]["who"] = " "
    with pytest.raises(DataError, match="sub-05_T1w has no 'who'"):
        members_of(CASES, rows, patient="who")


def test_participants_of_bids_are_told_by_the_names_of_cases(tmp_path: Path) -> None:
    table = tmp_path / "participants.tsv"
    table.write_text("participant_id\tage\tsex\nsub-00\t31\tF\nsub-01\tn/a\tM\n")
    found = CaseTable(table, columns=["age", "participant_id"])
    assert (
        found.of("sub-00_ses-2_T1w")
        == found.of("sub-00/anat/sub-00_T1w")
        == {
            "participant_id": "sub-00",
            "age": "31",
            "sex": "F",
        }
    )
    assert found.of("case_7") == {}
    cases: list[dict[str, Any]] = [{"image": "/d/sub-01_T1w.nii.gz"}, {"image": "/d/sub-09_T1w.nii.gz"}]
    add_columns(cases, str(table))
    assert cases[0]["participant_id"] == "sub-01"
    assert "sex" not in cases[1]
    with pytest.raises(DataError, match="no column 'site'; its columns are participant_id, age, sex"):
        CaseTable(table, columns=["site"])
    table.write_text("participant_id\tage\nsub-00\t31\nsub-00\t32\n")
    with pytest.raises(DataError, match="puts the subject sub-00 into '31' and '32'"):
        CaseTable(table, columns=["age"])
    (tmp_path / "empty.csv").write_text("name,age\nx,1\n")
    with pytest.raises(DataError, match="no column case"):
        CaseTable(tmp_path / "empty.csv")


@pytest.mark.parametrize("fold", [None, 0, 1, 2])
def test_patients_are_never_torn_apart(fold: int | None) -> None:
    cases = [{"image": f"/d/c{i:02d}.nii", "who": f"p{i // 3}", "kind": "ab"[i % 2]} for i in range(18)]
    for stratify in (None, lambda case: case["kind"]):
        lists = split_cases(cases, fold=fold, folds=3, patient="who", stratify=stratify)
        training, validation = ({case["who"] for case in lists[part]} for part in ("training", "validation"))
        assert validation
        assert not training & validation


def test_patients_within_centres_and_given_splits(tmp_path: Path) -> None:
    cases = [{"image": f"/d/c{i:02d}.nii", "who": f"p{i // 2}", "site": "abc"[i // 6]} for i in range(18)]
    lists = split_cases(cases, fold=1, folds=3, group="site", patient="who")
    assert len({case["site"] for case in lists["validation"]}) == 1
    cases[0]["site"] = "b"
    with pytest.raises(DataError, match="the who p0 is in the site 'b' and 'a'"):
        split_cases(cases, fold=1, folds=3, group="site", patient="who")
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([{"train": ["c00", "c01"], "val": ["c02"]}, {"train": ["c00"], "val": ["c01"]}]))
    assert len(split_cases(cases, splits=str(file), patient="who")["training"]) == 2
    with pytest.raises(DataError, match=r"has 1 who\(s\), such as p0, both in training and in validation"):
        split_cases(cases, splits=str(file), fold=1, patient="who")
    with pytest.raises(
        DataError, match="c00 has no 'name of patient'; add it to the table or the datalist, or drop --pat"
    ):
        whole_patients({"training": cases, "validation": []}, "name of patient", "list.json")
