# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Write bundles in the form that MONAI Label, the Model Zoo and Hugging Face take, as folders and as zips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.bundles import read_metadata
from common.errors import SettingsError, WeightsError
from common.files import write_json
from common.settings import meant_values
from common.terminal import near
from common.weights import read_checkpoint, trained_settings

from ..commanding.ending import end, exported_command, tool
from ..commanding.weights import encoder_at_hand
from .configs import BUNDLES, check_settings
from .distribution import Carried, check_target, write_bundle, write_zip
from .hub import check_repository, push_bundle
from .settings import ExportBundle

__all__ = ["export_bundle"]


def export_bundle(settings: ExportBundle) -> None:
    """Export bundles."""
    others = meant_values(settings.settings)
    if settings.model is not None:
        _check_model(settings.model)
    versions = {}
    carried = {}
    for name in settings.bundles:  # all of them, before anything is written
        check_settings(name, others)
        carried[name] = _carried(name, settings)
        check_target(settings.output / name, overwrite=settings.overwrite)
        versions[name] = str(read_metadata(BUNDLES / name)["version"])
    place: dict[str, Any] = {"version": versions[settings.bundles[0]], "private": settings.private}
    there = None
    if settings.push is not None:
        there = check_repository(settings.push, overwrite=settings.overwrite, **place)
    print(f"exporting {_counted(settings.bundles)} to {near(settings.output)}", flush=True)
    for name in settings.bundles:
        target = write_bundle(
            name, settings.output / name, settings=others, carried=carried[name], overwrite=settings.overwrite
        )
        packed, digest = write_zip(target, version=versions[name])
        _note(packed, digest, settings.source_url)
        encoder = carried[name].encoder
        held = f"the encoder {near(encoder)}" if encoder else "no weights"
        held = "a fine-tuned model" if settings.model else held
        print(f"{near(target)}: {held}; {packed.name}, {packed.stat().st_size / 1e6:.1f} MB, sha1 {digest}", flush=True)
        if settings.push is not None:
            push_bundle(target, settings.push, there=there, **place)
    last = settings.output / settings.bundles[-1]
    following = exported_command(last, trained=settings.model is not None)
    end(settings.output, look=last / "docs" / "README.md", following=following)


def _counted(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} bundles"


def _carried(name: str, settings: ExportBundle) -> Carried:
    """Return the weights that a bundle is to carry.

    Raises:
        WeightsError: if an encoder is missing that was asked for, or there is nothing to be fetched.
    """
    encoder = settings.pretrained or encoder_at_hand(name)
    wanted = settings.weights
    if wanted != "false" and not encoder.is_file() and (wanted == "true" or settings.pretrained is not None):
        raise WeightsError(
            f"there is no encoder {encoder}; pre-train, run {tool('import_checkpoint')} {name}, or "
            "export without weights (--weights false)"
        )
    found = encoder if wanted != "false" and encoder.is_file() else None
    if settings.weights_url and found is None and settings.model is None:
        raise WeightsError(f"there are no weights of {name} to be fetched from {settings.weights_url}")
    optional = settings.model is not None and settings.pretrained is None and wanted == "auto"
    return Carried(encoder=found, optional=optional, model=settings.model, address=settings.weights_url)


def _note(packed: Path, digest: str, source_url: str) -> None:
    """Put the entry of a zip into the list of the Model Zoo's form beside it."""
    info = packed.with_name("model_info.json")
    entries = json.loads(info.read_text("utf-8")) if info.is_file() else {}
    address = f"{source_url.rstrip('/')}/{packed.name}" if source_url else ""
    write_json(dict(sorted((entries | {packed.stem: {"checksum": digest, "source": address}}).items())), info)


def _check_model(model: Path) -> None:
    """Refuse a model that was trained for another task than the bundle's, or without the JSON beside it."""
    read_checkpoint(model)
    sidecar = model.with_suffix(".json")
    if not sidecar.is_file():
        raise WeightsError(f"{sidecar} is missing; training writes it beside the model, and inference needs it")
    told = trained_settings(str(model))
    task = told.get("labels"), told.get("channels", 1), told.get("regions")
    if task != (["background", "foreground"], 1, None):
        raise SettingsError(
            f"{model} was trained for labels {task[0]}, channels {task[1]} and regions {task[2]}; make a "
            f"bundle for this task with {tool('new_task')}, which takes --model too"
        )
