# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Make the locks of all requirements files: every package that they need, with the SHA-256 of each of its files.

  python tools/lock.py                # after a pin was changed; other versions stay as they are
  python tools/lock.py --upgrade      # take the newest of all that is not pinned

It writes locks/requirements.txt, locks/requirements-dev.txt and locks/requirements-label.txt, and locks/cuda.txt with
the CUDA libraries of the torch that the package index has for Linux. It asks the index for metadata and downloads no
package but the torch for CPUs, if pip finds one here. tools/check.py sees, without a network, whether a lock is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.ending import end, tool_command
from tools.commanding.environment import DEVELOPMENT, RUNTIME
from tools.commanding.running import main
from tools.commanding.settings import settings

__all__ = ["Lock", "lock"]


@settings
class Lock:
    """What ``lock`` is told."""

    upgrade: bool = False
    """Take the newest versions of what is not pinned."""


def lock(settings: Lock) -> None:
    """Make the locks."""
    from tools.commanding.locks import lock as run

    print("\n".join(f"written: {name}" for name in run(upgrade=settings.upgrade)))
    end("locks", following=tool_command("check", "--fast"))


if __name__ == "__main__":
    main(lock, __doc__, files=(RUNTIME, DEVELOPMENT))
