# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The quick start's report, from a folder as a quick start leaves it."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError, SettingsError
from common.weights.cells import METHODS, paper_of
from tools.commanding.settings import filled
from tools.starting import quickstart, report
from tools.starting.settings import Quickstart

from ..conftest import BUNDLES, blobs, method_of, write_volume

LABELS = {"background": 0, "a ball": 1}


def finished(folder: Path, data: Path, dice: Mapping[str, Sequence[tuple[float, float]]]) -> report.Start:
    """Write what a quick start on two test cases leaves; ``dice`` has those of each repeat of each run."""
    lists: dict[str, Any] = {"training": [], "test": []}
    for index in range(2):
        image, ball = blobs(index)
        case = {"image": data / "images" / f"case_{index}.nii.gz", "label": data / "labels" / f"case_{index}.nii.gz"}
        write_volume(case["image"], image)
        write_volume(case["label"], ball)
        lists["test"].append({key: str(path) for key, path in case.items()})
        for name in report.RUNS:
            file = report.run_folder(folder, name, 1) / "predictions" / f"case_{index}.nii.gz"
            write_volume(file, np.roll(ball, index, 0))
    (folder / "datalist.json").write_text(json.dumps(lists))
    runs = [(name, repeat, values) for name, own in dice.items() for repeat, values in enumerate(own, 1)]
    for name, repeat, values in runs:
        where = report.run_folder(folder, name, repeat)
        where.mkdir(parents=True, exist_ok=True)
        cases = [
            {"case": f"case_{i}", "reference": lists["test"][i]["label"], "scores": {"a ball": {"dice": value}}}
            for i, value in enumerate(values)
        ]
        mean = {"dice": {"mean": float(np.mean(values))}}
        summary = {"all": {"classes": {"a ball": mean}, "mean": mean}}
        (where / "scores.json").write_text(json.dumps({"summary": summary, "cases": cases}))
        (where / "history.json").write_text(json.dumps([{"epoch": 1, "train_loss": 1.0, "val_dice": 0.5}]))
    history = [{"epoch": 1, "train_loss": 2.0, "val_loss": 3.0}, {"epoch": 2, "train_loss": 1.0, "val_loss": 1.5}]
    (folder / "pretraining").mkdir(parents=True)
    (folder / "pretraining" / "history.json").write_text(json.dumps(history))
    return report.Start(
        "simclr_resenc_l",
        LABELS,
        {"learn": "some", "test": "others"},
        notice="your own data",
        data=data,
        sizes="1 mm voxels",
        repeats=len(dice[report.RUNS[0]]),
        commands=["python x"],
        seconds={"everything": 1.0},
        peak_mib=1.0,
    )


def test_a_verdict_volumes_and_commands_of_the_users_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = tmp_path / "my scans", tmp_path / "out"
    start = finished(folder, data, {"pre-trained": [(0.5, 0.9)], "from scratch": [(0.8, 0.8)]})
    titles = []
    curves = report._curves
    monkeypatch.setattr(report, "_curves", lambda *given: titles.append(given[2]) or curves(*given))
    page = html.unescape(report.write_report(folder, start).read_text("utf-8"))
    lead = re.findall(r'<p class="lead">(.*?)</p>', page)
    assert lead == [
        "The chain works on this machine. On the unseen part, mean Dice is 0.700 pre-trained and 0.800 from scratch: "
        "-0.100, which one short run each cannot tell from chance."
    ]
    assert titles == ["contrastive loss of finding a crop's partner"]
    shown = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert shown == [
        "best case: case_1, mean Dice 0.900 pre-trained",
        "worst case: case_0, mean Dice 0.500 pre-trained",
    ]
    assert page.index("<figcaption>best") < page.index("<table")
    assert '"maps": ["label", "pre-trained", "from scratch"]' in page
    go_on = page.partition("Go on with your own data</h2>")[2].partition("</pre>")[0]
    assert "<button" in go_on
    words = shlex.split(go_on.partition("<pre>")[2], comments=True)
    assert "FOLDER" not in words
    assert words.count(str(data)) == 3
    assert words.count(str(LABELS)) == 2
    assert words[-2:] == ["--output", str(tmp_path / "out_longer")]
    assert "a ball" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([0.80, 0.81, 0.82], [0.70, 0.72, 0.74], "0.810 pre-trained and 0.720 from scratch: +0.090 [+0.065, +0.115]"),
        ([0.70, 0.72, 0.74], [0.80, 0.81, 0.82], "0.720 pre-trained and 0.810 from scratch: -0.090 [-0.115, -0.065]"),
        ([0.80, 0.70, 0.90], [0.75, 0.75, 0.75], "0.800 pre-trained and 0.750 from scratch: +0.050 [-0.198, +0.298]"),
    ],
)
def test_the_verdict_follows_from_the_numbers(ours: list[float], theirs: list[float], said: str) -> None:
    shown = {"+0.090": "pre-training helped", "-0.090": "pre-training hurt", "+0.050": "no difference is shown"}
    (word,) = [word for number, word in shown.items() if f"{number} [" in said]
    assert report._verdict(ours, theirs) == f"On the unseen part, mean Dice is {said} over 3 repeats: {word}."


def test_three_runs_cover_the_truth_as_often_as_promised() -> None:
    """Where a bootstrap of three values would cover it in about three of four."""
    draws = np.random.default_rng(5).normal(0.3, 1.0, (2000, 3))
    inside = [low <= 0.3 <= high for low, high in map(report._interval, draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_the_verdict_of_what_was_not_scored() -> None:
    assert report._verdict([0.5, float("nan")], [0.5, 0.5]).endswith("; not every repeat could be scored.")


def test_all_repeats_are_in_the_table_and_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dice = {"pre-trained": [(0.9, 0.9), (0.7, 0.7)], "from scratch": [(0.6, 0.6), (0.4, 0.4)]}
    page = html.unescape(report.write_report(tmp_path, finished(tmp_path, tmp_path / "d", dice)).read_text("utf-8"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("network")]
    assert [row[-1] for row in rows] == ["0.800", "0.500"]
    assert "+0.300 [+0.300, +0.300] over 2 repeats: pre-training helped." in page


def test_without_labels_the_verdict_is_of_pretraining(tmp_path: Path) -> None:
    start = finished(tmp_path / "out", tmp_path / "d", {name: [(1, 1)] for name in report.RUNS})
    alone = report.Start(**{**start.__dict__, "labels": None})
    page = html.unescape(report.write_report(tmp_path / "out", alone).read_text("utf-8"))
    told = "in 2 epochs the contrastive loss of finding a crop's partner fell from 3.000 to 1.500."
    assert told in page
    assert "--dataset_dir FOLDER --labels" in page
    assert f"--dataset_dir {tmp_path / 'd'}" in page


def test_every_method_has_words_of_its_own() -> None:
    for bundle in BUNDLES:
        paper = paper_of(bundle)
        assert paper is METHODS[method_of(bundle)]
        assert paper.picture.endswith(".")
        hidden = method_of(bundle) in ("mae", "simmim", "spark3d")
        assert ("hidden blocks" in paper.error) == ("hidden blocks" in paper.picture) == hidden
    assert paper_of("my_task") is None


def test_labels_of_the_users_data_are_named(tmp_path: Path) -> None:
    for index in range(5):
        image, ball = blobs(index)
        write_volume(tmp_path / "d" / "images" / f"case_{index}.nii.gz", image)
        write_volume(tmp_path / "d" / "labels" / f"case_{index}.nii.gz", 4 * ball)

    def found(**given: Any) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        return quickstart._data(filled(Quickstart, data=tmp_path / "d", **given), tmp_path / "out")[1]

    assert found() == ["background", "class 1", "class 2", "class 3", "class 4"]
    assert found(labels={"background": 0, "ball": 4}) == {"background": 0, "ball": 4}
    with pytest.raises(DataError):
        found(labels=("background", "ball"))
    with pytest.raises(SettingsError, match="give --data FOLDER too"):
        filled(Quickstart, labels=("background", "ball"))
    images = tmp_path / "images"
    write_volume(images / "x.nii.gz", blobs(0)[0])
    with pytest.raises(DataError):
        quickstart._data(filled(Quickstart, data=images, labels=("background", "ball")), tmp_path / "other")
