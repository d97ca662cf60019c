# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoints and the JSON beside them: tensors and plain values only in, whole files only out.

Everything written here can be checked when it is read, and is: the zip archive of a ``.pt`` file holds a checksum of
each part, ``.safetensors`` files of this project a digest of their tensors, and the JSON beside weights their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import pickletools
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
_ZIP = b"PK\x03\x04"  # how files of torch.save begin, since torch 1.6
_LEGACY = re.compile(rb"\x80.\x8a\n", re.DOTALL)  # and before: a pickle of a large number
_AGAIN = "fetch or write it again"
# what other files begin with, and what they are
_OTHERS = [
    (
        rb"version https://git-lfs",
        f"is a Git LFS pointer, in place of the file that it names; {_AGAIN}, with git lfs pull",
    ),
    (rb"\s*<(!doctype|html|\?xml)", "is a web page, perhaps of a login or an error; look at it, and check the address"),
    (rb"\x89HDF", "is an HDF5 file, as Keras and TensorFlow write, and no checkpoint of PyTorch; check the path"),
    (rb"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (rb"\x93NUMPY", "is a NumPy array, and no checkpoint; check the path"),
    (rb"\x80[\x02-\x05]", "is a plain pickle, and no checkpoint of torch.save, so it is not read; check the path"),
    (rb"\s*[{\[]", "looks like JSON, and is no checkpoint; check the path"),
]


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


def _kind(path: Path) -> str:
    """Return by its beginning what a file is: ``zip``, ``legacy``, ``safetensors``, or empty for anything else."""
    with open(path, "rb") as stream:
        start = stream.read(9)
    if start.startswith(_ZIP):
        return "zip"
    if _LEGACY.match(start):
        return "legacy"
    header = int.from_bytes(start[:8], "little")
    return "safetensors" if path.suffix == ".safetensors" or (start[8:] == b"{" and header < 2**32) else ""


def _check_archive(path: Path) -> None:
    """Compare the checksums that ``torch.save`` wrote, which ``torch.load`` does not.

    Raises:
        WeightsError: if one differs, or the file is cut short or was not written by ``torch.save``.
    """
    kind = _kind(path)
    if kind in ("legacy", "safetensors"):
        return
    whole = f"{path} ({path.stat().st_size:,} bytes) is not a complete checkpoint of tensors"
    if kind != "zip":
        with open(path, "rb") as stream:
            start = stream.read(64)
        if not start.strip(b"\0") or len(start) < 4:
            raise WeightsError(f"{whole}: it begins with nothing; {_AGAIN}")
        told = next((told for pattern, told in _OTHERS if re.match(pattern, start, re.I)), None)
        raise WeightsError(
            f"{path} {told}"
            if told
            else f"{path} is no checkpoint: it does not begin as a file of torch.save does; check the path"
        )
    if not zipfile.is_zipfile(path):
        raise WeightsError(f"{whole}: its end is missing; {_AGAIN}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
    except PermissionError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({error}); {_AGAIN}") from error
    if damaged is not None:
        raise WeightsError(f"{path} is damaged: the checksum of its part {damaged} is wrong; {_AGAIN}")
    if not any(name.endswith("data.pkl") for name in names):
        raise WeightsError(
            f"{path} is a zip archive of something else ({', '.join(names[:3]) or 'nothing'}), and no checkpoint; "
            "unpack it, or check the path"
        )


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint on the CPU, whole and undamaged, refusing anything but tensors and plain values.

    NumPy's numbers and arrays, which logs of trainings hold, come as plain numbers and lists.

    Args:
        path: safetensors, or what ``torch.save`` wrote, now or before torch 1.6; told apart by how they begin.
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
    if _kind(path) == "safetensors":
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
    if zipfile.is_zipfile(path) or (_pickles_whole(path) and "EOF" not in reason):
        return (
            f"{path} holds other things than tensors and plain values ({reason}), which could execute anything and are "
            "not read; save the tensors alone, as torch.save(network.state_dict(), ...) does"
        )
    return f"{path} ({path.stat().st_size:,} bytes) is not a complete checkpoint of tensors: {reason}; {_AGAIN}"


def _pickles_whole(path: Path) -> bool:
    """Return whether the five pickles, with which a file of before torch 1.6 begins, have their ends; none is run."""
    try:
        with open(path, "rb") as stream:
            for _ in range(5):
                for _ in pickletools.genops(stream):
                    pass
    except Exception:  # as many as there are ways to be cut
        return False
    return True


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
    except Exception as error:
        if _safetensors_whole(path):
            raise WeightsError(
                f"{path} is a complete safetensors file with tensors that cannot be read here ({error}); convert them "
                "to float32 where it was made"
            ) from error
        raise WeightsError(f"{path} is not a complete safetensors file ({error}); {_AGAIN}") from error
    try:
        receipt = json.loads(metadata.get("receipt", "{}"))
    except ValueError:
        receipt = {}  # of somebody else, in words; where it was ours, its digests are missing now, which is told below
    about = receipt if isinstance(receipt, dict) else {}
    sealed = about.pop(CHECKSUM, None)
    lost = sealed is None and any(f'"{CHECKSUM}"' in value or _TENSORS in value for value in metadata.values())
    if lost or sealed not in (None, checksum(about)) or about.pop(_TENSORS, digest := _digest_of(weights)) != digest:
        raise WeightsError(f"{path} is damaged: its digests are those of something else; {_AGAIN}")
    return weights, about


def _safetensors_whole(path: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            return False
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False
    return 8 + length + max(ends, default=0) == path.stat().st_size


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the receipt inside a safetensors file, empty for any other file.

    Raises:
        WeightsError: if the file is cut short or damaged.
    """
    path = as_path(path)
    return _open_safetensors(path)[1] if path.is_file() and _kind(path) == "safetensors" else {}


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
            f"{path} holds only zeros in {len(wiped)} of {len(weights)} tensors ({', '.join(wiped[:3])}), as no "
            "training leaves them: they were wiped before it was saved, or never filled; use another file"
        )
