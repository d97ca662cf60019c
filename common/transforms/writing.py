# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Writing predictions whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from monai.data import NibabelWriter

__all__ = ["AtomicNibabelWriter"]


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer for ``SaveImaged``, through a temporary file: a killed run leaves no half prediction."""

    def write(self, filename: str, verbose: bool = False, **kwargs: Any) -> None:
        """Write to ``filename``."""
        path = Path(filename)
        temporary = path.with_name(f".part-{os.getpid()}-{path.name}")
        try:
            super().write(temporary, verbose=verbose, **kwargs)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
