# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""NumPy's numbers and arrays in a checkpoint, read without letting the file call NumPy.

Logs of trainings hold numbers such as ``np.float64(0.3)``, which a pickle spells as calls of a few names. A file that
may call the real ones could set flags of a NumPy type at will, and with them make it read memory that is not its own.
The stand-ins here take the same arguments and give plain Python numbers, texts and lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["NUMPY_VALUES"]


class _Type:
    """What a pickle says of a NumPy type: its letter and size, and the order of its bytes."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str) or code[:1] not in ("b", "i", "u", "f", "c", "U", "S", "O") or len(code) > 9:
            raise ValueError(f"values of the NumPy type {code!r} are not read")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def values(self, data: bytes | str) -> list[Any]:
        """Return what bytes of this type hold."""
        raw = data.encode("latin1") if isinstance(data, str) else data
        plain: list[Any] = np.frombuffer(raw, np.dtype(self.order + self.code)).tolist()
        return plain


class _Array(list[Any]):
    """The values of an array, in nested lists of its shape."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, data = state
        values = list(data) if kind.code.startswith("O") else kind.values(data)
        if math.prod(shape) != len(values):
            raise ValueError(f"an array of shape {list(shape)} has {len(values)} values")
        array = np.empty(len(values), dtype=object)
        array[:] = values
        self[:] = array.reshape(shape, order="F" if by_columns else "C").tolist() if shape else values


def _scalar(kind: _Type, data: Any) -> Any:
    return data if kind.code.startswith("O") else kind.values(data)[0]


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _empty() -> bytes:
    return b""


# what stands in for each name, as NumPy 2 and NumPy 1 write them; each is allowed by itself
NUMPY_VALUES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_Type, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (_empty, "builtins.bytes"),  # how the values of an empty array are written
]
