# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Synthetic checkpoints and inputs as the recorded numbers define them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["draw", "read", "synthetic_weights"]


def read(cell: str) -> dict[str, Any]:
    """Return the recorded numbers of one cell."""
    return json.loads((Path(__file__).parent / f"{cell}.json").read_text())


def draw(salt: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw the input that the numbers were recorded with."""
    rng = np.random.RandomState(zlib.crc32(f"{salt}:{name}".encode()))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def synthetic_weights(golden: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Fill every tensor of the published manifest by the rule that the reference was filled with."""
    weights = {}
    for key, (shape, _) in golden["published_manifest"].items():
        small = golden["small_manifest_differs"].get(key, shape)
        z = draw(golden["salt"], golden["aliases"].get(key, key), tuple(small))
        if len(small) >= 2 and not (key.endswith("pos_embed") or "mask_token" in key):
            weights[key] = z / float(np.sqrt(np.prod(small[1:])))
        elif len(small) == 1 and key.endswith("weight"):
            weights[key] = 1 + 0.1 * z
        else:
            weights[key] = 0.1 * z
    return weights
