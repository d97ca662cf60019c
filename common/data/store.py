# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The volume store: every volume preprocessed once, then read by chunks.

A volume becomes a chunked, compressed array (blosc2, float16, lz4 with bitshuffle; chunks of 64^3 voxels), its masks
another each, and a small JSON beside them with geometry, provenance and checksums. The name holds a digest of the
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
import io
import json
import math
import os
import random
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import blosc2
import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from ..errors import DataError, SettingsError, causes
from ..transforms import volume_preprocessing
from ..weights.files import replace_file
from .checks import check_channels, check_grid, check_mask, explain, settle
from .files import ANATOMY, INVERTED, LABEL, MASKS, Case, behind, case_name, images_of
from .filling import DiskEstimate, each
from .stored import StoredVolume, VolumeTable, mask_file, pack, volume_of, voxel_file

__all__ = ["StoreSettings", "VolumeStore", "meta_digest", "stored_file"]

T = TypeVar("T")
R = TypeVar("R")

_NAMING = 1  # of files; raise when the same settings begin to give other voxels
_LAYOUT = 2  # of the JSON: 1 had neither checksums nor voxels of the anatomy mask; both are read
_CHUNK, _BLOCK = (64, 64, 64), (16, 16, 32)
_VOXELS_KEPT, _ANATOMY_KEPT = 10_000, 1_000
_STALE_SECONDS, _UNUSED_SECONDS = 24 * 3600, 30 * 24 * 3600
_THREADS, _FEW = 16, 2000  # waiting for a file system, if there are more files than these
_LARGEST = float(np.finfo(np.float16).max)
_FILE = re.compile(
    rf"(.*-[0-9a-f]{{20}})(\.json|(?:\.(?:{'|'.join((*MASKS, LABEL))}))?\.b2nd|(?:\.{ANATOMY})?\.voxels\.npy)",
    re.DOTALL,
)


@dataclass(frozen=True)
class StoreSettings:
    """What the stored voxels depend on.

    Attributes:
        spacing_mm: target spacing, None to keep each file's own.
        reorient: canonical axes, or the file's own.
        dtype: ``float16`` or ``float32``.
        normalization: scheme of ``NormalizeChannelsd``, one for all channels or one for each.
        channels: of an image.
        size: voxels (slice, row, column) that every volume is resized to at the end; None for none.

    Raises:
        SettingsError: if the spacing or the size is not positive.
        DataError: if there is no such ``dtype``.
    """

    spacing_mm: float | Sequence[float] | None = 1.0
    reorient: bool = True
    dtype: str = "float16"
    normalization: str | Sequence[Any] = "zscore"
    channels: int = 1
    size: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.spacing_mm is not None:  # one spelling for one meaning: it becomes part of the files' names
            try:
                sides = [self.spacing_mm] * 3 if isinstance(self.spacing_mm, (int, float)) else list(self.spacing_mm)
                spacing = tuple(float(side) for side in sides)
            except (TypeError, ValueError):
                spacing = ()
            if len(spacing) != 3 or not all(0 < side < math.inf for side in spacing):
                raise SettingsError(
                    f"spacing_mm is {self.spacing_mm!r}; write one positive number, three, or null for each file's own"
                )
            object.__setattr__(self, "spacing_mm", spacing)
        if isinstance(self.normalization, str):
            object.__setattr__(self, "normalization", [self.normalization])
        if self.size is not None:
            object.__setattr__(self, "size", tuple(int(side) for side in self.size))
            if len(self.size) != 3 or min(self.size) < 1:
                raise SettingsError(f"size is {self.size!r}; it must be three numbers of voxels")
        if self.dtype not in ("float16", "float32"):
            raise DataError(f"store_dtype is {self.dtype!r}; it must be float16 or float32")


@dataclass(frozen=True)
class _Seen:
    """What folders were resolved to and what they hold, while a list is looked at."""

    folders: dict[str, str] = field(default_factory=dict)
    behind: dict[str, str] = field(default_factory=dict)


class VolumeStore:
    """Prepare volumes once and hand out their stored form.

    Args:
        root: folder of the store; made if missing.
        settings: what the voxels depend on.

    Raises:
        DataError: if the folder cannot be written.
    """

    def __init__(self, root: str | Path, settings: StoreSettings) -> None:
        self.root = Path(root).expanduser().absolute()
        self.settings = settings
        described = asdict(settings)
        self._described = {key: value for key, value in described.items() if (key, value) != ("size", None)}
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
        return self.root / self._name(case, _Seen())

    def get(self, case: Case) -> StoredVolume | None:
        """Return the prepared volume of a case, None if it is not there yet.

        Raises:
            DataError: if a source file is missing, or a later version of this project wrote the volume.
        """
        row = self._row(self._name(case, _Seen()), images_of(case)[0])
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
        path, image, masks, inverted = self.location(case), images_of(case)[0], _masks(case), _inverted(case)
        check_channels(case, self.settings.channels)
        for name in masks:
            if name == LABEL:
                check_grid(image, case[LABEL])
            else:
                check_mask(image, case[name])
        chain = volume_preprocessing(
            ["image", *masks],
            spacing_mm=self.settings.spacing_mm,
            reorient=self.settings.reorient,
            normalization=self.settings.normalization,
            channels=self.settings.channels,
            size=self.settings.size,
        )
        try:
            sources = [{"path": os.path.realpath(file), "bytes": os.path.getsize(file)} for file in images_of(case)]
            prepared = chain({key: case[key] for key in ("image", *masks)})
        except Exception as error:
            raise explain(image, _root_cause(error)) from error
        volume = prepared["image"]
        if any(float(channel.min()) == float(channel.max()) for channel in volume):
            raise DataError(f"{image} is constant where it is not zero; leave out the file")
        values = volume.as_tensor().numpy()
        if self.settings.dtype == "float16" and max(values.max(), -values.min()) > _LARGEST:
            raise DataError(f"{image} has intensities beyond {_LARGEST:g}, which float16 cannot hold; use float32")
        voxels = values.astype(self.settings.dtype)
        arrays = {path: voxels[0] if len(voxels) == 1 else voxels}
        for name in masks:
            marks = _whole_numbers(prepared[name].as_tensor()[0].numpy(), case[name])
            arrays[mask_file(path, name)] = 1 - marks if name in inverted else marks
        counts, places, table = _voxels_by_value(arrays.get(mask_file(path, LABEL)))
        content = {file: _frame(array) for file, array in arrays.items()}
        if places:
            content[voxel_file(path)] = _saved(table)
        if ANATOMY in masks:
            content[voxel_file(path, ANATOMY)] = _saved(_some_voxels(arrays[mask_file(path, ANATOMY)]))
        meta = {
            "layout": _LAYOUT,
            "shape": list(volume.shape[1:]),
            "affine_mm": volume.affine.tolist(),
            "source": sources[0]
            | {
                "affine_mm": volume.meta["original_affine"].tolist(),
                "shape": [int(n) for n in volume.meta["spatial_shape"]][:3],
            },
            "channels": sources[1:],
            "values": counts,
            "places": places,
            "inverted_masks": inverted,
            "settings": asdict(self.settings),
            "steps": ["axes", "crop to non-zero", "normalise", "resample" if self.settings.size is None else "resize"],
            "bytes": len(content[path]),
            "masks": {name: len(content[mask_file(path, name)]) for name in masks},
            "sha256": {file.name[len(path.stem) :]: hashlib.sha256(data).hexdigest() for file, data in content.items()},
        }
        if self.location(case) != path:
            raise DataError(f"{image} changed while it was prepared; run again when it is complete")
        meta["digest"] = meta_digest(meta)
        content[path.with_suffix(".json")] = (json.dumps(meta, indent=1) + "\n").encode()  # the last
        self._write(content)
        stored = self.get(case)
        if stored is None:
            raise OSError(errno.EIO, "the volume just written cannot be read back", str(path))
        return stored

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
        key = self._key(cases)
        known = self._newest(key)
        if not check_sources and known is not None and all(_in_threads(self._whole, known.rows())):
            problems = [DataError(problem) for problem in known.problems]
            settle(problems, len(known), strict=strict)
            return known, problems
        seen = _Seen()
        names = _in_threads(lambda case: _tried(lambda: self._name(case, seen)), cases)
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
        return self._catalogue(key, usable, problems), problems

    def _fill(
        self, cases: list[Case], num_workers: int, *, shares: int, scheduler: str | None, check_disk: bool
    ) -> dict[str, DataError]:
        problems: dict[str, DataError] = {}
        disk = DiskEstimate(cases, self.settings, self.root, shares=shares, refuse=check_disk)
        results = each(self.prepare_one, cases, self.settings, num_workers=num_workers, scheduler=scheduler)
        with tqdm(total=len(cases), desc="preparing volumes", unit="volume") as bar, contextlib.closing(results):
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

    def _name(self, case: Case, seen: _Seen) -> str:
        """Return the name of a case's array."""
        identity: list[object] = [_NAMING]
        for key in ("image", *_masks(case)):
            for file in images_of(case) if key == "image" else [case[key]]:
                try:
                    source, status = _resolved(file, seen.folders)
                    others = behind(file, seen.behind)  # by the name that it is given, not that of what a link leads to
                except (OSError, ValueError) as error:  # ValueError: no name that a file could have
                    raise explain(file, error) from error
                identity += [source, status.st_size, status.st_mtime_ns] + ([key] if key != "image" else [])
                identity += [{"files": others}] if others else []
        inverted = _inverted(case)
        identity += [{"inverted": inverted}] if inverted else []
        identity.append(self._described)
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
        return f"{_readable(case_name(case))}-{digest}.b2nd"

    def _row(self, name: str, source: str) -> bytes | None:
        """Return what a table says of a stored volume, None if it is not there or not whole."""
        try:
            meta = json.loads(Path(self.root, name).with_suffix(".json").read_text("utf-8"))
            layout, later = meta["layout"], meta["layout"] > _LAYOUT
            sizes = {"": meta["bytes"]} | meta.get("masks", {})
            row = [name, meta["shape"], source, sizes, meta.get("values", {}), meta.get("places", {})]
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
        name, _, _, sizes, _, places = json.loads(row)
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

    def _key(self, cases: Sequence[Case]) -> str:
        """Return a digest of a list of cases, whatever their files hold."""
        digest = hashlib.sha256(json.dumps([_NAMING, self._described]).encode())
        for case in cases:
            parts = [*images_of(case), *(f"{name}\0{case[name]}" for name in _masks(case)), *_inverted(case), ""]
            digest.update("\0\0".join(parts).encode(errors="surrogatepass"))
        return digest.hexdigest()[:20]

    def _newest(self, key: str) -> VolumeTable | None:
        """Return the table in which a list was opened last."""
        found = self._folder.glob(f"{key}-*.table")
        for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            with contextlib.suppress(DataError):
                return VolumeTable(path)
        return None

    def _catalogue(self, key: str, rows: Sequence[bytes], problems: Sequence[DataError]) -> VolumeTable:
        """Write the table of a list, whose name says what it holds, and open it."""
        content = pack(rows, [str(problem) for problem in problems])
        path = self._folder / f"{key}-{hashlib.sha256(content).hexdigest()[:20]}.table"
        try:
            if path.is_file() and path.stat().st_size == len(content):
                os.utime(path)
            else:
                replace_file(path, lambda temporary: Path(temporary).write_bytes(content))
            for other in self._folder.glob(f"{key}-*.table"):
                if other != path and time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    other.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            handle, name = tempfile.mkstemp(suffix=".table")
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            return VolumeTable(Path(name), root=self.root, remove=True)
        return VolumeTable(path)

    @property
    def _folder(self) -> Path:
        return self.root / "catalogues"

    def _remove_stale(self) -> None:
        """Remove what killed runs left; young files may belong to a running process."""
        left: list[str] = []
        for folder in (self.root, self._folder):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                left += [entry.path for entry in entries if entry.name.startswith(".") and ".part" in entry.name]
        for path in left:
            with contextlib.suppress(OSError):
                if time.time() - os.stat(path).st_mtime > _STALE_SECONDS:
                    os.unlink(path)


def stored_file(name: str) -> tuple[str, str] | None:
    """Return the name of a volume and the ending, of a file name that a store writes; None for any other.

    Example:
        >>> stored_file("a-0123456789abcdef0123.label.b2nd"), stored_file("sub-01_T1w.nii.gz")
        (('a-0123456789abcdef0123', '.label.b2nd'), None)
    """
    found = _FILE.fullmatch(name)
    return None if found is None else (found[1], found[2])


def meta_digest(meta: Mapping[str, Any]) -> str:
    """Return a digest of the JSON of a volume, which is noted in it, without that note."""
    plain = json.loads(json.dumps({key: value for key, value in meta.items() if key != "digest"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


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


def _resolved(file: str, folders: dict[str, str]) -> tuple[str, os.stat_result]:
    """Return a file's path without links and its status; each folder is resolved once."""
    folder, name = os.path.split(file)
    if name in ("", "..", "."):
        return os.path.realpath(file), os.stat(file)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    path = os.path.join(folders[folder], name)
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        path = os.path.realpath(path)
        status = os.stat(path)
    return path, status


def _readable(name: str) -> str:
    """Return as much of a case's name as a file name may hold; of surrogates, those that stand for single bytes."""
    return (
        re.sub(r"[/\\\0\ud800-\udc7f\udd00-\udfff]|^\.", "_", name[:80])
        .encode(errors="surrogateescape")[:80]
        .decode(errors="ignore")
    )


def _inverted(case: Case) -> list[str]:
    """Return which of a case's masks are to be exchanged, sorted."""
    names = sorted(case.get(INVERTED, ()))
    for name in names:
        if name not in MASKS:
            raise DataError(f"{INVERTED} of {images_of(case)[0]} names {name!r}; the masks are {', '.join(MASKS)}")
    return [name for name in names if name in case]


def _masks(case: Case) -> list[str]:
    """Return the names of the masks that come with a case."""
    return [name for name in (*MASKS, LABEL) if name in case]


def _whole_numbers(marks: np.ndarray, file: str) -> np.ndarray:
    """Return an integer map in the smallest type that holds it."""
    if not np.isfinite(marks).all() or (marks != np.round(marks)).any() or marks.min() < 0 or marks.max() > 32767:
        odd = marks[~np.isfinite(marks) | (marks != np.round(marks)) | (marks < 0) | (marks > 32767)]
        raise DataError(f"{file} holds the value {odd.flat[0]:g}; labels are whole numbers from 0, correct the file")
    return marks.astype(np.uint8 if marks.max() < 256 else np.int16)


def _voxels_by_value(label: np.ndarray | None) -> tuple[dict[int, int], dict[int, tuple[int, int]], np.ndarray]:
    """Count the values of a label map and keep voxels of each, from which foreground crops are drawn.

    As in nnU-Net, 10,000 of each value, but at least one in a hundred.

    Returns:
        voxels of each value, the rows of the table that hold some of them, and the table ``(n, 3)``.
    """
    values: dict[int, int] = {}
    places: dict[int, tuple[int, int]] = {}
    rows: list[np.ndarray] = [np.zeros((0, 3), np.uint16)]
    rng = np.random.default_rng(1234)
    row = 0
    for value in [] if label is None else np.unique(label).tolist():
        found = np.flatnonzero(label == value)
        kept = found
        limit = max(_VOXELS_KEPT, -(-len(found) // 100))
        if len(found) > limit:
            kept = np.sort(rng.choice(found, limit, replace=False))
        values[value] = len(found)
        places[value] = (row, row + len(kept))
        row += len(kept)
        assert label is not None
        rows.append(np.stack(np.unravel_index(kept, label.shape), axis=1).astype(np.uint16))
    return values, places, np.concatenate(rows)


def _some_voxels(mask: np.ndarray) -> np.ndarray:
    """Return up to 1,000 voxels of a mask, ``(n, 3)``: more than are drawn from one volume in the longest run."""
    found = np.flatnonzero(mask)
    if len(found) > _ANATOMY_KEPT:
        found = np.sort(np.random.default_rng(1234).choice(found, _ANATOMY_KEPT, replace=False))
    return np.stack(np.unravel_index(found, mask.shape), axis=1).astype(np.uint16)


def _frame(array: np.ndarray) -> bytes:
    """Return a chunked, compressed array as the bytes of its file."""
    return blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=(1,) * (array.ndim - 3) + tuple(map(min, _CHUNK, array.shape[-3:])),
        blocks=(1,) * (array.ndim - 3) + tuple(map(min, _BLOCK, array.shape[-3:])),
        cparams={"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
        dparams={"nthreads": 1},
    ).to_cframe()


def _saved(table: np.ndarray) -> bytes:
    """Return the bytes of an ``.npy`` file."""
    stream = io.BytesIO()
    np.save(stream, table)
    return stream.getvalue()


def _root_cause(error: BaseException) -> Exception:
    """Return the first exception of a chain, below what MONAI wraps around it."""
    *_, first = causes(error)
    return first if isinstance(first, Exception) else RuntimeError(str(first))
