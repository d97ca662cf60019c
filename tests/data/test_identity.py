# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which image an output is of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.data.identity import Origins, content_of, identity_of, same_images
from common.data.prediction import pending_cases, prediction_outputs
from common.errors import DataError, SettingsError

from ..conftest import blobs, write_volume


def test_an_image_is_known_by_where_it_is_or_what_it_holds(tmp_path: Path) -> None:
    file = write_volume(tmp_path / "a" / "x.nii", blobs(0)[0])
    case = {"image": str(file)}
    noted = json.loads(json.dumps(identity_of(case)))
    assert same_images(noted, case)
    moved = shutil.copy(file, tmp_path / "y.nii")
    assert same_images(noted, {"image": str(moved)}), "the same content elsewhere"
    os.utime(file)
    assert same_images(noted, case), "touched, and the same"
    status = file.stat()
    write_volume(file, blobs(1)[0])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert not same_images(noted, case), "another of the same size, whose time was set to that of the first"
    assert not same_images(noted, {"image": [str(moved), str(moved)]})
    with pytest.raises(OSError, match="gone"):
        same_images(noted, {"image": str(tmp_path / "gone.nii")})


def test_files_behind_an_image_belong_to_it(tmp_path: Path) -> None:
    header = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nspace: left-posterior-superior\nencoding: raw\n"
    header += b"space directions: (1,0,0) (0,1,0) (0,0,1)\ndata file: x.raw\n\n"
    (tmp_path / "x.nhdr").write_bytes(header)
    (tmp_path / "x.raw").write_bytes(bytes(range(8)))
    case = {"image": str(tmp_path / "x.nhdr")}
    noted = identity_of(case)
    os.utime(tmp_path / "x.raw", ns=(1, 1))
    assert same_images(noted, case)
    (tmp_path / "x.raw").write_bytes(bytes(range(1, 9)))
    assert not same_images(noted, case)
    before = content_of(case["image"])
    (tmp_path / "x.raw").write_bytes(bytes(range(8)))
    assert content_of(case["image"]) != before


def test_what_was_begun_or_cut_is_of_nothing(tmp_path: Path) -> None:
    file = write_volume(tmp_path / "x.nii.gz", blobs(0)[0])
    images, origins = identity_of({"image": str(file)}), Origins(tmp_path / "out")
    origins.note(["a.nii.gz", "b/c.nii.gz"], images, {"overlap": 0.5})
    assert {name: each["settings"] for name, each in origins.read().items()} == {
        "a.nii.gz": {"overlap": 0.5},
        "b/c.nii.gz": {"overlap": 0.5},
    }
    origins.begin(["a.nii.gz"])
    assert origins.read()["a.nii.gz"]["images"] is None
    with open(origins.file, "a", encoding="utf-8") as stream:
        stream.write('{"output": "d.nii.gz", "ima')  # killed
    origins.note(["e.nii.gz"], images, {})
    assert origins.read().keys() == {"a.nii.gz", "b/c.nii.gz", "e.nii.gz"}
    assert Origins(tmp_path / "elsewhere").read() == {}


@pytest.fixture
def cases(tmp_path: Path) -> list[dict[str, Any]]:
    return [{"image": str(write_volume(tmp_path / "in" / f"{name}.nii.gz", blobs(0)[0]))} for name in "xyz"]


def predicted(folder: Path, case: dict[str, Any], name: str, *, probabilities: bool = False, **settings: Any) -> None:
    """Write what a run leaves of a case."""
    outputs = prediction_outputs(name, probabilities=probabilities)
    for output in outputs:
        (folder / output).parent.mkdir(parents=True, exist_ok=True)
        (folder / output).touch()
    Origins(folder).note(outputs, identity_of(case), settings)


def test_only_predictions_of_these_images_are_kept(
    cases: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def pending(**options: Any) -> list[str]:
        return [Path(case["image"]).name[0] for case in pending_cases(cases, output_dir=str(out), **options)]

    assert pending() == ["x", "y", "z"]
    for case in cases[:2]:
        predicted(out, case, Path(case["image"]).name[0], overlap=0.5)
    assert pending(settings={"overlap": 0.5}) == ["z"]
    assert pending(settings={"overlap": 0.5}, probabilities=True) == ["x", "y", "z"]
    assert pending(settings={"overlap": 0.5}, overwrite=True) == ["x", "y", "z"]
    with pytest.raises(SettingsError, match=r"made otherwise \(overlap 0.5 -> 0.25\)"):
        pending(settings={"overlap": 0.25})
    capsys.readouterr()
    write_volume(tmp_path / "in" / "x.nii.gz", blobs(1)[0])
    assert pending(settings={"overlap": 0.5}) == ["x", "z"]
    assert "1 prediction(s) in" in (told := capsys.readouterr().out)
    assert "x.nii.gz, are of other images of the same names" in told
    Origins(out).begin(["y.nii.gz"])
    assert pending(settings={"overlap": 0.5}) == ["x", "y", "z"], "begun, and killed"
    cases[1] = {"image": str(write_volume(tmp_path / "site" / "y.nii.gz", blobs(0)[0]))}
    predicted(out, cases[1], "y", overlap=0.5)
    (tmp_path / "in" / "x.nii.gz").unlink()
    assert pending(settings={"overlap": 0.5}) == ["x", "z"], "an image that is gone is told when it is read"


def test_what_nothing_tells_the_image_of_is_neither_kept_nor_replaced(
    cases: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predicted(out, cases[0], "x")
    for name in "yz":
        (out / f"{name}.nii.gz").touch()
    with pytest.raises(DataError, match=r"nothing tells which image .*y\.nii\.gz was made of .* nor of 1 more there"):
        pending_cases(cases, output_dir=str(out))
    assert len(pending_cases(cases, output_dir=str(out), overwrite=True)) == 3


def test_predictions_must_have_files_of_their_own(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would replace it"):
        pending_cases(cases, output_dir=str(tmp_path / "in"))
    with pytest.raises(DataError, match="several cases are called x"):
        pending_cases([*cases, {"image": "/b/x.nii.gz"}], output_dir=str(tmp_path / "out"))
    for name, words in (("../x", "outside the folder"), ("X", "would share one file"), ("/tmp/x", "begins with /")):
        with pytest.raises(DataError, match=words):
            pending_cases([*cases, cases[0] | {"name": name}], output_dir=str(tmp_path / "out"))
    sites = [case | {"name": f"site{index}/scan"} for index, case in enumerate(cases)]
    predicted(tmp_path / "out", sites[0], "site0/scan")
    assert pending_cases(sites, output_dir=str(tmp_path / "out")) == sites[1:]
    assert prediction_outputs("site0/scan", probabilities=True) == [
        *("site0/scan.nii.gz", "probabilities/site0/scan_probabilities.nii.gz")
    ]
