# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Write a bundle's weights as a checkpoint for the reference's downstream code, or as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..commanding.environment import ROOT
from .cells import bundle_cell

__all__ = ["export_checkpoint"]


def export_checkpoint(
    bundle: str, source: str | None = None, output: str | None = None, format: str = "checkpoint", **settings: Any
) -> None:
    """Export weights.

    Args:
        bundle: whose weights.
        source: encoder file or pre-training state; default models/pretrained_encoder.pt of the bundle.
        output: file to write; default models/exported/checkpoint_final.pth or pretrained_encoder.safetensors.
        format: checkpoint or safetensors.
        settings: of the pretrain config, for a network of another size (--embed_dim, --features_per_stage, ...).
    """
    from common.errors import end_in_a_sentence
    from common.weights import export_checkpoint as export_file
    from common.weights import export_safetensors

    end_in_a_sentence()
    write = {"checkpoint": export_file, "safetensors": export_safetensors}
    if format not in write:
        raise SystemExit(f"Stopped: format is {format!r}; it must be one of {', '.join(write)}")
    cell, _ = bundle_cell(bundle, settings)
    models = ROOT / "bundles" / bundle / "models"
    name = {"checkpoint": "checkpoint_final.pth", "safetensors": "pretrained_encoder.safetensors"}[format]
    target = Path(output) if output else models / "exported" / name
    receipt = write[format](source or models / "pretrained_encoder.pt", cell, output=target)
    print(receipt.summary())
    print(f"written: {target}" + (" and adaptation_plan.json" if format == "checkpoint" else ""))
