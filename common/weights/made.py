# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How an encoder was made, by the JSON beside it: what all that follows needs to know and nobody need say again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..files import read_record
from ..paths import as_path

__all__ = ["NETWORK", "PATCH", "crop_of", "data_made_with", "made_with", "same"]

NETWORK = {"features_per_stage", "blocks_per_stage", "embed_dim", "depth", "num_heads", "token_size"}
PATCH = "patch_size"
_DATA = ("spacing_mm", "reorient")
_PUBLISHED = ([160, 160, 160], [256, 256, 64], [192, 192, 64])  # crops, or regions that crops are cut from


def made_with(encoder: str | Path) -> dict[str, Any]:
    """Return the settings of the pre-training by the JSON beside an encoder, empty where nothing is said.

    Raises:
        WeightsError: if that JSON is damaged.
    """
    beside = as_path(encoder).with_suffix(".json")
    if not beside.is_file():
        return {}
    settings = read_record(beside, error=WeightsError).get("settings")
    return dict(settings) if isinstance(settings, dict) else {}


def data_made_with(encoder: str | Path) -> dict[str, Any]:
    """Return spacing and axes of the pre-training by the JSON beside an encoder, those that it says.

    Raises:
        WeightsError: if that JSON is damaged.
    """
    beside = as_path(encoder).with_suffix(".json")
    about = read_record(beside, error=WeightsError) if beside.is_file() else {}
    told = made_with(encoder) | {name: about[name] for name in _DATA if about.get(name) is not None}
    return {name: told[name] for name in _DATA if name in told}


def crop_of(made: dict[str, Any]) -> list[int] | None:
    """Return the side of the crops that an encoder of another size than the published was made with, else None.

    One of the published crop is fine-tuned at the published crop of fine-tuning, which is another for some methods. Of
    a method that cuts its crops from a region, it is a cube as wide as the region.

    Args:
        made: as :func:`made_with` returns it.

    Example:
        >>> crop_of({"patch_size": [160, 160, 160]})
        >>> crop_of({"patch_size": [96, 96, 64]})
        [96, 96, 64]
        >>> crop_of({"patch_size": [64, 64, 16], "crop_size": 16})
        [64, 64, 64]
    """
    patch = made.get(PATCH)
    sides = [patch] * 3 if isinstance(patch, int) else patch
    if sides is None or sides in _PUBLISHED:
        return None
    return [max(sides)] * 3 if "crop_size" in made else list(sides)


def same(one: Any, other: Any) -> bool:
    """Return whether two values of a setting mean the same: 1 mm is 1 x 1 x 1 mm, regions have an order.

    Example:
        >>> same(1.0, [1, 1, 1]), same((8, 16), [8, 16]), same({"a": 1, "b": 2}, {"b": 2, "a": 1})
        (True, True, False)
    """
    return bool(_plain(one) == _plain(other))


def _plain(value: Any) -> Any:
    value = json.loads(json.dumps(value))
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        return value[0]
    return value
