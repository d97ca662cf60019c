# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Tables of numbers, whatever is wrong with them, and splits that hold low and high ones alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data import RegressionTask, class_weights, classified_lists, prediction_cases
from common.data.listing.quantities import ranges
from common.errors import DataError, SettingsError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files that are only named, which is all that lists look at."""
    (tmp_path / "scans").mkdir()
    for index in range(40):
        (tmp_path / "scans" / f"c{index:02d}.nii.gz").touch()
    return tmp_path / "scans"


def rows(values: list[Any]) -> str:
    return "case,age,patient\n" + "".join(f"c{i:02d},{value},p{i // 2}\n" for i, value in enumerate(values))


AGES = [20 + index * 1.5 for index in range(40)]


def lists(folder: Path, text: str, **options: Any) -> dict[str, Any]:
    (folder.parent / "t.csv").write_text(text)
    told = {"task": "regression", "target": "age", **options}
    return classified_lists(str(folder), table=str(folder.parent / "t.csv"), **told)


def numbers(found: dict[str, Any], part: str) -> list[float]:
    return [case["target"] for case in found[part]]


def test_mean_and_spread_are_those_of_the_training_cases_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = lists(folder, rows(AGES), fold=2, units="years")
    training = numbers(found, "training")
    assert len(training) == 32
    assert sorted(training + numbers(found, "validation")) == AGES
    assert found["task"] == RegressionTask("age", float(np.mean(training)), float(np.std(training)), "years")
    assert found["task"].mean != np.mean(AGES)
    assert "training 32 case(s): age" in capsys.readouterr().out
    encoded = found["task"].encode(training)
    assert encoded.shape == (32, 1)
    assert float(encoded.mean()) == pytest.approx(0, abs=1e-6)
    assert float(encoded.std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(found["task"].decode(encoded), torch.tensor(training))


def test_every_fold_has_low_and_high_numbers_and_tears_no_patient(folder: Path) -> None:
    seen: list[float] = []
    for fold in range(5):
        alone = numbers(lists(folder, rows(AGES), fold=fold), "validation")
        seen += alone
        # of each fifth of 8 cases one or two
        assert [sum(low <= value < low + 12 for value in alone) for low in range(20, 80, 12)] == pytest.approx(
            [1.6] * 5, abs=0.7
        )
        grouped = lists(folder, rows(AGES), fold=fold, group="patient")
        patients = [{case["patient"] for case in grouped[part]} for part in ("training", "validation")]
        assert not patients[0] & patients[1]
        assert np.ptp(numbers(grouped, "validation")) > 35
    assert sorted(seen) == AGES


def test_few_cases_and_ties_are_still_split(folder: Path) -> None:
    for values in ([1.5, 2.5, 3.5], [5, 5, 5, 5, 5, 6, 7, 5, 5, 5], [1, 2, 3, 4] * 5):
        found = lists(folder, rows(values))
        assert len(found["training"]) + len(found["validation"]) == len(values)
        assert found["validation"]
    assert ranges([{"target": 3.0}], parts=5)({"target": 9.0}) == "3 to 3"


def test_cases_without_a_number_are_told_and_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: list[Any] = [*AGES[:20], "", "nan", "unknown", '"61,5"', "inf", "n/a"]
    found = lists(folder, rows(values))
    assert len(found["training"]) + len(found["validation"]) == 20
    printed = capsys.readouterr()
    told = printed.out + printed.err
    assert "6 of 26 cannot be used" in told
    assert "c20 has no 'age'" in told
    assert "c21 has no 'age'" in told
    assert "c22 has 'unknown' in 'age', where a number is needed" in told
    assert "c23 has '61,5' in 'age', where a number is needed; write it with a point" in told
    assert "c24 has 'inf' in 'age', where a finite number is needed" in told
    with pytest.raises(DataError, match="c20 has no 'age'"):
        lists(folder, rows(values), strict=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["AD", "CN"] * 5, "holds no number, but for example 'AD'; leave out --task regression"),
        ([0, 1] * 5, "holds two different numbers, 0 and 1, which are classes; leave out --task regression"),
        ([54.5] * 10, r"holds 54\.5 for every case; there is nothing to predict"),
        ([""] * 10, "holds nothing; a regression needs a number"),
    ],
)
def test_columns_that_are_no_quantity_end_in_a_sentence(folder: Path, values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        lists(folder, rows(values))


def test_training_cases_of_one_number_teach_nothing(folder: Path) -> None:
    (folder.parent / "s.json").write_text('[{"train": ["c00", "c01"], "val": ["c02", "c03"]}]')
    with pytest.raises(DataError, match=r"all 2 training cases have the age 5 in .*another split"):
        lists(folder, rows([5, 5, 6, 7]), splits=str(folder.parent / "s.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regress"}, "task is 'regress'; it must be classification or regression"),
        ({"target": ["age", "patient"]}, "a regression predicts one number; name one column"),
        ({"classes": ["1", "2"]}, "a regression predicts a number; drop --classes"),
        ({"task": "classification", "units": "years"}, "classes have none; drop it, or add --task regression"),
        ({"target": ""}, "--task regression"),
    ],
)
def test_settings_that_do_not_fit_end_in_a_sentence(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        lists(folder, rows(AGES), **options)
    with pytest.raises(SettingsError, match="a regression has none; drop it"):
        class_weights([], RegressionTask("age"))


@pytest.mark.parametrize("values", [AGES, [40 + index % 15 for index in range(40)]])
def test_numbers_are_not_taken_for_classes(folder: Path, values: list[Any]) -> None:
    with pytest.raises(DataError, match="these are no classes: predict the number with --task regression"):
        lists(folder, rows(values), task="classification")
    grades = lists(folder, rows([index % 4 for index in range(40)]), task="classification")
    assert grades["task"].names == ("0", "1", "2", "3")
    few = lists(folder, rows(values), task="classification", classes=[str(values[0]), str(values[1])])
    assert len(few["task"].names) == 2, "listed classes are what is meant"


def test_cases_to_predict_carry_the_truth_where_it_is_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = RegressionTask("age", 50.0, 10.0)
    assert [case["target"] for case in prediction_cases(str(folder), task=task, target="age")] == [None] * 40
    (folder.parent / "t.csv").write_text(rows([41.5, "", "x", 70]))
    cases = prediction_cases(str(folder), task=task, target="age", table=str(folder.parent / "t.csv"))
    assert [case["target"] for case in cases] == [41.5, None, None, 70.0]
    assert "2 of 4 cases are predicted but cannot be scored" in capsys.readouterr().out
