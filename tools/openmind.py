# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pre-train, fine-tune, predict and embed with the bundles, one line each, from any folder.

  openmind list                                            # the bundles, and what weights are here
  openmind pretrain mae_resenc_l scans/                    # -> openmind_runs/mae_resenc_l
  openmind finetune mae_resenc_l task/ --labels background,edema,core
  openmind predict openmind_runs/mae_resenc_l new/ -o masks
  openmind embed mae_primus_m scans/ -o embeddings --pooling mean+std
  openmind pretrain mae_resenc_l -h                        # every setting of this bundle's pretrain.yaml

From a clone, without installing anything, the same is done by

  python tools/openmind.py VERB ...

A verb runs the bundle's own config through MONAI; --show_command prints the equal command instead. Every setting of the
config is an option; lists need no quotes: --patch-size 96 96 96. Results go to openmind_runs/BUNDLE, or to --output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.opening.entering import enter
from tools.opening.settings import Embed, Finetune, ListBundles, Predict, Pretrain

__all__ = ["VERBS", "embed", "finetune", "list_bundles", "main", "predict", "pretrain"]


def list_bundles(settings: ListBundles) -> None:
    """Print the bundles, and which weights and models are at hand."""
    from tools.opening.listing import list_bundles as run

    run(settings)


def pretrain(settings: Pretrain) -> None:
    """Pre-train on volumes without labels."""
    from tools.opening.runs import pretrain as run

    run(settings)


def finetune(settings: Finetune) -> None:
    """Fine-tune a pre-trained encoder, or a random one, for segmentation."""
    from tools.opening.runs import finetune as run

    run(settings)


def predict(settings: Predict) -> None:
    """Segment volumes with a model that was fine-tuned."""
    from tools.opening.runs import predict as run

    run(settings)


def embed(settings: Embed) -> None:
    """Write an embedding of each volume with a pre-trained encoder."""
    from tools.opening.runs import embed as run

    run(settings)


VERBS: dict[str, Callable[[Any], None]] = {
    "list": list_bundles,
    "pretrain": pretrain,
    "finetune": finetune,
    "predict": predict,
    "embed": embed,
}


def main() -> None:
    """Do what the command line says."""
    enter(VERBS, __doc__ or "", sys.argv[1:])


if __name__ == "__main__":
    main()
