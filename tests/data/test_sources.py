# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Every source gives the same kind of cases, from metadata alone, and refuses what it must."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data import StoreSettings, VolumeStore, pretraining_lists
from common.data.listing.classified import classified_cases
from common.data.listing.datalists import every_image, image_list
from common.data.listing.folders import volumes_in
from common.data.listing.labelled import labelled_lists
from common.data.listing.sources import detect, read_source
from common.errors import DataError, SettingsError

from ..conftest import ROOT, blobs, write_volume
from ..starts import python

COLUMNS = "image_path,modality,anon_mask_path,anat_mask_path,unique_id,image_quality_score,age,derived_from"
ROWS = [
    "ds000001/sub-01/anat/sub-01_T1w.nii.gz,T1w,ds000001/m/an_01.nii.gz,ds000001/m/at_01.nii.gz,ds000001_1,2.5,31,",
    "ds000001/sub-01/ses-02/anat/sub-01_ses-02_T2w.nii.gz,T2w,,,ds000001_2,nan,,",
    "ds003097/sub-0827/dwi/sub-0827_run-3_dwi__Data/FA.nii.gz,FA,nan,ds003097/m/at.nii.gz,ds003097_9,1,,dwi",
]


def openmind(folder: Path, rows: list[str] | None = None, columns: str = COLUMNS) -> Path:
    (folder / "OpenMind").mkdir(parents=True, exist_ok=True)
    (folder / "openneuro_metadata.csv").write_text("\n".join([columns, *(ROWS if rows is None else rows)]) + "\n")
    return folder


def test_openmind_as_published(tmp_path: Path) -> None:
    assert detect(openmind(tmp_path)) == detect(tmp_path / "openneuro_metadata.csv") == "openmind"
    images = f"{tmp_path}/OpenMind"
    first, second, third = read_source(tmp_path).cases
    assert first == {
        "image": f"{images}/ds000001/sub-01/anat/sub-01_T1w.nii.gz",
        "name": "ds000001_sub-01_T1w",
        "dataset": "ds000001",
        "subject": "sub-01",
        "session": "ses-DEFAULT",
        "modality": "T1w",
        "quality": 2.5,
        "anonymization_mask": f"{images}/ds000001/m/an_01.nii.gz",
        "anatomy_mask": f"{images}/ds000001/m/at_01.nii.gz",
    }
    assert second["session"] == "ses-02"
    assert not {"quality", "anonymization_mask", "anatomy_mask", "derived_from"} & second.keys(), "empty cells are none"
    assert third["derived_from"] == "dwi"
    assert third["name"] == "ds003097_sub-0827_run-3_dwi_FA"
    assert "anatomy_mask" in third
    assert "anonymization_mask" not in third


def test_polarity_of_masks_is_a_setting_that_reaches_the_list(tmp_path: Path) -> None:
    openmind(tmp_path)
    assert all("inverted_masks" not in case for case in read_source(tmp_path).cases)
    turned = [case.get("inverted_masks") for case in read_source(tmp_path, mask_polarity="inverted").cases]
    assert turned == [["anonymization_mask", "anatomy_mask"], None, ["anatomy_mask"]]
    one = read_source(tmp_path, mask_polarity={"anatomy_mask": "inverted"}).cases
    assert [case.get("inverted_masks") for case in one] == [["anatomy_mask"], None, ["anatomy_mask"]]
    for wrong in ("upside_down", {"brain_mask": "inverted"}):
        with pytest.raises(SettingsError, match="mask_polarity is"):
            read_source(tmp_path, mask_polarity=wrong)
    lists = pretraining_lists(str(tmp_path), mask_polarity={"anatomy_mask": "inverted"})
    cases = lists["training"] + lists["validation"]
    assert sorted(len(case.get("inverted_masks", [])) for case in cases) == [0, 1, 1]
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii", "inverted_masks": ["brain"]}]}))
    with pytest.raises(DataError, match='"inverted_masks" of "training" must be a list of'):
        pretraining_lists(datalist=str(tmp_path / "list.json"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("../../etc/sub-01/passwd.nii.gz,T1w,,,u,1,,", "leads out of the data set's folder"),
        ("/etc/sub-01/passwd.nii.gz,T1w,,,u,1,,", "leads out of the data set's folder"),
        ("ds1/sub-01/..\\..\\x.nii.gz,T1w,,,u,1,,", "leads out of the data set's folder"),
        ("ds1/sub-01/a.nii.gz,T1w,../x.nii.gz,,u,1,,", "leads out of the data set's folder"),
        ("ds1/sub-01/a.nii.gz,T1w,,,u,good,,", "image_quality_score is 'good', not a number"),
        (",T1w,,,u,1,,", "it names data set, subject and file"),
        (ROWS[0], "is listed twice; the first counts"),
    ],
)
def test_rows_that_cannot_be_used_are_told_and_left_out(row: str, words: str, tmp_path: Path) -> None:
    found = read_source(openmind(tmp_path, [*ROWS, row]))
    assert len(found.cases) == 3
    assert len(found.left_out) == 1
    assert words in found.left_out.told()[0]
    assert "line 5" in found.left_out.told()[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"image_path;modality\nds1/sub-1/a.nii;T1w\n", None),
        (b"\xef\xbb\xbfimage_path,modality\nds1/sub-1/a.nii,T1w\n", None),
        (b"image_path,mod\nds1/sub-1/a.nii,T1w\n", "has no column modality"),
        (b"", "has no column image_path"),
        (b"image_path,modality\nds1/sub-1/a.nii,T1w,oops\n", "3 values for 2 columns"),
        (b"image_path,modality,modality\nds1/sub-1/a.nii,T1w,T1w\n", "two columns called 'modality'"),
        (b"image_path,modality\nds1/sub-1/\xff.nii,T1w\n", "is not text in UTF-8"),
        (b'image_path,modality\n"ds1/sub-1/a.nii,T1w\n', "is no CSV"),
        (b"image_path,modality\n", "holds no volume"),
    ],
)
def test_tables(content: bytes, words: str | None, tmp_path: Path) -> None:
    (tmp_path / "openneuro_metadata.csv").write_bytes(content)
    if words is None:
        assert read_source(tmp_path).cases[0]["modality"] == "T1w"
        return
    with pytest.raises(DataError, match=words):
        read_source(tmp_path)


def index(images: list[Any], **info: Any) -> dict[str, Any]:
    session = {"session_id": "ses-1", "images": images}
    subject = {"subject_id": "sub-1", "sessions": {"ses-1": session}}
    dataset = {"dataset_index": 1, "dataset_info": info, "subjects": {"sub-1": subject}}
    return {"collection_index": 1, "collection_name": "mine", "datasets": {"ds1": dataset}}


def test_nnssl_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [
        {
            "name": "a.nii.gz",
            "image_path": "$my_data/x/a.nii.gz",
            "modality": "T1w",
            "associated_masks": {"anonymization_mask": "$my_data/x/m.nii.gz", "anatomy_mask": None},
        },
        {"name": "FA.nii.gz", "image_path": "b.nii.gz", "modality": "FA", "image_info": {"derived_from": "dwi"}},
        {"name": "c", "image_path": "/elsewhere/c.nrrd", "modality": "T2w", "associated_masks": None},
        {"name": "d", "image_path": "$my_data/../d.nii", "modality": "T1w"},
        {"name": "e", "image_path": "../e.nii", "modality": "T1w"},
        {"name": "f", "image_path": None, "modality": "T1w"},
        "g",
    ]
    scores = [{"modality": "FA", "derived_from": "dwi", "image_quality_score": 4}]
    file = tmp_path / "pretrain_data.json"
    file.write_text(json.dumps(index(images, image_quality_score=scores), indent=4, sort_keys=True))
    assert detect(tmp_path) == detect(file) == "nnssl"
    with pytest.raises(DataError, match=r"below \$my_data, which is not set; export my_data=FOLDER"):
        read_source(tmp_path)
    monkeypatch.setenv("my_data", "/data/mri")
    found = read_source(tmp_path, mask_polarity="inverted")
    first, second, third = found.cases
    assert first["image"] == "/data/mri/x/a.nii.gz"
    assert first["anonymization_mask"] == "/data/mri/x/m.nii.gz"
    assert first["inverted_masks"] == ["anonymization_mask"]
    assert "anatomy_mask" not in first
    assert (first["dataset"], first["subject"], first["session"]) == ("ds1", "sub-1", "ses-1")
    assert (second["image"], second["quality"]) == (str(tmp_path / "b.nii.gz"), 4)
    assert third["image"] == "/elsewhere/c.nrrd"
    assert len(found.left_out) == 4
    assert sum("leads out of the data set's folder" in sentence for sentence in found.left_out.told()) == 2
    lists = pretraining_lists(datalist=str(file))
    assert sum(map(len, lists.values())) == 6, "one subject is in both parts"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", 'it needs "datasets"'),
        ('{"datasets": {"a": 3}}', 'it needs "datasets"'),
        ('{"datasets": {"a": {"subjects": {"s": {"sessions": {"t": {}}}}}}}', 'has no list "images"'),
        ('{"datasets": {}}', "holds no volume"),
    ],
)
def test_broken_indices(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "pretrain_data.json").write_text(content)
    with pytest.raises(DataError, match=words):
        read_source(tmp_path)


def test_bids(tmp_path: Path) -> None:
    for dataset in ("ds1", "ds2"):
        root = tmp_path / dataset
        for inner in (
            "sub-01/anat/sub-01_T1w.nii.gz",
            "sub-01/ses-2/anat/sub-01_ses-2_acq-x_T2w.nii.gz",
            "sub-01/anat/sub-01_mod-T1w_defacemask.nii.gz",
            "sub-01/func/sub-01_task-rest_bold.nii.gz",
            "sub-01/anat/wrong.nii.gz",
            "derivatives/prep/sub-01/anat/sub-01_desc-x_T1w.nii.gz",
            "sub-01/anat/sub-01_T1w.json",
        ):
            (root / inner).parent.mkdir(parents=True, exist_ok=True)
            (root / inner).touch()
        (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    assert detect(tmp_path) == detect(tmp_path / "ds1") == "bids"
    found = read_source(tmp_path)
    assert [(c["dataset"], c["subject"], c.get("session"), c["modality"]) for c in found.cases] == [
        (dataset, "sub-01", session, modality)
        for dataset in ("ds1", "ds2")
        for session, modality in ((None, "T1w"), ("ses-2", "T2w"))
    ]
    assert len({case["name"] for case in found.cases}) == 4
    assert sorted(sentence.split(", such")[0] for sentence in found.left_out.told()) == [
        "2 file(s) of NIfTI in derivatives",
        "2 file(s) of a name that BIDS does not know",
        "2 file(s) of defacemask",
        "2 file(s) of func",
    ]
    assert len(found.left_out) == 8
    assert len(read_source(tmp_path / "ds1").cases) == 2
    with pytest.raises(DataError, match="is no BIDS data set"):
        read_source(tmp_path / "ds1" / "sub-01", "bids")
    (tmp_path / "more").mkdir()
    assert detect(tmp_path) == "folder", "a folder with other things than data sets is taken as it is"


def test_plain_folders_and_what_is_not_clear(tmp_path: Path) -> None:
    for name in ("äöü ß/T1 scan.nii.gz", "sub-01/ses-1/sub-01_ses-1_T1w.nii.gz", ".hidden/x.nii.gz", "B.NII", "c.mgz"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.nii").symlink_to("self.nii")
    (tmp_path / "link.nii.gz").symlink_to("B.NII")
    found = read_source(tmp_path)
    cases = found.cases
    assert found.left_out.told() == [
        f"1 link(s) back to a folder that they lie in, such as {tmp_path}/loop; nothing is lost"
    ]
    assert sorted(Path(case["image"]).name for case in cases) == [
        *("B.NII", "T1 scan.nii.gz", "c.mgz", "link.nii.gz", "self.nii", "sub-01_ses-1_T1w.nii.gz")
    ]
    named = next(case for case in cases if "subject" in case)
    assert (named["subject"], named["session"], named["modality"]) == ("sub-01", "ses-1", "T1w")
    from common.transforms import read_header

    with pytest.raises(DataError, match=r"self\.nii' cannot be opened"):
        read_header(tmp_path / "self.nii")
    (tmp_path / "openneuro_metadata.csv").touch()
    (tmp_path / "pretrain_data.json").touch()
    with pytest.raises(DataError, match="say which with --source openmind or nnssl"):
        detect(tmp_path)
    assert len(read_source(tmp_path, "folder").cases) == 6
    with pytest.raises(SettingsError, match="it must be one of openmind, nnssl, bids"):
        read_source(tmp_path, "dicomdir")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="is neither OpenMind's table"):
        detect(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        detect(tmp_path / "nowhere")


def test_volumes_of_an_unreadable_folder_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_volume(tmp_path / "a" / "a.nii.gz", blobs(0)[0])
    write_volume(tmp_path / "b" / "b.nii.gz", blobs(0)[0])
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [path.name for path in volumes_in(tmp_path)] == ["a.nii.gz"]
    told = f"left out: 1 folder(s) that cannot be read (Permission denied), such as {tmp_path}/b; correct their rights"
    assert told in capsys.readouterr().out


def test_folders_that_cannot_be_searched_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ds1", "ds2"):
        write_volume(tmp_path / name / "sub-01" / "anat" / "sub-01_T1w.nii.gz", blobs(0)[0])
        (tmp_path / name / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    status, access = os.stat, os.access

    def refuse(path: Any, **options: Any) -> Any:
        if str(path).startswith(f"{tmp_path}/ds2/"):
            raise PermissionError(13, "Permission denied", str(path))
        return status(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("ds2") and access(path, mode))
    assert detect(tmp_path) == "bids"
    found = read_source(tmp_path)
    assert [case["dataset"] for case in found.cases] == ["ds1"]
    told = [f"1 folder(s) that cannot be read (Permission denied), such as {tmp_path}/ds2; correct their rights"]
    assert found.left_out.told() == told
    plain = read_source(tmp_path, "folder")
    assert (len(plain.cases), plain.left_out.told()) == (1, told)


def test_linked_folders_are_read_once_and_no_loop_is_walked(tmp_path: Path) -> None:
    """As archives link subjects: a linked subject, a linked folder of one, two links to one, and links back."""
    for subject in ("01", "02", "03"):
        write_volume(tmp_path / f"archive/sub-{subject}/anat/sub-{subject}_T1w.nii.gz", blobs(0)[0])
    study = tmp_path / "study"
    (study / "sub-02").mkdir(parents=True)
    (study / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    (study / "sub-01").symlink_to(tmp_path / "archive" / "sub-01")
    (study / "sub-02" / "anat").symlink_to(tmp_path / "archive" / "sub-02" / "anat")
    shutil.copytree(tmp_path / "archive" / "sub-03", study / "sub-03")
    for source in ("bids", "folder"):
        found = read_source(study, source)
        assert sorted(case["subject"] for case in found.cases) == ["sub-01", "sub-02", "sub-03"]
        assert all(case["image"].startswith(f"{study}/") for case in found.cases), "named as they are seen"
        assert len(found.left_out) == 0
    (study / "sub-03" / "up").symlink_to(study)
    (study / "parent").symlink_to("..")
    (study / "again").symlink_to("sub-03")
    (study / "sub-04").symlink_to("nowhere")
    (study / "sub-05_T1w.nii.gz").symlink_to("nowhere.nii.gz")
    found = read_source(study, "folder")
    assert sorted(Path(case["image"]).name[4:6] for case in found.cases) == ["01", "02", "03", "05"]
    assert sorted(found.left_out.told()) == [
        f"1 link(s) that lead nowhere, such as {study}/sub-04; restore what they lead to, or remove them",
        f"1 link(s) to folders that are listed already, such as {study}/again; nothing is lost",
        f"2 link(s) back to a folder that they lie in, such as {study}/parent; nothing is lost",
    ]


def test_what_is_not_read_is_counted_alike_wherever_files_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for index in range(3):
        image, mask = blobs(index)
        write_volume(data / "images" / f"case_{index}.nii.gz", image)
        write_volume(data / "labels" / f"case_{index}.nii.gz", mask)
        (data / "images" / f"case_{index}.mnc").touch()
    (data / "images" / "volume.mha").touch()
    (data / "images" / "notes.txt").touch()
    wanted = [
        f"left out: 3 file(s) of MINC, which are not read, such as {data}/images/case_0.mnc; convert it with mnc2nii",
        f"left out: 1 file(s) of MetaImage, which are not read, such as {data}/images/volume.mha; convert it",
    ]
    listings: dict[str, Any] = {
        "preparation": lambda: pretraining_lists(str(data / "images")),
        "fine-tuning and evaluation": lambda: labelled_lists(str(data)),
        "inference": lambda: image_list(str(data)),
        "features": lambda: every_image(str(data)),
        "classification": lambda: classified_cases(str(data)),
    }
    for name, listing in listings.items():
        listing()
        told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
        assert len(told) == 2, name
        assert all(line.startswith(sentence) for line, sentence in zip(told, wanted, strict=True)), name
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.mhd").touch()
    with pytest.raises(DataError, match=r"holds no file ending in .*; it holds 1 file\(s\) of MetaImage"):
        read_source(tmp_path / "only")


def test_pre_training_takes_each_source(tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        inner = f"ds000001/sub-{number:02d}/anat/sub-{number:02d}_T1w.nii.gz"
        image, mask = blobs(number)
        write_volume(tmp_path / "OpenMind" / inner, image, spacing=2.0)
        write_volume(tmp_path / "OpenMind" / f"masks/{number}.nii.gz", mask, spacing=2.0)
        rows.append(f"{inner},T1w,masks/{number}.nii.gz,,u,1,,")
    openmind(tmp_path, rows)
    lists = pretraining_lists(str(tmp_path))
    assert (len(lists["training"]), len(lists["validation"])) == (5, 1)
    assert lists == pretraining_lists(datalist=str(tmp_path / "openneuro_metadata.csv"))
    volume = VolumeStore(tmp_path / "store", StoreSettings()).prepare_one(lists["training"][0])
    assert volume.masks == ("anonymization_mask",)
    assert np.isfinite(volume.read((0, 0, 0), volume.shape)).all()


def test_the_whole_table_opens_in_seconds(tmp_path: Path) -> None:
    """20,000 rows here; the figures of 114,000 are in docs/data.md."""
    rows = [
        f"ds{n // 150:06d}/sub-{n // 3:05d}/anat/sub-{n // 3:05d}_run-{n % 3}_T1w.nii.gz,T1w,"
        f"ds{n // 150:06d}/m/{n}_anon.nii.gz,ds{n // 150:06d}/m/{n}_anat.nii.gz,ds{n // 150:06d}_{n},{1 + n % 5},,"
        for n in range(20_000)
    ]
    openmind(tmp_path, rows)
    code = (
        "import resource, sys, time\nfrom common.data import pretraining_lists\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()\n"
        "lists = pretraining_lists(sys.argv[1])\n"
        "print(len(lists['training']), len(lists['validation']), time.perf_counter() - start, "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([python(), "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    training, validation, seconds, kilobytes = map(float, done.stdout.split())
    assert training + validation == 20_000
    assert validation == 66 * 3, "1 % of 6,667 subjects, all their volumes"
    assert seconds < 20
    assert kilobytes < 150 * 1024
