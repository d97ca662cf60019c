# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""From scores with intervals to a plain recommendation, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import norm as normal
from scipy.stats import t as student

from common.files import replace_file

from .probes import FEW_CASES

__all__ = ["Difference", "Verdict", "cell", "draw", "judge", "markdown_table"]

_MANY = 10  # times as many cases as there are: no longer advice


@dataclass(frozen=True)
class Difference:
    """How much better one arm is than another in the same cases; the interval is of 95 %, NaN where there is none."""

    estimate: float
    low: float
    high: float

    def widened(self, units: int) -> Difference:
        """Return it with the interval that so few cases allow.

        The interval of a bootstrap of few cases is too short, by about the root of n / (n - 1) and the ratio of
        Student's and normal quantiles (Hesterberg, doi:10.1080/00031305.2015.1089789). Of 6 cases without any
        difference, 14 % would be called different; so widened, about 5 %.

        Args:
            units: cases, or groups of cases, that were drawn from.

        Example:
            >>> print(Difference(0.1, 0.0, 0.2).widened(6), Difference(0.1, 0.0, 0.2).widened(100))
            +0.100 [-0.044, +0.244] +0.100 [-0.002, +0.202]
        """
        if units < 2:
            return self
        factor = math.sqrt(units / (units - 1)) * student.ppf(0.975, units - 1) / normal.ppf(0.975)
        low, high = self.estimate - self.low, self.high - self.estimate
        return Difference(self.estimate, self.estimate - factor * low, self.estimate + factor * high)

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Verdict:
    """What the scores allow to say.

    Attributes:
        best: the arm with the highest score.
        decided: whether it is clearly better than every other arm.
        tied: arms that it is not clearly better than.
        sentences: to be read.
    """

    best: str
    decided: bool
    tied: list[str]
    sentences: list[str]


def judge(
    scores: Mapping[str, float],
    difference: Callable[[str, str], Difference | None],
    *,
    units: int,
    what: str,
    scratch: Sequence[str] = (),
    seeds: int = 0,
) -> Verdict:
    """Recommend the best arm only over those that it is better than by an interval that leaves out 0.

    Args:
        scores: of every arm, the higher the better.
        difference: of two arms, first minus second; None where they have too few runs in common.
        units: cases, or groups of cases, that they were judged on.
        what: the score, in words.
        scratch: arms that start without pre-training.
        seeds: of the fine-tunings that differ in nothing else; 0 for probes. With one there is no recommendation.

    Returns:
        the verdict.

    Example:
        >>> gaps = {("a", "b"): Difference(0.1, 0.05, 0.15), ("a", "c"): Difference(0.02, -0.03, 0.06)}
        >>> found = judge({"a": 0.8, "b": 0.7, "c": 0.78}, lambda x, y: gaps[x, y], units=10, what="Dice")
        >>> found.decided, found.tied, found.sentences[0]
        (False, ['c'], 'Too close to call between a and c: Dice 0.800 and 0.780, difference +0.020 [-0.030, +0.060].')
    """
    known = {name: score for name, score in scores.items() if not math.isnan(score)}
    order = sorted(known, key=lambda name: -known[name])
    if not order:
        return Verdict("", False, [], ["There is no score to judge by."])
    best, others = order[0], order[1:]
    if not others:
        return Verdict(best, False, [], [f"There is nothing to compare {best} with."])
    if units < FEW_CASES:
        return Verdict(
            best,
            False,
            others,
            [
                f"Too close to call: with {units} case(s) judged no difference can be told from chance; the best so "
                f"far is {best} ({what} {known[best]:.3f}).",
                f"What would settle it: at least {FEW_CASES} labelled cases, better 20.",
            ],
        )
    if seeds == 1:
        ranking = ", ".join(f"{name} {known[name]:.3f}" for name in order)
        return Verdict(
            best,
            False,
            others,
            [
                f"None. By {what} the order is {ranking}, but one run of each does not tell luck from skill.",
                "What would settle it: more runs, at least --seeds 2, better 3.",
            ],
        )
    found = {name: difference(best, name) for name in others}
    tied = [name for name, gap in found.items() if gap is None or not gap.low > 0]
    beaten = [name for name in others if name not in tied]
    over = ", ".join(f"{name} ({found[name]})" for name in beaten)
    if not tied:
        start = f"Train from scratch, as {best}" if best in scratch else f"Use {best}"
        return Verdict(best, True, [], [f"{start}: {what} {known[best]:.3f}, better than {over}."])
    sentences = []
    if len(tied) == 1:
        gap = found[tied[0]]
        sentences.append(
            f"Too close to call between {best} and {tied[0]}: {what} {known[best]:.3f} and {known[tied[0]]:.3f}"
            + (f", difference {gap}." if gap else "; they have too few runs in common to be compared.")
        )
    else:
        listed = ", ".join(f"{name} {known[name]:.3f}" + _behind(found[name]) for name in tied)
        sentences.append(f"Too close to call: {best} has {what} {known[best]:.3f}, but it is not clear of {listed}.")
    if beaten:
        sentences.append(f"Clearly worse than {best}: {over}.")
    if best in scratch or any(name in scratch for name in tied):
        sentences.append("That pre-training helps on these data is not shown.")
    sentences.append(_what_settles(found[tied[0]], units, seeds))
    return Verdict(best, False, tied, sentences)


def _behind(gap: Difference | None) -> str:
    return f" (difference {gap})" if gap else ""


def _what_settles(gap: Difference | None, units: int, seeds: int) -> str:
    """Return how many cases the closest difference would need, if it stays as it is."""
    more = f", or more seeds than {seeds}" if seeds else ""
    if gap is None or math.isnan(gap.low):
        return f"What would settle it: more labelled cases{more}."
    half = (gap.high - gap.low) / 2
    needed = math.inf if gap.estimate == 0 else units * (half / abs(gap.estimate)) ** 2
    if needed > _MANY * units:
        return (
            f"What would settle it: more than {_MANY * units} labelled cases, if the difference stays as small as it "
            "is; either will do."
        )
    return (
        f"What would settle it: about {max(math.ceil(needed), units + 1)} labelled cases instead of {units}, if the "
        f"difference stays as it is{more}."
    )


def cell(estimate: float | None, interval: Sequence[float] | None, *, sign: bool = False) -> str:
    """Return a number with its interval.

    Example:
        >>> cell(0.8123, [0.7, 0.9]), cell(0.1, None, sign=True), cell(None, None)
        ('0.812 [0.700, 0.900]', '+0.100', '')
    """
    if estimate is None or math.isnan(estimate):
        return ""
    kind = "+.3f" if sign else ".3f"
    shown = format(estimate, kind)
    if interval is None or any(math.isnan(bound) for bound in interval):
        return shown
    return f"{shown} [{interval[0]:{kind}}, {interval[1]:{kind}}]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns also line up as plain text."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in (head, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def draw(panels: Mapping[str, Mapping[str, tuple[float, Sequence[float] | None, str]]], path: Path) -> None:
    """Draw scores with their intervals, a panel for probes and one for fine-tuning.

    Args:
        panels: by title: by arm the score, its interval and the colour.
        path: PNG to write.
    """
    from common.figures import subplots

    shown = {title: bars for title, bars in panels.items() if bars}
    most = max(len(bars) for bars in shown.values())
    figure, axes = subplots(1, len(shown), figsize=(5.2 * len(shown), 1.3 + 0.42 * most), squeeze=False)
    for axis, (title, bars) in zip(axes[0], shown.items(), strict=True):
        for place, (estimate, interval, colour) in enumerate(bars.values()):
            low, high = interval or (estimate, estimate)
            axis.errorbar(
                estimate,
                place,
                xerr=[[max(estimate - low, 0)], [max(high - estimate, 0)]],
                fmt="o",
                color=colour,
                capsize=3,
            )
        axis.set_yticks(range(len(bars)), list(bars))
        axis.set_ylim(len(bars) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("lines: 95 % of bootstrap resamples", fontsize=7)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
