# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Every format gives the same voxels at the same places, through checks, preprocessing, labels and predictions."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
from monai.transforms import LoadImaged
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from common.data import StoreSettings, VolumeStore, every_image, image_list, labelled_lists, pretraining_lists
from common.data.checking.checks import check_case, check_mask
from common.data.checking.filters import Filters
from common.data.checking.survey import survey
from common.data.listing.folders import volumes_below, volumes_in
from common.data.problems import LeftOut
from common.errors import DataError
from common.transforms import AtomicNibabelWriter, read_header, read_volume, volume_preprocessing
from common.transforms.formats import unpacking
from common.transforms.preprocessing import load_volumes
from common.transforms.writing import header_like

from ..conftest import blobs, write_volume

# oblique, anisotropic, left-handed: nothing that a wrong sign or a transposition would leave as it is
ANGLE = np.deg2rad(20)
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN @ np.diag([-0.9, 1.1, 2.0])
AFFINE[:3, 3] = [31.0, -17.0, 5.0]
VALUES = np.round(blobs(0, (22, 26, 20))[0][..., 3:17]).astype(np.int16)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_nrrd(path: Path, values: np.ndarray = VALUES, **fields: object) -> Path:
    lps = LPS @ AFFINE
    header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    detached = {"detached_header": True} if path.suffix == ".nhdr" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    nrrd.write(str(path), values, header | fields, index_order="F", **detached)
    return path


def write_mgh(path: Path, values: np.ndarray = VALUES) -> Path:
    nib.save(nib.MGHImage(values, AFFINE), path)
    return path


def slices(
    values: np.ndarray = VALUES, *, series: str | None = None, patient: str = "Doe^Jane"
) -> list[pydicom.Dataset]:
    """Return the slices of a series, first to last along z."""
    series, lps = series or generate_uid(), LPS @ AFFINE
    found = []
    for k in range(values.shape[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        one = pydicom.Dataset()
        one.file_meta = meta
        one.SOPClassUID, one.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        one.SeriesInstanceUID, one.StudyInstanceUID = series, "1.2.3"
        one.FrameOfReferenceUID = "1.2.3.4"
        one.PatientID, one.Modality, one.SeriesDescription = patient, "MR", "t1 mprage"
        one.Rows, one.Columns, one.SamplesPerPixel = values.shape[1], values.shape[0], 1
        one.PhotometricInterpretation = "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.PixelSpacing = [float(np.linalg.norm(lps[:3, 1])), float(np.linalg.norm(lps[:3, 0]))]
        across = lps[:3, 0] / np.linalg.norm(lps[:3, 0]), lps[:3, 1] / np.linalg.norm(lps[:3, 1])
        one.ImageOrientationPatient = [round(float(v), 8) for v in np.concatenate(across)]
        one.ImagePositionPatient = [round(float(v), 6) for v in lps[:3, 3] + k * lps[:3, 2]]
        one.RescaleSlope, one.RescaleIntercept = 2, -100
        one.PixelData = ((values[:, :, k].T + 100) // 2).astype(np.int16).tobytes()
        found.append(one)
    return found


EVEN = VALUES // 2 * 2  # what rescaling by 2 keeps


def write_series(folder: Path, datasets: list[pydicom.Dataset] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    datasets = slices(EVEN) if datasets is None else datasets
    for number, each in enumerate(datasets):
        name = f"IM{len(datasets) - number:04d}"  # the order of names says nothing
        each.save_as(folder / name, enforce_file_format=True)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "raw NRRD": lambda folder: write_nrrd(folder / "a.nrrd", encoding="raw"),
    "gzip NRRD": lambda folder: write_nrrd(folder / "a.nrrd", encoding="gzip"),
    "big-endian NRRD": lambda folder: write_nrrd(folder / "a.nrrd", VALUES.astype(">i2"), encoding="raw"),
    "detached NRRD": lambda folder: write_nrrd(folder / "a.nhdr", encoding="gzip"),
    "MGH": lambda folder: write_mgh(folder / "a.mgh"),
    "MGZ": lambda folder: write_mgh(folder / "a.mgz"),
    "DICOM": lambda folder: write_series(folder / "a"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_voxels_and_geometry_are_those_of_nifti(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    wanted = EVEN if kind == "DICOM" else VALUES
    header = read_header(path)
    values, affine = read_volume(path)
    assert header.shape == values.shape == wanted.shape
    np.testing.assert_array_equal(values, wanted)
    assert values.dtype.isnative
    for found in (header.affine, affine):
        np.testing.assert_allclose(found, AFFINE, atol=1e-4)
    assert volumes_in(tmp_path)[0] == path

    nifti = tmp_path / "nifti" / "b.nii.gz"
    nifti.parent.mkdir()
    nib.save(nib.Nifti1Image(wanted, AFFINE), nifti)
    check_case({"image": str(path)})
    chain = volume_preprocessing()
    ours, theirs = chain({"image": str(path)})["image"], chain({"image": str(nifti)})["image"]
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-3)
    np.testing.assert_allclose(ours.affine.numpy(), theirs.affine.numpy(), atol=1e-3)
    stored = VolumeStore(tmp_path / "store", StoreSettings(dtype="float32")).prepare_one({"image": str(path)})
    np.testing.assert_allclose(
        stored.read((0, 0, 0), stored.shape), theirs.numpy()[0], atol=1e-3, err_msg="what is trained on"
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_a_prediction_is_nifti_in_the_images_geometry(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    header = header_like(path, VALUES.shape, np.uint8)
    np.testing.assert_allclose(header.get_best_affine(), AFFINE, atol=1e-4)
    np.testing.assert_allclose(header.get_zooms(), [0.9, 1.1, 2.0], atol=1e-4)
    assert header.get_xyzt_units()[0] == "mm"
    writer = AtomicNibabelWriter(output_dtype=np.uint8)
    writer.set_data_array((VALUES > 120).astype(np.uint8)[None], channel_dim=0)
    writer.set_metadata({"source_file": str(path)})
    writer.write(str(tmp_path / "out" / "a.nii.gz"))
    saved = nib.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_allclose(saved.affine, AFFINE, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), VALUES > 120)


def test_images_and_labels_of_different_formats_make_a_case(tmp_path: Path) -> None:
    label = (VALUES > 150).astype(np.uint8)
    for index in range(3):
        write_nrrd(tmp_path / "images" / f"case_{index}.nrrd")
        (tmp_path / "labels").mkdir(exist_ok=True)
        if index == 0:
            nib.save(nib.Nifti1Image(label, AFFINE), tmp_path / "labels" / "case_0.nii.gz")
        elif index == 1:
            write_nrrd(tmp_path / "labels" / "case_1.seg.nrrd", label)
        else:
            nib.save(nib.MGHImage(label, AFFINE), tmp_path / "labels" / "case_2.mgz")
    lists = labelled_lists(str(tmp_path))
    cases = lists["training"] + lists["validation"]
    assert {Path(case["label"]).name for case in cases} == {"case_0.nii.gz", "case_1.seg.nrrd", "case_2.mgz"}
    for case in cases:
        check_case(case)
        check_mask(case["image"], case["label"])
    assert len(image_list(str(tmp_path))) == 3
    assert len(every_image(str(tmp_path))) == 3
    assert sum(map(len, pretraining_lists(str(tmp_path)).values())) == 3, "labels are not trained on"

    other = (VALUES > 150).astype(np.uint8)
    other[0, 0, 0] = 7
    bad = write_nrrd(tmp_path / "bad.nrrd", other)
    with pytest.raises(DataError, match=r"bad\.nrrd holds the values 7; a mask is 1 inside"):
        check_mask(cases[0]["image"], str(bad))
    shifted = write_nrrd(tmp_path / "shifted.nrrd", label, **{"space origin": np.zeros(3)})
    with pytest.raises(DataError, match=r"shifted\.nrrd.*do not share one grid"):
        check_mask(cases[0]["image"], str(shifted))


def test_spaces_of_nrrd(tmp_path: Path) -> None:
    ras = {"space": "right-anterior-superior", "space directions": AFFINE[:3, :3].T, "space origin": AFFINE[:3, 3]}
    np.testing.assert_allclose(read_header(write_nrrd(tmp_path / "ras.nrrd", **ras)).affine, AFFINE, atol=1e-6)
    plain = tmp_path / "plain.nrrd"
    nrrd.write(str(plain), VALUES, {"spacings": [0.5, 0.6, 0.7]}, index_order="F")
    np.testing.assert_allclose(np.diag(read_header(plain).affine), [-0.5, -0.6, 0.7, 1])
    nrrd.write(str(plain), VALUES, index_order="F")
    with pytest.raises(DataError, match="does not say the size of its voxels"):
        read_header(plain)
    channels = np.stack([VALUES, VALUES + 1])
    directions = np.vstack([np.full(3, np.nan), (LPS @ AFFINE)[:3, :3].T])
    several = write_nrrd(tmp_path / "several.nrrd", channels, **{"space directions": directions})
    values, affine = read_volume(several)
    np.testing.assert_array_equal(values, np.moveaxis(channels, 0, -1), "channels come last, as in NIfTI")
    np.testing.assert_allclose(affine, AFFINE, atol=1e-6)


def rewrite(path: Path, pattern: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert re.search(pattern, content)
    path.write_bytes(re.sub(pattern, new, content, count=1))
    return path


@pytest.mark.parametrize(
    ("pattern", "new", "words"),
    [
        (rb"sizes: .*", b"sizes: 60000 60000 60000", "more than the limit"),
        (rb"sizes: .*", b"sizes: 900 900 900", "cut short or damaged"),
        (rb"sizes: .*", b"sizes: -3 26 14", "correct its header"),
        (rb"type: .*", b"type: block", "save plain numbers"),
        (rb"encoding: .*", b"encoding: hex", "save it as raw or gzip"),
        (rb"encoding: .*", b"encoding: raw\nline skip: 3", "skips lines"),
        (rb"encoding: .*", b"encoding: raw\nbyte skip: 999999", "cut short or damaged"),
        (rb"space: .*", b"space: scanner-xyz", "lies in the space"),
        (rb"encoding: .*", b"encoding: raw\ndata file: ../../etc/passwd", "not in its folder"),
        (rb"encoding: .*", b"encoding: raw\ndata file: /etc/passwd", "not in its folder"),
        (rb"encoding: .*", b"encoding: raw\ndata file: a%03d.raw 1 3 1", "over several files"),
        (rb"NRRD000.", b"VRRD0005", "cannot be read as NRRD"),
    ],
)
def test_bad_nrrd(pattern: bytes, new: bytes, words: str, tmp_path: Path) -> None:
    path = rewrite(write_nrrd(tmp_path / "a.nrrd", encoding="raw"), pattern, new)
    with pytest.raises(DataError, match=words) as error:
        read_volume(path)
    assert "a.nrrd" in str(error.value)
    assert "\n" not in str(error.value)


def change(**fields: object) -> Callable[[list[pydicom.Dataset]], list[pydicom.Dataset]]:
    def apply(datasets: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
        for name, value in fields.items():
            setattr(datasets[4], name, value)
        return datasets

    return apply


def without_position(datasets: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    del datasets[4].ImagePositionPatient
    return datasets


def tilted(datasets: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    for index, each in enumerate(datasets):
        x, y, z = map(float, each.ImagePositionPatient)
        each.ImagePositionPatient = [x, y + 0.8 * index, z]
    return datasets


BAD_SERIES: dict[str, tuple[Callable[[list[pydicom.Dataset]], list[pydicom.Dataset]], str]] = {
    "missing slice": (lambda found: found[:5] + found[6:], "lacks slices: between .* there are 4 mm, elsewhere 2;"),
    "two at one place": (lambda found: [*found, *slices(EVEN, series=found[0].SeriesInstanceUID)[3:4]], "at one place"),
    "mixed orientations": (change(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "mixes orientations"),
    "mixed sizes": (change(Rows=25), "mixes slices of"),
    "no position": (without_position, "has no ImagePositionPatient"),
    "tilted": (tilted, "no regular stack"),
    "one slice": (lambda found: found[:1], "one slice"),
    "colours": (change(SamplesPerPixel=3), "holds colours"),
    "huge": (
        lambda found: [change(Rows=65535, Columns=65535)([each] * 5)[0] for each in found],
        "more than the limit",
    ),
}


@pytest.mark.parametrize("kind", BAD_SERIES)
def test_series_that_are_no_volume(kind: str, tmp_path: Path) -> None:
    make, words = BAD_SERIES[kind]
    write_series(tmp_path / "a", make(slices(EVEN)))
    with pytest.raises(DataError, match=words) as error:
        read_header(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)
    assert "\n" not in str(error.value)


def test_two_series_of_one_folder_are_two_volumes_and_patients_are_not_named(tmp_path: Path) -> None:
    first = slices(EVEN)
    second = slices(EVEN + 50)
    for number, each in enumerate([*first, *second]):
        (tmp_path / "a").mkdir(exist_ok=True)
        each.save_as(tmp_path / "a" / f"{number:03d}.dcm", enforce_file_format=True)
    (tmp_path / "a" / "README").write_text("no DICOM")
    found = volumes_in(tmp_path)
    assert [path.name for path in found] == ["000.dcm", f"{len(first):03d}.dcm"]
    np.testing.assert_array_equal(read_volume(found[1])[0], EVEN + 50)
    with pytest.raises(DataError, match="holds 2 DICOM series, not one"):
        read_header(tmp_path / "a")
    from common.data.listing.sources import read_source

    cases = read_source(tmp_path).cases
    assert len({case["subject"] for case in cases}) == 1
    assert "Doe" not in str(cases)
    assert {case["modality"] for case in cases} == {"MR"}
    assert len({case["name"] for case in cases}) == 2


def test_series_of_the_same_name_are_predicted_under_names_of_their_own(tmp_path: Path) -> None:
    for patient in ("1.2.3", "1.2.4"):
        write_series(tmp_path / patient / "T1.5")
    wanted = ["1.2.3_T1.5", "1.2.4_T1.5"]
    assert [case["name"] for case in image_list(str(tmp_path))] == wanted
    assert [case["name"] for case in every_image(str(tmp_path))] == wanted
    assert image_list(str(tmp_path / "1.2.3" / "T1.5"))[0]["name"] == "T1.5"


def enhanced(values: np.ndarray = EVEN) -> pydicom.Dataset:
    """Return one file of many frames."""
    planes = slices(values)
    one = slices(values)[0]
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedMRImageStorage
    one.NumberOfFrames = len(planes)
    one.PixelData = b"".join(each.PixelData for each in planes)
    shared, measures = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = one.PixelSpacing, 2.0
    orientation, rescale = pydicom.Dataset(), pydicom.Dataset()
    orientation.ImageOrientationPatient = one.ImageOrientationPatient
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 2, -100, "US"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    shared.PixelValueTransformationSequence = [rescale]
    one.SharedFunctionalGroupsSequence = [shared]
    one.PerFrameFunctionalGroupsSequence = []
    for each in planes:
        frame, place = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = each.ImagePositionPatient
        frame.PlanePositionSequence = [place]
        one.PerFrameFunctionalGroupsSequence.append(frame)
    for name in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(one, name)
    return one


@pytest.mark.parametrize("order", ["as they lie", "shuffled"])
def test_a_file_of_many_frames_is_read(order: str, tmp_path: Path) -> None:
    one = enhanced()
    if order == "shuffled":
        places = np.random.default_rng(0).permutation(len(one.PerFrameFunctionalGroupsSequence))
        frames = list(one.PerFrameFunctionalGroupsSequence)
        one.PerFrameFunctionalGroupsSequence = [frames[place] for place in places]
        pixels = np.frombuffer(one.PixelData, np.int16).reshape(len(frames), -1)
        one.PixelData = pixels[places].tobytes()
    path = write_series(tmp_path / "a", [one])
    values, affine = read_volume(path)
    np.testing.assert_array_equal(values, EVEN)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)
    assert read_header(path).bytes == (path / "IM0001").stat().st_size


def test_references_to_many_frames_are_no_hindrance(tmp_path: Path) -> None:
    one = enhanced()
    for frame in one.PerFrameFunctionalGroupsSequence:
        source, derivation = pydicom.Dataset(), pydicom.Dataset()
        source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = one.SOPClassUID, generate_uid()
        source.ReferencedFrameNumber = [1, 2, 3]
        derivation.SourceImageSequence, derivation.DerivationCodeSequence = [source], []
        frame.DerivationImageSequence = [derivation]
    path = write_series(tmp_path / "a", [one])
    np.testing.assert_array_equal(read_volume(path)[0], EVEN)


def test_frames_that_are_no_stack_are_told_by_the_scan(tmp_path: Path) -> None:
    one = enhanced()
    frames = one.PerFrameFunctionalGroupsSequence
    positions = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames]
    for position, words in (
        (
            positions[9],
            r"has two images at one place \(frame (4, frame 10|10, frame 4)\), such as echoes or time points",
        ),
        ([0, 0, 400], "lacks slices|no regular stack"),
        (None, "has no ImagePositionPatient for its frame 4, so its place is not known; convert it with dcm2niix"),
    ):
        frames[3].PlanePositionSequence[0].ImagePositionPatient = position
        path = write_series(tmp_path / "a", [one])
        told = survey([{"image": str(path)}]).problems
        assert re.search(words, told[0])
        with pytest.raises(DataError, match=words):
            read_volume(path)
    del one.PerFrameFunctionalGroupsSequence
    write_series(tmp_path / "a", [one])
    with pytest.raises(DataError, match="several frames and does not say where each lies; convert it with dcm2niix"):
        read_header(tmp_path / "a")


def touched(path: Path) -> None:
    """Change a file in place, so that its folder does not change."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.mark.parametrize("kind", ["folder", "file", "detached"])
def test_a_change_of_any_file_of_a_volume_is_noticed(kind: str, tmp_path: Path) -> None:
    if kind == "detached":
        path = write_nrrd(tmp_path / "a.nhdr", encoding="raw")
        other = tmp_path / "a.raw"
    else:
        path = write_series(tmp_path / "a")
        other = path / "IM0003"
        if kind == "file":
            path = path / "IM0001"
    assert other.is_file()
    store, case = VolumeStore(tmp_path / "store", StoreSettings()), {"image": str(path)}
    store.prepare([case])
    before = store.location(case)
    touched(other)
    assert store.location(case) != before
    assert store.get(case) is None
    duplicates = [case, {"image": str(write_volume(tmp_path / "b.nii.gz", VALUES))}]
    cache = tmp_path / "digests.json"
    Filters(duplicates=True).apply(duplicates, cache=cache)
    kept = set(json.loads(cache.read_text()))
    assert len(kept) == 2
    touched(other)
    Filters(duplicates=True).apply(duplicates, cache=cache)
    assert len(set(json.loads(cache.read_text())) - kept) == 1


def test_a_link_to_a_file_of_another_name_is_an_ordinary_file(tmp_path: Path) -> None:
    blob = write_volume(tmp_path / "blobs" / "x.nii.gz", blobs(0)[0])
    blob = blob.rename(tmp_path / "blobs" / "0123abc")
    (tmp_path / "a.nii.gz").symlink_to(blob)
    store, case = VolumeStore(tmp_path / "store", StoreSettings()), {"image": str(tmp_path / "a.nii.gz")}
    before = store.location(case)
    (tmp_path / "blobs" / "another").write_text("x")
    assert store.location(case) == before


BROKEN = bytes(128) + b"DICM" + b"\x01\x00\x02\x00zz"


def test_a_bad_file_beside_a_series_does_not_spoil_it(tmp_path: Path) -> None:
    path = write_series(tmp_path / "a")
    whole = read_volume(path)[0]
    (path / "other.dcm").write_bytes(BROKEN)
    (path / "notes").write_text("no DICOM")
    np.testing.assert_array_equal(read_volume(path)[0], whole)
    (path / "IM0005").write_bytes(BROKEN)
    with pytest.raises(DataError, match=r"series 't1 mprage': .*lacks slices: .*; beside it, .*IM0005 cannot be read"):
        read_header(path)
    for file in path.iterdir():
        file.write_bytes(BROKEN)
    with pytest.raises(DataError, match="cannot be read as DICOM"):
        read_header(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "cut in its header": (lambda file: file.write_bytes(file.read_bytes()[:300]), "cannot be read as DICOM"),
    "no DICOM": (lambda file: file.write_bytes(b"<html>not found</html>"), r"\(22 bytes\) is not DICOM"),
    "not fetched": (lambda file: (file.unlink(), file.symlink_to("nowhere")), "is a link that leads nowhere"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("slice_number", [1, 7, 14])
def test_a_damaged_slice_is_told_and_its_series_is_not_read_short(kind: str, slice_number: int, tmp_path: Path) -> None:
    path = write_series(tmp_path / "a")
    write_series(tmp_path / "b")
    damage, words = DAMAGE[kind]
    file = path / f"IM{slice_number:04d}"
    damage(file)
    left_out = LeftOut()
    assert [each for each, _ in volumes_below(tmp_path, left_out)] == [path, tmp_path / "b"]
    assert len(left_out) == 1
    assert re.match(rf"{re.escape(str(file))} {words}.*restore it or leave it out", left_out.told()[0])
    found = survey([{"image": str(path)}, {"image": str(tmp_path / "b")}])
    assert list(found.problems) == [0]
    where = "lacks slices" if slice_number == 7 else "may lack a slice"
    for look in (read_header, read_volume):
        with pytest.raises(DataError, match=rf"series 't1 mprage'.*{where}: .*{re.escape(str(file))} {words}"):
            look(path)
    file.rename(tmp_path / "elsewhere") if file.exists() else file.unlink()
    if slice_number != 7:
        assert read_header(path).shape == (22, 26, 13), "what a user takes away is the user's decision"


def test_a_damaged_file_among_many_series_spoils_those_beside_it_only(tmp_path: Path) -> None:
    for number in range(3):
        for index, each in enumerate(slices(EVEN)):
            each.save_as(tmp_path / f"{number * 14 + index}.dcm", enforce_file_format=True)
    (tmp_path / "15.dcm").write_bytes(b"")
    files = [tmp_path / f"{number}.dcm" for number in (0, 14, 28)]
    assert volumes_in(tmp_path) == sorted(files)
    found = survey([{"image": str(file)} for file in files])
    assert list(found.problems) == [1]
    for row, first in ((0, 0), (2, 28)):
        own = sum((tmp_path / f"{index}.dcm").stat().st_size for index in range(first, first + 14))
        assert found.bytes[row] == own, "of the series' own files"


def test_slices_that_hold_fewer_pixels_than_they_claim_are_told_by_the_scan(tmp_path: Path) -> None:
    path = write_series(tmp_path / "a")
    file = path / "IM0004"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(
        DataError, match=r"IM0004 \([\d,]+ bytes\) is cut short: .* 26 x 22 pixels, 1,144 bytes; copy it"
    ):
        read_header(path)


def test_slices_without_a_preamble_are_read(tmp_path: Path) -> None:
    path = write_series(tmp_path / "a")
    whole = read_volume(path)
    for number, file in enumerate(sorted(path.iterdir())):
        dataset = pydicom.dcmread(file)
        if number % 2:
            file.write_bytes(file.read_bytes()[132:])  # the meta group is left
        else:
            dataset.preamble = None
            del dataset.file_meta
            pydicom.dcmwrite(file, dataset, implicit_vr=bool(number % 4), little_endian=True)
            assert file.read_bytes()[:2] == b"\x08\x00"
    assert volumes_in(tmp_path) == [path]
    for got, wanted in zip(read_volume(path), whole, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_every_second_slice_is_not_a_series(tmp_path: Path) -> None:
    datasets = slices(EVEN)
    for number, each in enumerate(datasets):
        each.SpacingBetweenSlices, each.InstanceNumber, each.ImagesInAcquisition = 2, number + 1, len(datasets)
    half = write_series(tmp_path / "half", datasets[::2])
    with pytest.raises(
        DataError, match="lacks slices: they lie 4 mm apart and say 2, and their numbers go by 2; copy it"
    ):
        read_header(half)
    assert len(read_header(write_series(tmp_path / "whole", datasets)).notes) == 1, "left-handed, as it is"
    rest = read_header(write_series(tmp_path / "rest", datasets[3:]))
    assert rest.shape == (22, 26, 11)
    assert rest.notes[:2] == (
        "its slices are numbered from 4; some may be missing in front",
        "its acquisition has 14 images and 11 are here; some may be missing",
    )


def test_an_index_is_no_broken_image_and_other_objects_are_named(tmp_path: Path) -> None:
    shutil.copytree(write_series(tmp_path / "a"), tmp_path / "b" / "SE1")
    samples = Path(get_testdata_file("rtstruct.dcm")).parent
    shutil.copy(samples / "dicomdirtests" / "DICOMDIR", tmp_path / "b" / "DICOMDIR")
    shutil.copy(samples / "dicomdirtests" / "DICOMDIR", tmp_path / "a" / "DICOMDIR")
    left_out = LeftOut()
    assert len(volumes_below(tmp_path, left_out)) == 2
    assert len(left_out) == 0
    assert read_header(tmp_path / "a").shape == (22, 26, 14)
    shutil.copy(samples / "rtstruct.dcm", tmp_path / "a" / "structures.dcm")
    assert len(volumes_below(tmp_path, left_out)) == 2
    assert left_out.told() == [
        f"{tmp_path / 'a' / 'structures.dcm'} is DICOM without an image (RT Structure Set Storage) and is left out"
    ]
    assert read_header(tmp_path / "a").shape == (22, 26, 14)


def test_remarks_of_libraries_do_not_leak(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = slices(EVEN, series="1.02.3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write_series(tmp_path / "a", datasets)
    recwarn.clear()
    caplog.clear()
    volumes_below(tmp_path, LeftOut())
    np.testing.assert_array_equal(read_volume(path)[0], EVEN)
    assert not [each for each in recwarn if "pydicom" in str(each.filename)]
    assert not caplog.records


@pytest.mark.parametrize("name", ["IM0000", "pipe.nii", "pipe.nrrd", "pipe.mgz"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    path = write_series(tmp_path / "a")
    os.mkfifo(path / name)
    assert path in [*volumes_in(tmp_path), *(file.parent for file in volumes_in(tmp_path))]
    with pytest.raises(DataError, match="is a pipe, socket or device"):
        read_header(path / name)
    (path / "dangling").symlink_to(tmp_path / "nothing")
    found = survey([{"image": str(path)}])
    assert not found.problems
    assert found.bytes[0] > 0


def test_the_readers_that_monai_makes_besides_are_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("monai.data.nvimgcodec_pydicom_plugin")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    LoadImaged("image")
    assert "nvImageCodec" in caplog.text
    caplog.clear()
    load_volumes("image")
    assert not caplog.text


def test_pixels_that_cannot_be_read_end_in_a_sentence(tmp_path: Path) -> None:
    datasets = slices(EVEN)
    datasets[3].file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
    datasets[3].PixelData = encapsulate([datasets[3].PixelData[:100]])
    path = write_series(tmp_path / "a", datasets)
    read_header(path)
    with pytest.raises(DataError, match=r"the pixels of .* cannot be read"):
        read_volume(path)


def test_headers_are_judged_before_anything_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_volume(tmp_path / "a.nii.gz", blobs(0)[0])
    raw = bytearray(gzip.decompress(path.read_bytes()))
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("allocated"))
    for dims, words in (
        ([3, 30000, 30000, 30000, 1, 1, 1, 1], "more than the limit"),
        ([3, 1200, 1200, 1200, 1, 1, 1, 1], "cut short or damaged"),
        ([3, -4, 28, 26, 1, 1, 1, 1], "correct its header"),
        ([9, 4, 28, 26, 1, 1, 1, 1], "cannot be read as NIfTI"),
    ):
        raw[40:56] = np.array(dims, "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
        with pytest.raises(DataError, match=words):
            read_header(path)


def test_a_bomb_is_unpacked_to_a_limit_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    path = write_volume(tmp_path / "a.nii.gz", small)
    head, _, packed = write_nrrd(tmp_path / "b.nrrd", small, encoding="gzip").read_bytes().partition(b"\n\n")
    whole, data = gzip.decompress(path.read_bytes()), gzip.decompress(packed)
    unpacked = 0
    read = gzip.GzipFile.read

    def counting(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal unpacked
        content = read(self, size)
        unpacked += len(content)
        return content

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    monkeypatch.setattr(unpacking, "_MOST_BEHIND", 2**21)
    for behind in (2**20, 2**26):
        path.write_bytes(gzip.compress(whole + bytes(behind)))
        (tmp_path / "b.nrrd").write_bytes(head + b"\n\n" + gzip.compress(data + bytes(behind)))
        (tmp_path / "c.nii.bz2").write_bytes(bz2.compress(whole + bytes(behind)))
        for file in sorted(tmp_path.iterdir()):
            if behind < 2**21:
                np.testing.assert_array_equal(read_volume(file)[0], small)
                continue
            unpacked = 0
            with pytest.raises(
                DataError, match=r"holds more than 2,097,152 bytes behind the 240 that its header claims"
            ):
                read_volume(file)
            assert unpacked < 2**21 + 2**16
