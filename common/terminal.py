# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What people read while something runs: lines, warnings, bars, times and paths.

Colours and moving bars are for terminals; a file or another program gets plain lines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm  # where it is used it is imported: help is told before there are packages

__all__ = [
    "OPENMIND",
    "duration",
    "ending",
    "near",
    "openmind",
    "over_bars",
    "progress_bar",
    "speaks",
    "warn",
    "warned",
]

_Item = TypeVar("_Item")
_LINE_EVERY = 60  # seconds between the lines that stand for a bar where there is no terminal

OPENMIND = "OPENMIND_COMMAND"  # of the environment: how the command openmind was called, whose verb runs this process
warned: list[str] = []  # what this process was warned of, for the page of its progress


def warn(text: str) -> None:
    """Print what somebody should know about, once for all that say the same, in colour on a terminal."""
    from tqdm import tqdm

    if text not in warned:
        warned.append(text)
    tqdm.write(f"\033[33m{text}\033[0m" if _in_colour(sys.stdout) else text)


def _in_colour(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def over_bars(line: str) -> None:
    """Print the line of another process, over the bar that it may have drawn on the same terminal."""
    clear = "\r\033[K" if sys.stdout.isatty() and sys.stderr.isatty() else ""
    print(f"{clear}{line}", end="", flush=True)  # noqa: T201


class _Lines:
    """A file that gets every state of a bar as a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    items: Iterable[_Item] | None = None, *, line_every: float = _LINE_EVERY, **settings: Any
) -> tqdm[_Item]:
    """Return a bar of progress: one that moves on a terminal, a line now and then elsewhere, nothing for a single item.

    Args:
        items: to go through; None to update the bar by hand.
        line_every: seconds between lines where there is no terminal.
        settings: of tqdm.
    """
    from tqdm import tqdm

    total = settings.get("total", len(items) if hasattr(items, "__len__") else None)  # type: ignore[arg-type]
    settings.setdefault("disable", total is not None and total < 2)
    settings.setdefault("dynamic_ncols", True)
    if not sys.stderr.isatty():
        settings |= {"file": _Lines(), "mininterval": line_every, "maxinterval": line_every, "delay": line_every}
        settings["leave"] = False  # what ends says so itself
        how = "{n_fmt}{unit} of {total_fmt}{unit}" if "unit_scale" in settings else "{n_fmt} of {total_fmt} {unit}s"
        settings.setdefault("bar_format", f"{{desc}}: {how}, {{remaining}} left")
    return tqdm(items, **settings)


def duration(seconds: float) -> str:
    """Return a time to read.

    Example:
        >>> [duration(seconds) for seconds in (0.4, 42, 754, 9000, 200_000)]
        ['0.4 s', '42 s', '12 min 34 s', '2 h 30 min', '2 d 7 h']
        >>> duration(1800)
        '30 min'
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, unit, part in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def near(path: str | Path) -> str:
    """Return a path from where the user stands, if it lies below; else whole."""
    try:
        whole, here = Path(path).absolute(), Path.cwd()
    except OSError:  # the folder in which the user stood is gone
        return str(path)
    return os.path.normpath(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def ending(result: str | None, *, look: str | None = None, following: str | None = None) -> str:
    """Return the lines with which a run ends: where the result is, where to look, and the next command if there is one.

    Of what only prints, the next command alone.

    Example:
        >>> print(ending("models/model.pt", look="output/curves.png"))
        result:  models/model.pt
        look at: output/curves.png
    """
    told = {"result:": result, "look at:": look, "next:": following}
    return "\n".join(f"{name:<8} {each}" for name, each in told.items() if each is not None)


def openmind() -> str | None:
    """Return how the command ``openmind`` was called if this process runs one of its verbs, else None."""
    return os.environ.get(OPENMIND) or None


def speaks() -> bool:
    """Return whether this process is the one that tells what a run does: the first, of several."""
    return int(os.environ.get("RANK", "0")) == 0
