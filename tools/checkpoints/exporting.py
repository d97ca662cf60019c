# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Write a bundle's weights as a checkpoint for the reference's downstream code, or as safetensors.

  python tools/export_checkpoint.py mae_resenc_l                          # models/pretrained_encoder.pt
  python tools/export_checkpoint.py mae_resenc_l --source pretraining_state.pt    # with the method's own layers
  python tools/export_checkpoint.py mae_resenc_l --format safetensors     # this project's names, receipt as metadata

The checkpoint has the reference's names, aliases included, and its adaptation plan, inside and beside it. Tokens of
Primus are in the order that today's downstream Primus reads, first spatial axis slowest, and the plan says so in
token_order, which tools/import_checkpoint.py obeys.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bundle_cells import bundle_cell
from environment import ROOT, RUNTIME, ensure

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
    sys.path.insert(0, str(ROOT))
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


if __name__ == "__main__":
    ensure(RUNTIME)
    import fire

    fire.Fire(export_checkpoint)
