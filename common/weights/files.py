# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoint files: tensors only in, whole files only out."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..files import replace_file

__all__ = [
    "check_values",
    "read_checkpoint",
    "read_metadata",
    "write_checkpoint",
    "write_safetensors",
]


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Save ``content`` atomically: a kill or a full disk leaves the earlier file as it was.

    Raises:
        OSError: with ``ENOSPC`` and the path if the disk is full.
    """

    def write(temporary: str) -> None:
        with open(temporary, "wb") as stream:
            torch.save(content, stream)

    path = Path(path)
    try:
        replace_file(path, write)
    except RuntimeError as error:  # torch turns a short write into a RuntimeError of its own
        if shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(28, "No space left on device", str(path)) from error
        raise


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint on the CPU, refusing anything but tensors and plain values.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote.
        mmap: leave tensors in the file until they are read, so that what is not needed costs no memory.

    Raises:
        WeightsError: if the file is missing, cut short, not a checkpoint, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no checkpoint {path}; check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # the format of before torch 1.6 is no zip archive and cannot stay in the file
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".:") if str(error) else type(error).__name__
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete checkpoint of tensors: {reason}; "
            "fetch or write it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the receipt inside a ``.safetensors`` file, empty for any other file."""
    if Path(path).suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("receipt", "{}"))
    except Exception as error:
        raise WeightsError(f"{path} is not a complete safetensors file: {error}") from error
    return about if isinstance(about, dict) else {}


def write_safetensors(weights: Mapping[str, Tensor], path: str | Path, *, receipt: Mapping[str, Any]) -> None:
    """Save tensors as ``.safetensors`` atomically, with a receipt as metadata."""
    from safetensors.torch import save_file

    content = {name: value.contiguous() for name, value in weights.items()}
    metadata = {"format": "pt", "receipt": json.dumps(dict(receipt))}
    replace_file(Path(path), lambda temporary: save_file(content, temporary, metadata=metadata))


def check_values(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse weights that no training can have left: not finite, or wiped.

    Raises:
        WeightsError: naming the tensors.
    """
    other = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if other:
        raise WeightsError(f"{path}: {other[0]} is a {type(weights[other[0]]).__name__}, not a tensor")
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise WeightsError(
            f"{path} holds NaN or infinite values in {len(broken)} of {len(weights)} tensors "
            f"({', '.join(broken[:3])}); its training had failed, or the file is damaged"
        )
    wiped = [
        name for name, value in weights.items() if value.dim() > 1 and "mask_token" not in name and not value.any()
    ]
    if wiped:
        raise WeightsError(
            f"{path} holds only zeros in {len(wiped)} of {len(weights)} tensors ({', '.join(wiped[:3])}); "
            "the file is damaged: fetch or write it again"
        )
