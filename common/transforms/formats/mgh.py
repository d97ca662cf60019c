# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""MGH and MGZ, the volumes of FreeSurfer."""

from __future__ import annotations

import os

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader

from ...errors import DataError
from .header import Found, Header, check_claim, notes_on_axes, times, without_ones
from .unpacking import first_bytes, growth, packed_with, read_bytes

__all__ = ["find_mgh"]


def find_mgh(path: str) -> Found:
    """Return the header of an MGH file, and the way to its voxels.

    Raises:
        DataError: if it is none, or claims more than it can hold.
    """
    packed = packed_with(path)
    start = first_bytes(path, 284, packed)
    if len(start) < 284:
        raise DataError(f"{path} cannot be read as MGH (no such header); convert it or leave it out")
    header = MGHHeader(start)
    stored, dtype = tuple(int(side) for side in header.get_data_shape()), header.get_data_dtype()
    offset = int(header.get_data_offset())
    check_claim(path, stored, dtype, before=offset, size=(size := os.path.getsize(path)), growth=growth(packed))
    shape, count = without_ones(stored), int(np.prod(stored)) * dtype.itemsize
    affine = np.asarray(header.get_affine(), dtype=float)
    spacing = tuple(float(value) for value in header["delta"])
    if 0 in spacing:
        raise DataError(f"{path} says its voxels are {times(spacing)} mm; correct its header")
    notes = notes_on_axes(affine, other="SimpleITK does not read MGH")
    return Found(
        Header(shape, affine, dtype, spacing, size, tuple(notes)),
        lambda: read_bytes(path, count, packed, before=offset).view(dtype).reshape(shape, order="F"),
    )
