# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Commands ``prepare`` and ``verify`` of tools/prepare_data.py: fill a volume store, and look whether it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..commanding.commands import shard_parts, truth, whole

__all__ = ["prepare", "verify"]

_STALE_SECONDS = 24 * 3600
_REPORT = "damaged.txt"


def prepare(
    data: str,
    store_dir: str,
    dataset_dir: str = "",
    num_workers: int = os.cpu_count() or 1,
    shard: str = "",
    scheduler: str = "",
    spacing_mm: float | Sequence[float] | str | None = 1.0,
    reorient: bool = True,
    store_dtype: str = "float16",
    check_disk: bool = True,
    strict: bool = False,
) -> None:
    """Prepare every volume that pre-training would use, unless it is there. Stop and start it as you like.

    Settings must be those of pretrain.yaml, or pre-training prepares the volumes again.

    Args:
        data: folder of images, or a datalist.
        store_dir: folder of the store.
        dataset_dir: where relative paths of a datalist begin that are not beside it.
        num_workers: processes; they take turns at volumes that do not fit into memory together.
        shard: i/n with i from 0 to n - 1: only every n-th volume, for a cluster's job array.
        scheduler: address of a Dask scheduler (tcp://...) whose workers do it instead of this machine's processes.
        spacing_mm: target spacing, one or three (slice, row, column); null keeps each file's own.
        reorient: canonical axes; false keeps each file's own.
        store_dtype: float16 or float32.
        check_disk: stop if the disk is too small for what the first volumes let expect.
        strict: fail at the end if a volume cannot be used.
    """
    from common.data import StoreSettings, VolumeStore, pretraining_lists
    from common.errors import SettingsError

    num_workers = whole("num_workers", num_workers)
    part, parts = shard_parts(shard) if shard else (0, 1)
    spacing = None if spacing_mm == "null" else spacing_mm
    if isinstance(spacing, str):
        raise SettingsError(f"--spacing_mm is {spacing!r}; write a number, three, or null")
    lists = pretraining_lists(dataset_dir, str(data)) if Path(data).is_file() else pretraining_lists(str(data))
    settings = StoreSettings(spacing_mm=spacing, reorient=truth(reorient), dtype=store_dtype)
    store = VolumeStore(store_dir, settings)
    for name, cases in lists.items():
        own = cases[part::parts]
        if not own:
            continue
        volumes, problems = store.prepare(
            own,
            num_workers=num_workers,
            strict=truth(strict),
            shares=parts,
            order=random.SystemRandom().getrandbits(32),
            scheduler=scheduler or None,
            check_disk=truth(check_disk),
        )
        of = f" of shard {shard}" if shard else ""
        print(f"{name}: {len(volumes):,} of {len(own):,} volumes{of} are prepared, {len(problems):,} cannot be used")


def verify(store_dir: str, num_workers: int = os.cpu_count() or 1, repair: bool = False) -> None:
    """Read every file of a store and compare it with the checksum that was noted when it was written.

    What is damaged is printed and written to STORE/damaged.txt; the exit status is 1 if there is any and it stays.
    Files that no store writes are neither looked at nor removed, and a folder without any volume of a store is refused.

    Args:
        store_dir: folder of the store.
        num_workers: threads that read.
        repair: remove damaged volumes, so that the next run prepares them again.
    """
    from common.data.storing.naming import stored_file
    from common.errors import DataError
    from common.files import replace_file

    num_workers = whole("num_workers", num_workers)
    root, repair = Path(store_dir).expanduser(), truth(repair)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give the --store_dir of a run")
    own: dict[str, list[str]] = {}  # volume: the endings of its files that are there
    for path in sorted(root.iterdir()):
        if (found := stored_file(path.name)) is not None and not path.name.startswith("."):
            own.setdefault(found[0], []).append(found[1])
    sidecars = [root / f"{name}.json" for name, endings in own.items() if ".json" in endings]
    sidecars = [path for path in sidecars if ".b2nd" in own[path.name.removesuffix(".json")] or _is_sidecar(path)]
    if not any(map(_is_sidecar, sidecars)):
        raise DataError(
            f"{root} holds no prepared volume (no <name>-<digest>.json of a store); give the --store_dir of a run"
        )
    damaged: dict[str, tuple[str, list[str]]] = {}  # volume: what is wrong, its files
    unknown = 0
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = pool.map(_check, sidecars)
        for sidecar, (problem, summed) in zip(
            sidecars, tqdm(results, total=len(sidecars), desc="verifying", unit="volume"), strict=True
        ):
            name = sidecar.name.removesuffix(".json")
            unknown += not problem and not summed
            if problem:  # the JSON first: a volume without it does not exist
                damaged[name] = problem, [sidecar.name, *(name + end for end in own[name] if end != ".json")]
    for name, endings in own.items():
        for path in [] if ".json" in endings else [root / (name + ending) for ending in endings]:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    # a younger one may belong to a volume that is being written: its JSON comes last
                    damaged[path.name] = "belongs to no volume; a killed run left it", [path.name]
    lines = [f"{name}: {problem}" for name, (problem, _) in damaged.items()]
    for line in lines:
        print(line)
    report = root / _REPORT
    if lines:
        replace_file(
            report, lambda temporary: Path(temporary).write_text("\n".join(lines) + "\n", "utf-8", "backslashreplace")
        )
    else:
        report.unlink(missing_ok=True)
    if repair:
        for _, files in damaged.values():
            for name in files:
                (root / name).unlink(missing_ok=True)
    print(
        f"{len(sidecars):,} volumes, {len(damaged):,} damaged"
        + (
            f", {unknown:,} of an earlier version without checksums, of which only sizes were compared"
            if unknown
            else ""
        )
        + (f"; {report} lists them" if damaged else "")
        + ("; they are removed, the next run prepares them again" if damaged and repair else "")
    )
    if damaged and not repair:
        raise SystemExit(1)


def _is_sidecar(path: Path) -> bool:
    """Return whether a file is the JSON of a volume; the first layout had no checksums."""
    try:
        meta = json.loads(path.read_text("utf-8"))
        return isinstance(meta["layout"], int) and ("sha256" in meta or ("shape" in meta and "bytes" in meta))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _check(sidecar: Path) -> tuple[str, bool]:
    """Return what is wrong with the files of a volume, and whether there were checksums."""
    import blosc2

    from common.data.storing.naming import meta_digest, stored_file
    from common.files import sha256

    name = sidecar.name.removesuffix(".json")
    try:
        meta = json.loads(sidecar.read_text("utf-8"))
        shape = tuple(int(side) for side in meta["shape"])
        sizes = {".b2nd": meta["bytes"]} | {f".{mask}.b2nd": size for mask, size in meta.get("masks", {}).items()}
        sums = dict(meta.get("sha256", {}))
        endings = sorted({*sizes, *sums, *([".voxels.npy"] if meta.get("places") else [])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its JSON is damaged ({type(error).__name__}: {error})", True
    if "digest" in meta and meta["digest"] != meta_digest(meta):
        return "its JSON is not as it was written", True
    for ending in endings:
        if stored_file(name + ending) != (name, ending):
            return f"its JSON names {name + ending!r}, which no store writes", True
        path = sidecar.with_name(name + ending)
        try:
            size = path.stat().st_size
            if size != sizes.get(ending, size):
                return f"{path.name} has {size:,} bytes instead of {sizes[ending]:,}", True
            if ending in sums and sha256(path) != sums[ending]:
                return f"{path.name} does not have the checksum that it was written with", True
            if ending.endswith(".b2nd") and (own := tuple(blosc2.open(str(path), mode="r").shape[-3:])) != shape:
                return f"{path.name} is of shape {own}, but its JSON says {shape}", True
        except OSError as error:
            return f"{path.name} cannot be read ({error.strerror})", True
        except (RuntimeError, ValueError, TypeError) as error:
            return f"{path.name} is no array of a store ({error})", True
    return "", bool(sums)
