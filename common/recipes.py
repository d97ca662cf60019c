# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a training is made of in plain values, so that a resumed one can be told from another one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .files import sha256
from .paths import as_path

__all__ = ["changes", "encoder_digest", "recipe"]

_PLAIN = (bool, int, float, str, type(None))
_LONGEST = 60  # letters of a value that a sentence shows
_DIGEST = re.compile("[0-9a-f]{16,}")
_HOW_ONLY = {"foreach", "fused", "capturable", "differentiable", "maximize", "params"}  # of torch's optimizers


def recipe(**parts: Any) -> dict[str, Any]:
    """Describe the parts of a training by their settings, flat and in plain values.

    A number or text is its own description. An object is described by its class and those arguments of its constructor
    that it keeps under the same name, an optimizer by its hyper-parameters. So a change deep in a config is seen, too.

    Args:
        parts: by name: views, optimizer, loss, and single settings.

    Returns:
        Values by path, such as ``optimizer.momentum``.

    Example:
        >>> from common.views import SpatialCrop
        >>> made = recipe(spatial=SpatialCrop(8, zoom_probability=0.5), dropout=0.1)
        >>> made["spatial.zoom_probability"], made["spatial.patch_size"], made["dropout"]
        (0.5, [8, 8, 8], 0.1)
    """
    found: dict[str, Any] = {}
    for name, value in parts.items():
        found |= _described(value, name)
    return found


def _described(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, _PLAIN):
        return {name: value}
    if isinstance(value, Path):
        return {name: str(value)}
    if isinstance(value, Mapping):
        return {path: inner for key, each in value.items() for path, inner in _described(each, f"{name}.{key}").items()}
    if isinstance(value, Sequence):
        if all(isinstance(each, _PLAIN) for each in value):
            return {name: list(value)}
        return {
            path: inner
            for index, each in enumerate(value)
            for path, inner in _described(each, f"{name}.{index}").items()
        }
    package = __name__.split(".")[0]
    # full sharding puts a class of its own above that of a module
    kind = next((base for base in type(value).__mro__ if base.__module__.split(".")[0] == package), type(value))
    kept = {f"{name}.class": kind.__name__}
    own = getattr(value, "defaults", None)
    if isinstance(own, Mapping):  # an optimizer, whose groups may stand at another rate by now
        return kept | _described({key: each for key, each in own.items() if key not in _HOW_ONLY}, name)
    if kind.__module__.split(".")[0] != package:
        return kept
    for argument in inspect.signature(kind).parameters:
        if argument in vars(value):
            kept |= _described(vars(value)[argument], f"{name}.{argument}")
    return kept


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which values differ, empty if none does; what an earlier version did not write down counts as equal.

    Example:
        >>> changes({"lr": 0.1, "optimizer.momentum": 0.9}, {"lr": 0.1, "optimizer.momentum": 0.5, "seed": 1})
        'optimizer.momentum 0.9 -> 0.5'
        >>> changes({"encoder": "ab" * 32}, {"encoder": "cd" * 32})
        'another encoder'
    """
    told = []
    for name, value in now.items():
        if name in before and before[name] != value:
            short = max(len(repr(before[name])), len(repr(value))) < _LONGEST and not _DIGEST.fullmatch(str(value))
            told.append(f"{name} {before[name]!r} -> {value!r}" if short else f"another {name}")
    return "; ".join(told)


def encoder_digest(pretrained: str | Path, *, from_scratch: bool = False) -> str | None:
    """Return the SHA-256 of the encoder that a training starts from, None if from none.

    Args:
        pretrained: the file.
        from_scratch: no encoder is read.
    """
    path = as_path(pretrained)
    if from_scratch or not path.is_file():
        return None
    status = path.stat()
    return _digest(str(path.resolve()), status.st_size, status.st_mtime_ns)


@cache
def _digest(path: str, size: int, changed: int) -> str:
    return sha256(path)
