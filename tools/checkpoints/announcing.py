# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What is said before published weights are fetched: from where and how large, or at once that they cannot be."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from common.errors import WeightsError
from common.terminal import near

__all__ = ["announce"]

_PATIENCE = 10  # seconds for the size of a file


def announce(source: str, *, brought: Path, target: Path) -> None:
    """Say what is going to be fetched; nothing if the file was brought.

    Args:
        source: address of a published checkpoint on the hub.
        brought: where a user without a network puts the file.
        target: file of the encoder that is made of it.

    Raises:
        WeightsError: if it is not here and cannot be reached; the message names the file to bring.
    """
    if brought.is_file():
        return
    if _in_cache(source):
        print(f"{source} is here already, and is translated to {near(target)}", flush=True)
        return
    size = _size(source)
    if size is None and "HF_ENDPOINT" not in os.environ:
        raise WeightsError(
            f"the published weights are not here, and {source} cannot be reached; fetch it where there is a network, "
            f"put it at {near(brought)} (and adaptation_plan.json beside it), and run this again"
        )
    told = f"{size or 'of unknown size'}, CC-BY-4.0"
    print(f"fetching {source} ({told}) and keeping the encoder as {near(target)}", flush=True)


def _in_cache(source: str) -> bool:
    """Return whether the hub's own cache has the file."""
    from huggingface_hub import try_to_load_from_cache

    found = re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", source)
    return found is not None and isinstance(try_to_load_from_cache(found[1], found[3], revision=found[2]), str)


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
