# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Did pre-training help, and with how many labelled cases? Fine-tune both ways on few and on many, and compare.

  python tools/label_curve.py mae_resenc_l --data FOLDER --cases 2,4,8,16,all
  python tools/label_curve.py mae_resenc_l --data FOLDER --pretrained encoder.pt --epochs 150 --patch_size [160,160,160]
  python tools/label_curve.py mae_primus_m --data mni                      # on the template that nilearn ships
  python tools/label_curve.py mae_resenc_l --data IMAGES --table ages.csv --target age --units years    # of a number

FOLDER holds labelled cases as train.yaml reads them. They are split into folds; the cases of one fold are never seen in
training, not even without their labels. For every fold, number of cases and seed, the network is fine-tuned twice with
the same cases, steps and seed: from the pre-trained encoder with the bundle's recipe, and from scratch with its recipe
for that. Each gets the learning rate that is best for it on held-out cases of the first fold's training part; where
the best of those tried is at an end, more are tried. The last model predicts the unseen fold. Differences are taken
case by case. Beside them the same network with its encoder random and frozen, and a small plain CNN, are trained
likewise, since both ways to start must beat those (--plain_rows false leaves them out).

Without --pretrained, an encoder is pre-trained for each fold on the images of its training part. A name that is none
of the arguments below is a setting of the bundle's configs (--epochs, --patch_size, --features_per_stage, ...); on a
machine without a GPU a narrow network and short runs are the default, and what was used is written down. A run that was
cut goes on with the same command. It writes curve.csv, curve.json, curve.md, curve.png and report.html; the runs are a
study, which tools/study.py reports.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.curves.settings import LabelCurve

__all__ = ["label_curve"]


def label_curve(settings: LabelCurve) -> None:
    """Measure the curve and draw it."""
    from tools.curves.label_curve import label_curve as run

    run(settings)


if __name__ == "__main__":
    main(label_curve, __doc__)
