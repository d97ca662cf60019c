# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Commands ``prepare`` and ``verify`` of tools/prepare_data.py: fill a volume store, and look whether it is whole."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blosc2

from common.data import StoreSettings, VolumeStore, pretraining_lists
from common.data.storing.naming import meta_digest, stored_file
from common.errors import DataError
from common.files import replace_file, sha256
from common.terminal import near, progress_bar

from ..commanding.ending import config_command, end, tool_command
from .settings import Prepare, Verify

__all__ = ["prepare", "verify"]

_STALE_SECONDS = 24 * 3600
_REPORT = "damaged.txt"


def prepare(settings: Prepare) -> None:
    """Prepare every volume that pre-training would use, unless it is there."""
    part, parts = settings.shard or (0, 1)
    data = str(settings.data)
    lists = pretraining_lists(settings.dataset_dir, data) if settings.data.is_file() else pretraining_lists(data)
    counts = ", ".join(f"{len(cases):,} for {name}" for name, cases in lists.items())
    print(f"preparing {near(settings.data)} for {near(settings.store_dir)}: {counts}, {_how(settings)}", flush=True)
    own = StoreSettings(spacing_mm=settings.spacing_mm, reorient=settings.reorient, dtype=settings.store_dtype)
    store = VolumeStore(settings.store_dir, own)
    for name, cases in lists.items():
        if not (mine := cases[part::parts]):
            continue
        volumes, problems = store.prepare(
            mine,
            num_workers=settings.num_workers,
            strict=settings.strict,
            shares=parts,
            order=random.SystemRandom().getrandbits(32),
            scheduler=settings.scheduler,
            check_disk=settings.check_disk,
        )
        of = f" of shard {part}/{parts}" if settings.shard else ""
        print(f"{name}: {len(volumes):,} of {len(mine):,} volumes{of} are prepared, {len(problems):,} cannot be used")
    following = config_command("mae_resenc_l", "pretrain", settings.data, "--store_dir", settings.store_dir)
    end(settings.store_dir, following=following)


def _how(settings: Prepare) -> str:
    """Say how volumes are prepared."""
    spacing = settings.spacing_mm
    sides = [spacing] if isinstance(spacing, (int, float)) else spacing
    voxels = "each file's own voxels" if sides is None else f"voxels of {' x '.join(f'{side:g}' for side in sides)} mm"
    return f"{voxels}, {'canonical axes' if settings.reorient else 'axes as they are'}, {settings.store_dtype}"


def verify(settings: Verify) -> None:
    """Read every file of a store and compare it with the checksum that was noted when it was written.

    Files that no store writes are neither looked at nor removed, and a folder without any volume of a store is refused.

    Raises:
        SystemExit: with status 1, if something is damaged and stays.
    """
    root = settings.store_dir
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
    damaged, unknown = _damaged(root, own, sidecars, threads=settings.num_workers)
    lines = [f"{name}: {problem}" for name, (problem, _) in damaged.items()]
    print(*lines, sep="\n", end="\n" if lines else "")
    report = root / _REPORT
    if lines:
        replace_file(
            report, lambda temporary: Path(temporary).write_text("\n".join(lines) + "\n", "utf-8", "backslashreplace")
        )
    else:
        report.unlink(missing_ok=True)
    if settings.repair:
        for _, files in damaged.values():
            for name in files:
                (root / name).unlink(missing_ok=True)
    told = f"{len(sidecars):,} volumes, {len(damaged):,} damaged"
    if unknown:
        told += f", {unknown:,} of an earlier version without checksums, of which only sizes were compared"
    if damaged:
        told += f"; {report} lists them"
        told += "; they are removed, the next run prepares them again" if settings.repair else ""
    print(told)
    end(report if damaged else f"all of {root} is whole", following=tool_command("prepare_data", "verify", root))
    if damaged and not settings.repair:
        raise SystemExit(1)


def _damaged(
    root: Path, own: Mapping[str, Sequence[str]], sidecars: Sequence[Path], *, threads: int
) -> tuple[dict[str, tuple[str, list[str]]], int]:
    """Return what is wrong by volume, with its files, and how many volumes have no checksums."""
    damaged: dict[str, tuple[str, list[str]]] = {}
    unknown = 0
    with ThreadPoolExecutor(max(1, threads)) as pool:
        results = progress_bar(pool.map(_check, sidecars), total=len(sidecars), desc="verifying", unit="volume")
        for sidecar, (problem, summed) in zip(sidecars, results, strict=True):
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
    return damaged, unknown


def _is_sidecar(path: Path) -> bool:
    """Return whether a file is the JSON of a volume; the first layout had no checksums."""
    try:
        meta = json.loads(path.read_text("utf-8"))
        return isinstance(meta["layout"], int) and ("sha256" in meta or ("shape" in meta and "bytes" in meta))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _check(sidecar: Path) -> tuple[str, bool]:
    """Return what is wrong with the files of a volume, and whether there were checksums."""
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
