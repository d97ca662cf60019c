# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the voxels of a label map or a mask are: whole numbers, in the smallest type that holds them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DataError

__all__ = ["smallest_type", "whole_numbers"]

_ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of a value that a header scales in float32
_MOST = 1e-3  # from a whole number, however large it is


def smallest_type(lowest: int, highest: int) -> Any:
    """Return the smallest type for whole numbers in a range, of those that PyTorch reckons with.

    Example:
        >>> smallest_type(0, 255), smallest_type(0, 256), smallest_type(-1, 3), smallest_type(0, 614_454_277)
        (dtype('uint8'), dtype('int16'), dtype('int16'), dtype('int32'))
    """
    kinds = (np.uint8, np.int16, np.int32, np.int64)
    fits = (np.dtype(kind) for kind in kinds if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max)
    return next(fits, np.dtype(np.int64))


def whole_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """Return the whole numbers that a label map means, in the smallest type that holds them.

    What is off by no more than the rounding of float32, as in a mask of 0 and 255 with a scale of 1 / 255, is that
    number.

    Args:
        values: as they were read.
        name: of the file, for the message.

    Raises:
        DataError: naming a value that is none.

    Example:
        >>> whole_numbers(np.array([0, 1.0000001, 3.0000002]), "a.nii.gz")
        array([0, 1, 3], dtype=uint8)
    """
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            odd = values[~np.isfinite(values)]
            raise DataError(f"{name} holds the value {odd[0]}; labels are whole numbers, correct the file")
        near = np.rint(values)
        odd = values[np.abs(values - near) > np.minimum(_ROUNDING * np.maximum(np.abs(near), 1), _MOST)]
        if odd.size:
            raise DataError(
                f"{name} holds the value {odd[0]!s}; a label map holds whole numbers: save the classes rather than "
                "probabilities, and resample with nearest neighbours"
            )
        values = near
    elif values.dtype.kind not in "iu":
        raise DataError(f"{name} holds {values.dtype} voxels; save plain numbers, one per voxel")
    lowest, highest = (int(values.min()), int(values.max())) if values.size else (0, 0)
    return values.astype(smallest_type(lowest, highest), copy=False)
