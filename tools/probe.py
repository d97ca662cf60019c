# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""See what the frozen features of a bundle's features config tell about your own question, before you trust them.

  python tools/probe.py bundles/mae_resenc_l/output/features --table labels.csv --target diagnosis
  python tools/probe.py features.csv --table labels.csv --target age --patient patient --repeats 5

labels.csv has a column case (names of the images, with or without .nii.gz), the target, and perhaps the patient: scans
of one patient then stay on one side of every split. Classes or numbers are told by the values (--task says otherwise).

Two probes, k nearest neighbours and a regularised linear model, against a baseline that looks at nothing, in a repeated
cross-validation: standardisation, k and the strength of the regularisation are chosen within each training part alone.
Intervals (95 %) are a bootstrap over cases, or over patients; they leave out what depends on the cases trained on, and
so are a little too narrow.

It writes probe.json (scores, folds, settings), probe.csv (every out-of-fold prediction) and map.png into probe_<target>
beside the features, or into --output. Frozen features are weak for segmentation: in the study's comparison of schedules
a frozen encoder reached 55 Dice, a fine-tuned one 76.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.scoring.settings import Probe

__all__ = ["probe"]


def probe(settings: Probe) -> None:
    """Probe features."""
    from tools.scoring.probe import probe as run

    run(settings)


if __name__ == "__main__":
    main(probe, __doc__)
