# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the reference, or of anybody's training of its networks, translated for a bundle."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..files import read_record, sha256, write_record
from ..paths import as_path
from .cells import BACKBONES, Cell, Recognised, backbone_of, describe
from .files import check_values, checked_sha256, write_checkpoint
from .orders import order_of
from .origins import Known, Origin, Told, origin_of
from .published import ImportedWeights, import_network_weights
from .receipt import SPACING_CAVEAT, Receipt
from .reference import ReferenceCheckpoint, read_reference
from .transfer import keep_previous, origin_receipt

__all__ = ["import_checkpoint", "reported_digest_warning", "write_imported_state"]


def reported_digest_warning(known: Known, file: Path, digest: str) -> str | None:
    """Return a warning if a published file differs from what third parties, not its authors, reported of it."""
    wrong = []
    if known.sha256 is not None and digest != known.sha256:
        wrong.append(f"sha256 {digest[:12]}... instead of {known.sha256[:12]}...")
    if known.bytes is not None and file.stat().st_size != known.bytes:
        wrong.append(f"{file.stat().st_size:,} bytes instead of {known.bytes:,}")
    if not wrong:
        return None
    told = f"the file differs from what others reported of {known.repository}: {', '.join(wrong)}"
    return f"{told}; it may have been updated"


def import_checkpoint(
    path: str | Path,
    cell: Cell,
    *,
    output: str | Path,
    told: Told | None = None,
    plan_file: str | Path | None = None,
    token_order: str = "auto",
    allow_partial: bool = False,
) -> tuple[Receipt, ImportedWeights]:
    """Turn a checkpoint of the reference's networks into a bundle's pre-trained encoder, with a receipt beside it.

    The encoder, and the decoder where there is one, get the names of the bundle's backbone. A file that says it is of
    another method of this collection is refused; one of an unknown method, or of none of them, goes into any bundle of
    its backbone, and its receipt says so. A position table keeps the grid it was trained on; fine-tuning interpolates
    it. An earlier file at ``output`` is kept under another name; whatever goes wrong, it stays as it was.

    Args:
        path: checkpoint.
        cell: the bundle.
        output: file to write.
        told: what is known of the file besides what it holds.
        plan_file: adaptation plan, if neither in the file nor beside it.
        token_order: ``auto`` obeys the plan, the catalogue and the position table, and stops if they do not say it;
            ``swapped`` and ``straight`` say how the file was trained; ``keep`` converts nothing, for comparison.
        allow_partial: accept a file that does not cover the encoder.

    Returns:
        the receipt, and the weights under this project's names.

    Raises:
        WeightsError: if the file cannot be used.
        SettingsError: if ``token_order`` is unknown, or ``told`` contradicts the file.
    """
    told = told or Told()
    file = read_reference(path, plan_file=plan_file)
    digest = _checked(path, cell, told)
    origin = _fitting_origin(file, cell, told)
    order, how = order_of(token_order, file, told) if cell.num_heads is not None else ("straight", "")
    imported = import_network_weights(file.weights, token_order=order, grid=file.grid, num_heads=cell.num_heads)
    imported.backbone = {name: _float(value) for name, value in imported.backbone.items()}
    imported.method = {name: _float(value) for name, value in imported.method.items()}
    check_values(imported.backbone, path)
    receipt = Receipt(
        source=told.source or str(path),
        sha256=digest,
        revision=told.revision,
        method=origin.method,
        backbone=BACKBONES[backbone_of(cell.bundle)].title,
        name=origin.name,
        data=origin.data,
        licence=origin.licence,
        citation=origin.citation,
        spacing_mm=file.configuration.get("spacing", told.known.spacing_mm if told.known else None),
        patch_size=_patch(file, imported, cell, origin),
        notes=[*origin.notes, *file.notes],
    )
    _compare(receipt, imported, cell, file, swapped=order == "swapped", allow_partial=allow_partial)
    if how:
        receipt.notes.append(f"token order: {how}")
    receipt.notes += _contradictions(imported)
    warning = reported_digest_warning(told.known, Path(path), digest) if told.known else None
    receipt.notes += [warning] if warning else []
    receipt.notes.append(SPACING_CAVEAT)
    _write(receipt, imported, cell, as_path(output), order="keep" if token_order == "keep" else order)
    return receipt, imported


def _checked(path: str | Path, cell: Cell, told: Told) -> str:
    """Return the SHA-256 of the file; refuse another one than is expected."""
    digest = checked_sha256(path)
    if told.expected_sha256 and digest != told.expected_sha256:
        raise WeightsError(
            f"{path} is complete, but has sha256 {digest}, not {told.expected_sha256}, which large_files.yml of "
            f"{cell.bundle} says; bring the file that came first, or, if its authors have published another one, "
            "remove hash_val and hash_type there"
        )
    return digest


def _fitting_origin(file: ReferenceCheckpoint, cell: Cell, told: Told) -> Origin:
    """Return where a file is from.

    Raises:
        WeightsError: if it is of another backbone, or says that it is of another method of this collection.
    """
    found = file.recognise()
    backbone = backbone_of(cell.bundle)
    if found.backbone != backbone:
        raise WeightsError(f"{file.path} is not of {cell.bundle}: {_what(found)}")
    beside = file.path.with_suffix(".json")
    about = read_record(beside, error=WeightsError) if beside.is_file() else {}
    licence = about.get("licence")
    origin = origin_of(found, told, cited=file.citations, licence=licence)
    if origin.key is not None and f"{origin.key}_{backbone}" != cell.bundle:
        how = found.said if found.method == origin.key else origin.notes[0]
        raise WeightsError(f"{file.path} is not of {cell.bundle}: it fits {origin.key}_{backbone}, as {how}")
    return origin


def _what(found: Recognised) -> str:
    if not found.backbone:
        return f"it fits no bundle, for {found.why}"
    return f"it is a network of {BACKBONES[found.backbone].title}, which fits the bundles that end in _{found.backbone}"


def _contradictions(imported: ImportedWeights) -> list[str]:
    """Return a note on names of one tensor that hold different values, of which one was taken."""
    if not imported.contradicted:
        return []
    taken, others = next(iter(imported.contradicted.items()))
    return [
        f"{len(imported.contradicted)} tensors have second names in the file with other values; the last name in the "
        "order of modules was taken, as a strict load into the reference's network does in silence: "
        f"{taken}, and not {', '.join(others)}" + (", and so on" if len(imported.contradicted) > 1 else "")
    ]


def _float(value: Tensor) -> Tensor:
    """Return a float32 tensor that owns no more memory than it shows, since saving a view saves all of its storage."""
    value = value.to(torch.float32) if value.is_floating_point() else value
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()


def _patch(file: ReferenceCheckpoint, imported: ImportedWeights, cell: Cell, origin: Origin) -> list[int] | None:
    """Return what the network saw in pre-training: by the position table, else by the plan, else by its method."""
    table = imported.backbone.get("encoder.transformer.position_embedding")
    embedding = imported.backbone.get("encoder.patch_embedding.weight")
    if table is not None and embedding is not None:
        return [side * token for side, token in zip(table.shape[2:], embedding.shape[2:], strict=True)]
    stored = file.patch
    if origin.key in ("voco", "simclr"):  # plans of these may give the volume that crops are cut from
        if stored not in (None, list(cell.patch_size)):
            file.notes.append(
                f"patch_size {stored} of the adaptation plan is not the crop {list(cell.patch_size)} of this cell"
            )
        return list(cell.patch_size)
    return stored or (list(cell.patch_size) if origin.key else None)


def _compare(
    receipt: Receipt,
    imported: ImportedWeights,
    cell: Cell,
    file: ReferenceCheckpoint,
    *,
    swapped: bool,
    allow_partial: bool,
) -> None:
    """Fill in what became of each tensor, and refuse a file that does not cover the bundle's encoder."""
    state = cell.backbone.state_dict()
    wrong = []
    for name, value in list(imported.backbone.items()):
        same = name in state and state[name].shape == value.shape
        table = name.endswith("position_embedding") and name in state and state[name].shape[:2] == value.shape[:2]
        if same or table:
            if swapped and re.search(r"position_embedding|attention\.(query|key)\.", name):
                receipt.adapted[name] = "first two token axes exchanged back"
            else:
                receipt.taken.append(name)
            if not same:
                receipt.notes.append(
                    f"position table of {list(value.shape[2:])} tokens kept; fine-tuning interpolates it"
                )
            continue
        del imported.backbone[name]
        receipt.skipped[name] = "the backbone of this bundle has no such tensor"
        if name in state:
            receipt.skipped[name] = f"{list(value.shape)} in the file, {list(state[name].shape)} in this bundle"
        if name.startswith("encoder."):
            wrong.append(f"{name}: {receipt.skipped[name]}")
    receipt.missing = [name for name in state if name not in imported.backbone]
    receipt.skipped |= imported.unused
    receipt.skipped |= dict.fromkeys(imported.method, "only the pre-training method needs it")
    encoder = {name: value.numel() for name, value in state.items() if name.startswith("encoder.")}
    covered = sum(size for name, size in encoder.items() if name in imported.backbone)
    receipt.encoder_share = covered / sum(encoder.values())
    receipt.parameters = {
        "taken": sum(imported.backbone[name].numel() for name in receipt.taken),
        "adapted": sum(imported.backbone[name].numel() for name in receipt.adapted),
        "skipped": sum(value.numel() for value in file.weights.values())
        - sum(value.numel() for value in imported.backbone.values()),
        "missing": sum(state[name].numel() for name in receipt.missing),
    }
    wrong += [f"{name} is not in the file" for name in receipt.missing if name.startswith("encoder.")]
    if wrong and not allow_partial:
        raise WeightsError(
            f"{file.path} covers {100 * receipt.encoder_share:.1f} % of the encoder of {cell.bundle} "
            f"({'; '.join(wrong[:3])}). Give the network settings it was made with (--features_per_stage, --embed_dim, "
            "...), or take what fits with --allow_partial"
        )
    if not covered:
        raise WeightsError(f"{file.path} has nothing of the encoder of {cell.bundle}")


def _write(receipt: Receipt, imported: ImportedWeights, cell: Cell, output: Path, *, order: str) -> None:
    """Write the encoder and the JSON beside it, keeping another file that is there."""
    made = {
        "made_by": "import of a checkpoint of the reference",
        "source_sha256": receipt.sha256,
        "token_order": order,
        "names": len(imported.backbone),
    }
    before = origin_receipt(output).provenance if output.is_file() else {}
    if all(before.get(key) == value for key, value in made.items()):
        receipt.notes.append(f"{output} was this import already")
        words = ("method", "licence", "citation")
        if all(before.get(key) == getattr(receipt, key) for key in words):
            return
    else:
        keep_previous(str(output))
        write_checkpoint(imported.backbone, output)
    settings: dict[str, Any] = {"bundle": cell.bundle}
    if receipt.spacing_mm is not None:
        settings["spacing_mm"] = _one(receipt.spacing_mm)
    if cell.num_heads is not None:
        settings["num_heads"] = cell.num_heads
    about = receipt.as_dict() | made | {"source": receipt.source, "sha256": sha256(output), "settings": settings}
    about["versions"] = {name: importlib.metadata.version(name) for name in ("monai", "torch")}
    del about["provenance"]
    write_record(about, output.with_suffix(".json"))


def _one(spacing: Any) -> Any:
    """Return an isotropic spacing as one number, as the configs write it."""
    if isinstance(spacing, (list, tuple)) and spacing and all(side == spacing[0] for side in spacing):
        return float(spacing[0]) if isinstance(spacing[0], (int, float)) else None
    return spacing


def write_imported_state(
    method: nn.Module, imported: ImportedWeights, output: str | Path, *, cell: Cell, path: str | Path, receipt: Receipt
) -> list[str]:
    """Write a state from which the bundle's pretrain config goes on: the whole method, with a fresh optimizer.

    Args:
        method: of the bundle, on any device: only names and shapes are read.
        imported: weights of the checkpoint.
        output: ``pretraining_state.pt``.
        cell: the bundle.
        path: the checkpoint, whose epoch is taken if it is of a training that was not finished.
        receipt: of the import.

    Returns:
        what to tell the user.

    Raises:
        WeightsError: if the file is not known to be of this method, or does not have the whole of it.
    """
    title = describe(cell.bundle)[0]
    if receipt.method != title:
        raise WeightsError(
            f"{path} is not known to be of {title}, the method of {cell.bundle} (its method is {receipt.method}); "
            "pre-training cannot go on from it, only fine-tuning"
        )
    state = method.state_dict()
    given = {f"backbone.{name}": value for name, value in imported.backbone.items()} | imported.method
    wrong = [f"{name} is missing" for name in state if name not in given]
    wrong += [
        f"{name} is {list(given[name].shape)} in the file, {list(value.shape)} here"
        for name, value in state.items()
        if name in given and given[name].shape != value.shape
    ]
    if wrong:
        raise WeightsError(
            f"{path} does not hold the whole method of {cell.bundle} ({'; '.join(wrong[:3])}); pre-training cannot go "
            "on from it, only fine-tuning"
        )
    check_values({name: given[name] for name in state}, path)
    epoch = read_reference(path).epoch
    settings = {"bundle": cell.bundle} | ({"num_heads": cell.num_heads} if cell.num_heads is not None else {})
    keep_previous(str(output))
    write_checkpoint(
        {
            "method": {name: given[name] for name in state},
            "optimizer": {},
            "scaler": {},
            "epoch": epoch,
            "epochs": None,
            "data": None,
            "best": float("inf"),
            "history": [],
            "settings": settings,
        },
        output,
    )
    return [
        f"written: {output}; pre-training goes on from it at epoch {epoch} of its schedule, with a fresh optimizer: "
        "the file has none, or one whose order of parameters is the reference's"
    ]
