# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Say what a weights file is: its receipt if it has one, else what can be worked out from it."""

from __future__ import annotations

__all__ = ["inspect_weights"]


def inspect_weights(file: str, plan: str | None = None) -> None:
    """Print what a weights file is.

    Args:
        file: to look into.
        plan: adaptation plan of a checkpoint of the reference, if neither in the file nor beside it.
    """
    from common.weights import inspect

    print("\n".join(inspect(file, plan_file=plan)))
