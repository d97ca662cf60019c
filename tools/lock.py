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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.commanding.environment import DEVELOPMENT, RUNTIME, ensure


def lock(upgrade: bool = False) -> None:
    """Make the locks.

    Args:
        upgrade: take the newest versions of what is not pinned.
    """
    from tools.commanding import locks

    print("\n".join(f"written: {name}" for name in locks.lock(upgrade=upgrade)))


if __name__ == "__main__":
    ensure(RUNTIME, DEVELOPMENT)
    from tools.commanding.commands import run

    run(lock, sys.argv[1:])
