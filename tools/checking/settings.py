# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the command that checks the project."""

from __future__ import annotations

from ..commanding.settings import settings

__all__ = ["Check"]


@settings
class Check:
    """What ``check`` is told."""

    fast: bool = False
    """Leave out the tests that run whole bundles and studies, and networks of full size."""
    all: bool = False
    """Run the slow tests, those of a MONAI Label server, and nnU-Net itself on what is exported for it too, and tests
    with the lowest and the newest versions that the metadata allow."""
    fix: bool = False
    """Let ruff mend format and lint first."""
