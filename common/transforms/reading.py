# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One reader for every format of volumes, the same for checks, preprocessing and pictures.

============  =====================================================  ===============================
format        files                                                  read with
============  =====================================================  ===============================
NIfTI         ``.nii``; pairs of ``.hdr`` and ``.img``; both also    nibabel (header)
              with ``.gz`` or ``.bz2``
MGH           ``.mgh``, ``.mgz``                                     nibabel (header)
NRRD          ``.nrrd``, ``.nhdr`` with its data file                pynrrd (header)
DICOM series  the folder of one series, or any file of one           pydicom, highdicom
============  =====================================================  ===============================

Arrays are ``(X, Y, Z)``, channels last, and affines lead to millimetres in RAS, whatever the format says them in.

A header is judged before anything of the size that it claims is allocated: the claim must fit the size of the file,
which for a compressed file may grow by what its packing can reach at most, and a limit on voxels. Of a compressed
stream no more than the claimed bytes is ever kept, and it is read to its end, where its checksum is. Files are read,
not mapped: one that shrinks meanwhile would end the process.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from ..errors import DataError
from .formats.dicom import find_dicom, is_dicom, may_be_dicom
from .formats.header import Found, Header
from .formats.mgh import find_mgh
from .formats.nifti import PAIRED, find_nifti, other_of_pair
from .formats.nrrd import data_file, find_nrrd

__all__ = [
    "ENDINGS",
    "FileKind",
    "as_nifti",
    "explain",
    "file_kind",
    "files_behind",
    "read_header",
    "read_volume",
    "volume_format",
    "without_ending",
]

ENDINGS = (
    *(".nii.gz", ".nii.bz2", ".nii", ".img.gz", ".img.bz2", ".img"),
    *(".seg.nrrd", ".nrrd", ".nhdr", ".mgh", ".mgz"),
)
_SMALL = 2**16  # bytes; an NRRD without voxels of its own is smaller
_WITH_SIMPLEITK = "convert it, such as with SimpleITK.WriteImage(SimpleITK.ReadImage(FILE), 'NAME.nii.gz')"
_UNREAD = {
    (".mha", ".mhd"): ("MetaImage", _WITH_SIMPLEITK),
    (".gipl", ".gipl.gz"): ("GIPL", _WITH_SIMPLEITK),
    (".vtk", ".vti"): ("VTK", "convert it, such as with 3D Slicer"),
    (".nii.zst", ".hdr.zst", ".img.zst"): ("NIfTI packed with zstd", "unpack it with zstd -d"),
    (".nii.xz", ".hdr.xz", ".img.xz"): ("NIfTI packed with xz", "unpack it with xz -d"),
    (".nii.zip",): ("NIfTI packed with zip", "unpack it with unzip"),
    (".mnc", ".mnc.gz"): ("MINC", "convert it with mnc2nii"),
    (".par", ".rec"): ("Philips PAR/REC", "convert it with dcm2niix or nibabel's parrec2nii"),
    (".head", ".brik", ".brik.gz"): ("AFNI", "convert it with 3dAFNItoNIFTI"),
}


@dataclass(frozen=True)
class FileKind:
    """What a file is, by its name.

    Attributes:
        name: of its format.
        remedy: how to turn it into what is read; empty if it is read.
    """

    name: str
    remedy: str = ""


def file_kind(path: str | Path) -> FileKind | None:
    """Return what a file holds, None if it is no volume, or none of its own such as the ``.hdr`` of an ``.img``.

    Only names are looked at, but for the first bytes of what may be DICOM.

    Example:
        >>> file_kind("a.nii.gz"), file_kind("a.mnc"), file_kind("a.txt")
        (FileKind(name='NIfTI', remedy=''), FileKind(name='MINC', remedy='convert it with mnc2nii'), None)
    """
    lower = str(path).lower()
    if lower.endswith(PAIRED):
        other = other_of_pair(str(path))
        if ".img" in lower[-8:]:
            return FileKind("NIfTI" if other else "image without header", "" if other else "put its .hdr beside it")
        return None if other else FileKind("header without image", "put its .img beside it")
    if lower.endswith(ENDINGS):
        return FileKind(volume_format(path))
    for endings, (name, remedy) in _UNREAD.items():
        if lower.endswith(endings):
            return FileKind(name, remedy)
    return FileKind("DICOM") if is_dicom(Path(path)) else None


def without_ending(name: str) -> str:
    """Return a name without the ending of a volume.

    Example:
        >>> [without_ending(name) for name in ("a.nii.gz", "b.NRRD", "c.mgz", "1.2.840", "d.dcm", "e.hdr")]
        ['a', 'b', 'c', '1.2.840', 'd', 'e']
    """
    lower = name.lower()
    return next((name[: -len(ending)] for ending in (*ENDINGS, *PAIRED, ".dcm") if lower.endswith(ending)), name)


def volume_format(path: str | Path) -> str:
    """Return the format that a file or folder is read as, by its name."""
    lower = str(path).lower()
    if lower.endswith((".nii", ".nii.gz", ".nii.bz2", *PAIRED)):
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
    if not there and file.is_symlink():
        return DataError(f"{path} is a link to {os.readlink(path)}, which is not there; restore it, or remove the link")
    if not there:
        return DataError(f"there is no file {path}; correct the list or restore the file")
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
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


def _find(path: str) -> Found:
    readers: dict[str, Callable[[str], Found]] = {"NIfTI": find_nifti, "MGH": find_mgh, "NRRD": find_nrrd}
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe would wait for ever
            raise DataError(f"{path} is a pipe, socket or device and no file; leave it out")
        kind = volume_format(path)
        if kind == "DICOM" and stat.S_ISREG(mode) and not is_dicom(Path(path)):
            raise _unread(path)
        return readers.get(kind, find_dicom)(path)
    except RecursionError as error:
        raise DataError(f"{path} cannot be read as {volume_format(path)}; convert it or leave it out") from error
    except Exception as error:
        raise explain(path, error) from error


def _unread(path: str) -> DataError:
    size, kind = os.path.getsize(path), file_kind(path)
    if kind is not None:
        return DataError(f"{path} ({size:,} bytes) is {kind.name}, which is not read here; {kind.remedy}")
    return DataError(
        f"{path} ({size:,} bytes) is none of {', '.join(ENDINGS)} and not DICOM; convert it or leave it out"
    )


def files_behind(path: str) -> list[str]:
    """Return the other files that a volume is read from: of a DICOM series, of a pair, the data of an NRRD header.

    Of a series these are all files of its folder that may be DICOM, by their names. Nothing is said of a file that
    cannot be read.
    """
    kind = volume_format(path)
    try:
        if kind == "DICOM":
            folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
            with os.scandir(folder) as entries:
                return sorted(entry.path for entry in entries if may_be_dicom(entry.name) and entry.is_file())
        if kind == "NIfTI":
            return [other] if (other := other_of_pair(path)) else []
        if kind == "NRRD" and (path.lower().endswith(".nhdr") or os.path.getsize(path) < _SMALL):
            with open(path, "rb") as stream:
                text = re.split(rb"\r?\n\r?\n", stream.read(_SMALL), maxsplit=1)[0]
            named = re.search(rb"^data ?file:(.*)$", text, re.MULTILINE | re.IGNORECASE)
            return [data_file(path, os.fsdecode(named[1]))] if named else []
    except (OSError, ValueError):
        pass
    return []
