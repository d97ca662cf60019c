# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores of groups on made-up cases: what differs is found, what does not is not, and the rest is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.metrics.groups import (
    FEWEST,
    draw_groups,
    format_groups,
    group_scores,
    group_sentences,
    ordered_groups,
)


def scored(values: np.ndarray, groups: list[str], **told: Any) -> dict[str, Any]:
    return group_scores(lambda rows: float(values[rows].mean()), {"site": groups}, **told)["site"]


def test_the_gap_of_groups_that_do_not_differ_is_told_and_not_shown() -> None:
    """150 studies of five sites: best and worst are far apart by chance alone, as far as is said, and none is shown."""
    rng = np.random.default_rng(0)
    groups = [name for name in "ABCDE" for _ in range(12)]
    shown, gaps, expected = 0, [], []
    for _ in range(150):
        gap = scored(rng.standard_normal(60), groups, resamples=200)["gap"]
        gaps.append(gap["gap"])
        expected.append(gap["by_chance"])
        shown += gap["interval"][0] > 0
    assert np.mean(gaps) > 0.5, "in standard deviations of a case"
    assert np.mean(expected) == pytest.approx(np.mean(gaps), rel=0.08)
    assert shown / 150 <= 0.08


def test_a_gap_is_held_by_its_interval_although_best_and_worst_are_picked() -> None:
    rng = np.random.default_rng(1)
    truth = dict(zip("ABCD", (0.0, 0.0, 0.3, 1.0), strict=True))
    groups = [name for name in truth for _ in range(20)]
    level = np.array([truth[name] for name in groups])
    inside = shown = 0
    for _ in range(100):
        gap = scored(level + rng.standard_normal(80), groups, resamples=200)["gap"]
        low, high = gap["interval"]
        inside += low <= truth[gap["best"]] - truth[gap["worst"]] <= high
        shown += low > 0
    assert inside / 100 >= 0.91
    assert shown / 100 > 0.6


def test_scans_of_one_patient_are_one_patient() -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal(30)
    groups = ["A"] * 15 + ["B"] * 15
    alone = scored(values, groups)
    copied = scored(
        np.repeat(values, 4),
        [name for name in groups for _ in range(4)],
        patients=np.repeat(np.arange(30), 4).astype(str),
    )
    for name in "AB":
        assert copied["groups"][name]["patients"] == 15
        assert copied["groups"][name]["cases"] == 60
        assert copied["groups"][name]["interval"] == pytest.approx(alone["groups"][name]["interval"], abs=0.08)
    assert copied["gap"]["gap"] == pytest.approx(alone["gap"]["gap"], abs=1e-5)
    assert np.ptp(copied["gap"]["interval"]) == pytest.approx(np.ptp(alone["gap"]["interval"]), rel=0.1)


def test_small_groups_are_shown_and_named_and_take_no_part() -> None:
    values = np.concatenate([np.linspace(0, 1, FEWEST), np.linspace(0, 1, FEWEST) + 1, [9.0] * (FEWEST - 1), [5.0]])
    groups = ["A"] * FEWEST + ["B"] * FEWEST + ["C"] * (FEWEST - 1) + [""]
    found = scored(values, groups)
    assert [found["groups"][name]["few"] for name in "ABC"] == [False, False, True]
    assert (found["gap"]["best"], found["gap"]["worst"], found["missing"]) == ("B", "A", 1)
    told = " ".join(group_sentences({"site": found}))
    assert f"fewer than {FEWEST}, to say anything of C ({FEWEST - 1})" in told
    assert "1 case(s) have none and are in no group" in told
    assert "B is best and A worst, 1.000 apart" in told
    assert "a difference is shown" in told
    alone = scored(values[:FEWEST], groups[:FEWEST])
    assert alone["gap"] is None
    assert "nothing is said of a gap" in group_sentences({"site": alone})[0]


def test_an_error_is_best_where_it_is_lowest() -> None:
    values = np.concatenate([np.linspace(1, 2, 12), np.linspace(3, 4, 12)])
    groups = ["A"] * 12 + ["B"] * 12
    high, low = scored(values, groups), scored(values, groups, lower_is_better=True)
    assert (high["gap"]["best"], low["gap"]["best"]) == ("B", "A")
    assert high["gap"]["gap"] == low["gap"]["gap"] == pytest.approx(2)


def test_scores_that_are_not_defined_are_left_out() -> None:
    values = np.concatenate([np.full(12, np.nan), np.linspace(0, 1, 12), np.linspace(0, 1, 12)])
    found = scored(values, ["A"] * 12 + ["B"] * 12 + ["C"] * 12)
    assert found["groups"]["A"]["score"] is None
    assert found["groups"]["A"]["interval"] is None
    assert {found["gap"]["best"], found["gap"]["worst"]} == {"B", "C"}
    same = scored(np.ones(24), ["A"] * 12 + ["B"] * 12)["gap"]
    assert (same["gap"], same["interval"], same["by_chance"]) == (0, [0, 0], 0)
    without = scored(np.arange(24.0), ["A"] * 12 + ["B"] * 12, resamples=0)
    assert without["gap"] is None
    assert without["groups"]["B"] == {"cases": 12, "patients": 12, "score": 17.5, "interval": None, "few": False}


def test_what_is_printed_and_drawn(tmp_path: Path) -> None:
    values = np.concatenate([np.linspace(0, 0.5, 20), np.linspace(0.4, 0.9, 20), [0.7]])
    ages = ["below 40"] * 20 + ["40 and above"] * 20 + [""]
    found = group_scores(
        lambda rows: float(values[rows].mean()), {"age": ages, "site": ["$x$"] * 40 + ["B"]}, resamples=200
    )
    assert list(found["age"]["groups"]) == ["below 40", "40 and above"]
    text = format_groups(found, score="Dice").splitlines()
    assert text[0].split() == ["cases", "patients", "Dice", "[95", "%]"]
    assert text[1] == "age"
    assert text[2].split()[:5] == ["below", "40", "20", "20", "0.250"]
    assert any(line.endswith("(few)") for line in text)
    draw_groups(found, tmp_path / "groups.png", score="Dice", whole=0.45)
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")


def test_groups_are_in_their_order() -> None:
    assert ordered_groups(["b", "10", "9", "a", "9"]) == ["9", "10", "a", "b"]
