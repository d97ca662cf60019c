# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which weights are at hand, and fetching the published ones when they are first needed, said beforehand."""

from __future__ import annotations

import re
from pathlib import Path

from common.errors import SettingsError
from common.terminal import near

from ..commanding.environment import kept
from .options import BUNDLES

__all__ = ["ENCODER", "address", "find", "find_or_fetch"]

ENCODER = "pretrained_encoder.pt"


def address(bundle: str) -> str | None:
    """Return where the published weights of a bundle are, None if it has none."""
    found = re.search(r"^\s+url: *(\S+)", (BUNDLES / bundle / "large_files.yml").read_text("utf-8"), re.M)
    return found[1] if found else None


def find(bundle: str, folder: Path) -> Path | None:
    """Return the encoder of a run's folder, else the one that is kept for the bundle, if there is one."""
    places = (folder / "models" / ENCODER, kept(bundle) / "models" / ENCODER)
    return next((file for file in places if file.is_file()), None)


def find_or_fetch(bundle: str, folder: Path, *, show: bool = False) -> Path:
    """Return the encoder that is at hand, or fetch the published one, saying from where and how large it is.

    Args:
        bundle: of the collection.
        folder: of the run.
        show: only say where it would be.

    Raises:
        SettingsError: if there is none and none is published.
        WeightsError: if it cannot be fetched; the message names the file to bring.
    """
    if (file := find(bundle, folder)) is not None:
        if not show:
            print(f"starting from {near(file)}", flush=True)
        return file
    target = kept(bundle) / "models" / ENCODER
    source = address(bundle)
    if source is None:
        raise SettingsError(
            f"{bundle} has no published weights and none are here; pre-train it (openmind pretrain {bundle} DATA), "
            "name an encoder with --pretrained FILE, or start from a random network with --from_scratch"
        )
    if show:
        return target
    print(f"{bundle} starts from its published weights, unless --pretrained names others", flush=True)
    from ..checkpoints.importing import import_checkpoint
    from ..checkpoints.settings import ImportCheckpoint

    import_checkpoint(ImportCheckpoint(bundle))
    return target
