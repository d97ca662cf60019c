# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The network in a checkpoint of anybody: which of its dictionaries it is, and its names without what wraps it.

Wrapped by DistributedDataParallel, ``torch.compile`` or a method, an encoder has names such as
``module.student.backbone.encoder.stem...``; saved alone, such as ``stem...``. What is found is where the first
convolution lies: all that stands before it wraps the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError

__all__ = ["network_of", "unwrapped"]

# the first convolution of each backbone, whatever wraps it
_STEM = re.compile(r"(?P<wrapper>.*?)(?P<encoder>encoder\.)?stem\.convs\.0\.(?:all_modules\.0|conv)\.weight")
_TOKENS = re.compile(r"(?P<wrapper>.*?)(?P<encoder>encoder\.)?down_projection\.proj\.weight")
_COPIES = ("decoder.", "architecture.")  # second names of one network
_BARE = re.compile(r"(stem\.convs|stages\.\d+\.blocks)\.")
_USUAL = ("network_weights", "state_dict")  # where the reference and most others keep it


def _roots(names: Mapping[str, Any]) -> dict[str, bool]:
    """Return what stands before each encoder among these names, and whether it is called ``encoder.`` itself."""
    found: dict[str, bool] = {}
    for name in names:
        match = _STEM.fullmatch(name) if isinstance(name, str) else None
        if match and not match["wrapper"].endswith(_COPIES):
            found[match["wrapper"]] = bool(match["encoder"])
        elif match := _TOKENS.fullmatch(name) if isinstance(name, str) else None:
            found[match["wrapper"]] = True  # Primus may be wrapped in an "encoder." or not
    return found


def network_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, its names as they are.

    Raises:
        WeightsError: if there is none, or more than one.
    """
    if isinstance(usual := next((content[key] for key in _USUAL if content.get(key) is not None), None), dict):
        found = usual
    else:
        nested = {key: value for key, value in content.items() if isinstance(value, dict) and _roots(value)}
        if len(nested) > 1:
            raise _several(path, list(nested))
        flat = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        found = next(iter(nested.values()), {}) or flat
    if not found:
        raise WeightsError(
            f"{path} holds no network: it has {', '.join(map(repr, list(content)[:5])) or 'nothing'}, where a "
            "checkpoint of the reference has 'network_weights'"
        )
    spark = content.get("spark_weights")  # of a Spark3D training, its second dictionary
    found = {**spark, **found} if isinstance(spark, dict) else found
    other = [key for key, value in found.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if other:
        raise WeightsError(f"{path}: {other[0]!r} of its network is not a tensor; this is no state dict")
    return found


def unwrapped(weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict under the names that the reference would give, and what was done to them.

    Raises:
        WeightsError: if there are two encoders in it, which differ.
    """
    roots = _roots(weights)
    if len(roots) > 1 and not _alike(weights, list(roots)):
        raise _several(path, list(roots))
    if not roots:
        return dict(weights), []
    wrapper, named = next(iter(roots.items()))
    outer = re.sub(r"(^|(?<=\.))encoder\.$", "", wrapper)  # which a method may have for its encoder
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        inner = name.removeprefix(wrapper) if name.startswith(wrapper) else name.removeprefix(outer)
        found[inner if named or not _BARE.match(inner) else f"encoder.{inner}"] = value
    notes = [f"names are taken without their beginning {wrapper!r}"] if wrapper else []
    return found, [*notes, *([] if named else ["it is an encoder alone, its names without 'encoder.'"])]


def _alike(weights: Mapping[str, Tensor], roots: list[str]) -> bool:
    """Return whether the networks that begin so hold the same."""
    first, *others = [
        {name.removeprefix(root): value for name, value in weights.items() if name.startswith(root)} for root in roots
    ]
    return all(
        first.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in first.items())
        for other in others
    )


def _several(path: Path, names: list[str]) -> WeightsError:
    told = ", ".join(map(repr, names))
    return WeightsError(
        f"{path} holds several encoders that differ, under {told}; load it, save the one that you want alone, as "
        "torch.save(encoder, ...) of its dictionary of tensors does, and import that"
    )
