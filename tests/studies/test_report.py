# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The report of made-up studies: what it claims, and that whatever is missing neither breaks it nor is claimed."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.document import Heading, Picture, Strong, Table, Text, write_html, write_markdown
from common.errors import DataError
from tools.reporting import comparison, significance
from tools.reporting.published_numbers import published_part
from tools.reporting.report import write_report

from .synthetic import write_study

GAINS = {"mae_resenc_l": 0.06, "scratch_resenc_l": 0.0, "mae_primus_m": 0.0, "scratch_primus_m": -0.002}
SHORT = {"mae_resenc_l": 0.05, "scratch_resenc_l": 0.0}


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 300)
    monkeypatch.setattr(significance, "_PERMUTATIONS", 300)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / "report" / f"{name}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def report(folder: Path, **told: Any) -> str:
    path = write_report(write_study(folder, **({"data_sets": {"hippocampus": {}}, "gains": SHORT} | told)))
    assert path == folder / "report" / "report.html"
    text = path.read_text("utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text), "everything is inside"
    plain = re.sub(r'"data:[^"]*"|<script type="text/plain">[^<]*', "", text)
    assert "nan" not in plain.lower().replace("nano", "")
    markdown = (folder / "report" / "report.md").read_text("utf-8")
    for name in re.findall(r"\]\(([^)]+\.png)\)", markdown):
        assert (folder / "report" / name).stat().st_size > 1000
    return text


def lead(text: str) -> str:
    return " ".join(re.findall(r'<p class="lead">(.*?)</p>', text))


def test_a_full_report_says_who_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cards = {
        "hippocampus": {"group": "OOD", "code": "D3"},
        "centres": {"group": "ID", "groups": ["Basel", "Bern", "Ulm"]},
        "third": {"group": "ID"},
    }
    text = report(tmp_path, gains=GAINS, data_sets=cards, seeds=3, luck=0.003, pictures=True)
    told = lead(text)
    assert "mae_resenc_l has the highest DSC" in told
    assert "scratch_resenc_l, the difference is +" in told
    assert "shown to be better (paired tests: on 3 of 3 data sets)" in told
    assert "no difference shown: mae_primus_m" in told
    for title in ("Scores", "Ranks and tests", "Groups of cases", "Training curves", "Predictions", "How it was run"):
        assert f">{title}" in text
    assert "python tools/study.py run made_up.yaml" in text
    assert "Basel (8)" in text
    assert "abababab" in text, "receipts"
    assert "72 of 72 runs are finished" in capsys.readouterr().out
    table = rows(tmp_path, "table")
    assert {row["column"] for row in table} == {*cards, "ID", "OOD", "All"}
    mean = next(r for r in table if (r["arm"], r["column"], r["metric"]) == ("mae_resenc_l", "All", "dice"))
    assert float(mean["minus_low"]) > 0.04
    assert len(rows(tmp_path, "tests")) == 3 * 6
    assert len(rows(tmp_path, "cases")) == 72 * 12 * 2 * 3
    assert len(rows(tmp_path, "groups")) == 3 * 4 * 2
    ranks = {row["arm"]: row for row in rows(tmp_path, "ranks") if row["metric"] == "dice"}
    assert float(ranks["mae_resenc_l"]["mean_rank"]) == 1
    assert float(ranks["mae_resenc_l"]["critical_difference"]) == pytest.approx(2.569 * (20 / 18) ** 0.5, abs=0.01)
    for kind in ("best", "median", "worst"):
        assert (tmp_path / "report" / f"case_hippocampus_{kind}.png").exists()


def test_no_difference_is_claimed_where_there_is_none(tmp_path: Path) -> None:
    told = lead(report(tmp_path, gains={"mae_resenc_l": 0.0, "scratch_resenc_l": 0.0}, seeds=3, luck=0.01))
    assert "shown to be" not in told
    assert "no difference is shown" in told or "no pre-trained arm scored higher" in told


def test_one_seed_gives_no_verdict(tmp_path: Path) -> None:
    text = report(tmp_path, seeds=1)
    assert "one run of each, so no verdict" in lead(text)
    assert "shown to be" not in lead(text)
    assert "not about the methods" in text
    assert all(row["seed_sd"] == "" for row in rows(tmp_path, "table"))


def test_ranks_over_cases_are_labelled_as_such(tmp_path: Path) -> None:
    text = report(tmp_path, gains=GAINS)
    assert "ranks over data sets cannot be tested" in text
    assert "over the 24 cases of hippocampus alone" in text
    assert {row["over"] for row in rows(tmp_path, "ranks")} == {"hippocampus"}


def test_failed_and_missing_runs_are_told_and_not_compared(tmp_path: Path) -> None:
    def skip(run: Any) -> str | None:
        if run["arm"] == "simclr_resenc_l" and run["fold"] == 1:
            return "failed"
        return "missing" if run["arm"] == "mae_resenc_l" and run["seed"] == 1 and run["fold"] == 0 else None

    text = report(tmp_path, gains=SHORT | {"simclr_resenc_l": 0.3}, skip=skip)
    assert "9 of 12 runs are finished, 2 failed and 1 are not there yet" in text
    assert "the disk was full &lt;while&gt; writing | a file" in text
    assert "mae_resenc_l has the highest DSC" in lead(text), "the better one is not complete"
    assert "Not compared, since not all of their unseen cases are scored: simclr_resenc_l" in lead(text)
    assert "†" in text
    assert r"&lt;" not in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([f"centre_{i % 8}" for i in range(24)], "read as patients since they are many and of three cases or fewer"),
        ([f"centre_{i % 5}" for i in range(24)], "like since they are fewer than six: each has its own column below"),
        ([f"centre_{i % 7}" for i in range(24)], "like since they are of more than three cases on average: each has"),
        ([f"case_{i}" for i in range(24)], "like since no two cases share one: each has its own column below"),
        ([None, "one", "two"], "like since some cases name none: each has its own column below"),
        (["only"], "like since they are fewer than six: alone, it has no table"),
        ([None], ""),
    ],
)
def test_how_groups_are_read_is_told(tmp_path: Path, groups: list[str | None], told: str) -> None:
    text = report(tmp_path, data_sets={"hippocampus": {"groups": groups}}, seeds=1)
    assert ("No data set tells of groups" in text) == (not told)
    if told:
        count = len({group for group in groups if group})
        assert f"hippocampus: {count} group{'s' if count > 1 else ''} of 24 unseen cases, read as " in text
        assert told in text
    assert (len(rows(tmp_path, "groups")) > 0) == ("each has" in told)


def test_how_far_groups_are_apart_is_told(tmp_path: Path) -> None:
    groups = [*(["Basel", "Bern"] * 20), "Ulm", "Ulm"]
    text = report(tmp_path, data_sets={"hippocampus": {"groups": groups}}, cases=42, seeds=1)
    assert "too few patients, fewer than 10, to say anything of Ulm (2); left out of the gap" in text
    assert re.search(r"groups of these sizes that do not differ would be 0\.\d+ apart on average: no difference", text)
    assert "from the best group to the worst" in text
    gaps = rows(tmp_path, "gaps")
    assert [row["arm"] for row in gaps] == list(SHORT)
    for row in gaps:
        assert {row["best"], row["worst"]} == {"Basel", "Bern"}
        assert float(row["low"]) < 0 < float(row["gap"]) < float(row["high"])
    assert {row["group"]: row["few"] for row in rows(tmp_path, "groups")} == {
        "Basel": "False",
        "Bern": "False",
        "Ulm": "True",
    }
    assert (tmp_path / "report" / "groups_hippocampus_all.png").is_file()


@pytest.mark.parametrize("outcome", ["failed", "missing"])
def test_a_planned_data_set_without_results_is_not_passed_over(tmp_path: Path, outcome: str) -> None:
    cards = {"alpha": {"group": "ID"}, "gamma": {"group": "ID"}, "delta": {"group": "OOD"}}
    skip = lambda run: outcome if run["data_set"] == "gamma" else None  # noqa: E731
    text = report(tmp_path, data_sets=cards, skip=skip)
    told = lead(text)
    assert "on the mean of 2 of the 3 planned data sets." in told
    why = "8 of 8 runs failed" if outcome == "failed" else "no run is there yet"
    assert f"Planned but without a result with all labelled cases: gamma ({why})." in told
    markdown = (tmp_path / "report" / "report.md").read_text("utf-8")
    heads = [line.split(" | ") for line in markdown.splitlines() if "| All mean" in line]
    assert len(heads) == 6
    for head in heads:
        assert [part.strip(" |") for part in head if part.strip(" |")] == [
            *("alpha (ID)", "gamma (ID)", "delta (OOD)", "ID mean (1 of 2)", "OOD mean", "All mean (2 of 3)")
        ]
    assert "ranks over 2 of the 3 planned data sets" in text
    table = {(r["arm"], r["column"]): r for r in rows(tmp_path, "table") if r["metric"] == "dice"}
    mean = table["mae_resenc_l", "All"]
    assert (mean["data_sets"], mean["data_sets_planned"], mean["runs"], mean["planned"]) == ("2", "3", "8", "12")
    assert ("mae_resenc_l", "gamma") not in table


def test_a_task_of_which_no_run_is_finished_is_told(tmp_path: Path) -> None:
    cards = {"abide": {"task": "classification"}, "hippocampus": {}}
    told = lead(report(tmp_path, data_sets=cards, skip=lambda run: "failed" if run["data_set"] == "abide" else None))
    assert "has the highest DSC" in told
    assert "on hippocampus. Against" in told
    assert "Classification: no run is finished yet. Planned but without a result" in told
    assert "abide (8 of 8 runs failed)" in told


@pytest.mark.parametrize("kind", ["nothing", "one run", "one arm", "undefined", "no scratch", "two cases"])
def test_partial_results_make_a_report(tmp_path: Path, kind: str) -> None:
    first = lambda run: None if (run["arm"], run["fold"], run["seed"]) == ("mae_resenc_l", 0, 0) else "missing"  # noqa: E731

    def undefine(run: Any, result: Any) -> None:
        for entry in result["cases"].values():
            for scores in entry["scores"].values():
                scores |= {"dice": None, "nsd": None}

    told: dict[str, dict[str, Any]] = {
        "nothing": {"skip": lambda run: "missing"},
        "one run": {"skip": first},
        "one arm": {"gains": {"mae_resenc_l": 0.1}},
        "undefined": {"change": undefine},
        "no scratch": {"gains": {"mae_resenc_l": 0.1, "simclr_resenc_l": 0.0}},
        "two cases": {"cases": 2},
    }
    text = report(tmp_path, **told[kind])
    assert "shown to be" not in lead(text) or kind == "no scratch"
    expected = {
        "nothing": "nothing to compare",
        "one run": "nothing to compare",
        "one arm": "nothing to compare",
        "undefined": "nothing to compare",
        "no scratch": "does not tell what pre-training gave",
        "two cases": "the difference is",
    }
    assert expected[kind] in lead(text)


def test_classification_alone_and_with_segmentation(tmp_path: Path) -> None:
    cards = {"abide": {"task": "classification"}, "hippocampus": {}}
    text = report(tmp_path, data_sets=cards, budgets=("4", "all"))
    assert "has the highest DSC" in text
    assert "has the highest AP" in text
    assert "balanced accuracy, %" in text
    assert (tmp_path / "report" / "budgets_classification.png").exists()
    assert {row["metric"] for row in rows(tmp_path, "table")} == {"dice", "nsd", "ap", "balanced_accuracy"}
    shutil.rmtree(tmp_path / "report")
    about = json.loads((tmp_path / "study.json").read_text())
    about["data_sets"].pop("hippocampus")
    about["runs"] = [run for run in about["runs"] if run["data_set"] == "abide"]
    (tmp_path / "study.json").write_text(json.dumps(about))
    write_report(tmp_path)
    assert "No segmentation is finished" in (tmp_path / "report" / "report.html").read_text()


def test_a_report_of_numbers(tmp_path: Path) -> None:
    cards = {"ages": {"task": "regression", "groups": ["a", "b"]}}
    report(tmp_path, data_sets=cards)
    text = (tmp_path / "report" / "report.html").read_text()
    assert "Regression" in text
    assert "R2, %" in text
    assert {row["metric"] for row in rows(tmp_path, "table")} == {"r2", "pearson"}
    assert {row["score"] for row in rows(tmp_path, "cases")} == {"predicted", "truth"}


def test_pictures_that_cannot_be_drawn_are_said(tmp_path: Path) -> None:
    study = {"folder": tmp_path, "pictures": True}
    report(**study)
    shutil.rmtree(tmp_path / "data")
    write_report(tmp_path)
    assert "cannot be drawn" in (tmp_path / "report" / "report.html").read_text()
    for folder in tmp_path.glob("runs/**/predictions"):
        shutil.rmtree(folder)
    write_report(tmp_path)
    assert "its prediction is gone" in (tmp_path / "report" / "report.html").read_text()


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*study\.json; name the output folder"):
        write_report(tmp_path)


PUBLISHED = """
grades: {copied: Copied from the table.}
sources: {paper: {citation: A paper}}
data_sets: {Hippo: {name: Hippocampus, card: D3}, KIT: {name: Kits, card: null}}
missing: []
tables:
  one:
    {title: A table, source: paper, grade: copied, task: segmentation, metric: dice, unit: percent, kind: data_set,
     note: null,
     columns: [KIT, Hippo], rows: [{label: MAE, method: mae, backbone: resenc_l, epochs: 150, values: [12.34, 89.6]},
     {label: VoCo, method: voco, backbone: resenc_l, epochs: 150, values: [1, 55.5]}]}
  other:
    {title: Ranks, source: paper, grade: copied, task: segmentation, metric: dice, unit: percent, kind: quantity,
     columns: [x], rows: []}
"""


def test_published_numbers_stand_alone(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text(PUBLISHED)
    arm = {"method": "mae", "backbone": "resenc_l", "weights": "a.pt"}
    about = {"arms": {"mine": arm}, "data_sets": {"hippocampus": {"card": {"code": "D3"}}}}
    parts = published_part(about, path=file)
    (table,) = [part for part in parts if isinstance(part, Table)]
    assert list(table.heads)[4:] == ["Hippocampus, DSC, published", "hippocampus, here"]
    assert [list(row) for row in table.rows] == [["MAE", "ResEnc-L", "150", "copied", "89.6", "–"]]
    texts = [part.text for part in parts if isinstance(part, Text)]
    assert any("not comparable" in text for text in texts)
    assert texts[-1] == "A paper. Grade copied: Copied from the table."
    for changed in ({"data_sets": {"mine": {}}}, {"arms": {"x": arm | {"method": "simmim"}}}):
        parts = published_part({**about, **changed}, path=file)
        assert "no published number is known" in str(parts[-1])


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    parts = [
        Heading("<b>"),
        Text("a | b *c*"),
        Table(["", "<i>"], [["part"], ["x|y", Strong("1", "[0, 2]")]], words=True),
        Picture("p.png", b"content", 'a "picture"'),
    ]
    write_html("<script>", parts, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<script>" not in text
    assert "<i>" not in text
    assert "&quot;picture&quot;" in text
    write_markdown("t", parts, tmp_path / "r.md")
    assert r"| x\|y | **1** \[0, 2\] |" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "p.png").read_bytes() == b"content"


def test_a_setting_of_one_data_set_is_not_told_of_all(tmp_path: Path) -> None:
    folder = write_study(tmp_path, data_sets={"hippocampus": {}, "other": {}}, gains=SHORT)
    for file in folder.glob("runs/other/**/run.json"):
        content = json.loads(file.read_text("utf-8"))
        content["settings"]["spacing_mm"] = 2.0
        file.write_text(json.dumps(content))
    write_report(folder)
    markdown = (folder / "report" / "report.md").read_text("utf-8")
    assert re.search(r"\| spacing\\?_mm \| 2.0 or default \|", markdown)
    assert re.search(r"\| lr \| 0.1 \|", markdown)
