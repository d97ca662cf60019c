# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pre-train, fine-tune, predict, embed and compare with the bundles, one line each, from any folder.

  openmind list                                            # the bundles, and what weights are here
  openmind scan scans/                                     # what is in a folder, from headers alone
  openmind pretrain mae_resenc_l scans/                    # -> openmind_runs/mae_resenc_l
  openmind finetune mae_resenc_l task/ --labels background,edema,core
  openmind predict openmind_runs/mae_resenc_l new/ -o masks
  openmind evaluate masks truth --labels background,edema,core
  openmind classify mae_primus_m scans/ --table labels.csv --target diagnosis
  openmind classify mae_primus_m scans/ --table ages.csv --target age --task regression
  openmind embed mae_primus_m scans/ -o embeddings --pooling mean+std
  openmind probe embeddings --table labels.csv --target diagnosis
  openmind new-task mae_resenc_l --labels edema,core --output glioma
  openmind serve glioma scans/                             # with MONAI Label
  openmind doctor                                          # what of this machine a run depends on
  openmind pretrain mae_resenc_l -h                        # every setting of this bundle's pretrain.yaml

From a clone, without installing anything, the same is done by python tools/openmind.py:

  python tools/openmind.py list

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
from tools import study
from tools.choose import choose
from tools.evaluate import evaluate
from tools.export_bundle import export_bundle
from tools.import_checkpoint import import_checkpoint
from tools.inspect_weights import inspect_weights
from tools.label_curve import label_curve
from tools.new_task import new_task
from tools.opening.entering import enter
from tools.opening.settings import Classify, Doctor, Embed, Finetune, ListBundles, Predict, Pretrain, Serve
from tools.prepare_data import scan
from tools.probe import probe

__all__ = ["GROUPS", "VERBS", "main"]


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


def classify(settings: Classify) -> None:
    """Train a classifier of whole volumes, or a regression with --task regression, or predict with one."""
    from tools.opening.runs import classify as run

    run(settings)


def serve(settings: Serve) -> None:
    """Label with MONAI Label: put its app and a bundle together and start the server."""
    from tools.opening.serving import serve as run

    run(settings)


def doctor(settings: Doctor) -> None:
    """Look at this machine: versions, GPU, memory, disk, links, extras; one finding a line."""
    from tools.opening.doctor import doctor as run

    run(settings)


VERBS: dict[str, Callable[[Any], None]] = {
    "list": list_bundles,
    "scan": scan,
    "import": import_checkpoint,
    "inspect": inspect_weights,
    "pretrain": pretrain,
    "finetune": finetune,
    "predict": predict,
    "evaluate": evaluate,
    "classify": classify,
    "embed": embed,
    "probe": probe,
    "choose": choose,
    "curve": label_curve,
    "export": export_bundle,
    "new-task": new_task,
    "serve": serve,
    "doctor": doctor,
}
GROUPS = {"study": study.COMMANDS}


def main() -> None:
    """Do what the command line says."""
    enter(VERBS, __doc__ or "", sys.argv[1:], groups=GROUPS)


if __name__ == "__main__":
    main()
