# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Write a bundle's weights for the reference's downstream code, as safetensors, or as a model for nnU-Net."""

from __future__ import annotations

from common.weights import export_checkpoint as export_file
from common.weights import export_safetensors

from ..commanding.ending import end, tool_command
from ..commanding.environment import kept
from .cells import bundle_cell
from .models import export_model
from .settings import ExportCheckpoint

__all__ = ["export_checkpoint"]

_WRITERS = {
    "checkpoint": (export_file, "checkpoint_final.pth", "adaptation_plan.json"),
    "safetensors": (export_safetensors, "pretrained_encoder.safetensors", ""),
}


def export_checkpoint(settings: ExportCheckpoint) -> None:
    """Export weights."""
    if settings.format == "nnunet":
        export_model(settings)
        return
    cell, _ = bundle_cell(settings.bundle, settings.settings)
    models = kept(settings.bundle) / "models"
    write, name, beside = _WRITERS[settings.format]
    target = settings.output or models / "exported" / name
    receipt = write(settings.source or models / "pretrained_encoder.pt", cell, output=target)
    print(receipt.summary())
    end(target, look=target.with_name(beside) if beside else None, following=tool_command("inspect_weights", target))
