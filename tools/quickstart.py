# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""See the whole chain on real MRI: pre-train, look, fine-tune with and without pre-training, predict, compare, report.

  python tools/quickstart.py                          # MAE with the residual U-Net, on the MNI152 template
  python tools/quickstart.py --bundle simclr_primus_m # any other bundle: another method, the transformer
  python tools/quickstart.py --data FOLDER            # your own NIfTI; segmentation too if it has images/ and labels/
  python tools/quickstart.py --data FOLDER --labels background,edema,core --scale 4   # names of classes, a longer look

It makes its own environment (.venv) unless the running one has the exact pins, runs the bundle's own configs through
monai.bundle, with a narrow network, small crops and few steps set on the command line, and ends with report.html, one
file with everything in it. Settings: --bundle, --data, --labels, --output (default quickstart/<bundle>), --seed and
--scale (1.0; 2.0 takes twice the steps). A run that was cut goes on when started again with the same settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.starting.settings import Quickstart

__all__ = ["quickstart"]


def quickstart(settings: Quickstart) -> None:
    """Run the chain and write the report."""
    from tools.starting.quickstart import quickstart as run

    run(settings)


if __name__ == "__main__":
    main(quickstart, __doc__)
