# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What is done with cases that cannot be used: each is named, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from ..errors import DataError
from ..terminal import progress_bar, warn

__all__ = ["LeftOut", "attempt", "report", "settle"]

T = TypeVar("T")


class LeftOut:
    """What a list leaves out: how many files and folders of which kind, one of each, and what to do about them.

    Example:
        >>> left_out = LeftOut()
        >>> for name in ("a.mnc", "b.mnc"):
        ...     left_out.add("file(s) of MINC", name, "convert them with mnc2nii")
        >>> left_out.note("b.csv, line 3: the path is empty")
        >>> len(left_out), left_out.told()[0]
        (3, '2 file(s) of MINC, such as a.mnc; convert them with mnc2nii')
    """

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], tuple[int, str]] = {}
        self.single: list[str] = []

    def add(self, kind: str, example: object, remedy: str) -> None:
        """Count one of a kind."""
        count, first = self.kinds.get((kind, remedy), (0, str(example)))
        self.kinds[kind, remedy] = count + 1, first

    def note(self, sentence: str) -> None:
        """Count one that is like no other."""
        self.single.append(sentence)

    def __len__(self) -> int:
        return sum(count for count, _ in self.kinds.values()) + len(self.single)

    def told(self, most: int = 5) -> list[str]:
        """Return a sentence for every kind, and for the first of the others."""
        kinds = [f"{count:,} {kind}, such as {first}; {how}" for (kind, how), (count, first) in self.kinds.items()]
        more = [f"{len(self.single) - most:,} more"] if len(self.single) > most else []
        return [*kinds, *self.single[:most], *more]


def report(left_out: LeftOut) -> None:
    """Print what a list leaves out."""
    for sentence in left_out.told():
        tqdm.write(f"left out: {sentence}")


def settle(problems: Sequence[DataError], usable: int, *, strict: bool) -> None:
    """Report bad files at the end of a check, and stop if strict or if nothing is left.

    Raises:
        DataError: with ``strict``, or when ``usable`` is 0.
    """
    if not problems:
        return
    listed = "\n".join(f"  - {problem}" for problem in problems)
    summary = f"{len(problems)} of {len(problems) + usable} cannot be used:\n{listed}"
    if strict:
        raise DataError(f"{summary}\nRepair them, or run without --strict to go on with the rest.")
    if not usable:
        raise DataError(f"{summary}\nNothing is left to work on.")
    warn(f"Going on without them: {summary}")


def attempt(function: Callable[[T], Any], items: Iterable[T]) -> list[DataError | None]:
    """Call ``function`` on every item in threads, and return what each raised."""

    def one(item: T) -> DataError | None:
        try:
            function(item)
        except DataError as error:
            return error
        return None

    items = list(items)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(progress_bar(pool.map(one, items), total=len(items), desc="checking files", unit="case"))
