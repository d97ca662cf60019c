# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Draw the learning rate of each fine-tuning schedule, and when the encoder is frozen.

python tools/schedules.py                                  # the published 150 epochs
python tools/schedules.py --epochs 1000 --output long.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.commanding.environment import RUNTIME, ensure

if __name__ == "__main__":
    ensure(RUNTIME)
    from tools.commanding.commands import run
    from tools.curves.schedules import schedules

    run(schedules, sys.argv[1:])
