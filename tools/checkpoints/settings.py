# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands for checkpoints and weights files."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from ..commanding.settings import Bundle, Existing, Rests, settings

__all__ = ["ExportCheckpoint", "ImportCheckpoint", "InspectWeights"]


@settings
class ImportCheckpoint:
    """What ``import_checkpoint`` is told."""

    bundle: Bundle
    """What to import for."""
    source: str | None = None
    """File, folder, address, or repository of the hub; the bundle's published one unless given."""
    output: Path | None = None
    """File to write; default models/pretrained_encoder.pt of the bundle."""
    plan: Existing | None = None
    """Adaptation plan, if it is neither in the checkpoint nor beside it."""
    token_order: Literal["auto", "swapped", "straight", "keep"] = "auto"
    """auto; or swapped or straight, if the plan and the published cell are wrong about the file; or keep, which
    converts nothing, for comparison."""
    allow_partial: bool = False
    """Accept a file that does not cover the encoder."""
    resume: bool = False
    """Also write pretraining_state.pt, from which the pretrain config goes on."""
    allow_http: bool = False
    """Fetch from an address without encryption too."""
    settings: Rests = field(default_factory=dict)
    """Of the pretrain config, for a network of another size (--embed_dim, --features_per_stage, ...)."""


@settings
class ExportCheckpoint:
    """What ``export_checkpoint`` is told."""

    bundle: Bundle
    """Whose weights."""
    source: Existing | None = None
    """Encoder file or pre-training state; default models/pretrained_encoder.pt of the bundle."""
    output: Path | None = None
    """File to write; default models/exported/checkpoint_final.pth or pretrained_encoder.safetensors."""
    format: Literal["checkpoint", "safetensors"] = "checkpoint"
    """Names of the reference in a checkpoint, or those of this project as safetensors."""
    settings: Rests = field(default_factory=dict)
    """Of the pretrain config, for a network of another size (--embed_dim, --features_per_stage, ...)."""


@settings
class InspectWeights:
    """What ``inspect_weights`` is told."""

    file: Existing
    """To look into."""
    plan: Existing | None = None
    """Adaptation plan of a checkpoint of the reference, if neither in the file nor beside it."""
