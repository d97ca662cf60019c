# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Whether the features of a pre-training get better while it runs: on labelled cases, and without any label."""

from typing import TYPE_CHECKING

from ...lazy import on_demand

if TYPE_CHECKING:
    from .handler import FeatureWatch
    from .source import ProbeSource

__all__ = ["FeatureWatch", "ProbeSource"]

__getattr__ = on_demand(globals())
