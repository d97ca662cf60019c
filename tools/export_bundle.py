# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Write bundles in the form that MONAI Label, the Model Zoo and Hugging Face take, as folders and as zips.

  python tools/export_bundle.py mae_resenc_l --output dist
  python tools/export_bundle.py all --output dist --weights false
  python tools/export_bundle.py mae_resenc_l --model trained/model.pt      # with a model that was fine-tuned
  python tools/export_bundle.py mae_resenc_l --push owner/mae_resenc_l     # and upload it to Hugging Face, privately

It writes dist/<bundle>, which runs on its own, dist/<bundle>_v<version>.zip, and the zip's entry in
dist/model_info.json. Weights come from models/pretrained_encoder.pt of the bundle, where pre-training or
tools/import_checkpoint.py put them. models/model.pt is then this encoder with a decoder that is marked as untrained:
inference says to fine-tune first. Equal inputs give equal bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.exporting.settings import ExportBundle

__all__ = ["export_bundle"]


def export_bundle(settings: ExportBundle) -> None:
    """Export bundles."""
    from tools.exporting.bundles import export_bundle as run

    run(settings)


if __name__ == "__main__":
    main(export_bundle, __doc__)
