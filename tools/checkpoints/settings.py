# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands for checkpoints and weights files."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from common.errors import SettingsError

from ..commanding.settings import Bundle, Existing, Rests, settings

__all__ = ["ExportCheckpoint", "ImportCheckpoint", "InspectWeights"]


@settings
class ImportCheckpoint:
    """What ``import_checkpoint`` is told."""

    bundle: Bundle | None = None
    """What to import for."""
    source: str | None = None
    """File, folder, address, or repository of the hub; the bundle's published one unless given. A folder of models of
    nnU-Net, with plans.json and dataset.json, becomes models/model.pt."""
    list: bool = False
    """Only say which public checkpoints are known; with a bundle, those of its backbone."""
    output: Path | None = None
    """File to write; default models/pretrained_encoder.pt of the bundle."""
    plan: Existing | None = None
    """Adaptation plan, if it is neither in the checkpoint nor beside it."""
    token_order: Literal["auto", "swapped", "straight", "keep"] = "auto"
    """Of Primus. auto goes by the plan, the catalogue or the file, and stops where they do not say it; swapped and
    straight say how it was trained; keep converts nothing, for comparison."""
    method: str | None = None
    """How it was pre-trained, if neither the file nor the catalogue says it: mae, ..., or words of yours."""
    licence: str | None = None
    """Its licence, if no card or catalogue says it."""
    citation: str | None = None
    """What to cite for it, likewise."""
    allow_partial: bool = False
    """Accept a file that does not cover the encoder."""
    resume: bool = False
    """Also write pretraining_state.pt, from which the pretrain config goes on."""
    allow_http: bool = False
    """Fetch from an address without encryption too."""
    settings: Rests = field(default_factory=dict)
    """Of the pretrain config, for a network of another size (--embed_dim, --features_per_stage, ...)."""

    def __post_init__(self) -> None:
        if self.bundle is None and not self.list:
            raise SettingsError(
                "import_checkpoint needs the name of a bundle, such as mae_resenc_l; --list says which checkpoints are "
                "known"
            )


@settings
class ExportCheckpoint:
    """What ``export_checkpoint`` is told."""

    bundle: Bundle
    """Whose weights."""
    source: Existing | None = None
    """Encoder file or pre-training state, default models/pretrained_encoder.pt of the bundle; for nnunet a fine-tuned
    model, default models/model.pt."""
    output: Path | None = None
    """File to write, default models/exported/checkpoint_final.pth or pretrained_encoder.safetensors; for nnunet a
    folder, default models/exported/nnunet."""
    format: Literal["checkpoint", "safetensors", "nnunet"] = "checkpoint"
    """Names of the reference in a checkpoint; those of this project as safetensors; or a segmentation as a folder that
    nnU-Net predicts with."""
    settings: Rests = field(default_factory=dict)
    """Of the pretrain config, for a network of another size (--embed_dim, --features_per_stage, ...)."""


@settings
class InspectWeights:
    """What ``inspect_weights`` is told."""

    file: Existing
    """To look into."""
    plan: Existing | None = None
    """Adaptation plan of a checkpoint of the reference, if neither in the file nor beside it."""
