# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Stand-in for torchvision, for tests only: the one module that a MONAI Label server without SAM imports."""

from . import utils

__all__ = ["utils"]
