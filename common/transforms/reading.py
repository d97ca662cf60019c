# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One reader for every format of volumes, the same for checks, preprocessing and pictures.

============  =====================================================  ===============================
format        files                                                  read with
============  =====================================================  ===============================
NIfTI         ``.nii``, ``.nii.gz``                                  nibabel
MGH           ``.mgh``, ``.mgz``                                     nibabel
NRRD          ``.nrrd``, ``.nhdr`` with its data file                pynrrd (header)
DICOM series  the folder of one series, or any file of one           pydicom, highdicom
============  =====================================================  ===============================

Arrays are ``(X, Y, Z)``, channels last, and affines lead to millimetres in RAS, whatever the format says them in.

A header is judged before anything of the size that it claims is allocated: the claim must fit the size of the file,
which for a compressed file may grow by what deflate can reach at most, and a limit on voxels. Of a compressed stream no
more than the claimed bytes is ever unpacked. Files are read, not mapped: one that shrinks meanwhile would end the
process.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from monai.data import ImageReader
from nibabel.arrayproxy import ArrayProxy
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.openers import ImageOpener

from ..errors import DataError

__all__ = [
    "ENDINGS",
    "Header",
    "VolumeReader",
    "as_nifti",
    "explain",
    "files_behind",
    "nifti_header",
    "read_header",
    "read_volume",
    "volume_format",
    "without_ending",
]

ENDINGS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".nhdr", ".mgh", ".mgz")
MOST_VOXELS = 2**31  # 1290 along every axis; what claims more is no scan
_DEFLATE = 1032  # bytes that one compressed byte can become at most
_SMALL = 2**16  # bytes; an NRRD without voxels of its own is smaller
_MOST_BEFORE_VOXELS = 2**26  # bytes of extensions in a NIfTI, or of an NRRD's text


@dataclass(frozen=True)
class Header:
    """What a file says of its voxels.

    Attributes:
        shape: ``(X, Y, Z)``, and channels if there are several.
        affine: ``(4, 4)`` from voxels to millimetres in RAS.
        dtype: of the stored voxels.
        spacing_mm: as stored, along ``(X, Y, Z)``; 0 where the file says 0.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    dtype: np.dtype
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True)
class _Found:
    """A header with the way to its voxels."""

    header: Header
    voxels: Callable[[], np.ndarray]


def without_ending(name: str) -> str:
    """Return a name without the ending of a volume.

    Example:
        >>> [without_ending(name) for name in ("a.nii.gz", "b.NRRD", "c.mgz", "1.2.840", "d.dcm")]
        ['a', 'b', 'c', '1.2.840', 'd']
    """
    lower = name.lower()
    return next((name[: -len(ending)] for ending in (*ENDINGS, ".dcm") if lower.endswith(ending)), name)


def volume_format(path: str | Path) -> str:
    """Return the format that a file or folder is read as, by its name."""
    lower = str(path).lower()
    if lower.endswith((".nii", ".nii.gz")):
        return "NIfTI"
    if lower.endswith((".mgh", ".mgz")):
        return "MGH"
    return "NRRD" if lower.endswith((".nrrd", ".nhdr")) else "DICOM"


def explain(path: str, error: Exception) -> DataError:
    """Turn what a reader raised into one sentence about the file."""
    if isinstance(error, DataError):
        return error
    file = Path(path)
    try:
        there, size = file.exists(), file.stat().st_size
    except (OSError, ValueError) as problem:  # a loop of links, no permission, a name with a null byte
        if not isinstance(problem, FileNotFoundError):
            reason = getattr(problem, "strerror", None) or str(problem)
            return DataError(f"{path!r} cannot be opened ({reason}); correct the list or restore the file")
        there, size = False, 0
    if not there:
        return DataError(f"there is no file {path}; correct the list or restore the file")
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, (EOFError, zlib.error)) or "end-of-stream" in text or "Expected" in text:
        return DataError(f"{path} ({size:,} bytes) is cut short or damaged ({text}); copy it again from its source")
    return DataError(
        f"{path} ({size:,} bytes) cannot be read as {volume_format(path)} ({text}); convert it or leave it out"
    )


def read_header(path: str | Path) -> Header:
    """Read what a file says of its voxels, and refuse claims that cannot be true.

    Raises:
        DataError: if the file is missing, not of its format, or claims more than it can hold.
    """
    return _find(str(path)).header


def read_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels, channels last, and the affine to millimetres.

    Raises:
        DataError: if the file is missing, damaged or not of its format.
    """
    found = _find(str(path))
    try:
        values = found.voxels()
    except Exception as error:
        raise explain(str(path), error) from error
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    return values, found.header.affine


def as_nifti(path: str | Path) -> nib.Nifti1Image:
    """Read a volume of any format as an image of nibabel.

    Raises:
        DataError: if it cannot be read.
    """
    values, affine = read_volume(path)
    return nib.Nifti1Image(values, affine, dtype=values.dtype)


def _find(path: str) -> _Found:
    readers = {"NIfTI": _nifti, "MGH": _mgh, "NRRD": _nrrd, "DICOM": _dicom}
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe would wait for ever
            raise DataError(f"{path} is a pipe, socket or device and no file; leave it out")
        return readers[volume_format(path)](path)
    except RecursionError as error:
        raise DataError(f"{path} cannot be read as {volume_format(path)}; convert it or leave it out") from error
    except Exception as error:
        raise explain(path, error) from error


def check_claim(path: str, shape: Sequence[int], dtype: np.dtype, *, before: int, size: int, packed: bool) -> None:
    """Refuse a header that claims voxels which its file cannot hold.

    Args:
        path: of the file, for the message.
        shape: claimed.
        dtype: claimed.
        before: bytes before the voxels.
        size: of the file that holds the voxels, in bytes.
        packed: it is compressed.

    Raises:
        DataError: naming what is claimed and what is there.
    """
    printed = " x ".join(str(side) for side in shape)
    if min(shape, default=0) < 1:
        raise DataError(f"{path} says its voxels are {printed}; correct its header or leave it out")
    voxels = math.prod(shape)
    if voxels > MOST_VOXELS:
        raise DataError(f"{path} claims {printed} voxels, more than the limit of {MOST_VOXELS:,}; leave it out")
    needed = before + voxels * dtype.itemsize
    if needed > (size * _DEFLATE if packed else size):
        raise DataError(
            f"{path} ({size:,} bytes) is cut short or damaged: its header claims {printed} voxels of {dtype}, "
            f"{needed:,} bytes; copy it again from its source"
        )


def _start(path: str, size: int) -> bytes:
    with ImageOpener(path) as stream:
        return bytes(stream.read(size))


def nifti_header(path: str | Path) -> Any:
    """Return nibabel's header of a NIfTI file, without its extensions.

    Raises:
        DataError: if the file is no single NIfTI file.
    """
    return _nifti_header(str(path))[0]


def _nifti_header(path: str) -> tuple[Any, tuple[float, ...]]:
    start = _start(path, 540)
    kinds = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    sizes = [int(np.frombuffer(start[:4], order)[0]) for order in ("<i4", ">i4")] if len(start) >= 4 else []
    kind = next((kinds[size] for size in sizes if size in kinds), None)
    length = 0 if kind is None else kind.template_dtype.itemsize
    if kind is None or len(start) < length:
        raise DataError(f"{path} cannot be read as NIfTI (no such header); convert it or leave it out")
    raw = kind(start[:length], check=False)
    magic = bytes(raw["magic"].item())
    if not magic.startswith(b"n+"):
        raise DataError(f"{path} cannot be read as NIfTI (its magic is {magic!r}, not a single file); convert it")
    stored = tuple(float(value) for value in raw["pixdim"][1:4])
    return kind(start[:length]), stored  # checked, and repaired where nibabel does


def _nifti(path: str) -> _Found:
    header, stored = _nifti_header(path)
    if not 0 <= (offset := float(header["vox_offset"])) <= _MOST_BEFORE_VOXELS:
        raise DataError(f"{path} says its voxels start at byte {offset:g}; correct its header or leave it out")
    shape, dtype = tuple(int(side) for side in header.get_data_shape()), header.get_data_dtype()
    offset = int(header.get_data_offset())
    _check_nibabel_file(path, shape, dtype, offset)
    return _Found(
        Header(shape, np.asarray(header.get_best_affine(), dtype=float), dtype, stored),
        lambda: np.asanyarray(ArrayProxy(path, (shape, dtype, offset, *header.get_slope_inter()), mmap=False)),
    )


def _mgh(path: str) -> _Found:
    start = _start(path, 284)
    if len(start) < 284:
        raise DataError(f"{path} cannot be read as MGH (no such header); convert it or leave it out")
    header = MGHHeader(start)
    shape, dtype = tuple(int(side) for side in header.get_data_shape()), header.get_data_dtype()
    offset = int(header.get_data_offset())
    _check_nibabel_file(path, shape, dtype, offset)
    spacing = tuple(float(value) for value in header["delta"])
    return _Found(
        Header(shape, np.asarray(header.get_affine(), dtype=float), dtype, spacing),
        lambda: np.asanyarray(ArrayProxy(path, (shape, dtype, offset), mmap=False)),
    )


def _check_nibabel_file(path: str, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> None:
    packed = path.lower().endswith((".gz", ".mgz"))
    check_claim(path, shape, dtype, before=offset, size=Path(path).stat().st_size, packed=packed)


_NRRD_TYPES = {
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
_NRRD_SPACES = {  # signs that lead to RAS
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
}


def _nrrd(path: str) -> _Found:
    import nrrd

    with open(path, "rb") as stream:
        start = stream.read(_MOST_BEFORE_VOXELS if path.lower().endswith(".nhdr") else 2**16)
        if not start.startswith(b"NRRD"):
            raise DataError(f"{path} cannot be read as NRRD (no such header); convert it or leave it out")
        while (end := re.search(rb"\r?\n\r?\n", start)) is None and len(start) < _MOST_BEFORE_VOXELS:
            more = stream.read(2**20)
            if not more:
                break
            start += more
    header = nrrd.read_header(io.BytesIO(start[: end.end()] if end else start + b"\n\n"))
    attached = "data file" not in header and "datafile" not in header
    before = end.end() if attached and end else 0
    data = path if attached else _nrrd_data_file(path, str(header.get("data file", header.get("datafile"))))
    if int(header.get("line skip", header.get("lineskip", 0))):
        raise DataError(f"{path} skips lines before its voxels; save it again without")
    skip = int(header.get("byte skip", header.get("byteskip", 0)))
    kind, encoding = str(header["type"]), str(header["encoding"]).lower()
    if kind not in _NRRD_TYPES:
        raise DataError(f"{path} holds {kind} voxels; save plain numbers, one per voxel")
    packed = encoding in ("gzip", "gz")
    if not packed and encoding != "raw":
        raise DataError(f"{path} is encoded as {encoding}; save it as raw or gzip")
    order = ">" if str(header.get("endian", "little")).lower() == "big" else "<"
    dtype = np.dtype(order + _NRRD_TYPES[kind])
    sizes = [int(side) for side in header["sizes"]]
    size = Path(data).stat().st_size
    check_claim(path, sizes, dtype, before=max(skip, 0), size=size - before, packed=packed)
    if skip < -1 or skip > size or (skip < 0 and packed):
        raise DataError(f"{path} skips {skip} bytes before its voxels; save it again without")
    bytes_needed = math.prod(sizes) * dtype.itemsize
    affine, spatial = _nrrd_affine(path, header, len(sizes))
    axes = (*spatial, *(axis for axis in range(len(sizes)) if axis not in spatial))

    def voxels() -> np.ndarray:
        with open(data, "rb") as stream:
            stream.seek(size - bytes_needed if skip == -1 else before + (0 if packed else skip))
            source: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=stream) if packed else stream
            if packed:
                source.read(skip)
            content = source.read(bytes_needed)
        if len(content) < bytes_needed:
            raise DataError(
                f"{path} holds {len(content):,} of {bytes_needed:,} bytes: it is cut short or damaged; copy it again "
                "from its source"
            )
        return np.frombuffer(bytearray(content), dtype).reshape(sizes, order="F").transpose(axes)

    shape = tuple(sizes[axis] for axis in axes)
    spacing = tuple(float(value) for value in np.linalg.norm(affine[:3, :3], axis=0))
    return _Found(Header(shape, affine, dtype, spacing), voxels)


def _nrrd_data_file(path: str, name: str) -> str:
    """Return where the voxels of a detached header are: beside it or below."""
    inner = Path(name.strip())
    if name.strip().upper().startswith("LIST") or re.search(r"%\d*d", name):
        raise DataError(f"{path} spreads its voxels over several files; save them as one")
    if inner.is_absolute() or ".." in inner.parts or not name.strip():
        raise DataError(f"{path} names the data file {name!r}, which is not in its folder; put it there")
    return str(Path(path).parent / inner)


def _nrrd_affine(path: str, header: dict[str, Any], dimensions: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the affine in RAS, and which three axes lie in space."""
    affine = np.eye(4)
    if "space directions" not in header:
        spacings = np.asarray(header.get("spacings", []), dtype=float)
        if dimensions != 3 or spacings.shape != (3,):
            raise DataError(f"{path} does not say the size of its voxels; save it with space directions")
        affine[:3, :3] = np.diag(spacings) @ np.diag([-1, -1, 1])  # without a space, MONAI takes LPS as well
        return affine, (0, 1, 2)
    space = str(header.get("space", "left-posterior-superior")).lower()
    if space not in _NRRD_SPACES:
        raise DataError(f"{path} lies in the space {space!r}; save it in left-posterior-superior")
    rows = header["space directions"]
    vectors = [None if row is None else np.asarray(row, dtype=float) for row in rows]
    spatial = tuple(axis for axis, row in enumerate(vectors) if row is not None and not np.isnan(row).any())
    if len(vectors) != dimensions or len(spatial) != 3 or any(vectors[axis].shape != (3,) for axis in spatial):  # type: ignore[union-attr]
        raise DataError(f"{path} has {len(spatial)} directions in space for {dimensions} axes; save a 3-D volume")
    affine[:3, :3] = np.stack([vectors[axis] for axis in spatial], axis=1)  # type: ignore[misc]
    affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), dtype=float)
    return np.diag([*_NRRD_SPACES[space], 1.0]) @ affine, spatial


def files_behind(path: str) -> list[str]:
    """Return the other files that a volume is read from: those of a DICOM series, the data file of an NRRD header.

    Of a series these are all files of its folder that may be DICOM, by their names. Nothing is said of a file that
    cannot be read.
    """
    from .dicom import may_be_dicom

    kind = volume_format(path)
    try:
        if kind == "DICOM":
            folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
            with os.scandir(folder) as entries:
                return sorted(entry.path for entry in entries if may_be_dicom(entry.name) and entry.is_file())
        if kind == "NRRD" and (path.lower().endswith(".nhdr") or os.path.getsize(path) < _SMALL):
            with open(path, "rb") as stream:
                text = re.split(rb"\r?\n\r?\n", stream.read(_SMALL), maxsplit=1)[0]
            named = re.search(rb"^data ?file:(.*)$", text, re.MULTILINE | re.IGNORECASE)
            return [_nrrd_data_file(path, os.fsdecode(named[1]))] if named else []
    except (OSError, ValueError):
        pass
    return []


def _dicom(path: str) -> _Found:
    from .dicom import find_series

    header, voxels = find_series(path)
    return _Found(header, voxels)


class VolumeReader(ImageReader):
    """This module's reader for MONAI's ``LoadImaged``.

    Files are named in ``read`` and read in ``get_data``, whose errors ``LoadImaged`` passes on as they are.
    """

    def verify_suffix(self, filename: Any) -> bool:
        """Return true: it reads every format that there is."""
        return True

    def read(self, data: Any, **kwargs: Any) -> list[str]:
        """Return the names of one file, or of one for each channel."""
        return [str(data)] if isinstance(data, (str, Path)) else [str(name) for name in data]

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the voxels, those of several files stacked in front, and where they lie."""
        volumes = [read_volume(name) for name in img]
        values, affine = volumes[0]
        channel: float = float("nan") if values.ndim <= 3 else -1
        shape = np.asarray(values.shape[:3])
        if len(volumes) > 1:
            values, channel = np.stack([each for each, _ in volumes]), 0
        return values, {
            "affine": affine.copy(),
            "original_affine": affine.copy(),
            "spatial_shape": shape,
            "original_channel_dim": channel,
            "space": "RAS",
        }
