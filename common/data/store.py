# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The volume store: every volume preprocessed once, then read by chunks.

A volume becomes a chunked, compressed array (blosc2, float16, lz4 with bitshuffle; chunks of 64^3 voxels) and a small
JSON beside it with its geometry and provenance. The name holds a digest of the source file's path, size and time and of
the preprocessing settings, so one store serves any number of data sets and settings, and a changed file is prepared
again. Both files are written under a temporary name and renamed, the JSON last: a volume without its JSON does not
exist. A killed run leaves at most a temporary file, which the next run removes; two processes that prepare one volume
write the same bytes.

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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import blosc2
import numpy as np
import torch
from tqdm import tqdm

from ..errors import DataError
from ..transforms import volume_preprocessing
from .checks import check_header, explain, settle
from .datalists import Case, stem

__all__ = ["StoreSettings", "StoredVolume", "VolumeStore", "one_thread"]

_LAYOUT = 1  # of files and metadata; raise when either changes meaning
_CHUNK, _BLOCK = 64, 32
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class StoreSettings:
    """What the stored voxels depend on.

    Attributes:
        spacing_mm: target spacing, None to keep each file's own.
        reorient: canonical axes, or the file's own.
        dtype: ``float16`` or ``float32``.
    """

    spacing_mm: float | Sequence[float] | None = 1.0
    reorient: bool = True
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.spacing_mm is not None:  # one spelling for one meaning: it becomes part of the files' names
            sides = [self.spacing_mm] * 3 if isinstance(self.spacing_mm, (int, float)) else list(self.spacing_mm)
            object.__setattr__(self, "spacing_mm", tuple(float(side) for side in sides))
        if self.dtype not in ("float16", "float32"):
            raise DataError(f"store_dtype is {self.dtype!r}; it must be float16 or float32")


@dataclass(frozen=True)
class StoredVolume:
    """One prepared volume: where it is and its shape ``(D, H, W)``."""

    path: str
    shape: tuple[int, int, int]

    def read(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Return the region from ``start`` to ``stop``; only the chunks it touches are read."""
        array = blosc2.open(self.path, mode="r")
        return array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]


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

    def location(self, image: str) -> Path:
        """Return where the array of a source file belongs.

        Raises:
            DataError: if the source file is missing.
        """
        try:
            source = Path(image).resolve()
            status = source.stat()
        except OSError as error:
            raise explain(image, error) from error
        identity = [_LAYOUT, str(source), status.st_size, status.st_mtime_ns, asdict(self.settings)]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
        return self.root / f"{stem(image)[:80]}-{digest}.b2nd"

    def get(self, image: str) -> StoredVolume | None:
        """Return the prepared volume of a source file, None if it is not there yet."""
        path = self.location(image)
        try:
            meta = json.loads(path.with_suffix(".json").read_text("utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        if not path.is_file() or path.stat().st_size != meta["bytes"]:
            return None
        d, h, w = meta["shape"]
        return StoredVolume(str(path), (d, h, w))

    def prepare_one(self, image: str) -> StoredVolume:
        """Preprocess one file into the store, unless it is there.

        Raises:
            DataError: if the file cannot be used.
            OSError: ``ENOSPC`` if the disk is full.
        """
        present = self.get(image)
        if present is not None:
            return present
        path = self.location(image)
        check_header(image)
        chain = volume_preprocessing("image", spacing_mm=self.settings.spacing_mm, reorient=self.settings.reorient)
        source = {"path": str(Path(image).resolve()), "bytes": Path(image).stat().st_size}
        try:
            volume = chain({"image": image})["image"]
        except Exception as error:
            raise explain(image, _root_cause(error)) from error
        if float(volume.min()) == float(volume.max()):
            raise DataError(f"{image} is constant where it is not zero; leave out the file")
        voxels = volume.as_tensor()[0].numpy().astype(self.settings.dtype)
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.part.b2nd")
        meta = {
            "layout": _LAYOUT,
            "shape": list(voxels.shape),
            "affine_mm": volume.affine.tolist(),
            "source": source
            | {
                "affine_mm": volume.meta["original_affine"].tolist(),
                "shape": [int(n) for n in volume.meta["spatial_shape"]],
            },
            "settings": asdict(self.settings),
            "steps": ["axes", "crop to non-zero", "z-score", "resample"],
        }
        try:
            blosc2.asarray(
                np.ascontiguousarray(voxels),
                chunks=tuple(min(_CHUNK, n) for n in voxels.shape),
                blocks=tuple(min(_BLOCK, n) for n in voxels.shape),
                cparams={"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
                dparams={"nthreads": 1},
                urlpath=str(temporary),
                mode="w",
            )
            meta["bytes"] = temporary.stat().st_size
            with open(temporary, "rb+") as stream:
                os.fsync(stream.fileno())
            sidecar = temporary.with_suffix(".json")
            sidecar.write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
            os.replace(temporary, path)
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
            temporary.unlink(missing_ok=True)
            temporary.with_suffix(".json").unlink(missing_ok=True)
        stored = self.get(image)
        if stored is None:
            raise OSError(errno.EIO, "the volume just written cannot be read back", str(path))
        return stored

    def prepare(
        self, cases: Sequence[Case], *, num_workers: int = 0, strict: bool = False
    ) -> tuple[list[StoredVolume], list[DataError]]:
        """Prepare all volumes of a list, those that are missing in ``num_workers`` processes, with a progress bar.

        Returns:
            the prepared volumes in the order of the list, and what was wrong with the others.

        Raises:
            DataError: with ``strict`` and a bad volume, or if none is usable.
            OSError: ``ENOSPC`` if the disk is full; what is prepared stays.
        """
        self._remove_stale()
        images = [case["image"] for case in cases]
        problems: dict[str, DataError] = {}
        missing = []
        for image in dict.fromkeys(images):
            try:
                if self.get(image) is None:
                    missing.append(image)
            except DataError as error:
                problems[image] = error
        if missing:
            problems |= self._prepare_missing(missing, num_workers)
        stored = [self.get(image) for image in images if image not in problems]
        volumes = [volume for volume in stored if volume is not None]
        found = list(problems.values())
        settle(found, len(volumes), strict=strict)
        return volumes, found

    def _prepare_missing(self, images: list[str], num_workers: int) -> dict[str, DataError]:
        problems: dict[str, DataError] = {}
        with tqdm(total=len(images), desc="preparing volumes", unit="volume") as bar:
            if num_workers <= 1 or len(images) <= 2:
                for image in images:
                    try:
                        self.prepare_one(image)
                    except DataError as error:
                        problems[image] = error
                    bar.update()
                return problems
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(num_workers, len(images)), mp_context=context, initializer=one_thread) as pool:
                running = {pool.submit(self.prepare_one, image): image for image in images}
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


def _root_cause(error: BaseException) -> Exception:
    """Return the first exception of a chain, below what MONAI wraps around it."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def one_thread(_worker: int = 0) -> None:
    """Keep a preparing or reading process to one thread; the processes are the parallelism."""
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
