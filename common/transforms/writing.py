# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Writing predictions whole or not at all, in the geometry of the image they belong to."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import NibabelWriter
from torch import Tensor

from .formats.nifti import nifti_header
from .reading import read_header, volume_format

__all__ = ["AtomicNibabelWriter", "header_like", "write_channels"]


def header_like(file: str | Path, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a NIfTI header with the affine, codes and units of ``file``, for other voxels.

    What else the file's header says (scaling, display range, intent, extensions) is about its own voxels. A file of
    another format than NIfTI has an affine, which is written in millimetres of the scanner.
    """
    if volume_format(file) == "NIfTI":
        header = nifti_header(file).copy()
    else:
        affine = read_header(file).affine
        header = nib.Nifti1Header()
        header.set_data_shape(shape)
        header.set_qform(affine, code="scanner")
        header.set_sform(affine, code="scanner")
        header.set_xyzt_units("mm")
    for name in ("cal_max", "cal_min", "intent_p1", "intent_p2", "intent_p3", "intent_code", "slice_code"):
        header[name] = 0
    header["intent_name"] = b""
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 0
    return header


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a temporary name that becomes ``path`` if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC or shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(errno.ENOSPC, "No space left on device", str(path.parent)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[Any]:
    """Open a file to write, compressed if it ends in ``.gz``: by isal, twice as fast as zlib, and without the time, so
    that the same voxels are the same bytes.
    """
    with open(path, "wb") as file:
        if path.suffix != ".gz":
            yield file
            return
        from isal import igzip

        with igzip.IGzipFile("", "wb", compresslevel=2, fileobj=file, mtime=0) as packed:
            yield packed


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer for ``SaveImaged``, through a temporary file: a killed run leaves no half prediction.

    A map whose metadata name its ``source_file`` is written with that file's geometry to the last bit: affine, codes of
    qform and sform, units.
    """

    def set_metadata(self, meta_dict: Any, resample: bool = True, **options: Any) -> None:
        """Remember whose geometry it is; MONAI would pass the voxels through its resampling, in float64."""
        self.source = (meta_dict or {}).get("source_file")
        if self.source is None:
            super().set_metadata(meta_dict, resample=resample, **options)

    def write(self, filename: str, verbose: bool = False, **kwargs: Any) -> None:
        """Write to ``filename``."""
        with _whole(Path(filename)) as temporary:
            if self.source is None:
                super().write(temporary, verbose=verbose, **kwargs)
                return
            voxels = np.asarray(self.data_obj)
            voxels = voxels.astype(self.output_dtype or voxels.dtype, copy=False)
            header = header_like(self.source, voxels.shape, voxels.dtype)
            kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
            with _stream(temporary) as stream:
                kind(voxels, header.get_best_affine(), header).to_stream(stream)


def write_channels(volumes: Iterable[Tensor], count: int, path: Path, *, like: str) -> None:
    """Write a four-dimensional float32 NIfTI, one volume after the other, so that only one is in memory.

    Args:
        volumes: each ``(X, Y, Z)``.
        count: number of them.
        path: file to write, compressed if it ends in ``.gz``.
        like: image with their geometry.
    """
    with _whole(path) as temporary, _stream(temporary) as stream:
        for index, volume in enumerate(volumes):
            if index == 0:
                header = header_like(like, (*volume.shape, count), np.float32)
                header.write_to(stream)
            stream.write(volume.cpu().numpy().astype(header.get_data_dtype(), copy=False).tobytes(order="F"))
