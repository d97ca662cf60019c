# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Say what a weights file is: its receipt if it has one, else what can be worked out from it."""

from __future__ import annotations

from common.weights import inspect

from .settings import InspectWeights

__all__ = ["inspect_weights"]


def inspect_weights(settings: InspectWeights) -> None:
    """Print what a weights file is."""
    print("\n".join(inspect(settings.file, plan_file=settings.plan)))
