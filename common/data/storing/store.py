# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The volume store: every volume preprocessed once, then read by chunks.

A volume becomes a chunked, compressed array (blosc2, float16, lz4 with bitshuffle; chunks of 64^3 voxels), its masks
another each, and beside them a small JSON with geometry, provenance and SHA-256, and another with a checksum of every
chunk, which is compared when the chunk is read. The name holds a digest of the
source files' paths, sizes and times and of the preprocessing settings, so one store serves any number of data sets and
settings, and a changed file is prepared again. All are written under a temporary name and renamed, the JSON last: a
volume without its JSON does not exist. A killed run leaves at most temporary files, which a later run removes;
processes that prepare one volume at the same time write the same bytes.

``catalogues`` holds a :class:`VolumeTable` for every list of cases that was opened, so that the next run reads one file
instead of a JSON for each volume. It may be removed when no run is going on.

float16 rounds z-scored intensities at one part in 2048; ``dtype: float32`` keeps them.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from tqdm import tqdm

from ...errors import DataError
from ...paths import as_path
from ...terminal import progress_bar
from ..cases import ANATOMY, LABEL, Case, images_of, inverted_of
from ..checking.checks import tell_nearly_zero, tell_slants
from ..preparing.estimates import DiskEstimate
from ..preparing.filling import each
from ..preparing.settings import StoreSettings
from ..preparing.volume import PreparedVolume, prepare_volume
from ..problems import settle
from .arrays import frame, saved, some_voxels, voxels_by_value
from .checksums import ENDING, checksums_beside, checksums_of
from .naming import Naming, Seen, meta_digest
from .stored import StoredVolume, mask_file, voxel_file
from .tables import Catalogues, VolumeTable, volume_of

__all__ = ["VolumeStore"]

T = TypeVar("T")
R = TypeVar("R")

_LAYOUT = 2  # of the JSON: 1 had neither checksums nor voxels of the anatomy mask; both are read
_ODD = ("outside", "slant_degrees", "nearly_zero")  # what few volumes have, and is told
_STALE_SECONDS = 24 * 3600
_THREADS, _FEW = 16, 2000  # waiting for a file system, if there are more files than these


class VolumeStore:
    """Prepare volumes once and hand out their stored form.

    Args:
        root: folder of the store; made if missing.
        settings: what the voxels depend on.

    Raises:
        DataError: if the folder cannot be written.
    """

    def __init__(self, root: str | Path, settings: StoreSettings) -> None:
        self.root = as_path(root).absolute()
        self.settings = settings
        self._naming = Naming(settings)
        self._catalogues = Catalogues(self.root / "catalogues")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"the store {self.root} cannot be made ({error.strerror}); give another --store_dir"
            ) from error

    def location(self, case: Case) -> Path:
        """Return where the array of a case, an image with its masks, belongs.

        Raises:
            DataError: if a source file is missing.
        """
        return self.root / self._naming.name(case)

    def get(self, case: Case) -> StoredVolume | None:
        """Return the prepared volume of a case, None if it is not there yet.

        Raises:
            DataError: if a source file is missing, or a later version of this project wrote the volume.
        """
        row = self._row(self._naming.name(case), images_of(case)[0])
        return None if row is None else volume_of(row, self.root)

    def prepare_one(self, case: Case) -> StoredVolume:
        """Preprocess one image and its masks into the store, unless they are there.

        Raises:
            DataError: if a file cannot be used.
            OSError: ``ENOSPC`` if the disk is full.
        """
        present = self.get(case)
        if present is not None:
            return present
        path = self.location(case)
        content = self._content(path, prepare_volume(case, self.settings), inverted=inverted_of(case))
        if self.location(case) != path:
            raise DataError(f"{images_of(case)[0]} changed while it was prepared; run again when it is complete")
        self._write(content)
        stored = self.get(case)
        if stored is None:
            raise OSError(errno.EIO, "the volume just written cannot be read back", str(path))
        return stored

    def _content(self, path: Path, prepared: PreparedVolume, *, inverted: Sequence[str]) -> dict[Path, bytes]:
        """Return the files of a volume whose array is ``path``, its JSON last."""
        masks = prepared.masks
        content = {path: frame(prepared.voxels)} | {mask_file(path, name): frame(masks[name]) for name in masks}
        counts, places, table = voxels_by_value(masks.get(LABEL))
        if places:
            content[voxel_file(path)] = saved(table)
        if ANATOMY in masks:
            content[voxel_file(path, ANATOMY)] = saved(some_voxels(masks[ANATOMY]))
        endings = {file.name[len(path.stem) :]: data for file, data in content.items()}
        endings[ENDING] = content[path.with_suffix(ENDING)] = checksums_of(endings)
        meta = {
            "layout": _LAYOUT,
            **prepared.about,
            "values": counts,
            "places": places,
            "inverted_masks": list(inverted),
            "settings": asdict(self.settings),
            "steps": ["axes", "crop to non-zero", "normalise", "resample" if self.settings.size is None else "resize"],
            "bytes": len(content[path]),
            "masks": {name: len(content[mask_file(path, name)]) for name in masks},
            "sha256": {ending: hashlib.sha256(data).hexdigest() for ending, data in endings.items()},
        }
        meta["digest"] = meta_digest(meta)
        return content | {path.with_suffix(".json"): (json.dumps(meta, indent=1) + "\n").encode()}

    def _write(self, content: Mapping[Path, bytes]) -> None:
        """Write all files under temporary names, flush and rename them in their order."""
        mark = uuid.uuid4().hex
        parts = {file: self.root / f".{mark}.{index}.part" for index, file in enumerate(content)}
        try:
            for file, data in content.items():
                with open(parts[file], "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
            for file, part in parts.items():
                os.replace(part, file)
            checksums_beside.cache_clear()  # of a volume that was at this place before
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.root).free
                told = f"No space left on device or in the quota ({free / 2**20:.0f} MiB free)"
                raise OSError(errno.ENOSPC, told, str(self.root)) from error
            raise
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)

    def prepare(
        self,
        cases: Sequence[Case],
        *,
        num_workers: int = 0,
        strict: bool = False,
        check_sources: bool = True,
        shares: int = 1,
        order: int = 0,
        scheduler: str | None = None,
        check_disk: bool = True,
    ) -> tuple[VolumeTable, list[DataError]]:
        """Prepare all volumes of a list, those that are missing in ``num_workers`` processes, with a progress bar.

        Every process of a distributed run walks the list in an order of its own, so they share the work and none
        waits.

        Args:
            cases: images with their masks.
            num_workers: processes; each takes a volume at a time, and as many run as there is memory for.
            strict: raise at the end if a volume is bad.
            check_sources: look at every source file, so that changed ones are prepared again; if not, the list is
                opened as it was the last time.
            shares: into how many parts the whole work is split, of which this list is one; for the disk needed.
            order: seed of the order in which volumes are prepared; processes with one list meet less if theirs differ.
            scheduler: address of a Dask scheduler whose workers prepare the volumes instead.
            check_disk: refuse to go on if the disk is too small for what is expected.

        Returns:
            the prepared volumes in the order of the list, and what was wrong with the others.

        Raises:
            DataError: with ``strict`` and a bad volume, if none is usable, or if the disk is too small.
            OSError: ``ENOSPC`` if the disk is full; what is prepared stays.
        """
        self._remove_stale()
        key = self._naming.key(cases)
        known = self._catalogues.newest(key)
        if not check_sources and known is not None and all(_in_threads(self._whole, known.rows())):
            problems = [DataError(problem) for problem in known.problems]
            settle(problems, len(known), strict=strict)
            _tell_odd(list(known.rows()))
            return known, problems
        seen = Seen()
        names = _in_threads(lambda case: _tried(lambda: self._naming.name(case, seen)), cases)
        found = {
            images_of(case)[0]: name for case, name in zip(cases, names, strict=True) if isinstance(name, DataError)
        }
        files = {name: case for name, case in zip(names, cases, strict=True) if isinstance(name, str)}
        rows = self._rows(files, known)
        missing = {name: files[name] for name, row in rows.items() if row is None}
        if missing:
            queue = list(missing.values())
            order += dist.get_rank() if dist.is_initialized() else 0
            random.Random(order).shuffle(queue)  # the first ones tell how much disk all will take
            found |= self._fill(queue, num_workers, shares=shares, scheduler=scheduler, check_disk=check_disk)
            rows |= self._rows(missing)
        for name, case in missing.items():
            if rows[name] is None and images_of(case)[0] not in found:
                error = DataError(f"{self.root / name} was prepared and is gone; run again")
                found[images_of(case)[0]] = error
        usable = [row for name in names if isinstance(name, str) and (row := rows[name]) is not None]
        problems = [found[image] for image in dict.fromkeys(images_of(case)[0] for case in cases) if image in found]
        settle(problems, len(usable), strict=strict)
        _tell_odd(usable)
        return self._catalogues.write(key, usable, problems), problems

    def _fill(
        self, cases: list[Case], num_workers: int, *, shares: int, scheduler: str | None, check_disk: bool
    ) -> dict[str, DataError]:
        problems: dict[str, DataError] = {}
        disk = DiskEstimate(cases, self.settings, self.root, shares=shares, refuse=check_disk)
        results = each(self.prepare_one, cases, self.settings, num_workers=num_workers, scheduler=scheduler)
        bar = progress_bar(total=len(cases), desc="preparing volumes", unit="volume")
        with bar, contextlib.closing(results):
            for case, error in results:
                if isinstance(error, DataError):
                    problems[images_of(case)[0]] = error
                elif error is not None:
                    raise error
                else:
                    disk.add(case, self._bytes)
                bar.update()
        return problems

    def _bytes(self, case: Case) -> int:
        """Return what a prepared case takes on the disk."""
        path = self.location(case)
        return sum(file.stat().st_size for file in self.root.glob(f"{glob.escape(path.stem)}.*"))

    def _row(self, name: str, source: str) -> bytes | None:
        """Return what a table says of a stored volume, None if it is not there or not whole."""
        try:
            meta = json.loads(Path(self.root, name).with_suffix(".json").read_text("utf-8"))
            layout, later = meta["layout"], meta["layout"] > _LAYOUT
            if not later and meta.get("digest", meta_digest(meta)) != meta_digest(meta):
                tqdm.write(f"{self.root / name}: its JSON is damaged, so the volume is prepared anew")
                return None
            sizes = {"": meta["bytes"]} | meta.get("masks", {})
            odd = {key: meta[key] for key in _ODD if meta.get(key)}
            row = [name, meta["shape"], source, sizes, meta.get("values", {}), meta.get("places", {})]
            row += [odd] if odd else []
            packed = json.dumps(row, separators=(",", ":")).encode()
            whole = not later and self._whole(packed) and all(side > 0 for side in volume_of(packed, self.root).shape)
        # whatever else its JSON holds was not written here
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return None
        if later:
            raise DataError(
                f"{self.root / name} was written by a later version of this project (layout {layout}, this "
                f"one reads up to {_LAYOUT}); update, or give another --store_dir"
            )
        return packed if whole else None

    def _whole(self, row: bytes) -> bool:
        """Return whether the files of a volume are there in their sizes."""
        name, _, _, sizes, _, places = json.loads(row)[:6]
        base = os.path.join(self.root, name.removesuffix(".b2nd"))
        try:
            for mask, size in sizes.items():
                if os.stat(f"{base}.{mask}.b2nd" if mask else f"{base}.b2nd").st_size != size:
                    return False
            return not places or os.path.isfile(f"{base}.voxels.npy")
        except OSError:
            return False

    def _rows(self, files: Mapping[str, Case], known: VolumeTable | None = None) -> dict[str, bytes | None]:
        """Return the rows of these volumes, as far as they are there; those of a known table need no JSON."""
        old = {json.loads(row)[0]: row for row in known.rows()} if known is not None else {}

        def row(name: str) -> bytes | None:
            had = old.get(name)
            return had if had is not None and self._whole(had) else self._row(name, images_of(files[name])[0])

        return dict(zip(files, _in_threads(row, files), strict=True))

    def _remove_stale(self) -> None:
        """Remove what killed runs left; young files may belong to a running process."""
        left: list[str] = []
        for folder in (self.root, self._catalogues.folder):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                left += [entry.path for entry in entries if entry.name.startswith(".") and ".part" in entry.name]
        for path in left:
            with contextlib.suppress(OSError):
                if time.time() - os.stat(path).st_mtime > _STALE_SECONDS:
                    os.unlink(path)


def _tell_odd(rows: Sequence[bytes]) -> None:
    """Say which volumes have axes that are not at right angles, or backgrounds nearly 0; rows of a table."""
    odd = [volume_of(row, Path()) for row in rows if b'"slant_degrees"' in row or b'"nearly_zero"' in row]
    tell_slants({volume.source: volume.slant_degrees for volume in odd}, total=len(rows))
    tell_nearly_zero({volume.source: volume.nearly_zero for volume in odd}, total=len(rows))


def _in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call a function on all items; on many, in threads, since a network's file system takes its time for each."""
    items = list(items)
    if len(items) <= _FEW:
        return [function(item) for item in items]
    parts = [items[start : start + _FEW // 4] for start in range(0, len(items), _FEW // 4)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [result for part in pool.map(lambda part: [function(item) for item in part], parts) for result in part]


def _tried(function: Callable[[], T]) -> T | DataError:
    try:
        return function()
    except DataError as error:
        return error
