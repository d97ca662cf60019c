# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The volume store: every volume preprocessed once, then read by chunks.

A volume becomes a chunked, compressed array (blosc2, float16, lz4 with bitshuffle; chunks of 64^3 voxels), its masks
another each, and a small JSON beside them with geometry and provenance. The name holds a digest of the source files'
paths, sizes and times and of the preprocessing settings, so one store serves any number of data sets and settings, and
a changed file is prepared again. All are written under a temporary name and renamed, the JSON last: a volume without
its JSON does not exist. A killed run leaves at most temporary files, which the next run removes; two processes that
prepare one volume write the same bytes.

float16 rounds z-scored intensities at one part in 2048; ``dtype: float32`` keeps them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ..errors import DataError, causes
from ..transforms import volume_preprocessing
from .checks import check_channels, check_grid, check_mask, explain, settle
from .datalists import LABEL, MASKS, Case, case_name, images_of

__all__ = ["StoreSettings", "StoredVolume", "VolumeStore", "one_thread"]

_LAYOUT = 1  # of files and metadata; raise when either changes meaning
_CHUNK, _BLOCK = 64, 32
_VOXELS_KEPT = 10_000
_STALE_SECONDS = 24 * 3600


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
    """

    spacing_mm: float | Sequence[float] | None = 1.0
    reorient: bool = True
    dtype: str = "float16"
    normalization: str | Sequence[Any] = "zscore"
    channels: int = 1
    size: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.spacing_mm is not None:  # one spelling for one meaning: it becomes part of the files' names
            sides = [self.spacing_mm] * 3 if isinstance(self.spacing_mm, (int, float)) else list(self.spacing_mm)
            object.__setattr__(self, "spacing_mm", tuple(float(side) for side in sides))
        if isinstance(self.normalization, str):
            object.__setattr__(self, "normalization", [self.normalization])
        if self.size is not None:
            object.__setattr__(self, "size", tuple(int(side) for side in self.size))
        if self.dtype not in ("float16", "float32"):
            raise DataError(f"store_dtype is {self.dtype!r}; it must be float16 or float32")


@dataclass(frozen=True)
class StoredVolume:
    """One prepared volume.

    Attributes:
        path: of the array, ``(D, H, W)`` for one channel and ``(C, D, H, W)`` for several.
        shape: ``(D, H, W)``.
        source: file it was made from.
        masks: names of the masks that are stored with it; a ``label`` map is one of them.
        values: of the label map, with their number of voxels.
        places: for each of these values, which rows of the table of voxels are of it.
    """

    path: str
    shape: tuple[int, int, int]
    source: str
    masks: tuple[str, ...] = ()
    values: Mapping[int, int] = field(default_factory=dict)
    places: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def read(self, start: Sequence[int], stop: Sequence[int], *, mask: str | None = None) -> np.ndarray:
        """Return the region from ``start`` to ``stop`` of the volume or one of its masks.

        Only the chunks it touches are read. A mask that the volume does not have is 0 everywhere.
        """
        region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        if mask is None:
            array = blosc2.open(self.path, mode="r")
            return array[region] if array.ndim == 3 else array[(slice(None), *region)]
        if mask not in self.masks:
            return np.zeros([b - a for a, b in zip(start, stop, strict=True)], np.uint8)
        return blosc2.open(str(_mask_file(Path(self.path), mask)), mode="r")[region]

    def voxel(self, values: Sequence[int], rng: np.random.Generator) -> tuple[int, int, int] | None:
        """Draw one of the kept voxels of any of these label values, None if there are none; reads that one only."""
        spans = [self.places[value] for value in values if value in self.places]
        if not spans:
            return None
        rank = int(rng.integers(sum(stop - start for start, stop in spans)))
        table = np.load(_voxel_file(Path(self.path)), mmap_mode="r")
        for start, stop in spans:
            if rank < stop - start:
                d, h, w = table[start + rank].tolist()
                return d, h, w
            rank -= stop - start
        raise AssertionError("a rank lies in one of the spans")


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
        identity: list[object] = [_LAYOUT]
        for key in ("image", *_masks(case)):
            for file in images_of(case) if key == "image" else [case[key]]:
                try:
                    source = Path(file).resolve()
                    status = source.stat()
                except OSError as error:
                    raise explain(file, error) from error
                identity += [str(source), status.st_size, status.st_mtime_ns] + ([key] if key != "image" else [])
        settings = asdict(self.settings)
        identity.append({key: value for key, value in settings.items() if (key, value) != ("size", None)})
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
        return self.root / f"{case_name(case)[:80]}-{digest}.b2nd"

    def get(self, case: Case) -> StoredVolume | None:
        """Return the prepared volume of a case, None if it is not there yet."""
        path = self.location(case)
        try:
            meta = json.loads(path.with_suffix(".json").read_text("utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        sizes = {path: meta["bytes"]} | {_mask_file(path, name): size for name, size in meta.get("masks", {}).items()}
        if any(not file.is_file() or file.stat().st_size != size for file, size in sizes.items()):
            return None
        d, h, w = meta["shape"]
        values = {int(value): count for value, count in meta.get("values", {}).items()}
        places = {int(value): (span[0], span[1]) for value, span in meta.get("places", {}).items()}
        if places and not _voxel_file(path).is_file():
            return None
        return StoredVolume(str(path), (d, h, w), images_of(case)[0], tuple(meta.get("masks", {})), values, places)

    def prepare_one(self, case: Case) -> StoredVolume:
        """Preprocess one image and its masks into the store, unless they are there.

        Raises:
            DataError: if a file cannot be used.
            OSError: ``ENOSPC`` if the disk is full.
        """
        present = self.get(case)
        if present is not None:
            return present
        path, image, masks = self.location(case), images_of(case)[0], _masks(case)
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
        sources = [{"path": str(Path(file).resolve()), "bytes": Path(file).stat().st_size} for file in images_of(case)]
        try:
            prepared = chain({key: case[key] for key in ("image", *masks)})
        except Exception as error:
            raise explain(image, _root_cause(error)) from error
        volume = prepared["image"]
        if any(float(channel.min()) == float(channel.max()) for channel in volume):
            raise DataError(f"{image} is constant where it is not zero; leave out the file")
        voxels = volume.as_tensor().numpy().astype(self.settings.dtype)
        voxels = voxels[0] if len(voxels) == 1 else voxels
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.part.b2nd")
        arrays = {path: voxels} | {
            _mask_file(path, name): _whole_numbers(prepared[name].as_tensor()[0].numpy(), case[name]) for name in masks
        }
        values, places, table = _voxels_by_value(arrays[_mask_file(path, LABEL)] if LABEL in masks else None)
        written = {file: temporary.with_name(f"{temporary.stem}.{n}.b2nd") for n, file in enumerate(arrays)}
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
            "values": values,
            "places": places,
            "settings": asdict(self.settings),
            "steps": ["axes", "crop to non-zero", "normalise", "resample" if self.settings.size is None else "resize"],
        }
        try:
            for file, array in arrays.items():
                _write_array(array, written[file])
            meta["bytes"] = written[path].stat().st_size
            meta["masks"] = {name: written[_mask_file(path, name)].stat().st_size for name in masks}
            if places:
                part = written[_voxel_file(path)] = temporary.with_suffix(".voxels.npy")
                with open(part, "wb") as stream:
                    np.save(stream, table)
            sidecar = temporary.with_suffix(".json")
            sidecar.write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
            for file, part in written.items():
                os.replace(part, file)
            os.replace(sidecar, path.with_suffix(".json"))
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) or error.errno == errno.ENOSPC:
                needed = voxels.nbytes
                free = shutil.disk_usage(self.root).free
                if free < 2 * needed or isinstance(error, OSError):
                    raise OSError(
                        errno.ENOSPC, f"No space left on device ({free / 2**20:.0f} MiB free)", str(self.root)
                    ) from error
            raise
        finally:
            for part in written.values():
                part.unlink(missing_ok=True)
            temporary.with_suffix(".json").unlink(missing_ok=True)
        stored = self.get(case)
        if stored is None:
            raise OSError(errno.EIO, "the volume just written cannot be read back", str(path))
        return stored

    def prepare(
        self, cases: Sequence[Case], *, num_workers: int = 0, strict: bool = False
    ) -> tuple[list[StoredVolume], list[DataError]]:
        """Prepare all volumes of a list, those that are missing in ``num_workers`` processes, with a progress bar.

        Every process of a distributed run walks the list from its own starting point, so they share the work and none
        waits.

        Returns:
            the prepared volumes in the order of the list, and what was wrong with the others.

        Raises:
            DataError: with ``strict`` and a bad volume, or if none is usable.
            OSError: ``ENOSPC`` if the disk is full; what is prepared stays.
        """
        self._remove_stale()
        problems: dict[str, DataError] = {}
        missing = []
        for image, case in {images_of(case)[0]: case for case in cases}.items():
            try:
                if self.get(case) is None:
                    missing.append(case)
            except DataError as error:
                problems[image] = error
        if missing:
            turn = dist.get_rank() * len(missing) // dist.get_world_size() if dist.is_initialized() else 0
            problems |= self._prepare_missing(missing[turn:] + missing[:turn], num_workers)
        stored = [self.get(case) for case in cases if images_of(case)[0] not in problems]
        volumes = [volume for volume in stored if volume is not None]
        found = [problems[image] for image in dict.fromkeys(images_of(case)[0] for case in cases) if image in problems]
        settle(found, len(volumes), strict=strict)
        return volumes, found

    def _prepare_missing(self, cases: list[Case], num_workers: int) -> dict[str, DataError]:
        problems: dict[str, DataError] = {}
        with tqdm(total=len(cases), desc="preparing volumes", unit="volume") as bar:
            if num_workers <= 1 or len(cases) <= 2:
                for case in cases:
                    try:
                        self.prepare_one(case)
                    except DataError as error:
                        problems[images_of(case)[0]] = error
                    bar.update()
                return problems
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(num_workers, len(cases)), mp_context=context, initializer=one_thread) as pool:
                running = {pool.submit(self.prepare_one, case): images_of(case)[0] for case in cases}
                try:
                    for future in as_completed(running):
                        problem = future.exception()
                        if isinstance(problem, DataError):
                            problems[running[future]] = problem
                        elif problem is not None:
                            raise problem
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        return problems

    def _remove_stale(self) -> None:
        """Remove what killed runs left; young files may belong to a running process."""
        for path in self.root.glob(".*.part.*"):
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue


def _masks(case: Case) -> list[str]:
    """Return the names of the masks that come with a case."""
    return [name for name in (*MASKS, LABEL) if name in case]


def _mask_file(path: Path, mask: str) -> Path:
    """Return where the mask of the volume at ``path`` is stored."""
    return path.with_suffix(f".{mask}.b2nd")


def _voxel_file(path: Path) -> Path:
    """Return where the table of labelled voxels of the volume at ``path`` is stored."""
    return path.with_suffix(".voxels.npy")


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


def _write_array(array: np.ndarray, path: Path) -> None:
    """Write a chunked array and wait until it is on the disk."""
    blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=(1,) * (array.ndim - 3) + tuple(min(_CHUNK, n) for n in array.shape[-3:]),
        blocks=(1,) * (array.ndim - 3) + tuple(min(_BLOCK, n) for n in array.shape[-3:]),
        cparams={"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
        dparams={"nthreads": 1},
        urlpath=str(path),
        mode="w",
    )
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


def _root_cause(error: BaseException) -> Exception:
    """Return the first exception of a chain, below what MONAI wraps around it."""
    *_, first = causes(error)
    return first if isinstance(first, Exception) else RuntimeError(str(first))


def one_thread(_worker: int = 0) -> None:
    """Keep a preparing or reading process to one thread; the processes are the parallelism."""
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
