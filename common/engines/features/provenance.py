# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Where the features of a file come from: source, weights, settings and versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["provenance_of", "versions"]


def provenance_of(path: Path) -> dict[str, Any] | None:
    """Return where the features of one file come from, None if it is damaged or of something else."""
    try:
        with np.load(path, allow_pickle=False) as content:
            about = json.loads(str(content["provenance"]))
            content["embedding"]
    except Exception:
        return None
    wanted = {"case", "source", "weights_sha256", "settings"}
    return about if isinstance(about, dict) and wanted <= about.keys() else None


def versions() -> dict[str, str]:
    """Return the versions of what features depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "monai", "numpy")}
    return {"python": platform.python_version(), **packages}
