# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A bundle as it is distributed: real files, every config one complete JSON, the shared code as package ``scripts``.

MONAI Label, the Model Zoo and ``monai.bundle.load`` read one JSON file at a time, and ``scripts`` is the only package
that MONAI Label unloads between two bundles.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.bundles import check_links
from common.errors import SettingsError, WeightsError
from common.files import replace_file, write_json
from common.weights import Receipt

from ..commanding.environment import ROOT
from .configs import BUNDLES, Derived, complete_configs, metadata_of, of_encoder, of_model
from .pages import Pages, write_pages
from .weights import copy_trained, large_files, write_weights

__all__ = ["Carried", "check_target", "write_bundle", "write_zip"]

_FILE_DATE = (
    2022,
    5,
    30,
    0,
    0,
    0,
)  # of every entry of a zip, as the Model Zoo does, so that equal files give equal zips
_STORED = {".pt", ".png", ".ts", ".safetensors"}  # compressing these again takes long and gains nothing


@dataclass(frozen=True)
class Carried:
    """The weights that a bundle carries; none by default.

    Attributes:
        encoder: pre-trained encoder; ``models/model.pt`` becomes this encoder with a decoder that is marked as
            untrained.
        optional: leave the encoder out if it does not fit the network, as the bundle's own need not fit a model.
        model: fine-tuned model to carry as ``models/model.pt`` instead, with its JSON beside it.
        from_scratch: a random network, marked as untrained, to train from.
        address: leave the weights out and say in large_files.yml that they are found under this address; they are
            written beside the folder, to be put there.
    """

    encoder: Path | None = None
    optional: bool = False
    model: Path | None = None
    from_scratch: bool = False
    address: str | None = None

    @property
    def start(self) -> str:
        """What a task has of the bundle that it is made from."""
        if self.model is None and not self.from_scratch:
            return "to be fine-tuned from the encoder of"
        return f"{'to be trained from scratch' if self.model is None else 'fine-tuned'} with the network of"


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse to write over a folder that is there.

    Raises:
        SettingsError: if it may not be replaced.
    """
    if target.exists() and not overwrite:
        raise SettingsError(
            f"{target} exists, and what was trained in it would be lost; give another --output, or replace it "
            "with --overwrite true"
        )


def write_bundle(
    bundle: str,
    target: Path,
    *,
    settings: Mapping[str, Any],
    carried: Carried | None = None,
    derived: Derived | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the distributed form of a bundle, whole or not at all.

    Args:
        bundle: of the collection.
        target: folder to write, named like the bundle.
        settings: top-level names of its configs with other defaults.
        carried: its weights; none by default.
        derived: task of the user's that the bundle is made for.
        overwrite: replace a folder that is there.

    Returns:
        the folder.

    Raises:
        SettingsError: if the folder is there and may not be replaced, or settings are not those of the model.
        WeightsError: if the encoder does not fit and is not optional.
    """
    carried = carried or Carried()
    check_target(target, overwrite=overwrite)
    check_links(BUNDLES / bundle)
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    of_task = {} if derived is None else derived.settings()
    told: dict[str, Any] = {}
    if carried.model is not None:
        told = of_model(bundle, carried.model, {**of_task, **settings})
    elif carried.encoder is not None:
        told = of_encoder(bundle, carried.encoder, settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        shutil.copytree(
            ROOT / "common", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__", "configs", "*.pyc")
        )
        random = {"from_scratch": True} if carried.from_scratch else {}
        configs = complete_configs(bundle, {**settings, **random}, told, derived)
        data = {**told, **of_task}
        metadata = metadata_of(bundle, {**data, **settings}, derived, carried.start)
        for name, config in {**configs, "metadata.json": metadata}.items():
            write_json(config, folder / "configs" / name)
        for name in ("configs/logging.conf", "LICENSE"):
            shutil.copyfile(BUNDLES / bundle / name, folder / name)
        receipt = _write_carried(bundle, folder, carried, settings, data)
        pages = Pages(
            bundle,
            configs,
            metadata,
            derived,
            carried.start,
            receipt,
            trained=carried.model is not None,
            random=carried.from_scratch,
            hosted=bool(carried.address),
        )
        write_pages(folder, pages)
        if carried.address:
            _put_aside(folder, target.parent / f"{target.name}_weights", carried.address)
        for path in sorted(folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            target.replace(Path(scratch) / "old")
        folder.replace(target)
    return target


def _write_carried(
    bundle: str, folder: Path, carried: Carried, settings: Mapping[str, Any], data: Mapping[str, Any]
) -> Receipt | None:
    """Write the weights that a bundle carries; return the receipt of the encoder."""
    receipt = None
    if carried.encoder is not None or carried.from_scratch:
        try:
            encoder = None if carried.from_scratch else carried.encoder
            receipt = write_weights(bundle, folder, encoder, settings, data)
        except WeightsError:
            if not carried.optional:
                raise
    if carried.model is not None:
        copy_trained(carried.model, folder)
    return receipt


def _put_aside(folder: Path, beside: Path, address: str) -> None:
    """Move the weights out of a bundle, and say where they will be found."""
    entries = large_files(folder, address)
    (folder / "large_files.yml").write_text(yaml.safe_dump({"large_files": entries}, sort_keys=False), "utf-8")
    beside.mkdir(exist_ok=True)
    for file in (folder / "models").glob("*.pt"):
        os.replace(file, beside / file.name)


def write_zip(folder: Path, *, version: str) -> tuple[Path, str]:
    """Pack a bundle as ``<name>_v<version>.zip`` beside it, with one folder at the top; equal files give equal bytes.

    Returns:
        the zip and its SHA-1, which the Model Zoo's list holds.
    """
    path = folder.parent / f"{folder.name}_v{version}.zip"

    def write(temporary: str) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for file in sorted(
                path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
            ):
                entry = zipfile.ZipInfo(f"{folder.name}/{file.relative_to(folder).as_posix()}", _FILE_DATE)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_STORED if file.suffix in _STORED else zipfile.ZIP_DEFLATED
                with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, 2**20)

    replace_file(path, write)
    with path.open("rb") as stream:
        return path, hashlib.file_digest(stream, "sha1").hexdigest()
