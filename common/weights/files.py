# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoints and the JSON beside them: tensors and plain values only in, whole files only out.

Everything written here can be checked when it is read, and is: the zip archive of a ``.pt`` file holds a checksum of
each part, ``.safetensors`` files of this project a digest of their tensors, and the JSON beside weights their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..files import CHECKSUM, checksum, read_record, replace_file, sha256
from ..paths import as_path
from .numpy_values import NUMPY_VALUES

__all__ = [
    "check_values",
    "checked_sha256",
    "read_checkpoint",
    "read_metadata",
    "write_checkpoint",
    "write_safetensors",
]

_TENSORS = "sha256_of_tensors"  # in the receipt inside a safetensors file
_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\n"  # how files of torch.save begin, now and before torch 1.6


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Save ``content`` atomically: a kill or a full disk leaves the earlier file as it was.

    Raises:
        OSError: with ``ENOSPC`` and the path if the disk is full.
    """

    def write(temporary: str) -> None:
        with open(temporary, "wb") as stream:
            torch.save(content, stream)

    path = as_path(path)
    try:
        replace_file(path, write)
    except RuntimeError as error:  # torch turns a short write into a RuntimeError of its own
        if shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(28, "No space left on device", str(path)) from error
        raise


def _recorded_sha256(path: Path) -> str | None:
    """Return what the JSON beside a file of weights says its SHA-256 is, None where nothing does."""
    beside = path.with_suffix(".json")
    recorded = read_record(beside, error=WeightsError).get("sha256") if beside.is_file() else None
    return recorded if isinstance(recorded, str) else None


def checked_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file of weights, compared with the one in the JSON beside it, if there is one.

    Raises:
        WeightsError: if it is another file, or the JSON is damaged.
    """
    path = as_path(path)
    digest = sha256(path)
    recorded = _recorded_sha256(path) or digest
    if recorded != digest:
        beside = path.with_suffix(".json").name
        raise WeightsError(
            f"{path} is not the file that {beside} beside it is about: its sha256 is {digest[:12]}..., not "
            f"{recorded[:12]}... Restore it, repeat what wrote it if that was cut short, or, if the file is right, "
            f"move {beside} away"
        )
    return digest


def _check_archive(path: Path) -> None:
    """Compare the checksums that ``torch.save`` wrote, which ``torch.load`` does not.

    Raises:
        WeightsError: if one differs, or the file is cut short or was not written by ``torch.save``.
    """
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start == _LEGACY or path.suffix == ".safetensors":
        return
    whole = f"{path} ({path.stat().st_size:,} bytes) is not a complete checkpoint of tensors"
    if start != _ZIP:
        if len(start) == 4 and start.strip(b"\0"):
            raise WeightsError(
                f"{path} is no checkpoint: it does not begin as a file of torch.save does; check the path"
            )
        raise WeightsError(f"{whole}: it begins with nothing; fetch or write it again")
    if not zipfile.is_zipfile(path):
        raise WeightsError(f"{whole}: its end is missing; fetch or write it again")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except PermissionError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({error}); fetch or write it again") from error
    if damaged is not None:
        raise WeightsError(f"{path} is damaged: the checksum of its part {damaged} is wrong; fetch or write it again")


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint on the CPU, whole and undamaged, refusing anything but tensors and plain values.

    NumPy's numbers and arrays, which logs of trainings hold, come as plain numbers and lists.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote.
        mmap: leave tensors in the file until they are read, so that what is not needed costs no memory.

    Raises:
        WeightsError: if the file is missing, cut short, damaged, another one than the JSON beside it is about, not a
            checkpoint, or holds other objects.
    """
    path = as_path(path)
    if not path.is_file():
        raise WeightsError(f"there is no checkpoint {path}; check the path")
    _check_archive(path)
    if _recorded_sha256(path) is not None:
        checked_sha256(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)[0]
    try:
        with torch.serialization.safe_globals(NUMPY_VALUES):
            # the format of before torch 1.6 is no zip archive and cannot stay in the file
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:
        raise WeightsError(_why_unread(path, error)) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _why_unread(path: Path, error: Exception) -> str:
    """Return a sentence on an archive that is whole and cannot be read, or on a file of the old format."""
    text = str(error)
    reason = text.splitlines()[0].rstrip(".:") if text else type(error).__name__
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if found := foreign or re.search(r"WeightsUnpickler error: (.+)", text):
        reason = found[1].rstrip(".:")
    if foreign or zipfile.is_zipfile(path):
        return (
            f"{path} holds other things than tensors and plain values ({reason}), which could execute anything and are "
            "not read; save the tensors alone, as torch.save(network.state_dict(), ...) does"
        )
    return (
        f"{path} ({path.stat().st_size:,} bytes) is not a complete checkpoint of tensors: {reason}; "
        "fetch or write it again"
    )


def _digest_of(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and receipt, compared with the digests that :func:`write_safetensors` wrote."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        receipt = json.loads(metadata.get("receipt", "{}"))
    except Exception as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({error}); fetch or write it again") from error
    about = receipt if isinstance(receipt, dict) else {}
    sealed = about.pop(CHECKSUM, None)
    lost = sealed is None and any(f'"{CHECKSUM}"' in value or _TENSORS in value for value in metadata.values())
    if lost or sealed not in (None, checksum(about)) or about.pop(_TENSORS, digest := _digest_of(weights)) != digest:
        raise WeightsError(f"{path} is damaged: its digests are those of something else; fetch or write it again")
    return weights, about


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the receipt inside a ``.safetensors`` file, empty for any other file.

    Raises:
        WeightsError: if the file is cut short or damaged.
    """
    return _open_safetensors(as_path(path))[1] if as_path(path).suffix == ".safetensors" else {}


def write_safetensors(weights: Mapping[str, Tensor], path: str | Path, *, receipt: Mapping[str, Any]) -> None:
    """Save tensors as ``.safetensors`` atomically, with a receipt and the digest of the tensors as metadata."""
    from safetensors.torch import save_file

    content = {name: value.contiguous() for name, value in weights.items()}
    about = {**receipt, _TENSORS: _digest_of(content)}
    metadata = {"format": "pt", "receipt": json.dumps({**about, CHECKSUM: checksum(about)})}
    replace_file(as_path(path), lambda temporary: save_file(content, temporary, metadata=metadata))


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
