# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""NIfTI-1 and NIfTI-2, as one file or as a pair of ``.hdr`` and ``.img``.

What the standard says and nibabel, SimpleITK or both read otherwise is decided here, and noted in the header:

* ``scl_slope`` 0, NaN or infinite means that voxels are not scaled, whatever ``scl_inter`` says; a slope with an
  intercept that is NaN or infinite has no meaning and is refused.
* The unit of ``xyzt_units`` is converted to millimetres; where it is unknown, sizes are millimetres.
* Axes of length 1 behind the third are none.
* The sform places the volume, without a code of its own the qform, without any the voxel sizes alone, as in nibabel.
* A quaternion that rounding made a little longer than 1 is one of length 1.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.volumeutils import apply_read_scaling

from ...errors import DataError
from .header import Found, Header, check_claim, corners_apart, notes_on_axes, times, to_mm, without_ones
from .unpacking import first_bytes, growth, packed_with, read_bytes

__all__ = ["PAIRED", "find_nifti", "nifti_header", "other_of_pair"]

PAIRED = tuple(f".{part}{packed}" for packed in (".gz", ".bz2", "") for part in ("hdr", "img"))
_MOST_BEFORE_VOXELS = 2**26  # bytes of extensions
_UNITS = {0: ("unknown unit", 1.0), 1: ("m", 1e3), 2: ("mm", 1.0), 3: ("micron", 1e-3)}
_LONGER_THAN_1 = 1e-5  # of the squares of a quaternion; float32 makes less than a tenth of it
_FAR = 0.1  # voxels between two places that are told
_SILENT = logging.Logger("nibabel's remarks")  # what matters of them is said here
_SILENT.addHandler(logging.NullHandler())
_CLASSES = {
    (348, b"n+"): nib.Nifti1Header,
    (348, b"ni"): nib.Nifti1Pair.header_class,
    (540, b"n+"): nib.Nifti2Header,
    (540, b"ni"): nib.Nifti2Pair.header_class,
}


def other_of_pair(path: str) -> str | None:
    """Return the file that lies beside one of a pair, if it is there."""
    lower = path.lower()
    ending = next((each for each in PAIRED if lower.endswith(each)), None)
    if ending is None:
        return None
    stem, part = path[: -len(ending)], "img" if ending.startswith(".hdr") else "hdr"
    found = (f"{stem}.{name}{packed}" for name in (part, part.upper()) for packed in (ending[4:], "", ".gz", ".bz2"))
    return next((each for each in found if os.path.isfile(each)), None)


def _files(path: str) -> tuple[str, str]:
    """Return the files of header and voxels."""
    if not path.lower().endswith(PAIRED):
        return path, path
    other = other_of_pair(path)
    if other is None:
        part = ".img" if ".hdr" in path.lower()[-8:] else ".hdr"
        raise DataError(f"{path} is one of a pair, and there is no {part} file of its name beside it; put it there")
    return (path, other) if ".hdr" in path.lower()[-8:] else (other, path)


def nifti_header(path: str | Path) -> Any:
    """Return nibabel's header of a NIfTI file, as that of a single file and without its extensions.

    Raises:
        DataError: if the file is none.
    """
    header = _read_header(str(path))[0]
    single = {nib.Nifti1Pair.header_class: nib.Nifti1Header, nib.Nifti2Pair.header_class: nib.Nifti2Header}
    if type(header) not in single:
        return header
    kind = single[type(header)]
    changed = kind(header.binaryblock, header.endianness, check=False)
    changed["magic"], changed["vox_offset"] = kind.single_magic, kind.single_vox_offset
    return changed


def _read_header(path: str) -> tuple[Any, Any]:
    """Return nibabel's header, repaired where nibabel does, and the one that is stored."""
    file = _files(path)[0]
    start = first_bytes(file, 540, packed_with(file))
    sizes = [int(np.frombuffer(start[:4], order)[0]) for order in ("<i4", ">i4")] if len(start) >= 4 else []
    size = next((size for size in sizes if size in (348, 540)), 0)
    if not size or len(start) < size:
        raise DataError(f"{path} cannot be read as NIfTI (no such header); convert it or leave it out")
    magic = start[344:348] if size == 348 else start[4:12]
    kind = _CLASSES.get((size, magic[:2]))
    if kind is None and file.lower().endswith(PAIRED) and size == 348:
        raise DataError(
            f"{path} is Analyze 7.5, which does not say which side is left; convert it to NIfTI with the program that "
            "wrote it, such as SPM or fslchfiletype, and look at left and right"
        )
    if kind is None or kind.is_single == file.lower().endswith(PAIRED):
        wanted = "of a pair" if file.lower().endswith(PAIRED) else "a single file"
        raise DataError(f"{path} cannot be read as NIfTI (its magic is {magic!r}, not {wanted}); convert it")
    stored = kind(start[:size], check=False)
    header = stored.copy()
    header.check_fix(logger=_SILENT)
    parts = np.array([float(header[f"quatern_{name}"]) for name in "bcd"])
    if 1 < (squares := float(parts @ parts)) <= 1 + _LONGER_THAN_1:
        for name, value in zip("bcd", parts / math.sqrt(squares), strict=True):
            header[f"quatern_{name}"] = value
    return header, stored


def find_nifti(path: str) -> Found:
    """Return the header of a NIfTI file, and the way to its voxels.

    Raises:
        DataError: if it is none, claims more than it can hold, or says what has no meaning.
    """
    header, stored = _read_header(path)
    data = _files(path)[1]
    if not 0 <= (offset := float(header["vox_offset"])) <= _MOST_BEFORE_VOXELS:
        raise DataError(f"{path} says its voxels start at byte {offset:g}; correct its header or leave it out")
    claimed, dtype = tuple(int(side) for side in header.get_data_shape()), header.get_data_dtype()
    offset = int(header.get_data_offset())
    packed = _packing_of_voxels(data)
    check_claim(path, claimed, dtype, before=offset, size=os.path.getsize(data), growth=growth(packed))
    slope, inter, notes = _scaling(path, header)
    shape, count = without_ones(claimed), math.prod(claimed) * dtype.itemsize
    affine, placed = _place(path, header, stored, shape)

    def voxels() -> np.ndarray:
        values = read_bytes(data, count, packed, before=offset).view(dtype).reshape(shape, order="F")
        return np.asarray(apply_read_scaling(values, slope, inter))

    spacing = tuple(float(side) for side in np.linalg.norm(affine[:3, :3], axis=0))
    size = sum(os.path.getsize(file) for file in set(_files(path)))
    return Found(Header(shape, affine, dtype, spacing, size, (*notes, *placed)), voxels)


def _packing_of_voxels(data: str) -> str:
    """Return what voxels are packed with; those of a pair have no first bytes to tell it by."""
    if not data.lower().endswith(PAIRED):
        return packed_with(data)
    return {".gz": "gzip", "bz2": "bzip2"}.get(data.lower()[-3:], "")


def _scaling(path: str, header: Any) -> tuple[np.float64, np.float64, list[str]]:
    """Return slope and intercept, and what is to be noted."""
    slope, inter = np.float64(header["scl_slope"]), np.float64(header["scl_inter"])
    if slope and np.isfinite(slope):
        if np.isfinite(inter):
            return slope, inter, []
        raise DataError(f"{path} has the slope {slope:g} and the intercept {inter:g} (scl_inter); correct its header")
    notes = []
    if inter and np.isfinite(inter):
        notes.append(
            f"its slope (scl_slope) is {slope:g}, so its voxels are taken as they are stored; SimpleITK adds the "
            f"intercept of {inter:g}"
        )
    return np.float64(1), np.float64(0), notes


def _place(path: str, header: Any, stored: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """Return the affine in millimetres, and what is to be noted of it."""
    code = int(stored["xyzt_units"]) & 7
    if code not in _UNITS:
        raise DataError(
            f"{path} says in xyzt_units that its unit of length is {code}, which is none of 1 (metre), 2 (millimetre) "
            "and 3 (micron); correct its header"
        )
    unit, scale = _UNITS[code]
    sides = [float(side) for side in stored["pixdim"][1:4]]
    if 0 in sides:  # nibabel makes it 1
        raise DataError(f"{path} says its voxels are {times(sides)} {unit}; correct its header")
    try:
        affine = np.asarray(header.get_best_affine(), dtype=float)
    except ValueError as error:
        raise DataError(f"{path} has a qform that is no rotation ({error}); correct its header") from error
    notes = (
        [] if scale == 1 else [f"its unit is {unit}; its sizes are converted to millimetres, which nibabel does not"]
    )
    if min(sides) < 0:
        notes.append(
            f"it says that its voxels are {times(sides)} {unit}; they are taken as positive, and SimpleITK turns that "
            "axis round"
        )
    if np.isfinite(affine).all() and len(shape) >= 3:
        notes += _differences(header, affine, scale, shape)
    return to_mm(path, affine, np.full(3, scale), unit), notes


def _differences(header: Any, affine: np.ndarray, scale: float, shape: tuple[int, ...]) -> list[str]:
    """Return where SimpleITK would place a volume elsewhere, and why."""
    codes = {name: int(header[f"{name}_code"]) for name in ("qform", "sform")}
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], dtype=float))
    if not any(codes.values()):
        return [
            "no code says what its qform and sform are for, so its voxel sizes alone place it, the first axis to the "
            "left as in nibabel; SimpleITK turns the second axis round as well, and nothing says who is right"
        ]
    try:
        qform = np.asarray(header.get_qform(), dtype=float) if codes["qform"] else None
    except ValueError:
        qform = None
    if qform is not None and not np.isfinite(qform).all():
        qform = None
    far = _FAR * float(pixdim.min())
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0).clip(1e-30)
    square = bool(np.abs(directions @ directions.T - np.eye(3)).max() <= 1e-4)
    apart = 0.0 if qform is None else corners_apart(shape, affine, qform)
    theirs = "sform"
    if codes["sform"] and not (square and (qform is None or codes["sform"] == 1 or apart <= far)):
        theirs = "error" if qform is None else "qform"
    told = {"sform": "takes them too", "qform": "takes the qform", "error": "refuses the file"}[theirs]
    notes = notes_on_axes(affine, other=f"SimpleITK {told}")
    if codes["sform"] and apart > far:
        notes.append(
            f"its qform (code {codes['qform']}) and sform (code {codes['sform']}) place it up to {apart * scale:.3g} "
            f"mm apart; the sform is used, as in nibabel, and SimpleITK uses the {theirs}"
        )
    elif codes["sform"] and theirs == "sform":
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if (np.abs(spacing - pixdim) * np.subtract(shape[:3], 1) > far).any():
            notes.append(
                f"its sform says voxels of {times(spacing * scale)} mm and its pixdim {times(pixdim * scale)}; the "
                "sform is used, as in nibabel, and SimpleITK uses the pixdim"
            )
    return notes
