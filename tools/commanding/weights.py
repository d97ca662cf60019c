# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which encoder of a bundle a command takes where none is named."""

from __future__ import annotations

from pathlib import Path

from common.terminal import openmind

from .environment import RUNS, kept

__all__ = ["encoder_at_hand"]

_ENCODER = Path("models") / "pretrained_encoder.pt"


def encoder_at_hand(bundle: str) -> Path:
    """Return the file of the encoder that is kept for a bundle; for a verb of ``openmind``, first that of a run.

    Args:
        bundle: of the collection.
    """
    own = (RUNS / bundle / _ENCODER).absolute()
    return own if openmind() is not None and own.is_file() else kept(bundle) / _ENCODER
