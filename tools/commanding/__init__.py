# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What every command needs: the environment, and settings that are judged before any work is done."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (what follows cannot be read by an older one)
    raise SystemExit(f"Stopped: this needs Python 3.11 or newer, not {sys.version.split()[0]}")
