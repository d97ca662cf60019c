# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Whatever a file or an index holds, reading it ends in voxels or cases, or in a sentence."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.data import pretraining_lists
from common.data.cases import subject_of
from common.data.checking.checks import check_header, read_image
from common.data.listing.sources import detect, read_source
from common.data.listing.sources.base import below
from common.errors import DataError
from common.transforms import read_volume

from .test_formats import EVEN, write_mgh, write_nrrd, write_series

pytestmark = pytest.mark.long
quick = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
SMALL = EVEN[:5, :6, :4]


def sample(kind: str) -> dict[str, bytes]:
    """Return the files of a small volume by name, the first of them to be read."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        if kind in ("nii", "nii.gz"):
            nib.save(nib.Nifti1Image(SMALL, np.diag([1, 2, 3, 1.0])), here / f"a.{kind}")
        elif kind == "nifti2":
            nib.save(nib.Nifti2Image(SMALL, np.eye(4)), here / "a.nii")
        elif kind in ("mgh", "mgz"):
            write_mgh(here / f"a.{kind}", SMALL)
        elif kind == "dicom":
            write_series(here, None)
        else:
            write_nrrd(here / f"a.{kind}", SMALL, encoding="gzip")
        return {path.name: path.read_bytes() for path in sorted(here.iterdir())}


SAMPLES = {kind: sample(kind) for kind in ("nii", "nii.gz", "nifti2", "mgh", "mgz", "nrrd", "nhdr", "dicom")}
HEADERS = {"nii": 352, "nii.gz": 352, "nifti2": 544, "mgh": 284, "mgz": 284, "nrrd": 300, "nhdr": 300, "dicom": 1000}


@contextmanager
def written(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def refusal(function: Callable[[], object]) -> str | None:
    """Return the sentence that a call ends in, if it does."""
    try:
        function()
    except DataError as error:
        return str(error)
    return None


def read_or_refuse(path: Path) -> None:
    for function in (check_header, read_image, read_volume):
        told = refusal(lambda function=function: function(str(path)))  # type: ignore[misc]
        assert told is None or ("\n" not in told and str(path.parent) in told)


edits = st.lists(st.tuples(st.integers(0, 1000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", SAMPLES)
@quick
@given(edits=edits, cut=st.none() | st.integers(0, 2000))
def test_changed_bytes(kind: str, edits: list[tuple[int, bytes]], cut: int | None) -> None:
    files = dict(SAMPLES[kind])
    name = next(name for name in files if name.endswith(("hdr", "nii", "gz", "mgh", "mgz", "nrrd")) or kind == "dicom")
    packed = name.endswith(("gz", "mgz"))
    content = bytearray(gzip.decompress(files[name]) if packed else files[name])
    for place, new in edits:
        at = place % HEADERS[kind]
        content[at : at + len(new)] = new
    files[name] = (gzip.compress(bytes(content), 1) if packed else bytes(content))[:cut]
    with written(files) as folder:
        read_or_refuse(folder / name)


numbers = st.one_of(
    st.sampled_from([0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")]), st.floats(-300, 300, width=32)
)


@quick
@given(
    dims=st.lists(st.integers(-(2**15), 2**15 - 1) | st.integers(1, 6), min_size=8, max_size=8),
    spacing=st.lists(numbers, min_size=8, max_size=8),
    srow=st.lists(numbers, min_size=12, max_size=12),
    quaternion=st.lists(numbers, min_size=6, max_size=6),
    codes=st.tuples(st.integers(-2, 6), st.integers(-2, 6)),
    datatype=st.integers(-1, 2400) | st.sampled_from([2, 4, 8, 16, 64, 128, 256, 512, 1024, 1536]),
    offset=numbers,
    scale=st.tuples(numbers, numbers),
)
def test_nifti_headers(
    dims: list[int],
    spacing: list[float],
    srow: list[float],
    quaternion: list[float],
    codes: tuple[int, int],
    datatype: int,
    offset: float,
    scale: tuple[float, float],
) -> None:
    raw = bytearray(SAMPLES["nii"]["a.nii"])
    raw[40:56] = np.array(dims, "<i2").tobytes()
    raw[70:72] = np.array(datatype, "<i2").tobytes()
    raw[76:108] = np.array(spacing, "<f4").tobytes()
    raw[108:120] = np.array([offset, *scale], "<f4").tobytes()
    raw[252:328] = np.array(codes, "<i2").tobytes() + np.array([*quaternion, *srow], "<f4").tobytes()
    with written({"a.nii": bytes(raw)}) as folder:
        read_or_refuse(folder / "a.nii")
        try:
            header = check_header(str(folder / "a.nii"))
        except DataError:
            return
    assert np.isfinite(header.affine).all(), "what passes has a place in space"
    assert min(header.shape) >= 2
    assert len(header.shape) == 3


NRRD_FIELDS = (
    "type",
    "dimension",
    "sizes",
    "space directions",
    "space origin",
    "encoding",
    "endian",
    "byte skip",
    "kinds",
)


@quick
@given(
    field=st.sampled_from(NRRD_FIELDS),
    value=st.text(st.characters(codec="ascii", exclude_characters="\n\r"), max_size=30)
    | st.lists(st.integers(-(10**12), 10**12), max_size=5).map(lambda each: " ".join(map(str, each)))
    | st.lists(numbers, max_size=9).map(lambda each: " ".join(f"({v},{v},0)" for v in each)),
)
def test_nrrd_fields(field: str, value: str) -> None:
    head, _, rest = SAMPLES["nrrd"]["a.nrrd"].partition(b"\n\n")
    lines = [line for line in head.split(b"\n") if not line.startswith(field.encode() + b":")]
    lines.append(f"{field}: {value}".encode())
    with written({"a.nrrd": b"\n".join(lines) + b"\n\n" + rest}) as folder:
        read_or_refuse(folder / "a.nrrd")


@quick
@given(content=st.binary(max_size=600), name=st.sampled_from(["a.nii", "a.nii.gz", "a.mgz", "a.nrrd", "a.dcm", "a"]))
def test_any_bytes(content: bytes, name: str) -> None:
    with written({name: content}) as folder:
        read_or_refuse(folder / name)
        (folder / name).write_bytes(b"\0" * 128 + b"DICM" + content)
        read_or_refuse(folder / name)
        assert "holds no" in (refusal(lambda: read_source(folder, "folder")) or "holds no")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("datasets", "subjects", "sessions", "images", "image_path", "name", "modality", "image_info"),
                    *(
                        "associated_masks",
                        "anatomy_mask",
                        "dataset_info",
                        "image_quality_score",
                        "training",
                        "validation",
                    ),
                    *("image", "label", "subject", "inverted_masks", "x"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


@quick
@given(content=values)
def test_any_json(content: Any) -> None:
    with written({"pretrain_data.json": json.dumps(content).encode()}) as folder:
        file = folder / "pretrain_data.json"
        for attempt in (
            lambda: read_source(file, "nnssl"),
            lambda: detect(file),
            lambda: pretraining_lists(datalist=str(file), source="datalist"),
        ):
            assert "pretrain_data.json" in (refusal(attempt) or "pretrain_data.json")


@quick
@given(
    image=st.recursive(
        st.fixed_dictionaries(
            {},
            optional={
                "image_path": values | st.text(max_size=20),
                "associated_masks": values,
                "image_info": values,
                "modality": values,
                "name": values,
            },
        ),
        lambda inner: inner,
    ),
    info=values,
)
def test_any_image_of_an_index(image: dict[str, Any], info: Any) -> None:
    session = {"images": [image]}
    content = {"datasets": {"d": {"dataset_info": info, "subjects": {"s": {"sessions": {"t": session}}}}}}
    with written({"pretrain_data.json": json.dumps(content).encode()}) as folder:
        try:
            cases = read_source(folder).cases
        except DataError:
            return
    for case in cases:
        path = Path(case["image"])
        assert path.is_relative_to(folder) or image["image_path"].startswith(("/", "$"))


@quick
@given(
    rows=st.lists(
        st.lists(st.text(max_size=15) | st.sampled_from(["../x", "a/b/c.nii", "/etc/x", "nan", "1"]), max_size=5)
    ),
    separator=st.sampled_from([",", ";", "\t", '"']),
    columns=st.permutations(["image_path", "modality", "anat_mask_path", "image_quality_score", "derived_from"]),
)
def test_any_table(rows: list[list[str]], separator: str, columns: list[str]) -> None:
    lines = [separator.join(columns), *(separator.join(row) for row in rows)]
    with written({"openneuro_metadata.csv": "\n".join(lines).encode("utf-8", "surrogatepass")}) as folder:
        told = refusal(lambda: read_source(folder))
        assert told is None or str(folder) in told
        cases = read_source(folder).cases if told is None else []
    for case in cases:
        for key in ("image", "anatomy_mask"):
            if key in case:
                assert Path(case[key]).is_relative_to(folder)
                assert ".." not in Path(case[key]).parts


@quick
@given(entry=st.text(max_size=30) | st.lists(st.sampled_from(["..", ".", "a", "", "C:", "\\"])).map("/".join))
def test_entries_never_lead_out(entry: str) -> None:
    try:
        inner = below(entry)
    except DataError:
        return
    assert (Path("/data") / inner).resolve().is_relative_to("/data")


@quick
@given(path=st.text(max_size=40))
def test_any_name(path: str) -> None:
    dataset, subject = subject_of(path)
    assert subject in path
    assert dataset in path
    assert refusal(lambda: read_volume(path or "a")) is not None
