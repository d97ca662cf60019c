# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which cases of a source are taken: each filter is optional, and what each removes is counted."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, SettingsError
from ...files import write_json
from ...paths import as_path
from ...transforms import read_volume
from ..cases import Case, images_of
from ..listing.folders import behind
from .survey import Survey, in_threads, survey

__all__ = ["Filtered", "Filters", "voxel_digest"]

_SLAB = 2**22  # voxels that are digested at once


@dataclass(frozen=True)
class Filters:
    """What to take.

    Attributes:
        modality: names, in any case.
        max_quality_score: highest image-quality score taken, 1 is best; volumes without a score are taken.
        min_size: voxels that every axis must have.
        spacing_mm: lowest and highest spacing that every axis may have.
        include: names, subjects or paths, ``*`` for any letters; nothing else is taken.
        exclude: the same, not taken.
        duplicates: of volumes with the same shape and the same voxel values in float32, take the first only.
    """

    modality: tuple[str, ...] = ()
    max_quality_score: float | None = None
    min_size: int | None = None
    spacing_mm: tuple[float, float] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    duplicates: bool = False

    def __post_init__(self) -> None:
        for name in ("max_quality_score", "min_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise SettingsError(f"{name} is {value!r}; it must be a number")
        if self.max_quality_score is not None and not math.isfinite(self.max_quality_score):
            raise SettingsError(f"max_quality_score is {self.max_quality_score}; it must be a number")
        if self.spacing_mm is not None and (
            len(self.spacing_mm) != 2 or not 0 <= self.spacing_mm[0] <= self.spacing_mm[1] < math.inf
        ):
            raise SettingsError(
                f"spacing_mm is {self.spacing_mm}; it must be the lowest and the highest, such as 0.5,3"
            )
        if self.min_size is not None and not (self.min_size >= 1 and self.min_size == int(self.min_size)):
            raise SettingsError(f"min_size is {self.min_size}; it must be a number of voxels")

    def apply(
        self, cases: Sequence[Case], *, root: str | Path = "", threads: int = 8, cache: str | Path | None = None
    ) -> Filtered:
        """Take what passes; headers and voxels are read only if a filter asks for them.

        Args:
            cases: of a source.
            root: folder that paths in ``include`` and ``exclude`` may start from.
            threads: that read files.
            cache: JSON where digests of voxels are kept, so that they are computed once.

        Raises:
            DataError: if nothing is left.
        """
        result = Filtered(list(cases), {}, [])
        start = os.path.abspath(root) + os.sep
        if self.include:
            wanted = _matcher(self.include, start)
            result.keep("not in include", [wanted(case) for case in result.cases])
        if self.exclude:
            unwanted = _matcher(self.exclude, start)
            result.keep("in exclude", [not unwanted(case) for case in result.cases])
        if self.modality:
            names = {name.lower() for name in self.modality}
            result.keep("other modality", [str(case.get("modality", "")).lower() in names for case in result.cases])
        if self.max_quality_score is not None:
            scores = [case.get("quality") for case in result.cases]
            unscored = sum(score is None for score in scores)
            if unscored:
                result.notes.append(f"{unscored:,} volume(s) have no image-quality score and are kept")
            result.keep("quality score too high", [s is None or s <= self.max_quality_score for s in scores])
        if self.min_size is not None or self.spacing_mm is not None or self.duplicates:
            self._by_headers(result, threads, cache)
        if not result.cases:
            told = ", ".join(f"{name} {count:,}" for name, count in result.removed.items())
            raise DataError(f"nothing is left of {len(cases):,} volumes ({told}); loosen the filters")
        return result

    def _by_headers(self, result: Filtered, threads: int, cache: str | Path | None) -> None:
        found = survey(result.cases, threads=threads)
        result.problems += found.problems.values()
        keep = {"unreadable": found.readable}
        if self.min_size is not None:
            keep["too small"] = found.shape.min(axis=1) >= self.min_size
        if self.spacing_mm is not None:
            low, high = self.spacing_mm
            keep["spacing out of range"] = (found.spacing_mm.min(1) >= low) & (found.spacing_mm.max(1) <= high)
        rows = np.arange(len(result.cases))
        for name, passes in keep.items():
            result.keep(name, passes[rows].tolist())
            rows = rows[passes[rows]]
        if self.duplicates:
            result.keep("duplicate", _first_of_each(result.cases, found, rows, threads, cache))

    def settings(self) -> dict[str, Any]:
        """Return what is asked for, as plain values."""
        return {key: value for key, value in asdict(self).items() if value not in ((), None, False)}


@dataclass
class Filtered:
    """What is left, how many each filter removed, and what to tell."""

    cases: list[Case]
    removed: dict[str, int]
    notes: list[str]
    problems: list[str] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.problems = self.problems or []

    def keep(self, name: str, passes: Sequence[bool]) -> None:
        """Drop the cases that do not pass, and count them."""
        self.removed[name] = len(passes) - sum(passes)
        self.cases = [case for case, good in zip(self.cases, passes, strict=True) if good]


def _matcher(entries: Sequence[str], start: str) -> Callable[[Case], bool]:
    exact = {entry for entry in entries if not any(letter in entry for letter in "*?[")}
    patterns = [fnmatch.translate(entry) for entry in entries if entry not in exact]
    pattern = re.compile("|".join(patterns)) if patterns else None

    def matches(case: Case) -> bool:
        path = images_of(case)[0]
        names = {
            path,
            path.removeprefix(start),
            os.path.basename(path),
            *(str(case.get(k)) for k in ("name", "subject")),
        }
        names |= {f"{case.get('dataset')}/{case.get('subject')}", str(case.get("series"))}
        return not exact.isdisjoint(names) or (pattern is not None and any(pattern.match(name) for name in names))

    return matches


def voxel_digest(path: str) -> str:
    """Return a digest of a volume's shape and its voxel values in float32, whatever format and type they are stored in.

    Raises:
        DataError: if it cannot be read.
    """
    values, _ = read_volume(path)
    digest = hashlib.sha256(str(values.shape).encode())
    rows = max(1, _SLAB // max(1, values[0].size))
    for first in range(0, len(values), rows):
        digest.update(np.ascontiguousarray(values[first : first + rows], dtype="<f4").tobytes())
    return digest.hexdigest()


def _first_of_each(
    cases: Sequence[Case], found: Survey, rows: np.ndarray, threads: int, cache: str | Path | None
) -> list[bool]:
    """Return which cases are the first of their content; only volumes that share a shape are read, one a thread."""
    shapes = [tuple(found.shape[row].tolist()) for row in rows]
    shared = Counter(shapes)
    candidates = [place for place, shape in enumerate(shapes) if shared[shape] > 1]
    kept = as_path(cache) if cache else None
    known: dict[str, str] = {}
    seen: dict[str, str] = {}
    if kept is not None and kept.is_file():
        try:
            known = dict(json.loads(kept.read_text("utf-8")))
        except (ValueError, TypeError):
            known = {}

    def digest(place: int) -> tuple[str, str]:
        file = Path(images_of(cases[place])[0])
        try:
            status = file.stat()
            key = f"{file}:{status.st_size}:{status.st_mtime_ns}"
            key += f":{others}" if (others := behind(str(file), seen)) else ""
            return key, known.get(key) or voxel_digest(str(file))
        except (DataError, OSError, ValueError):
            return str(file), f"unreadable {file}"  # is told when it is prepared

    digests = in_threads(digest, candidates, threads=min(threads, 4), doing="comparing voxels")
    if kept is not None:
        write_json(known | {key: value for key, value in digests if not value.startswith("unreadable")}, kept)
    met: set[str] = set()
    first = [True] * len(cases)
    for place, (_, value) in zip(candidates, digests, strict=True):
        first[place] = value not in met
        met.add(value)
    return first
