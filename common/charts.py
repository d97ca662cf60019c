# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Curves as SVG to stand in a page: written in a millisecond, where matplotlib takes half a second."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

__all__ = ["Points", "curves_svg"]

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 620, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 34
# told apart by everyone, and by their dashes in grey
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_STEPS = 5  # about so many between the lowest and the highest line of the grid
_MOST_POINTS = 400  # of a line


def curves_svg(lines: Mapping[str, Points], *, alt: str, across: str = "epoch") -> str:
    """Return lines over a common axis, with a legend below; points that are no finite number are left out.

    Args:
        lines: points by name, those of each in order.
        alt: what the picture shows, for who cannot see it.
        across: what the horizontal axis is.
    """
    known = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in lines.items()
    }
    known = {name: _thinned(points) for name, points in known.items() if points}
    if not known:
        return ""
    xs = [x for points in known.values() for x, _ in points]
    ys = [y for points in known.values() for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1)
    step = _round_step((max(ys) - min(ys) or abs(max(ys)) or 1.0) / _STEPS)
    low, high = math.floor(min(ys) / step), math.ceil(max(ys) / step)  # in steps
    high = max(high, low + 1)

    def place(x: float, y: float) -> str:
        across_share, up_share = (x - left) / (right - left), (y / step - low) / (high - low)
        return (
            f"{_LEFT + across_share * (_WIDTH - _LEFT - _RIGHT):.1f},"
            f"{_HEIGHT - _BOTTOM - up_share * (_HEIGHT - _TOP - _BOTTOM):.1f}"
        )

    parts = []
    for tick in range(low, high + 1):
        at = place(left, tick * step).split(",")[1]
        parts.append(f'<path d="M{_LEFT},{at}H{_WIDTH - _RIGHT}" stroke="#d0d7de"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{at}" text-anchor="end" dominant-baseline="middle">{tick * step:.6g}</text>'
        )
    for x, anchor in ((left, "start"), (right, "end")):
        at = place(x, low * step).split(",")[0]
        parts.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}">{x:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(across)}</text>')
    keys = []
    for index, (name, points) in enumerate(known.items()):
        look = f'stroke="{_COLOURS[index % len(_COLOURS)]}" stroke-width="2" fill="none"'
        if dash := _DASHES[index % len(_DASHES)]:
            look += f' stroke-dasharray="{dash}"'
        if len(points) == 1:
            right_of, below = place(*points[0]).split(",")
            parts.append(f'<circle cx="{right_of}" cy="{below}" r="3" {look}/>')
        else:
            parts.append(f'<polyline points="{" ".join(place(*point) for point in points)}" {look}/>')
        key = f'<svg width="34" height="10" aria-hidden="true"><path d="M2,5H32" {look}/></svg>'
        keys.append(f"<span>{key} {html.escape(name)} {points[-1][1]:.4g}</span>")
    return (
        f'<figure class="chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(alt)}">'
        f"{''.join(parts)}</svg><figcaption>{''.join(keys)}</figcaption></figure>"
    )


def _round_step(step: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least so much.

    Example:
        >>> [_round_step(step) for step in (0.13, 0.3, 7.0)]
        [0.2, 0.5, 10.0]
    """
    power = 10.0 ** math.floor(math.log10(step))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * (1 - 1e-9))


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most so many of the points, the last one among them."""
    step = -(-len(points) // _MOST_POINTS)
    return points[::-1][::step][::-1]
