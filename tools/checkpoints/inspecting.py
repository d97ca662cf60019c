# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Say what a weights file is: its receipt if it has one, else what can be worked out from it."""

from __future__ import annotations

from common.files import sha256
from common.weights import Told, inspect

from . import catalogue
from .settings import InspectWeights

__all__ = ["inspect_weights"]


def inspect_weights(settings: InspectWeights) -> None:
    """Print what a weights file is."""
    known = catalogue.by_digest(sha256(settings.file)) if settings.file.is_file() else None
    card = settings.file.with_name("README.md")
    print(
        "\n".join(inspect(settings.file, plan_file=settings.plan, told=Told(known=known, by="its digest", card=card)))
    )
