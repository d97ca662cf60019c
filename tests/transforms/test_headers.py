# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What headers of NIfTI, NRRD and MGH files say means what their standards say."""

from __future__ import annotations

import bz2
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest

from common.data import StoreSettings, VolumeStore
from common.data.checking.checks import check_case, check_header
from common.errors import DataError
from common.transforms import FileKind, file_kind, files_behind, read_header, read_volume, volume_preprocessing
from common.transforms.writing import header_like
from tools.preparing.scanning import scan
from tools.preparing.settings import Scan

VOXELS = (np.arange(4 * 5 * 6) % 200).reshape(4, 5, 6)
TURNED = np.array([[0, -1.5, 0, 10], [1, 0, 0, -20], [0, 0, 2, 30], [0, 0, 0, 1.0]])
KINDS = {
    "NIfTI-1": (nib.Nifti1Header, ".nii"),
    "NIfTI-2": (nib.Nifti2Header, ".nii"),
    "NIfTI-1, gzip": (nib.Nifti1Header, ".nii.gz"),
    "NIfTI-2, bzip2": (nib.Nifti2Header, ".nii.bz2"),
    "pair of NIfTI-1": (nib.Nifti1Pair.header_class, ".img"),
    "pair of NIfTI-2, gzip": (nib.Nifti2Pair.header_class, ".img.gz"),
}


def write_nifti(
    path: Path,
    voxels: np.ndarray,
    kind: Any = nib.Nifti1Header,
    *,
    qform: np.ndarray | None = None,
    sform: np.ndarray | None = None,
    codes: tuple[int, int] = (1, 1),
    **fields: Any,
) -> Path:
    """Write a header as it is, with nothing made better."""
    path.parent.mkdir(exist_ok=True)
    header = kind()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header["pixdim"][1:4] = 1
    if qform is not None:
        header.set_qform(qform, code=codes[0], strip_shears=True)
    if sform is not None:
        header.set_sform(sform, code=codes[1])
        if qform is None:
            header["pixdim"][1:4] = np.linalg.norm(sform[:3, :3], axis=0)
    header["vox_offset"] = 0 if ".img" in path.name else kind.single_vox_offset
    for name, value in fields.items():
        header[name] = value
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    content = voxels.tobytes(order="F")
    if ".img" in path.name:
        path.with_name(path.name.replace(".img", ".hdr")).write_bytes(pack(header.binaryblock))
        path.write_bytes(pack(content))
    else:
        path.write_bytes(pack(header.binaryblock + bytes(4) + content))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, ">i2"])
def test_a_slope_of_0_nan_or_infinity_means_not_scaled(kind: str, dtype: Any, tmp_path: Path) -> None:
    header, ending = KINDS[kind]
    voxels = VOXELS.astype(dtype)
    if not np.dtype(dtype).isnative:

        class Swapped(header):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                super().__init__(endianness=">")

        header = Swapped
    for slope, inter in ((0, 0), (np.nan, np.nan), (np.inf, 0), (-np.inf, 3), (0, 7), (np.nan, 0)):
        path = write_nifti(tmp_path / f"a{ending}", voxels, header, qform=TURNED, scl_slope=slope, scl_inter=inter)
        values, affine = read_volume(path)
        np.testing.assert_array_equal(values, VOXELS)
        assert values.dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_allclose(affine, TURNED, atol=1e-5)
        assert any("SimpleITK adds the intercept" in note for note in read_header(path).notes) == (inter in (3, 7))
    path = write_nifti(tmp_path / f"a{ending}", voxels, header, qform=TURNED, scl_slope=-2, scl_inter=7)
    np.testing.assert_array_equal(read_volume(path)[0], 7 - 2.0 * VOXELS)
    for inter in (np.nan, np.inf):
        write_nifti(path, voxels, header, scl_slope=2, scl_inter=inter)
        with pytest.raises(DataError, match=rf"a\.\w.* has the slope 2 and the intercept {inter} .*correct its header"):
            read_header(path)


def test_an_unscaled_file_is_prepared_and_checked(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(200, 1700, (12, 10, 8)).astype(np.int16)
    path = write_nifti(tmp_path / "a.nii.gz", voxels, qform=np.eye(4), scl_slope=0, scl_inter=9)
    mask = write_nifti(
        tmp_path / "mask.img",
        (voxels > 800).astype(np.uint8),
        nib.Nifti1Pair.header_class,
        qform=np.eye(4),
        scl_slope=np.nan,
    )
    check_case({"image": str(path)})
    prepared = volume_preprocessing(["image", "label"], normalization="none")({"image": str(path), "label": str(mask)})
    np.testing.assert_array_equal(prepared["image"][0].numpy(), voxels.T)
    np.testing.assert_array_equal(prepared["label"][0].numpy(), voxels.T > 800)
    stored = VolumeStore(tmp_path / "store", StoreSettings(dtype="float32")).prepare_one({"image": str(path)})
    np.testing.assert_allclose(stored.read((0, 0, 0), stored.shape), (voxels.T - voxels.mean()) / voxels.std(), 1e-4)


@pytest.mark.parametrize(("code", "scale"), [(0, 1), (1, 1e3), (2, 1), (3, 1e-3), (3 + 8, 1e-3), (8, 1)])
def test_units_of_nifti_become_millimetres(code: int, scale: float, tmp_path: Path) -> None:
    in_mm = TURNED.copy()
    stored = TURNED / scale
    stored[3, 3] = 1
    for place in ("qform", "sform"):
        path = write_nifti(tmp_path / "a.nii", VOXELS.astype(np.int16), **{place: stored}, xyzt_units=code)
        header = read_header(path)
        np.testing.assert_allclose(header.affine, in_mm, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(header.spacing_mm, [1, 1.5, 2], rtol=1e-5)
        assert any("converted to millimetres" in note for note in header.notes) == (scale != 1)
        np.testing.assert_allclose(read_volume(path)[1], in_mm, rtol=1e-5, atol=1e-6)
        written = header_like(path, (4, 5, 6), np.uint8)
        assert written["xyzt_units"] == code, "a prediction keeps the file's own geometry"
        np.testing.assert_allclose(written.get_best_affine(), stored, rtol=1e-5, atol=1e-6 / scale)


def test_units_that_cannot_be_are_named(tmp_path: Path) -> None:
    for code in (4, 5, 6, 7):
        path = write_nifti(tmp_path / "a.nii", VOXELS.astype(np.int16), qform=np.eye(4), xyzt_units=code)
        with pytest.raises(DataError, match=rf"a\.nii says in xyzt_units that its unit of length is {code}.*correct"):
            read_header(path)
    path = write_nifti(tmp_path / "a.nii", VOXELS.astype(np.int16), qform=np.eye(4), xyzt_units=1)
    with pytest.raises(DataError, match=r"1 x 1 x 1 m, which is 1000 x 1000 x 1000 mm; .* correct the unit"):
        read_volume(path)
    path = write_nifti(tmp_path / "a.nii", VOXELS.astype(np.int16), qform=np.eye(4), pixdim=[1, 1, 0, 1, 0, 0, 0, 0])
    with pytest.raises(DataError, match="says its voxels are 1 x 0 x 1 unknown unit; correct its header"):
        read_volume(path)


def write_nrrd(path: Path, voxels: np.ndarray, **fields: Any) -> Path:
    header = {"space": "left-posterior-superior", "space directions": np.diag([1, 2, 3]), "space origin": [4, 5, 6]}
    header |= fields
    nrrd.write(str(path), voxels, {key: value for key, value in header.items() if value is not None}, index_order="F")
    return path


@pytest.mark.parametrize(
    ("units", "scale"),
    [
        (["mm"] * 3, (1, 1, 1)),
        (["um"] * 3, (1e-3, 1e-3, 1e-3)),
        (["micrometer", "Microns", "µm"], (1e-3, 1e-3, 1e-3)),
        (["cm", "mm", "cm"], (10, 1, 10)),
        (["m"] * 3, (1e3, 1e3, 1e3)),
        (["", "???", "mm"], (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
def test_units_of_nrrd_become_millimetres(
    units: list[str], scale: tuple[float, ...], coding: str, tmp_path: Path
) -> None:
    directions, origin = np.diag([0.5, 2, 3]) / np.array(scale), np.array([4, 5, 6]) / np.array(scale)
    path = write_nrrd(
        tmp_path / "a.nrrd", VOXELS.astype(np.int16), **{"space directions": directions.T, "space origin": origin}
    )
    said = " ".join(f'"{unit}"' for unit in units)
    path.write_bytes(
        path.read_bytes().replace(b"space origin", f"space units: {said}\n".encode(coding) + b"space origin", 1)
    )
    wanted = np.diag([-0.5, -2, 3, 1.0])
    wanted[:3, 3] = -4, -5, 6
    np.testing.assert_allclose(read_header(path).affine, wanted, rtol=1e-9)
    assert any("converted to millimetres" in note for note in read_header(path).notes) == (set(scale) != {1})
    np.testing.assert_array_equal(read_volume(path)[0], VOXELS)
    plain = {"space": None, "space directions": None, "space origin": None}
    path = write_nrrd(tmp_path / "b.nrrd", VOXELS.astype(np.int16), spacings=[0.5, 2, 3] / np.array(scale), **plain)
    path.write_bytes(path.read_bytes().replace(b"spacings", f"units: {said}\n".encode(coding) + b"spacings", 1))
    np.testing.assert_allclose(read_header(path).spacing_mm, [0.5, 2, 3], rtol=1e-9)


def test_an_unknown_unit_of_nrrd_is_named(tmp_path: Path) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", VOXELS.astype(np.int16), **{"space units": ["mm", "parsec", "mm"]})
    with pytest.raises(
        DataError, match=r"a\.nrrd says in space units that its unit of length is 'parsec'.*save it in mm"
    ):
        read_header(path)
    path = write_nrrd(tmp_path / "a.nrrd", VOXELS.astype(np.int16), **{"space units": ["m"] * 3})
    with pytest.raises(DataError, match=r"1 x 2 x 3 m, which is 1000 x 2000 x 3000 mm; .* correct the unit"):
        read_header(path)


@pytest.mark.parametrize("behind", [(1,), (1, 1), (1, 1, 1, 1)])
def test_axes_of_length_1_behind_the_third_are_none(behind: tuple[int, ...], tmp_path: Path) -> None:
    image = VOXELS.astype(np.float32)
    nifti = write_nifti(tmp_path / "a.nii.gz", image.reshape(image.shape + behind), sform=TURNED)
    several = write_nrrd(
        tmp_path / "b.nrrd",
        image.reshape(behind + image.shape),
        **{"space directions": np.vstack([*[np.full(3, np.nan)] * len(behind), np.diag([1, 2, 3])])},
    )
    last = write_nrrd(
        tmp_path / "c.nrrd",
        image.reshape(image.shape + behind),
        **{
            "space": None,
            "space origin": None,
            "space directions": None,
            "spacings": [1, 2, 3] + [np.nan] * len(behind),
        },
    )
    for path in (nifti, several, last):
        assert check_header(str(path)).shape == image.shape
        np.testing.assert_array_equal(read_volume(path)[0], image)
        check_case({"image": str(path), "label": str(path)})
    assert header_like(nifti, image.shape, np.uint8).get_data_shape() == image.shape


def test_more_dimensions_than_three_are_refused_with_how_to_split(tmp_path: Path) -> None:
    for shape, dims in (((4, 5, 6, 2), 4), ((4, 5, 6, 1, 2), 4), ((4, 5, 6, 2, 3), 5)):
        path = write_nifti(tmp_path / "a.nii", np.zeros(shape, np.uint8), sform=TURNED)
        with pytest.raises(
            DataError, match=rf"has {dims} dimensions .*; save one 3-D volume per file, such as with nib"
        ):
            check_header(str(path))
    path = write_nifti(tmp_path / "a.nii", np.zeros((2, 2, 2, 2), np.uint8), sform=TURNED)
    for dim in ([4, 256, 256, 200, 600, 1, 1, 1], [5, 100, 100, 100, 1, 3000, 1, 1]):
        content = bytearray(path.read_bytes())
        content[40:56] = np.array(dim, "<i2").tobytes()
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"dimensions .*; save one 3-D volume per file"):
            read_header(path)
    vector = write_nifti(tmp_path / "b.nii", np.zeros((4, 5, 6, 1, 3), np.uint8), sform=TURNED)
    assert check_header(str(vector), channels=3).shape == (4, 5, 6, 3)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ((0.6, 0.8000003, 0.0), [[-0.28, 0.96, 0], [0.96, 0.28, 0], [0, 0, -1]]),
        ((0.0, 0.70710695, 0.70710695), [[-1, 0, 0], [0, 0, 1], [0, 1, 0]]),
        ((1.000004, 0.0, 0.0), [[1, 0, 0], [0, -1, 0], [0, 0, -1]]),
        ((0.0, 0.0, 0.0), np.eye(3).tolist()),
    ],
)
def test_quaternions_that_rounding_made_too_long(parts: tuple[float, ...], wanted: list[Any], tmp_path: Path) -> None:
    fields = dict(zip(("quatern_b", "quatern_c", "quatern_d"), parts, strict=True))
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        path = write_nifti(tmp_path / "a.nii", VOXELS.astype(np.uint8), kind, qform_code=1, **fields)
        np.testing.assert_allclose(read_header(path).affine[:3, :3], wanted, atol=1e-5)
        np.testing.assert_allclose(header_like(path, (4, 5, 6), np.uint8).get_best_affine()[:3, :3], wanted, atol=1e-5)
    fields = {"quatern_b": 0.6, "quatern_c": 0.81}
    path = write_nifti(tmp_path / "a.nii", VOXELS.astype(np.uint8), qform_code=1, **fields)
    with pytest.raises(DataError, match=r"a\.nii has a qform that is no rotation .*; correct its header"):
        read_header(path)
    path = write_nifti(tmp_path / "a.nii", VOXELS.astype(np.uint8), sform=TURNED, qform_code=1, **fields)
    np.testing.assert_allclose(read_header(path).affine, TURNED, atol=1e-5)


SHIFTED = TURNED + np.array([[0, 0, 0, 3.0], [0, 0, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0]])
SHEARED = TURNED @ np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
LEFT = np.diag([-1.0, 1, 1, 1])


@pytest.mark.parametrize(
    ("fields", "affine", "words"),
    [
        ({"qform": TURNED, "sform": TURNED}, TURNED, []),
        ({"qform": TURNED}, TURNED, []),
        (
            {"qform": SHIFTED, "sform": TURNED, "codes": (1, 2)},
            TURNED,
            ["5 mm apart; the sform is used.*uses the qform"],
        ),
        (
            {"qform": SHIFTED, "sform": TURNED, "codes": (2, 1)},
            TURNED,
            ["5 mm apart; the sform is used.*uses the sform"],
        ),
        ({"qform": SHIFTED, "sform": TURNED, "codes": (1, 0)}, SHIFTED, []),
        ({}, np.array([[-1, 0, 0, 1.5], [0, 1, 0, -2], [0, 0, 1, -2.5], [0, 0, 0, 1]]), ["no code says.*second axis"]),
        ({"sform": SHEARED}, SHEARED, ["3.8 degrees off right angles.*SimpleITK refuses the file"]),
        ({"qform": TURNED, "sform": SHEARED}, SHEARED, ["3.8 degrees off.*SimpleITK takes the qform", "0.4 mm apart"]),
        ({"qform": LEFT}, LEFT, ["left-handed"]),
        (
            {"sform": LEFT, "pixdim": [1, 1, 3, 1, 0, 0, 0, 0]},
            LEFT,
            ["left-handed", "1 x 1 x 1 mm and its pixdim 1 x 3 x 1"],
        ),
        ({"qform": np.eye(4), "pixdim": [1, -1, 1, 1, 0, 0, 0, 0]}, np.eye(4), ["-1 x 1 x 1 .*turns that axis round"]),
    ],
)
def test_where_readers_place_a_file_differently_is_noted(
    fields: dict[str, Any], affine: np.ndarray, words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_nifti(tmp_path / "a.nii", VOXELS.astype(np.uint8), **fields)
    header = read_header(path)
    np.testing.assert_allclose(header.affine, affine, atol=1e-5)
    found = [next((note for note in header.notes if re.search(word, note)), None) for word in words]
    assert None not in found, header.notes
    assert len(header.notes) == len(words), header.notes
    assert not caplog.records, "nibabel's remarks do not leak"


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_what_a_file_is_packed_with_is_told_by_its_content(name: str, pack: Any, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "plain.nii", VOXELS.astype(np.int16), sform=TURNED)
    (tmp_path / name).write_bytes(pack(path.read_bytes()))
    np.testing.assert_array_equal(read_volume(tmp_path / name)[0], VOXELS)


def test_a_pair_is_one_volume_by_either_name(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "a.img", VOXELS.astype(np.int16), nib.Nifti1Pair.header_class, sform=TURNED)
    header = tmp_path / "a.hdr"
    for path, other in ((image, header), (header, image)):
        np.testing.assert_array_equal(read_volume(path)[0], VOXELS)
        assert files_behind(str(path)) == [str(other)]
    assert file_kind(image) == FileKind("NIfTI")
    assert file_kind(header) is None, "it is no volume of its own"
    written = header_like(image, (4, 5, 6), np.uint8)
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), written.get_best_affine(), written), tmp_path / "b.nii")
    np.testing.assert_allclose(read_header(tmp_path / "b.nii").affine, TURNED, atol=1e-5)
    header.rename(tmp_path / "A.HDR")
    with pytest.raises(DataError, match=r"a\.img is one of a pair, and there is no \.hdr file of its name beside it"):
        read_header(image)
    assert file_kind(image) == FileKind("image without header", "put its .hdr beside it")
    image.rename(tmp_path / "A.IMG")
    np.testing.assert_array_equal(read_volume(tmp_path / "A.IMG")[0], VOXELS)
    nib.save(nib.Spm99AnalyzeImage(VOXELS.astype(np.int16), np.diag([-1, 1, 1, 1])), tmp_path / "old.img")
    for name in ("old.img", "old.hdr"):
        with pytest.raises(
            DataError, match=r"is Analyze 7.5, which does not say which side is left; convert it to NIfTI"
        ):
            read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.mha", "MetaImage, .*SimpleITK.WriteImage"),
        ("a.mhd", "MetaImage, .*SimpleITK.WriteImage"),
        ("a.nii.zst", "NIfTI packed with zstd, .*unpack it with zstd -d"),
        ("a.mnc", "MINC, .*mnc2nii"),
        ("a.PAR", "Philips PAR/REC, .*dcm2niix"),
        ("a+orig.HEAD", "AFNI, .*3dAFNItoNIFTI"),
        ("a.txt", "is none of .nii.gz, .*; convert it or leave it out"),
    ],
)
def test_formats_that_are_not_read_are_named_with_how_to_convert(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd" * 100)
    with pytest.raises(DataError, match=rf"{re.escape(name)} \(400 bytes\) is.* {words}|{words}"):
        read_volume(tmp_path / name)
    kind = file_kind(tmp_path / name)
    assert (kind is None) == (name == "a.txt")
    assert kind is None or kind.remedy
    (tmp_path / "b.nii").write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(DataError, match=r"is packed with zstd; unpack it first: zstd -d b.nii"):
        read_volume(tmp_path / "b.nii")


def packed_files(folder: Path) -> list[Path]:
    """Write a volume in every packed form."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(16, 14, 12)).astype(np.float32)
    whole = write_nifti(folder / "a.nii", image, sform=TURNED).read_bytes()
    members = folder / "members.nii.gz"
    members.write_bytes(b"".join(gzip.compress(whole[at : at + 2500]) for at in range(0, len(whole), 2500)))
    (folder / "a.nii").rename(folder / "whole")
    nib.save(nib.MGHImage(image, TURNED), folder / "a.mgz")
    detached = write_nrrd(folder / "d.nhdr", image, encoding="gzip")
    assert detached.is_file()
    return [
        write_nifti(folder / "a.nii.gz", image, sform=TURNED),
        write_nifti(folder / "b.nii.bz2", image, sform=TURNED),
        write_nifti(folder / "c.img.gz", image, nib.Nifti1Pair.header_class, sform=TURNED),
        members,
        folder / "a.mgz",
        write_nrrd(folder / "e.nrrd", image, encoding="gzip"),
        write_nrrd(folder / "f.nrrd", image, encoding="bzip2"),
        folder / "d.raw.gz",
    ]


def test_no_flipped_bit_and_no_cut_of_a_packed_file_passes(tmp_path: Path) -> None:
    draw, silent, harmless, told = random.Random(1), [], 0, 0
    for path in packed_files(tmp_path):
        whole = path.read_bytes()
        volume = tmp_path / "d.nhdr" if path.name == "d.raw.gz" else path
        truth = read_volume(volume)[0]
        start = whole.index(b"\n\n") + 2 if path.suffix == ".nrrd" else 0
        for number in range(60):
            content = bytearray(whole)
            if number < 50:
                content[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
            else:
                del content[draw.randrange(start, len(content)) :]
            path.write_bytes(content)
            try:
                same = np.array_equal(read_volume(volume)[0], truth)
            except DataError as error:
                told += str(volume.parent) in str(error)
                continue
            harmless += same  # the name, time and system that gzip notes in front
            silent += [] if same else [path.name]
        path.write_bytes(whole)
    assert not silent
    assert told > 440
    assert harmless + told == 480


def test_scan_names_each_file_that_other_programs_read_differently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voxels = (np.arange(20 * 18 * 16) % 200).reshape(20, 18, 16).astype(np.uint8)
    for name, fields in {
        "plain": {"sform": TURNED},
        "two": {"qform": SHIFTED, "sform": TURNED, "codes": (1, 2)},
        "three": {"qform": SHIFTED @ np.diag([1, 1, -1, 1]), "sform": TURNED, "codes": (1, 2)},
        "none": {},
        "micron": {"sform": TURNED * [[1000], [1000], [1000], [1]], "xyzt_units": 3},
    }.items():
        write_nifti(tmp_path / "data" / f"{name}.nii", voxels, **fields)
    scan(Scan(str(tmp_path / "data"), output=str(tmp_path / "out")))
    told = capsys.readouterr().out
    assert "4 volume(s) are read differently by other programs; nothing is left out:" in told
    assert re.search(
        r"2 x .*data/three.nii: its qform .* mm apart; the sform is used, as in nibabel, and SimpleITK", told
    )
    noted = json.loads((tmp_path / "out" / "scan.json").read_text())["notes"]
    assert [Path(entry["image"]).stem for entry in noted] == ["micron", "none", "three", "two"]
    assert all(entry["notes"] for entry in noted)
