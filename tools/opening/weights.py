# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which weights are at hand, and fetching the published ones when they are first needed, said beforehand."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from common.errors import SettingsError, WeightsError
from common.terminal import near

from ..commanding.environment import kept
from .options import BUNDLES

__all__ = ["ENCODER", "address", "find", "find_or_fetch"]

ENCODER = "pretrained_encoder.pt"
_PATIENCE = 10  # seconds for the size of a file


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
    _announce(bundle, source, target)
    from ..checkpoints.importing import import_checkpoint
    from ..checkpoints.settings import ImportCheckpoint

    import_checkpoint(ImportCheckpoint(bundle))
    return target


def _announce(bundle: str, source: str, target: Path) -> None:
    """Say what is going to be fetched, or at once that it cannot be."""
    brought = kept(bundle) / "models" / "openmind" / source.rsplit("/", 1)[-1]
    if brought.is_file() or _in_cache(source):
        print(f"the weights of {bundle} are here already, and are translated", flush=True)
        return
    size = _size(source)
    if size is None and "HF_ENDPOINT" not in os.environ:
        raise WeightsError(
            f"{bundle} needs its published weights, which are not here, and {source} cannot be reached; fetch it where "
            f"there is a network, put it at {brought} (and adaptation_plan.json beside it) and run this again, or name "
            "another encoder with --pretrained FILE"
        )
    print(
        f"the weights of {bundle} are needed for the first time: fetching {source} ({size or 'of unknown size'}, "
        f"CC-BY-4.0) and keeping the encoder as {target}",
        flush=True,
    )


def _in_cache(source: str) -> bool:
    """Return whether the hub's own cache has the file."""
    from huggingface_hub import try_to_load_from_cache

    owner, name, _, revision, file = source.removeprefix("https://huggingface.co/").split("/")
    return isinstance(try_to_load_from_cache(f"{owner}/{name}", file, revision=revision), str)


def _size(source: str) -> str | None:
    """Return the size of a file as its server tells it, empty if it does not, None if it cannot be reached."""
    try:
        request = urllib.request.Request(source, method="HEAD", headers={"User-Agent": "openmind-bundles"})
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            return f"{int(answer.headers['Content-Length']) / 1e6:.0f} MB"
    except (urllib.error.HTTPError, TypeError, ValueError):
        return ""
    except OSError:
        return None
