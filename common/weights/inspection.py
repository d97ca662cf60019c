# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a weights file is, by its receipt or by what is in it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from ..paths import as_path
from ..terminal import openmind
from .cells import BACKBONES, METHODS, describe
from .files import check_values, read_checkpoint
from .orders import known_order
from .origins import UNKNOWN, Told, origin_of
from .published import network_name, published_name
from .receipt import Receipt
from .reference import read_reference
from .transfer import origin_receipt
from .wrappers import network_of, unwrapped

__all__ = ["IMPORT", "inspect"]

IMPORT = "import it with: "  # begins the last line of what can be imported


def inspect(path: str | Path, *, plan_file: str | Path | None = None, told: Told | None = None) -> list[str]:
    """Return lines that say what a file is.

    Args:
        path: any file of weights.
        plan_file: adaptation plan, for a checkpoint of the reference.
        told: what is known of such a file besides what it holds.

    Raises:
        WeightsError: if the file cannot be read.
    """
    content = read_checkpoint(path, mmap=True)
    content.pop("init_args", None)
    receipt = origin_receipt(path)
    stored = {
        entry.name: receipt.provenance[entry.name] for entry in fields(Receipt) if entry.name in receipt.provenance
    }
    network, kind = _network(content, as_path(path))
    lines = [f"{path}: {kind}", _size(network)]
    try:
        check_values(network, path)
    except WeightsError as error:
        lines.append(f"warning: {error}")
    if "taken" in stored:
        digest = receipt.provenance.get("source_sha256", receipt.sha256)
        whole = Receipt(**{**stored, "source": receipt.provenance.get("source", str(path)), "sha256": digest})
        whole.provenance = {}
        whole.notes = [*whole.notes, *receipt.notes]
        return [*lines, "its receipt:", whole.summary()]
    receipt.taken = list(network)
    if kind == REFERENCE:
        return [*lines, *_reference(path, plan_file, told or Told())]
    if kind in (OWN_ENCODER, OWN_STATE):
        if kind == OWN_STATE:
            settings = content.get("settings", {})
            receipt.method, receipt.backbone, receipt.citation = describe(str(settings.get("bundle", "")))
            receipt.spacing_mm = settings.get("spacing_mm")
            receipt.patch_size = settings.get("crop_size", settings.get("patch_size"))
            lines.append(f"epochs done: {content.get('epoch')}")
        receipt.parameters = {"taken": sum(value.numel() for value in network.values())}
        receipt.encoder_share = float(any("encoder." in name for name in network))
        if not receipt.provenance and kind == OWN_ENCODER:
            receipt.notes.append("nothing beside the file says where it comes from")
        return [*lines, receipt.summary()]
    first = ", ".join(list(network)[:3])
    return [*lines, f"its first names are {first}" if first else "it holds no tensors"]


OWN_ENCODER = "backbone of this collection"
OWN_STATE = "pre-training state of this collection"
REFERENCE = "checkpoint of the reference"
FOREIGN = "of no network of OpenMind"


def _network(content: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the state dict in a file, and what kind of file it is."""

    def tensors(value: object) -> dict[str, Tensor]:
        return (
            {name: entry for name, entry in value.items() if isinstance(entry, Tensor)}
            if isinstance(value, dict)
            else {}
        )

    if isinstance(content.get("method"), dict) and "settings" in content:
        return tensors(content["method"]), OWN_STATE
    network = tensors(content)
    if any(name.startswith(("encoder.stem.conv.", "encoder.transformer.")) for name in network):
        return network, OWN_ENCODER
    try:
        network = network_of(content, path)
        named, _ = unwrapped(network, path)
    except WeightsError as error:
        several = str(error).removeprefix(f"{path} ")
        return network, several if "several" in several else FOREIGN
    return network, REFERENCE if any(network_name(name)[0] == "backbone" for name in named) else FOREIGN


def _size(network: dict[str, Tensor]) -> str:
    shared = {(value.untyped_storage().data_ptr(), value.storage_offset()): value.numel() for value in network.values()}
    return f"{len(network)} tensors, {sum(shared.values()):,} numbers (those with two names counted once)"


def _reference(path: str | Path, plan_file: str | Path | None, told: Told) -> list[str]:
    file = read_reference(path, plan_file=plan_file)
    found = file.recognise()
    if not found.backbone:
        return [found.why]
    origin = origin_of(found, told, cited=file.citations)
    about = Receipt(str(path), "", method=origin.method, backbone=BACKBONES[found.backbone].title)
    parts = [published_name(key)[0] for key in file.weights]
    bundles = f"{origin.key}_{found.backbone}" if origin.key else f"any that ends in _{found.backbone}"
    lines = [
        about.origin,
        f"its tensors would fit {' or '.join(found.bundles)}, by {found.why}"
        if len(found.bundles) < len(METHODS)
        else found.why,
        f"trainer_name {file.trainer or 'not given'}",
        f"of its names {parts.count('backbone')} are of the backbone, {parts.count('method')} of the method alone, "
        f"{parts.count('alias')} are second names, {parts.count('unused')} copies or unknown",
        *file.notes,
        *origin.notes,
        *([f"licence {origin.licence}"] if origin.licence != UNKNOWN else []),
    ]
    if found.backbone == "primus_m":
        order = known_order(file, told)
        lines.append(
            f"token order {order[1] if order else 'not known: import it with --token_order swapped or straight'}"
        )
    lines += [f"please cite {paper}" for paper in origin.citation]
    bundle = bundles if origin.key else f"BUNDLE ({bundles})"
    called = f"{command} import" if (command := openmind()) is not None else "python tools/import_checkpoint.py"
    return [*lines, f"{IMPORT}{called} {bundle} --source {path}"]
