# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands of prepare_data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from ..commanding.settings import Existing, From, Reads, Shard, plain, settings

__all__ = ["ListCases", "Prepare", "Scan", "Verify"]

Source = Literal["openmind", "nnssl", "bids", "folder", "datalist"]
Polarity = Annotated[Any, Reads(plain, "as_named or inverted, for all masks of the source or for each")]


@settings
class Scan:
    """What ``prepare_data scan`` is told."""

    folder: Existing
    """Of volumes, or an index of them."""
    output: Path | None = None
    """Folder for scan.json and scan.png (histograms, middle slices of a few volumes); nothing is written without."""
    source: Source | None = None
    """What it is; found out if not given."""
    mask_polarity: Polarity = "as_named"
    """Whether masks are of what their names say, or of the rest."""
    quality: bool = False
    """Measure every volume, not just those that are drawn, for hints at poor quality; reads all voxels."""
    threads: Annotated[int, From(1)] = 8
    """That read headers."""


@settings
class ListCases:
    """What ``prepare_data list`` is told."""

    folder: Existing
    """Of volumes, or an index of them."""
    output: Path
    """Datalist JSON to write; paths below its folder are written relative to it."""
    source: Source | None = None
    """What it is; found out if not given."""
    mask_polarity: Polarity = "as_named"
    """Whether masks are of what their names say, or of the rest."""
    modality: tuple[str, ...] = ()
    """Names to take, such as T1w,T2w."""
    max_quality_score: float | None = None
    """Highest image-quality score to take, 1 is best; volumes without a score are taken."""
    min_size: int | None = None
    """Voxels that every axis must have."""
    spacing_mm: tuple[float, ...] | None = None
    """Lowest and highest spacing in millimetres along any axis, such as 0.5,3."""
    include: tuple[str, ...] = ()
    """Names, subjects or paths to take, * for any letters; or a text file with one on each line."""
    exclude: tuple[str, ...] = ()
    """The same, not to take."""
    duplicates: bool = False
    """Leave out volumes whose voxels are equal to those of an earlier one; reads them all once."""
    keep: Existing | None = None
    """Earlier datalist whose subjects stay in their part; by default the one that is updated."""
    update: bool = False
    """Write over an existing output."""
    seed: Annotated[int, From(0)] = 12345
    """Of the split."""
    threads: Annotated[int, From(1)] = 8
    """That read files."""


@settings
class Prepare:
    """What ``prepare_data prepare`` is told."""

    data: Existing
    """Folder of images, or a datalist."""
    store_dir: Path
    """Folder of the store."""
    dataset_dir: str = ""
    """Where relative paths of a datalist begin that are not beside it."""
    num_workers: Annotated[int, From(0)] = os.cpu_count() or 1
    """Processes; they take turns at volumes that do not fit into memory together."""
    shard: Shard | None = None
    """Only every n-th volume, for a cluster's job array."""
    scheduler: str | None = None
    """Address of a Dask scheduler (tcp://...) whose workers do it instead of this machine's processes."""
    spacing_mm: float | tuple[float, ...] | None = 1.0
    """Target spacing, one or three (slice, row, column); null keeps each file's own."""
    reorient: bool = True
    """Canonical axes; false keeps each file's own."""
    store_dtype: Literal["float16", "float32"] = "float16"
    """Of the voxels in the store."""
    check_disk: bool = True
    """Stop if the disk is too small for what the first volumes let expect."""
    strict: bool = False
    """Fail at the end if a volume cannot be used."""


@settings
class Verify:
    """What ``prepare_data verify`` is told."""

    store_dir: Existing
    """Folder of the store."""
    num_workers: Annotated[int, From(1)] = os.cpu_count() or 1
    """Threads that read."""
    repair: bool = False
    """Remove damaged volumes, so that the next run prepares them again."""
