# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Draw the learning rate of each fine-tuning schedule, and when the encoder is frozen.

  python tools/schedules.py                                  # the published 150 epochs
  python tools/schedules.py --epochs 1000 --output long.png

It writes schedules.png, or the picture that --output names.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.curves.settings import Schedules

__all__ = ["schedules"]


def schedules(settings: Schedules) -> None:
    """Draw the learning rates."""
    from tools.curves.schedules import schedules as run

    run(settings)


if __name__ == "__main__":
    main(schedules, __doc__)
