# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the reference: read without trust, and translated for a bundle.

A checkpoint of the reference is a dictionary of ``network_weights`` (a state dict), ``nnssl_adaptation_plan`` (how to
build and fill the downstream network; also in ``adaptation_plan.json`` beside the file), ``trainer_name``, and, in
files of a training, much that is not needed here, among it an index of all volumes of some 80 MB, which is dropped at
once.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from ..files import sha256, write_record
from ..paths import as_path
from .cells import Cell, Recognised, describe, recognise, token_order_of
from .files import check_values, checked_sha256, read_checkpoint, write_checkpoint
from .published import ImportedWeights, import_network_weights, published_name
from .receipt import SPACING_CAVEAT, Receipt
from .transfer import keep_previous, origin_receipt

__all__ = [
    "PLAN_FILE",
    "ReferenceCheckpoint",
    "import_checkpoint",
    "read_reference",
    "reported_digest_warning",
    "write_imported_state",
]

PLAN_FILE = "adaptation_plan.json"
_ORDERS = ("auto", "keep", "swapped", "straight")
# reported by third parties, not by the authors: size in bytes and sha256 of checkpoint_final.pth
_REPORTED = {
    "ResEncL-OpenMind-MAE": (491_198_606, "7a847af785635335c00e711d16ff4d225d86ecd5992b14c059df2b520e3ee933"),
    "PrimusM-OpenMind-MAE": (None, "b866ac5f61d7e90d3a6cbb00a759ffc9d73beb5e63baa6b3cd654671ebc9a552"),
}


@dataclass
class ReferenceCheckpoint:
    """What is needed of a checkpoint of the reference.

    Attributes:
        path: the file.
        weights: state dict under the reference's names; Spark3D's second dictionary is joined.
        plan: adaptation plan, empty if there is none.
        trainer: name of the trainer, if the file or plan gives one.
        epoch: epochs that a training checkpoint had done.
        citations: that the file carries, as text.
        notes: what is odd about the file.
    """

    path: Path
    weights: dict[str, Tensor]
    plan: dict[str, Any] = field(default_factory=dict)
    trainer: str | None = None
    epoch: int = 0
    citations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def recognise(self) -> Recognised:
        """Say which bundles the file can be of."""
        return recognise(self.weights, self.trainer)


def read_reference(path: str | Path, *, plan_file: str | Path | None = None) -> ReferenceCheckpoint:
    """Read a checkpoint of the reference, leaving its tensors in the file until they are needed.

    Args:
        path: what ``torch.save`` wrote.
        plan_file: adaptation plan; that inside the file, or ``adaptation_plan.json`` beside it, unless given.

    Raises:
        WeightsError: if the file is missing, damaged, holds anything but tensors and plain values, or no network.
    """
    path = as_path(path)
    content = read_checkpoint(path, mmap=True)
    content.pop("init_args", None)  # some 80 MB of file names in the published files
    weights = content.get("network_weights", content.get("state_dict"))
    if weights is None:
        weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not isinstance(weights, dict) or not weights:
        raise WeightsError(
            f"{path} holds no network: it has {', '.join(map(repr, list(content)[:5])) or 'nothing'}, where a "
            "checkpoint of the reference has 'network_weights'"
        )
    spark = content.get("spark_weights")
    if isinstance(spark, dict):
        weights = {**spark, **weights}
    other = [key for key, value in weights.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if other:
        raise WeightsError(f"{path}: {other[0]!r} of its network is not a tensor; this is no state dict")
    if any(
        key.startswith(("encoder.stem.conv.", "encoder.transformer.", "encoder.patch_embedding.")) for key in weights
    ):
        raise WeightsError(
            f"{path} is an encoder of this collection already; give it to fine-tuning with --pretrained {path}"
        )
    notes: list[str] = []
    plan = content.get("nnssl_adaptation_plan")
    trainer = content.get("trainer_name")
    if plan_file is not None or not isinstance(plan, dict) or trainer is None:
        beside = _plan_beside(as_path(plan_file or path.with_name(PLAN_FILE)), required=plan_file is not None)
        if not isinstance(plan, dict):
            plan = beside
            notes.append("the adaptation plan was beside the file" if beside else "the file has no adaptation plan")
        trainer = trainer or plan.get("trainer_name", beside.get("trainer_name"))
    citations = content.get("citations") or []
    return ReferenceCheckpoint(
        path=path,
        weights=weights,
        plan=plan,
        trainer=trainer if isinstance(trainer, str) else None,
        epoch=content["current_epoch"] if isinstance(content.get("current_epoch"), int) else 0,
        citations=[text for entry in citations for text in _texts(entry)] if isinstance(citations, list) else [],
        notes=notes,
    )


def _plan_beside(file: Path, *, required: bool) -> dict[str, Any]:
    if not file.is_file():
        if required:
            raise WeightsError(f"there is no adaptation plan {file}; check the path")
        return {}
    try:
        plan = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not a JSON file: {error}; fetch it again or move it away") from error
    return plan if isinstance(plan, dict) else {}


def _texts(citation: Any) -> list[str]:
    """Return what to cite of an entry of ``citations``."""
    if not isinstance(citation, dict):
        return [str(citation)]
    texts = citation.get("apa_citations") or citation.get("bibtex_citations") or [citation.get("name", "")]
    return [str(text) for text in (texts if isinstance(texts, list) else [texts]) if text]


def reported_digest_warning(repository: str, file: Path, digest: str) -> str | None:
    """Return a warning if a published file differs from what third parties reported of it."""
    size, reported = _REPORTED.get(repository.rsplit("/", 1)[-1], (None, None))
    wrong = []
    if reported is not None and digest != reported:
        wrong.append(f"sha256 {digest[:12]}... instead of {reported[:12]}...")
    if size is not None and file.stat().st_size != size:
        wrong.append(f"{file.stat().st_size:,} bytes instead of {size:,}")
    if not wrong:
        return None
    return f"the file differs from what others reported of {repository}: {', '.join(wrong)}; it may have been updated"


def import_checkpoint(
    path: str | Path,
    cell: Cell,
    *,
    output: str | Path,
    source: str | None = None,
    revision: str | None = None,
    plan_file: str | Path | None = None,
    token_order: str = "auto",
    allow_partial: bool = False,
    licence: str = "unknown",
    expected_sha256: str | None = None,
    repository: str = "",
) -> tuple[Receipt, ImportedWeights]:
    """Turn a checkpoint of the reference into a bundle's pre-trained encoder, with a receipt beside it.

    The encoder, and the decoder where the method trained one, get the names of the bundle's backbone. A position table
    keeps the grid it was trained on; fine-tuning interpolates it. An earlier file at ``output`` is kept under another
    name; whatever goes wrong, it stays as it was.

    Args:
        path: checkpoint.
        cell: the bundle.
        output: file to write.
        source: what to name as the source; the path unless given.
        revision: commit of the repository it was fetched from.
        plan_file: adaptation plan, if neither in the file nor beside it.
        token_order: ``auto`` obeys the plan and else the published cell; ``swapped`` and ``straight`` say how the file
            was trained; ``keep`` converts nothing, for comparison.
        allow_partial: accept a file that does not cover the encoder.
        licence: of the weights.
        expected_sha256: refuse another file.
        repository: name of the published repository it comes from.

    Returns:
        the receipt, and the weights under this project's names.

    Raises:
        WeightsError: if the file cannot be used.
        SettingsError: if ``token_order`` is unknown.
    """
    if token_order not in _ORDERS:
        raise SettingsError(f"token_order is {token_order!r}; it must be one of {', '.join(_ORDERS)}")
    file = read_reference(path, plan_file=plan_file)
    digest = checked_sha256(path)
    if expected_sha256 and digest != expected_sha256:
        raise WeightsError(
            f"{path} has sha256 {digest}, not {expected_sha256}, which large_files.yml of {cell.bundle} says; fetch it "
            "again, or, if its authors have published another one, remove hash_val and hash_type there"
        )
    notes = list(file.notes)
    found = file.recognise()
    if cell.bundle not in found.bundles:
        fits = f"it fits {' or '.join(found.bundles)}" if found.bundles else "it fits no bundle"
        raise WeightsError(f"{path} is not of {cell.bundle}: {fits}, by {found.why}")
    if len(found.bundles) > 1:
        notes.append(
            f"the file does not say which of {', '.join(found.bundles)} it is of (told by {found.why}); "
            f"taken as {cell.bundle}"
        )
    order, how = _order(token_order, file.plan, cell.bundle)
    grid = _grid(file, notes)
    imported = import_network_weights(file.weights, token_order=order, grid=grid, num_heads=cell.num_heads)
    imported.backbone = {name: _float(value) for name, value in imported.backbone.items()}
    imported.method = {name: _float(value) for name, value in imported.method.items()}
    check_values(imported.backbone, path)
    title, network, citation = describe(cell.bundle)
    receipt = Receipt(
        source=source or str(path),
        sha256=digest,
        revision=revision,
        method=title,
        backbone=network,
        licence=licence,
        citation=file.citations or citation,
        spacing_mm=_configuration(file.plan).get("spacing", cell.spacing_mm),
        patch_size=_patch(file.plan, imported, cell, notes),
        notes=notes,
    )
    _compare(receipt, imported, cell, file, swapped=order == "swapped", allow_partial=allow_partial)
    if cell.num_heads is not None:
        receipt.notes.append(f"token order: {how}")
    warning = reported_digest_warning(repository, Path(path), digest)
    receipt.notes += [warning] if warning else []
    receipt.notes.append(SPACING_CAVEAT)
    _write(receipt, imported, cell, as_path(output), order=token_order)
    return receipt, imported


def _order(asked: str, plan: Mapping[str, Any], bundle: str) -> tuple[str, str]:
    """Return how the tokens of a file were ordered in training, and by what that is known."""
    if asked == "keep":
        return "straight", "kept as in the file, as asked"
    if asked != "auto":
        return asked, f"{asked}, as asked"
    stored = plan.get("token_order")
    if stored is not None:
        if stored not in ("swapped", "straight"):
            raise WeightsError(
                f"token_order of the adaptation plan is {stored!r}; give --token_order swapped or straight"
            )
        return stored, f"{stored}, by the adaptation plan"
    order = token_order_of(bundle)
    converted = "first two axes exchanged back" if order == "swapped" else "nothing to convert"
    return order, f"{order} in the published files of this cell: {converted}"


def _float(value: Tensor) -> Tensor:
    """Return a float32 tensor that owns no more memory than it shows, since saving a view saves all of its storage."""
    value = value.to(torch.float32) if value.is_floating_point() else value
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()


def _configuration(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one configuration of the pre-training plan, empty if there is none."""
    pretraining = plan.get("pretrain_plan")
    configurations = pretraining.get("configurations") if isinstance(pretraining, dict) else None
    if not isinstance(configurations, dict) or not configurations:
        return {}
    first = configurations.get("onemmiso", next(iter(configurations.values())))
    return first if isinstance(first, dict) else {}


def _plan_patch(plan: Mapping[str, Any]) -> list[int] | None:
    patch = plan.get("pretrain_patch_size") or _configuration(plan).get("patch_size")
    if not isinstance(patch, (list, tuple)) or len(patch) != 3 or not all(isinstance(side, int) for side in patch):
        return None
    return list(patch)


def _grid(file: ReferenceCheckpoint, notes: list[str]) -> list[int] | None:
    """Return the grid of tokens if the plan's patch gives one that the position table has, else None: a cube."""
    tables = [value for key, value in file.weights.items() if published_name(key)[1].endswith("position_embedding")]
    embeddings = [
        value for key, value in file.weights.items() if published_name(key)[1] == "encoder.patch_embedding.weight"
    ]
    patch = _plan_patch(file.plan)
    if not tables or not embeddings or patch is None or tables[0].dim() != 3 or embeddings[0].dim() != 5:
        return None
    grid = [side // token for side, token in zip(patch, embeddings[0].shape[2:], strict=True)]
    if math.prod(grid) == tables[0].shape[1]:
        return grid
    notes.append(
        f"patch_size {patch} of the adaptation plan is not what was trained: the position table has "
        f"{tables[0].shape[1]} places"
    )
    return None


def _patch(plan: Mapping[str, Any], imported: ImportedWeights, cell: Cell, notes: list[str]) -> list[int]:
    """Return what the network saw in pre-training: by the position table, else by the plan, else by the bundle."""
    table = imported.backbone.get("encoder.transformer.position_embedding")
    embedding = imported.backbone.get("encoder.patch_embedding.weight")
    if table is not None and embedding is not None:
        return [side * token for side, token in zip(table.shape[2:], embedding.shape[2:], strict=True)]
    stored = _plan_patch(plan)
    if cell.bundle.startswith(("voco", "simclr")):  # plans of these may give the volume that crops are cut from
        if stored not in (None, list(cell.patch_size)):
            notes.append(
                f"patch_size {stored} of the adaptation plan is not the crop {list(cell.patch_size)} of this cell"
            )
        return list(cell.patch_size)
    return stored or list(cell.patch_size)


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
    beside = output.with_suffix(".json")
    if output.is_file():
        about = origin_receipt(output).provenance
        if all(about.get(key) == value for key, value in made.items()):
            receipt.notes.append(f"{output} was this import already")
            return
        keep_previous(str(output))
    write_checkpoint(imported.backbone, output)
    settings: dict[str, Any] = {"bundle": cell.bundle, "spacing_mm": _one(receipt.spacing_mm)}
    if cell.num_heads is not None:
        settings["num_heads"] = cell.num_heads
    about = receipt.as_dict() | made | {"source": receipt.source, "sha256": sha256(output), "settings": settings}
    about["versions"] = {name: importlib.metadata.version(name) for name in ("monai", "torch")}
    del about["provenance"]
    write_record(about, beside)


def _one(spacing: Any) -> Any:
    """Return an isotropic spacing as one number, as the configs write it."""
    if isinstance(spacing, (list, tuple)) and spacing and all(side == spacing[0] for side in spacing):
        return float(spacing[0]) if isinstance(spacing[0], (int, float)) else None
    return spacing


def write_imported_state(
    method: nn.Module, imported: ImportedWeights, output: str | Path, *, cell: Cell, path: str | Path
) -> list[str]:
    """Write a state from which the bundle's pretrain config goes on: the whole method, with a fresh optimizer.

    Args:
        method: of the bundle, on any device: only names and shapes are read.
        imported: weights of the checkpoint.
        output: ``pretraining_state.pt``.
        cell: the bundle.
        path: the checkpoint, whose epoch is taken if it is of a training that was not finished.

    Returns:
        what to tell the user.

    Raises:
        WeightsError: if the file does not have the whole method.
    """
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
