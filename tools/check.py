# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Run every check of the project: configs, locks, format, lint, types, tests. One line per step; the exit status says
if any failed.

  python tools/check.py           # what CI runs
  python tools/check.py --fast    # without the tests that run whole bundles and studies
  python tools/check.py --all     # with the slow tests, a MONAI Label server, nnU-Net itself, other versions
  python tools/check.py --fix     # let ruff mend what it can first

It makes its own environment (.venv) unless the running one has the exact pins; --all makes .venv-label and
.venv-nnunet as well, and renews tests/weights/nnunet/recording.json, what nnU-Net said of the exports. Last it makes
.venv-lowest and .venv-newest, with the lowest and the newest versions that the metadata allow, and tests in them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.checking.settings import Check
from tools.commanding.environment import DEVELOPMENT, RUNTIME
from tools.commanding.running import main

__all__ = ["check"]


def check(settings: Check) -> None:
    """Run the checks."""
    from tools.checking.checks import check as run

    run(settings)


if __name__ == "__main__":
    main(
        check,
        __doc__,
        files=(
            DEVELOPMENT,
            RUNTIME,
        ),
    )
