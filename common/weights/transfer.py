# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Loading weights into a network, with a receipt of what was taken."""

from __future__ import annotations

import contextlib
import copy
import glob
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SettingsError, WeightsError
from ..files import read_record, replace_file, sha256, write_record
from ..networks.ensemble import Ensemble
from ..networks.untrained import UNTRAINED, refuse_untrained
from ..paths import as_path
from .cells import describe
from .files import check_values, checked_sha256, read_checkpoint, read_metadata
from .made import PATCH, same
from .missing import encoder_remedy, fetch_command, import_tool
from .origins import licence_terms
from .receipt import CAVEAT, SPACING_CAVEAT, Receipt, spacing_warning
from .tuning import FROZEN_RANDOM, prepare_tuning

__all__ = [
    "differences",
    "fine_tuning_network",
    "keep_previous",
    "model_digests",
    "origin_receipt",
    "trained_network",
    "trained_settings",
    "transfer_weights",
]

_INPUT = {"spacing_mm", PATCH}  # which a trained network takes otherwise only if somebody insists
_TRANSFERS = ("encoder", "encoder+decoder")


def transfer_weights(
    network: nn.Module, path: str | Path, *, transfer: str = "encoder", allow_partial: bool = False
) -> Receipt:
    """Copy a pre-trained backbone into a network of the same kind.

    A first layer for more channels than the file's one gets its weights repeated and divided by their number; a
    position table of another grid is interpolated trilinearly; a kernel of one voxel along an axis gets the mean of a
    longer one. With ``allow_partial`` an encoder of another depth takes the stages and blocks that both have. The head
    keeps its random start. A decoder is taken whole or not at all: that of Primus has widths that depend on the number
    of classes, so it fits only where these agree.

    Args:
        network: with ``encoder.*`` and ``decoder.*`` tensors.
        path: flat state dict of a backbone, ``.pt`` or ``.safetensors``.
        transfer: ``encoder`` or ``encoder+decoder``.
        allow_partial: do not insist on a completely covered encoder.

    Returns:
        the receipt.

    Raises:
        WeightsError: if the file cannot be read or does not cover the encoder.
        SettingsError: if ``transfer`` is unknown.
    """
    if transfer not in _TRANSFERS:
        raise SettingsError(f"transfer is {transfer!r}; it must be one of {', '.join(_TRANSFERS)}")
    weights = read_checkpoint(path)
    if not any(key.startswith("encoder.") for key in weights):
        raise WeightsError(
            f"{path} is not a pre-trained encoder of this collection (its first entry is "
            f"{next(iter(weights), None)!r}); a published checkpoint must be imported first, with {import_tool()}"
        )
    check_values({key: value for key, value in weights.items() if key.startswith("encoder.")}, path)
    receipt = origin_receipt(path)
    target = network.state_dict()
    mismatched = _take(weights, target, tuple(f"{part}." for part in transfer.split("+")), receipt)
    covered = {*receipt.taken, *receipt.adapted}
    receipt.missing = [key for key in target if key not in covered]
    receipt.parameters = {
        "taken": sum(target[key].numel() for key in receipt.taken),
        "adapted": sum(target[key].numel() for key in receipt.adapted),
        "skipped": sum(weights[key].numel() for key in receipt.skipped),
        "missing": sum(target[key].numel() for key in receipt.missing),
    }
    encoder = {key: value.numel() for key, value in target.items() if key.startswith("encoder.")}
    receipt.encoder_share = sum(size for key, size in encoder.items() if key in covered) / sum(encoder.values())
    missing = [f"{key} is not in the file" for key in encoder if key not in weights]
    extra = [
        f"{key} is not in the network" for key in receipt.skipped if key.startswith("encoder.") and key not in target
    ]
    if (mismatched or missing or extra) and not allow_partial:
        examples = "; ".join((mismatched + missing + extra)[:3])
        raise WeightsError(
            f"{path} is of another network: it covers {100 * receipt.encoder_share:.1f} % of this encoder "
            f"({examples}). Use the bundle and the network settings (features_per_stage, embed_dim, ...) it was made "
            "with, or take what fits with --allow_partial true"
        )
    network.load_state_dict(target)
    return receipt


def _take(
    weights: Mapping[str, Tensor], target: dict[str, Tensor], prefixes: tuple[str, ...], receipt: Receipt
) -> list[str]:
    """Put what fits of a file into the state of a network, and into the receipt what became of each tensor.

    Args:
        weights: of the file.
        target: of the network; changed.
        prefixes: of the parts that are transferred.
        receipt: filled in.

    Returns:
        what does not fit of the encoder.
    """
    mismatched = []
    decoder_fits = all(
        key in target and target[key].shape == value.shape
        for key, value in weights.items()
        if key.startswith("decoder.")
    )
    for key, value in weights.items():
        if not key.startswith(prefixes):
            receipt.skipped[key] = "not part of the transfer"
        elif key not in target:
            receipt.skipped[key] = "the network has no such tensor"
        elif key.startswith("decoder.") and not decoder_fits:
            receipt.skipped[key] = "the decoder has other widths here"
        elif target[key].shape == value.shape:
            target[key] = value
            receipt.taken.append(key)
        else:
            adapted, how = _adapt(key, value, target[key])
            if adapted is not None:
                target[key] = adapted
                receipt.adapted[key] = how
                continue
            receipt.skipped[key] = how
            if key.startswith("encoder."):
                mismatched.append(f"{key} is {list(value.shape)} in the file, {list(target[key].shape)} in the network")
    return mismatched


def origin_receipt(path: str | Path) -> Receipt:
    """Return a receipt that says where a weights file comes from, by the JSON beside it or the metadata inside.

    Raises:
        WeightsError: if that JSON is damaged or about another file.
    """
    digest = checked_sha256(path)
    about, beside = read_metadata(path), as_path(path).with_suffix(".json")
    if not about and beside.is_file():
        about = read_record(beside, error=WeightsError)
    settings = about.get("settings", {})
    method, backbone, citation = describe(str(settings.get("bundle", "")))
    return Receipt(
        source=str(path),
        sha256=digest,
        revision=about.get("revision"),
        method=about.get("method", method),
        backbone=about.get("backbone", backbone),
        name=about.get("name"),
        data=about.get("data", "unknown"),
        licence=about.get("licence", "unknown"),
        citation=about.get("citation", citation),
        spacing_mm=about.get("spacing_mm", settings.get("spacing_mm")),
        patch_size=about.get("patch_size", settings.get("crop_size", settings.get("patch_size"))),
        fitted_to=about.get("fitted_to"),
        provenance=about,
    )


def _adapt(key: str, value: Tensor, like: Tensor) -> tuple[Tensor | None, str]:
    """Return the tensor made to fit ``like`` and how, or None and why not."""
    if key.endswith("position_embedding") and value.shape[1] == like.shape[1]:
        resized = F.interpolate(value.float(), size=like.shape[2:], mode="trilinear")
        return resized.to(value.dtype), f"grid {list(value.shape[2:])} interpolated to {list(like.shape[2:])}"
    channels = like.shape[1] if like.dim() == 5 and key.startswith("encoder.") else 0
    if (
        channels
        and value.dim() == 5
        and value.shape[1] == 1
        and value.shape[0] == like.shape[0]
        and value.shape[2:] == like.shape[2:]
    ):
        return value.repeat(1, channels, 1, 1, 1) / channels, f"one input channel repeated to {channels} and divided"
    if value.dim() == like.dim() == 5 and value.shape[:2] == like.shape[:2]:
        axes = [axis for axis in (2, 3, 4) if value.shape[axis] > like.shape[axis] == 1]
        averaged = value.mean(dim=axes, keepdim=True) if axes else value
        if averaged.shape == like.shape:
            return averaged, f"kernel {list(value.shape[2:])} averaged to {list(like.shape[2:])}"
    return None, f"shape {list(value.shape)} does not fit {list(like.shape)}"


def fine_tuning_network(
    network: nn.Module,
    *,
    pretrained: str,
    settings: Mapping[str, Any],
    from_scratch: bool = False,
    transfer: str = "encoder",
    allow_partial: bool = False,
    receipt_file: str | None = None,
    tuning: str = "full",
    lora_rank: int = 8,
    optimizer_states: int = 0,
) -> nn.Module:
    """Return ``network`` with a pre-trained encoder in it, or untouched from scratch; print and save the receipt.

    Args:
        network: to load into.
        pretrained: flat state dict of a backbone.
        settings: of this run; where the JSON beside ``pretrained`` says otherwise, the number of attention heads is an
            error, since no tensor shows it, and anything else is told.
        from_scratch: load nothing.
        transfer: ``encoder`` or ``encoder+decoder``.
        allow_partial: accept a file that does not cover the encoder.
        receipt_file: JSON to write; where none lies beside ``pretrained``, it is written there too.
        tuning: how much of the network learns, see :func:`prepare_tuning`.
        lora_rank: of the adapters of ``lora``.
        optimizer_states: numbers that the optimizer keeps for each parameter, for the note on memory.

    Raises:
        WeightsError: if the file is missing, damaged or of another network.
        SettingsError: if part of a network is to be tuned that was not pre-trained.
    """
    if from_scratch:
        if tuning not in ("full", FROZEN_RANDOM):
            raise SettingsError(
                f"tuning {tuning} leaves weights as they are, and from scratch they mean nothing yet; add --tuning "
                f"full, or as a control {FROZEN_RANDOM}"
            )
        tqdm.write("training from scratch: no weights loaded")
        return _tuned(network, tuning, lora_rank, optimizer_states)
    if tuning == FROZEN_RANDOM:
        raise SettingsError(
            f"tuning {FROZEN_RANDOM} keeps an encoder as it was drawn, so nothing can be loaded into it; add "
            "--from_scratch true, or --tuning frozen for the pre-trained one"
        )
    if not as_path(pretrained).is_file():
        raise WeightsError(
            f"there is no pre-trained encoder {pretrained}; {encoder_remedy(pretrained)}, or train without one with "
            "--from_scratch true"
        )
    receipt = transfer_weights(network, pretrained, transfer=transfer, allow_partial=allow_partial)
    for name, (theirs, ours) in differences(receipt.provenance, settings).items():
        if name == "num_heads":
            raise WeightsError(f"{pretrained} was made with num_heads {theirs}, not {ours}; add --num_heads {theirs}")
        receipt.notes.append(f"pre-training had {name} {theirs}, this run has {ours}")
    warning = spacing_warning(receipt.spacing_mm, settings.get("spacing_mm"))
    receipt.notes += [*licence_terms(receipt.licence), warning or SPACING_CAVEAT]
    tqdm.write(f"{receipt.summary()}\n{CAVEAT}")
    if transfer != "encoder" and not any(key.startswith("decoder.") for key in receipt.taken):
        held = any(key.startswith("decoder.") for key in receipt.skipped)
        why = "has other widths for this number of classes" if held else "was not pre-trained by this method"
        tqdm.write(f"note: the decoder {why} and keeps its random start")
    if receipt_file:
        write_record(receipt.as_dict(), receipt_file)
    beside = as_path(pretrained).with_suffix(".json")
    if not beside.exists() and not receipt.provenance:
        with contextlib.suppress(OSError):  # a folder that only others may write to
            write_record(receipt.as_dict(), beside)
    return _tuned(network, tuning, lora_rank, optimizer_states)


def _tuned(network: nn.Module, tuning: str, lora_rank: int, optimizer_states: int) -> nn.Module:
    if tuning == "full":
        return network
    return prepare_tuning(network, tuning, rank=lora_rank, optimizer_states=optimizer_states)


def differences(about: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what a JSON beside weights says of these settings where it says otherwise: its value and this one."""
    recorded = about.get("settings", {})
    return {
        name: (recorded[name], ours)
        for name, ours in settings.items()
        if name in recorded and not same(recorded[name], ours)
    }


def _models(path: str | Sequence[str]) -> list[Path]:
    """Return the files that a path, a list of them, or a pattern with ``*`` names."""
    files: list[Path] = []
    for one in [path] if isinstance(path, (str, Path)) else list(path):
        found = sorted(glob.glob(str(as_path(one)))) if "*" in str(one) else [str(one)]
        files += [as_path(file) for file in found]
    if not files:
        raise WeightsError(f"model names no file ({path!r}); give one, a list of them, or a pattern with *")
    return files


def _read_sidecar(model: Path) -> dict[str, Any]:
    """Return what the JSON beside a trained model says, empty without one."""
    sidecar = model.with_suffix(".json")
    if not sidecar.is_file():
        return {}
    about = read_record(sidecar, error=WeightsError)
    if not isinstance(about.get("settings", {}), dict):
        raise WeightsError(f"{sidecar} is not what training writes beside a model; restore it or move it away")
    return about


def trained_settings(path: str | Sequence[str]) -> dict[str, Any]:
    """Return what a model was trained with, by the JSON beside it; of several, the first one's.

    Empty where there is none, so that a config falls back to the published defaults.

    Args:
        path: model file, a list of them, or a pattern with ``*``.

    Raises:
        WeightsError: if the JSON is not one that training wrote.
    """
    try:
        first = _models(path)[0]
    except WeightsError:
        return {}  # loading it will say so
    return dict(_read_sidecar(first).get("settings", {}))


def model_digests(path: str | Sequence[str]) -> list[str]:
    """Return the first digits of the SHA-256 of each model file, by which predictions remember what made them."""
    return [sha256(file)[:16] for file in _models(path) if file.is_file()]


def trained_network(
    network: nn.Module, path: str | Sequence[str], *, settings: Mapping[str, Any], override_input: bool = False
) -> nn.Module:
    """Return ``network`` with the weights of a fine-tuned model, every tensor of it.

    Args:
        network: to load into.
        path: flat state dict of the same network; or several, a list or a pattern with ``*``, to average their logits.
        settings: labels, spacing and network settings of this run, compared with the JSON beside the file, if any.
        override_input: take another spacing or patch than in training, and say so.

    Returns:
        the network, or an :class:`~common.networks.Ensemble` of copies of it.

    Raises:
        WeightsError: if a file is missing, damaged, of another network, or was trained with other settings.
    """
    files = _models(path)
    if len(files) == 1:
        return _load_trained(network, files[0], settings, override_input=override_input)
    tqdm.write(f"averaging the logits of {len(files)} models: {', '.join(map(str, files))}")
    load = partial(_load_trained, settings=settings, override_input=override_input)
    return Ensemble([load(copy.deepcopy(network), file) for file in files])


def _load_trained(
    network: nn.Module, path: Path, settings: Mapping[str, Any], *, override_input: bool = False
) -> nn.Module:
    if not path.is_file():
        remedy = fetch_command(path) or "fine-tune with this bundle's train config first"
        raise WeightsError(f"there is no trained model {path}; {remedy}")
    weights = read_checkpoint(path)
    target = network.state_dict()
    wrong = [f"{key} is missing" for key in target if key not in weights]
    wrong += [f"{key} is not known here" for key in weights if key not in {*target, UNTRAINED}]
    wrong += [
        f"{key} is {list(weights[key].shape)} in the file, {list(target[key].shape)} here"
        for key in target
        if key in weights and weights[key].shape != target[key].shape
    ]
    others = {name: f"{was}, here {ours}" for name, (was, ours) in differences(_read_sidecar(path), settings).items()}
    for name in [name for name in others if name in _INPUT] if override_input else ():
        tqdm.write(f"note: {name} of training was {others.pop(name)}, by --override_input")
    wrong = [f"--{name} was {told}" for name, told in others.items()] + wrong
    if wrong:
        insist = ", or insist with --override_input true" if others and others.keys() <= _INPUT else ""
        raise WeightsError(
            f"{path} was trained otherwise ({'; '.join(wrong[:3])}); use the settings it was trained with{insist}"
        )
    network.load_state_dict(weights)
    refuse_untrained(network, str(path))
    return network


def _is_untrained(path: Path) -> bool:
    try:
        return UNTRAINED in read_checkpoint(path, mmap=True)
    except WeightsError:
        return False


def keep_previous(path: str, *, move: bool = False) -> None:
    """Before training writes a file, keep the one that is there as ``<name>_previous.pt``, ``..._previous_2.pt``, ...

    An earlier one is never replaced: it may be the good one, if this training was started again after a kill. What came
    with a bundle and was not trained yet is not kept.

    Args:
        path: of a checkpoint; the JSON beside it is kept too.
        move: leave nothing under the old name, instead of a copy.
    """
    model = as_path(path)
    if not model.is_file() or _is_untrained(model):
        return
    number = 1
    while (
        previous := model.with_name(f"{model.stem}_previous{f'_{number}' if number > 1 else ''}{model.suffix}")
    ).exists():
        number += 1
    for source, kept in ((model, previous), (model.with_suffix(".json"), previous.with_suffix(".json"))):
        if source.is_file():
            if move:
                source.replace(kept)
            else:
                replace_file(kept, partial(shutil.copyfile, source))
    tqdm.write(f"{model} exists: kept as {previous}")
