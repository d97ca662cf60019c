# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""matplotlib as everything here draws with it: into files, and texts as they are; a class may be called ``$x$``.

Nothing of it is changed for others in the same process, such as a notebook that shows its own figures.
"""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib import figure
from matplotlib.backend_bases import RendererBase
from matplotlib.text import Text

__all__ = ["Figure", "subplots"]


class Figure(figure.Figure):
    """A figure of no window, which draws texts as they are."""

    def draw(self, renderer: RendererBase) -> None:
        """Draw, no text of it as mathematics."""
        for text in self.findobj(Text):
            text.set_parse_math(False)  # type: ignore[attr-defined]
        with matplotlib.rc_context({"text.parse_math": False}):  # of those that are only made now
            super().draw(renderer)


def subplots(rows: int, columns: int, *, figsize: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """Return a figure of so many inches and its axes, as :func:`matplotlib.pyplot.subplots` does."""
    made = Figure(figsize=figsize, layout="constrained")
    return made, made.subplots(rows, columns, **options)
