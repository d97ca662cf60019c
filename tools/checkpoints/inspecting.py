# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Say what a weights file is: its receipt if it has one, else what can be worked out from it."""

from __future__ import annotations

from pathlib import Path

from common.files import sha256
from common.weights import Told, inspect
from common.weights.inspection import IMPORT
from common.weights.made import made_with

from ..commanding.ending import config_command, end, model_command
from . import catalogue
from .settings import InspectWeights

__all__ = ["inspect_weights"]


def inspect_weights(settings: InspectWeights) -> None:
    """Print what a weights file is."""
    known = catalogue.by_digest(sha256(settings.file)) if settings.file.is_file() else None
    card = settings.file.with_name("README.md")
    lines = inspect(settings.file, plan_file=settings.plan, told=Told(known=known, by="its digest", card=card))
    following = lines.pop().removeprefix(IMPORT) if lines[-1].startswith(IMPORT) else _following(settings.file)
    print("\n".join(lines))
    end(following=following)


def _following(file: Path) -> str | None:
    """Return what is done with an encoder or a model that was made here."""
    told = made_with(file)
    if "bundle" not in told:
        return None
    if "labels" in told:
        return model_command(str(told["bundle"]), file, "IMAGES")
    return config_command(str(told["bundle"]), "train", "LABELLED_FOLDER", "--pretrained", file)
