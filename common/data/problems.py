# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What is done with cases that cannot be used: each is named, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from ..errors import DataError

__all__ = ["attempt", "report", "settle"]

T = TypeVar("T")


def report(problems: Sequence[str], *, most: int = 5) -> None:
    """Print what is left out of a list, the first of them in full."""
    for problem in problems[:most]:
        tqdm.write(f"left out: {problem}")
    if len(problems) > most:
        tqdm.write(f"left out: {len(problems) - most:,} more")


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
    tqdm.write(f"Going on without them: {summary}")


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
        return list(
            tqdm(pool.map(one, items), total=len(items), desc="checking files", unit="case", disable=len(items) < 2)
        )
