# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""matplotlib as everything here draws with it: into files, and texts as they are; a class may be called ``$x$``."""

from __future__ import annotations

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["Figure", "plt"]

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False
