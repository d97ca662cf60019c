# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Looking at data and listing it, as a user does."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.data import pretraining_lists
from common.errors import DataError, SettingsError, sentence
from tools import prepare_data as tool
from tools.commanding.running import run
from tools.preparing.scanning import _columns, _least_middle_most, list_cases, scan
from tools.preparing.settings import ListCases, Scan

from ..conftest import ROOT, blobs, write_volume
from ..starts import python


def prepare_data(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), "-W", "ignore", str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def data(folder: Path, subjects: range) -> Path:
    for subject in subjects:
        for kind in ("T1w", "T2w"):
            image = blobs(subject)[0] + (kind == "T2w")
            write_volume(folder / f"sub-{subject:02d}" / f"sub-{subject:02d}_{kind}.nii.gz", image, spacing=4.0)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_scan_shows_what_is_there_and_writes_only_where_it_is_told(tmp_path: Path) -> None:
    folder = data(tmp_path / "my data", range(4))
    (folder / "sub-00" / "broken_T1w.nii.gz").write_bytes(b"nothing")
    (folder / "sub-01" / "broken_T1w.nii.gz").write_bytes(b"nothing at all")
    write_volume(folder / "flat_T1w.nii.gz", np.zeros((4, 4), np.float32))
    before = files(folder)
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    done = prepare_data("scan", folder, cwd=empty)
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert "as folder: 11 volumes of 5 subject(s)" in told
    assert "3 volume(s) cannot be used" in told
    assert "2 x " in told, "problems of a kind are counted"
    assert re.search(r"^T1w +6 +\d+ +0\.000  24x28x26 +4x4x4$", told, re.MULTILINE), told
    assert "4x4x4" in told
    assert files(folder) == before
    assert files(empty) == set()

    done = prepare_data("scan", folder, "--output", tmp_path / "out", cwd=empty)
    assert done.returncode == 0, done.stderr
    assert files(folder) == before
    assert files(tmp_path / "out") == {"scan.json", "scan.png"}
    report = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert (report["volumes"], report["readable"], report["measured"]) == (11, 8, 8)
    assert {entry["modality"]: entry["volumes"] for entry in report["modalities"]} == {"T1w": 6, "T2w": 4, "unknown": 1}
    assert (tmp_path / "out" / "scan.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_a_scan_holds_volumes_that_exist_in_columns_that_fit() -> None:
    """A flat and a tall scan have no size between them, and long numbers do not push what follows out of its column."""
    shapes = np.array([[512, 512, 30], [200, 1024, 900], [20, 20, 2000]])
    assert _least_middle_most(shapes).tolist() == [[20, 20, 2000], [512, 512, 30], [200, 1024, 900]]
    spacings = np.array([[0.123, 0.123, 5.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    assert _least_middle_most(spacings).tolist() == [[0.123, 0.123, 5.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]
    name = "a very long name of a modality"
    entries = [
        {"modality": "T1w", "volumes": 3, "subjects": 3, "gigabytes": 0.5, "size": shapes, "spacing_mm": spacings},
        {"modality": name, "volumes": 1234567, "subjects": 1, "gigabytes": 98765.4, "size": shapes[[0, 0, 0]]}
        | {"spacing_mm": spacings[[1, 1, 1]]},
        {"modality": "bold", "volumes": 1, "subjects": 1, "gigabytes": 0.0},
    ]
    head, *lines = _columns(entries)
    for column in ("size", "spacing"):
        at = head.index(column)
        assert all(len(line) <= at or (line[at - 2 : at] == "  " and line[at] != " ") for line in lines)
    assert [line[: len(name)].rstrip() for line in lines] == ["T1w", name, "bold"]
    assert lines[1].endswith("512x512x30" + " " * (head.index("spacing") - head.index("size") - 10) + "1x1x1")


def test_list_keeps_its_split_and_is_what_pre_training_takes(tmp_path: Path) -> None:
    folder = data(tmp_path / "data", range(10))
    output = tmp_path / "data" / "list.json"
    done = prepare_data("list", folder, "--output", output, "--modality", "T1w,T2w", "--min_size", "8")
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert len(content["training"]), len(content["validation"]) == (16, 4)
    assert content["training"][0]["image"].startswith("sub-0"), "relative to the list"
    assert content["about"]["removed"] == {"other modality": 0, "unreadable": 0, "too small": 0}
    assert content["about"]["filters"] == {"modality": ["T1w", "T2w"], "min_size": 8}
    lists = pretraining_lists(datalist=str(output))
    assert all(os.path.isfile(case["image"]) for part in lists.values() for case in part)
    held = {case["subject"] for case in content["validation"]}

    refused = prepare_data("list", folder, "--output", output)
    assert refused.returncode == 1
    assert "exists; --update true writes it anew and keeps its split" in refused.stderr
    assert "Traceback" not in refused.stderr
    data(folder, range(10, 40))
    done = prepare_data("list", folder, "--output", output, "--update", "true", "--seed", "77")
    assert done.returncode == 0, done.stderr
    grown = json.loads(output.read_text())
    assert held < {case["subject"] for case in grown["validation"]}, "more are held out, of the new ones"
    assert len({case["subject"] for case in grown["validation"]}) == 5
    assert {case["subject"] for case in content["training"]} <= {case["subject"] for case in grown["training"]}

    other = tmp_path / "other.json"
    done = prepare_data("list", output, "--output", other, "--include", "*T1w*", "--exclude", "sub-03,sub-04")
    assert done.returncode == 0, done.stderr
    again = json.loads(other.read_text())
    assert len(again["training"]) + len(again["validation"]) == 38
    parts = {case["subject"]: part for part in ("training", "validation") for case in grown[part]}
    assert all(parts[case["subject"]] == part for part in ("training", "validation") for case in again[part])
    assert {case["image"] for case in again["training"]} == {
        f"data/{case['image']}"
        for case in grown["training"]
        if "T1w" in case["image"] and case["subject"] not in ("sub-03", "sub-04")
    }


def test_scan_draws_any_name_and_reports_what_it_could_not_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = blobs(0)[0]
    folder = tmp_path / "data"
    for name in (
        "cost $5^$ \\frac.nii.gz",
        "tab\tand\nline.nii.gz",
        os.fsdecode(b"caf\xe9.nii.gz"),
        "cut.nii.gz",
        "nan.nii.gz",
    ):
        write_volume(folder / "x.nii.gz", np.full_like(image, np.nan) if name.startswith("nan") else image)
        os.rename(folder / "x.nii.gz", folder / name)
    cut = folder / "cut.nii.gz"
    cut.write_bytes(cut.read_bytes()[:9000])
    run(COMMANDS, ["scan", str(folder), "--output", str(tmp_path / "out"), "--quality", "true"])
    told = capsys.readouterr().out
    assert "2 volume(s) cannot be used" in told
    assert "voxels that are NaN or infinite" in told
    report = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert (report["volumes"], report["readable"], report["measured"]) == (5, 3, 3)
    assert sum(entry["count"] for entry in report["problems"]) == 2


def test_a_list_of_one_subject_may_grow_and_no_subject_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = data(tmp_path / "data", range(1)), tmp_path / "data" / "list.json"
    list_cases(ListCases(str(folder), str(output)))
    assert "note: all volumes are in both parts" in capsys.readouterr().out
    list_cases(ListCases(str(output), str(tmp_path / "again.json")))
    assert len(json.loads((tmp_path / "again.json").read_text())["training"]) == 2, "each once"
    data(folder, range(1, 12))
    capsys.readouterr()
    list_cases(ListCases(str(folder), str(output), update=True))
    assert "note" not in capsys.readouterr().out

    plain = tmp_path / "plain.json"  # no columns, folders of a data set
    images = [f"data/ds1/sub-{index:02}/T1w.nii.gz" for index in range(30)]
    plain.write_text(json.dumps({"training": [{"image": image} for image in images[:20]]}))
    listed = tmp_path / "listed.json"
    list_cases(ListCases(str(plain), str(listed)))
    before = {case["image"] for case in json.loads(listed.read_text())["validation"]}
    plain.write_text(json.dumps({"training": [{"image": image} for image in images]}))
    list_cases(ListCases(str(plain), str(listed), update=True, seed=9))
    after = json.loads(listed.read_text())
    assert before < {case["image"] for case in after["validation"]}
    assert not {case["image"] for case in after["training"]} & before


COMMANDS = {"scan": tool.scan, "list": tool.list_cases, "prepare": tool.prepare, "verify": tool.verify}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prepare x --store_dir y --num_worker 3", "prepare has no setting --num_worker; did you mean --num_workers?"),
        ("prepare x --store-dir=y --xyz=3", "prepare has no setting --xyz; it has: data, store_dir,"),
        ("verify x -repai true", "did you mean --repair?"),
        ("scan x --output", "--output of scan has no value"),
        ("list x --output --update", "--output of list has no value"),
        ("verify a 1 true more", "does not know what to do with 'more'"),
        ("scan nowhere", "--folder is 'nowhere'; it must be a file or folder that is there"),
        ("list x --modality T1w", "list needs --folder (a file or folder that is there) and --output (a path)"),
        ("skan x", "there is no command 'skan'; did you mean scan?"),
    ],
)
def test_settings_are_judged_before_any_work(line: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prepare", "verify", "scan", "list_cases"):
        where = "filling" if name in ("prepare", "verify") else "scanning"
        monkeypatch.setattr(f"tools.preparing.{where}.{name}", lambda _: pytest.fail("work began"))
    with pytest.raises(SettingsError) as error:
        run(COMMANDS, line.split())
    assert words in str(error.value)


def test_texts_stay_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data(tmp_path / "2024_01", range(2))
    monkeypatch.chdir(tmp_path)
    run(COMMANDS, ["scan", "2024_01", "--output", "1e3"])
    assert (tmp_path / "1e3" / "scan.json").is_file()
    run(COMMANDS, ["prepare", "2024_01", "--store_dir", "7", "--num_workers", "1"])
    assert len(list((tmp_path / "7").glob("*.json"))) == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prepare data --store_dir s --spacing_mm 0", "spacing_mm is 0.0; write one positive number"),
        ("prepare data --store_dir s --spacing_mm 1,2", r"spacing_mm is \(1.0, 2.0\); write one positive"),
        ("prepare data --store_dir s --num_workers x", "--num_workers is 'x'; it must be a whole number from 0"),
        ("prepare data --store_dir file/s", "the store .*file/s cannot be made"),
        ("verify data --num_workers x", "--num_workers is 'x'"),
        ("list data --output l.json --max_quality_score abc", "max_quality_score is 'abc'"),
        ("list data --output l.json --min_size abc", "min_size is 'abc'"),
        ("list data --output l.json --spacing_mm abc", "--spacing_mm is 'abc'; it must be numbers with commas"),
        ("list data --output l.json --spacing_mm -1,2", r"spacing_mm is \(-1.0, 2.0\)"),
        ("list data --output l.json --seed x", "--seed is 'x'"),
        ("list data --output file/l.json", "the folder .*file cannot be written"),
        ("scan data --output file", "the folder file cannot be written"),
        ("scan data --threads x", "--threads is 'x'"),
        ("scan list.json --mask_polarity foo", "mask_polarity is 'foo'; it is as_named or inverted"),
        ("scan list.json --mask_polarity 3", "mask_polarity is 3; it is as_named or inverted"),
        ("scan list.json --mask_polarity inverted", "is a datalist, which says itself"),
    ],
)
def test_wrong_values_and_places_end_in_a_sentence(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data(tmp_path / "data", range(1))
    (tmp_path / "file").write_text("x")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "data/sub-00/sub-00_T1w.nii.gz"}]}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, SettingsError)) as error:
        run(COMMANDS, line.split())
    told = sentence(error.value)
    assert told is not None
    assert re.search(words, told), told
    assert not (tmp_path / "l.json").exists()


def test_a_place_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EACCES, errno.EROFS, errno.EPERM):
        told = sentence(OSError(number, os.strerror(number), "/mnt/store/.x.part"))
        assert (
            told
            == f"/mnt/store/.x.part cannot be read or written ({os.strerror(number)}); correct the path or its rights"
        )
    monkeypatch.setattr(os, "access", lambda path, mode: "out" not in str(path))
    with pytest.raises(DataError, match=r"out cannot be written \(Permission denied\); give another --output"):
        scan(Scan(str(data(tmp_path / "data", range(1))), output=str(tmp_path / "out")))


def test_mistakes_end_in_a_sentence(tmp_path: Path) -> None:
    folder = data(tmp_path / "data", range(2))
    for arguments, words in (
        (["scan", tmp_path / "nowhere"], "it must be a file or folder that is there"),
        (["scan", folder, "--source", "openmind"], "cannot be read: No such file"),
        (["list", folder, "--output", tmp_path / "l.json", "--modality", "CT"], "nothing is left of 4 volumes"),
        (
            ["list", folder, "--output", tmp_path / "l.json", "--include", "none.txt"],
            "the list none.txt cannot be read",
        ),
        (
            ["list", folder, "--output", tmp_path / "l.json", "--keep", "none.json"],
            "--keep is 'none.json'; it must be a file or folder",
        ),
    ):
        done = prepare_data(*arguments)
        assert done.returncode != 0
        assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "l.json").exists()
