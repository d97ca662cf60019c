# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the files of a stored volume hold: chunked arrays, and tables of the voxels that crops are drawn around."""

from __future__ import annotations

import io

import blosc2
import numpy as np

from ..preparing.settings import BLOCK

__all__ = ["frame", "saved", "some_voxels", "voxels_by_value"]

_CHUNK = (64, 64, 64)
_VOXELS_KEPT, _ANATOMY_KEPT = 10_000, 1_000


def voxels_by_value(label: np.ndarray | None) -> tuple[dict[int, int], dict[int, tuple[int, int]], np.ndarray]:
    """Count the values of a label map and keep voxels of each, from which foreground crops are drawn.

    As in nnU-Net, 10,000 of each value, but at least one in a hundred.

    Returns:
        voxels of each value, the rows of the table that hold some of them, and the table ``(n, 3)``.
    """
    values: dict[int, int] = {}
    places: dict[int, tuple[int, int]] = {}
    rows: list[np.ndarray] = [np.zeros((0, 3), np.uint16)]
    rng = np.random.default_rng(1234)
    row = 0
    for value in [] if label is None else np.unique(label).tolist():
        found = np.flatnonzero(label == value)
        kept = found
        limit = max(_VOXELS_KEPT, -(-len(found) // 100))
        if len(found) > limit:
            kept = np.sort(rng.choice(found, limit, replace=False))
        values[value] = len(found)
        places[value] = (row, row + len(kept))
        row += len(kept)
        assert label is not None
        rows.append(np.stack(np.unravel_index(kept, label.shape), axis=1).astype(np.uint16))
    return values, places, np.concatenate(rows)


def some_voxels(mask: np.ndarray) -> np.ndarray:
    """Return up to 1,000 voxels of a mask, ``(n, 3)``: more than are drawn from one volume in the longest run."""
    found = np.flatnonzero(mask)
    if len(found) > _ANATOMY_KEPT:
        found = np.sort(np.random.default_rng(1234).choice(found, _ANATOMY_KEPT, replace=False))
    return np.stack(np.unravel_index(found, mask.shape), axis=1).astype(np.uint16)


def frame(array: np.ndarray) -> bytes:
    """Return a chunked, compressed array as the bytes of its file."""
    return blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=(1,) * (array.ndim - 3) + tuple(map(min, _CHUNK, array.shape[-3:])),
        blocks=(1,) * (array.ndim - 3) + tuple(map(min, BLOCK, array.shape[-3:])),
        cparams={"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
        dparams={"nthreads": 1},
        contiguous=True,  # laid out as in the file while it is made
    ).to_cframe()


def saved(table: np.ndarray) -> bytes:
    """Return the bytes of an ``.npy`` file."""
    stream = io.BytesIO()
    np.save(stream, table)
    return stream.getvalue()
