# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""NRRD, attached or with its voxels in a file of its own.

``space units``, and ``units`` where a file has spacings instead of directions, are converted to millimetres. An axis of
length 1 that is none of space, such as the list of segments of a ``.seg.nrrd`` with one, is none.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from .header import Found, Header, check_claim, notes_on_axes, to_mm, without_ones
from .unpacking import growth, read_bytes

__all__ = ["data_file", "find_nrrd"]

_MOST_TEXT = 2**26  # bytes of a header
_MICRO = re.compile(rb"(?:\xc2\xb5|\xce\xbc|\xb5)m")  # pynrrd leaves letters beyond ASCII out, and that would be metres
_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char,int8,int8_t",
        "u1": "uchar,unsigned char,uint8,uint8_t",
        "i2": "short,short int,signed short,signed short int,int16,int16_t",
        "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
        "i4": "int,signed int,int32,int32_t",
        "u4": "uint,unsigned int,uint32,uint32_t",
        "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
        "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(",")
}
_SPACES = {  # signs that lead to RAS
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
}
_UNITS = {  # millimetres
    name: size
    for size, names in {
        1.0: ",mm,millimeter,millimeters,millimetre,millimetres",
        1e-3: "um,micron,microns,micrometer,micrometers,micrometre,micrometres",
        10.0: "cm,centimeter,centimeters,centimetre,centimetres",
        1e3: "m,meter,meters,metre,metres",
    }.items()
    for name in names.split(",")
}


def find_nrrd(path: str) -> Found:
    """Return the header of an NRRD file, and the way to its voxels.

    Raises:
        DataError: if it is none, claims more than it can hold, or does not say where it lies.
    """
    import nrrd

    start, attached = _text(path)
    with np.errstate(invalid="ignore"):  # it tries whether NaN is a whole number
        header = nrrd.read_header(io.BytesIO(_MICRO.sub(b"um", start)))
    named = header.get("data file", header.get("datafile"))
    data = path if named is None else data_file(path, str(named))
    before = len(start) if named is None and attached else 0
    if int(header.get("line skip", header.get("lineskip", 0))):
        raise DataError(f"{path} skips lines before its voxels; save it again without")
    skip = int(header.get("byte skip", header.get("byteskip", 0)))
    kind, encoding = str(header["type"]), str(header["encoding"]).lower()
    if kind not in _TYPES:
        raise DataError(f"{path} holds {kind} voxels; save plain numbers, one per voxel")
    packings = {"raw": "", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
    if encoding not in packings:
        raise DataError(f"{path} is encoded as {encoding}; save it as raw or gzip")
    packed = packings[encoding]
    order = ">" if str(header.get("endian", "little")).lower() == "big" else "<"
    dtype = np.dtype(order + _TYPES[kind])
    sizes = [int(side) for side in header["sizes"]]
    affine, spatial = _place(path, header, len(sizes))
    axes = (*spatial, *(axis for axis in range(len(sizes)) if axis not in spatial))
    stored = tuple(sizes[axis] for axis in axes)
    size = Path(data).stat().st_size
    check_claim(path, stored, dtype, before=max(skip, 0), size=size - before, growth=growth(packed))
    if skip < -1 or skip > size or (skip < 0 and packed):
        raise DataError(f"{path} skips {skip} bytes before its voxels; save it again without")
    count, shape = math.prod(sizes) * dtype.itemsize, without_ones(stored)
    ones = tuple(axis for axis in range(3, len(stored)) if stored[axis] == 1)

    def voxels() -> np.ndarray:
        if packed:
            content = read_bytes(data, count, packed, before=skip, start=before)
        else:
            content = read_bytes(data, count, packed, start=size - count if skip == -1 else before + skip)
        return np.squeeze(content.view(dtype).reshape(sizes, order="F").transpose(axes), ones)

    spacing = tuple(float(value) for value in np.linalg.norm(affine[:3, :3], axis=0))
    notes = notes_on_axes(affine, other="SimpleITK does so too")
    units = [str(each) for field in ("space units", "units") for each in header.get(field, [])]
    if any(_UNITS.get(unit.lower(), 1) != 1 for unit in units):
        notes.insert(0, f"its unit is {units[0]}; its sizes are converted to millimetres, which SimpleITK does not")
    return Found(Header(shape, affine, dtype, spacing, size + len(start) * (data != path), tuple(notes)), voxels)


def _text(path: str) -> tuple[bytes, bool]:
    """Return the text of a header, and whether an empty line ends it."""
    with open(path, "rb") as stream:
        start = stream.read(_MOST_TEXT if path.lower().endswith(".nhdr") else 2**16)
        if not start.startswith(b"NRRD"):
            raise DataError(f"{path} cannot be read as NRRD (no such header); convert it or leave it out")
        while (end := re.search(rb"\r?\n\r?\n", start)) is None and len(start) < _MOST_TEXT:
            more = stream.read(2**20)
            if not more:
                break
            start += more
    return (start + b"\n\n", False) if end is None else (start[: end.end()], True)


def data_file(path: str, name: str) -> str:
    """Return where the voxels of a detached header are: beside it or below.

    Raises:
        DataError: if they lie elsewhere or in several files.
    """
    inner = Path(name.strip())
    if name.strip().upper().startswith("LIST") or re.search(r"%\d*d", name):
        raise DataError(f"{path} spreads its voxels over several files; save them as one")
    if inner.is_absolute() or ".." in inner.parts or not name.strip():
        raise DataError(f"{path} names the data file {name!r}, which is not in its folder; put it there")
    return str(Path(path).parent / inner)


def _place(path: str, header: dict[str, Any], dimensions: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the affine in millimetres in RAS, and which three axes lie in space."""
    affine = np.eye(4)
    if "space directions" not in header:
        spacings = np.asarray(header.get("spacings", []), dtype=float)
        spatial = tuple(np.flatnonzero(~np.isnan(spacings)).tolist())
        if len(spacings) != dimensions or len(spatial) != 3:
            raise DataError(f"{path} does not say the size of its voxels; save it with space directions")
        scale, unit = _unit(path, header, "units", spatial)
        affine[:3, :3] = np.diag(spacings[list(spatial)]) @ np.diag([-1, -1, 1])  # without a space, as in LPS
        return to_mm(path, affine, scale, unit), spatial
    space = str(header.get("space", "left-posterior-superior")).lower()
    if space not in _SPACES:
        raise DataError(f"{path} lies in the space {space!r}; save it in left-posterior-superior")
    rows = header["space directions"]
    vectors = [None if row is None else np.asarray(row, dtype=float) for row in rows]
    spatial = tuple(axis for axis, row in enumerate(vectors) if row is not None and not np.isnan(row).any())
    if len(vectors) != dimensions or len(spatial) != 3 or any(vectors[axis].shape != (3,) for axis in spatial):  # type: ignore[union-attr]
        raise DataError(f"{path} has {len(spatial)} directions in space for {dimensions} axes; save a 3-D volume")
    affine[:3, :3] = np.stack([vectors[axis] for axis in spatial], axis=1)  # type: ignore[misc]
    affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), dtype=float)
    scale, unit = _unit(path, header, "space units", (0, 1, 2))
    return to_mm(path, affine * np.array([*_SPACES[space], 1.0])[:, None], scale, unit), spatial


def _unit(path: str, header: dict[str, Any], field: str, axes: Sequence[int]) -> tuple[np.ndarray, str]:
    """Return the millimetres per unit along three axes, and the name of the unit."""
    said = [str(name).strip() for name in header.get(field, [])]
    names = [said[axis] if axis < len(said) and said[axis] != "???" else "" for axis in axes]
    unknown = [name for name in names if name.lower() not in _UNITS]
    if unknown:
        raise DataError(
            f"{path} says in {field} that its unit of length is {unknown[0]!r}, which is not known; save it in mm"
        )
    return np.array([_UNITS[name.lower()] for name in names]), next((name for name in names if name), "mm")
