# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError, SettingsError
from tools.scoring.evaluate import evaluate
from tools.scoring.settings import Evaluate

from ..conftest import ROOT, write_volume
from ..starts import python


def cube(value: int = 1, shift: int = 0) -> np.ndarray:
    out = np.zeros((14, 12, 12), np.uint8)
    out[2 + shift : 6 + shift, 4:8, 4:8] = value
    return out


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        write_volume(tmp_path / "ref" / f"s{index}" / "mask.nii.gz", cube(1 + 3 * (index == 2)), spacing=2.0)
        write_volume(tmp_path / "pred" / f"s{index}" / "mask.nii", cube(1 + 3 * (index == 2), 1), spacing=2.0)
    return "pred", "ref"


def written(folder: str = "evaluation") -> dict:
    return json.loads((Path(folder) / "scores.json").read_text())


def test_values_of_the_references_are_the_classes(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(Path("pred/s0/mask.nii"), cube(1, 1) + cube(9, 8), spacing=2.0)
    write_volume(Path("pred/extra.nii.gz"), cube())
    write_volume(Path("ref/s9.nii.gz"), cube())
    evaluate(Evaluate(*pair))
    content = written()
    assert [case["case"] for case in content["cases"]] == ["s0/mask", "s1/mask", "s2/mask"]
    assert content["settings"]["classes"] == {"class 1": [1], "class 4": [4], "class 9": [9]}
    means = {name: scores["dice"] for name, scores in content["summary"]["all"]["classes"].items()}
    assert means["class 1"]["mean"] == means["class 4"]["mean"] == 0.75
    assert [means[name]["cases"] for name in means] == [2, 1, 1]
    assert means["class 9"]["mean"] == 0.0
    assert content["summary"]["all"]["classes"]["class 1"]["hd95_mm"]["mean"] == 2.0
    assert list(content["skipped"]) == ["s9"]
    assert content["settings"]["predictions_without_reference"] == ["extra"]
    printed = capsys.readouterr().out
    assert "1 prediction(s) without a reference: extra" in printed
    assert "no reference holds the label value(s) 9" in printed
    assert "there is no prediction of ref/s9.nii.gz" in printed


def test_names_regions_and_an_ignored_value(pair: tuple[str, str]) -> None:
    write_volume(Path("ref/s0/mask.nii.gz"), np.maximum(cube(), cube(255, 4)), spacing=2.0)
    evaluate(
        Evaluate(
            *pair, labels=["background", "a", "b", "c", "d"], regions={"any": [1, 4]}, ignore_label=255, output="o"
        )
    )
    assert [case["scores"]["any"]["predicted_ml"] for case in written("o")["cases"]] == pytest.approx(
        [4 * 4 * 3 * 0.008, 0.512, 0.512]  # the slice beyond the cube is ignored
    )
    evaluate(Evaluate(*pair, ignore_label=255, output="p"))
    assert list(written("p")["settings"]["classes"]) == ["class 1", "class 4"]


def test_a_dataset_json_says_classes_and_what_is_ignored(pair: tuple[str, str]) -> None:
    write_volume(Path("ref/s0/mask.nii.gz"), np.maximum(cube(), cube(255, 4)), spacing=2.0)
    labels = {"background": 0, "a": 1, "b": 4, "ignore": 255}
    Path("dataset.json").write_text(json.dumps({"labels": labels}))
    evaluate(Evaluate(*pair, labels="dataset.json"))
    content = written()
    assert content["settings"]["classes"] == {"a": [1], "b": [4]}
    assert content["settings"]["ignore_label"] == 255
    assert content["cases"][0]["scores"]["a"]["predicted_ml"] == pytest.approx(4 * 4 * 3 * 0.008)


def test_two_files(pair: tuple[str, str]) -> None:
    evaluate(Evaluate("pred/s1/mask.nii", "ref/s1/mask.nii.gz", output="one"))
    summary = written("one")["summary"]["all"]
    assert summary["classes"]["class 1"]["dice"] == {"mean": 0.75, "interval": None, "cases": 1}


def test_groups(pair: tuple[str, str]) -> None:
    Path("cases.csv").write_text("case,scanner\ns0/mask,1\ns1/mask,2\ns2/mask,2\n")
    evaluate(Evaluate(*pair, groups="cases.csv", group="scanner"))
    assert {name: each["cases"] for name, each in written()["summary"]["groups"].items()} == {"1": 1, "2": 2}


def test_what_cannot_be_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(SettingsError, match="--predictions is 'nowhere'; it must be a file or folder that is there"):
        evaluate(Evaluate("nowhere", "ref"))
    with pytest.raises(SettingsError, match="must both be folders"):
        evaluate(Evaluate("pred", "ref/s1/mask.nii.gz"))
    with pytest.raises(SettingsError, match="belong together"):
        evaluate(Evaluate(*pair, group="scanner"))
    with pytest.raises(SettingsError, match="regions need the names"):
        evaluate(Evaluate(*pair, regions={"a": [1]}))
    with pytest.raises(SettingsError, match="ignore_label is 'x'"):
        evaluate(Evaluate(*pair, ignore_label="x"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has the name of one in"):
        evaluate(Evaluate("pred/s1", "ref"))
    write_volume(Path("ref/s1/mask.nii"), cube())
    with pytest.raises(DataError, match=r"holds both mask.nii and mask.nii.gz"):
        evaluate(Evaluate(*pair))
    Path("ref/s1/mask.nii").unlink()
    for index in range(3):
        write_volume(
            Path(f"ref/s{index}/mask.nii.gz"), np.arange(14 * 144, dtype=np.int16).reshape(14, 12, 12), spacing=2
        )
    with pytest.raises(DataError, match="2,016 different values; give label maps rather than images"):
        evaluate(Evaluate(*pair))
    for index in range(3):
        write_volume(Path(f"ref/s{index}/mask.nii.gz"), cube(0), spacing=2)
        write_volume(Path(f"pred/s{index}/mask.nii"), cube(0), spacing=2)
    with pytest.raises(DataError, match="mark any voxel"):
        evaluate(Evaluate(*pair))


def test_the_command_says_what_failed_and_fails(pair: tuple[str, str], tmp_path: Path) -> None:
    command = [python(), str(ROOT / "tools" / "evaluate.py"), *pair, "--labels", "['background','a','b','c','d']"]
    good = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert "mean of classes" in good.stdout
    assert "Warning" not in good.stderr
    for path in (tmp_path / "pred").rglob("*.nii"):
        path.write_bytes(path.read_bytes()[:1000])
    bad = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr
    assert "mask.nii (1,000 bytes) is cut short or damaged" in bad.stderr
    assert "Nothing is left to work on" in bad.stderr
