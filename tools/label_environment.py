# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Make the environment in which the tests start a MONAI Label server: .venv-label, apart from the project's own.

  python tools/label_environment.py

tools/check.py --all calls it. It has the pins of requirements-label.txt, with a stand-in for torchvision (see
tests/ecosystem/torchvision_standin), and is no environment to work in: docs/monai_label.md says how to make that one.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.ending import end
from tools.commanding.label_environment import label_python
from tools.commanding.running import main
from tools.commanding.settings import settings

__all__ = ["LabelEnvironment", "label_environment"]


@settings
class LabelEnvironment:
    """``label_environment`` needs to be told nothing."""


def label_environment(_: LabelEnvironment) -> None:
    """Make the environment, and tell its interpreter."""
    end(label_python(), following="python -m pytest -m label tests/ecosystem")


if __name__ == "__main__":
    main(label_environment, __doc__, files=())
