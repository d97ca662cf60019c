# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure the data path of pre-training, against what else one could do with the same volumes.

Volumes are 256^3: the MNI152 template cut to the brain and enlarged, seen through simulated scanners, once with nothing
but zeros outside the brain and once with a scanner's noise there. All ways give the same crops of 160^3, float32, on
one thread, in turn; processor time leaves out what other programs do.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
import psutil
import torch
from monai.data import CacheDataset, PersistentDataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandSpatialCropd,
    Spacingd,
)
from scipy.ndimage import zoom

from common.data import CropDataset, EpochSampler, StoreSettings, VolumeStore, crop_loader
from common.transforms import read_volume
from common.views import SpatialCrop

from ..preparing.template import simulate_scan, template

__all__ = ["data_tables", "measure_data_path"]

_VOLUMES = 4
_STEPS = (0.25, 0.5, 1.0)  # seconds of an optimizer step, assumed


def measure_data_path(folder: Path, side: int, crop: int, repeats: int, scans: Sequence[Path] = ()) -> dict[str, Any]:
    """Measure preparation, reads of random crops and loaders.

    Args:
        folder: for the volumes, 1.5 GB at 256^3.
        side: of the volumes.
        crop: side of the crops.
        repeats: timed rounds; each way reads 8 crops for each.
        scans: files to measure with instead of simulated ones, continued at their edges as in a mirror.
    """
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    kinds = {}
    for index, kind in enumerate(map(str, scans) if scans else ("skull-stripped", "noisy background")):
        made = _mirrored(kind, side) if scans else _scans(kind, side)
        with redirect_stdout(sys.stderr):  # what preparing says is no part of the figures
            kinds[Path(kind).name] = _measure_kind(folder / str(index), made, crop, repeats)
    return {"side": side, "crop": crop, "kinds": kinds}


def _scans(kind: str, side: int) -> Iterator[np.ndarray]:
    image = template()[0]
    inside = np.nonzero(image > 0)
    image = image[tuple(slice(a.min(), a.max() + 1) for a in inside)]
    image = zoom(image, [side / n for n in image.shape], order=1, grid_mode=True, mode="nearest")
    for seed in range(_VOLUMES):
        scan = simulate_scan(image, np.random.default_rng(seed))
        if kind == "skull-stripped":
            scan[image <= 0] = 0
        scan[0, 0, 0] = scan[-1, -1, -1] = 1  # so that the crop to non-zero keeps all of it
        yield scan


def _mirrored(file: str, side: int) -> Iterator[np.ndarray]:
    """Yield volumes of a scan's own voxels and noise: without interpolation, the scan continued as in a mirror."""
    values = np.asarray(read_volume(file)[0], np.float32)
    repeats = [(0, max(side - n, 0)) for n in values.shape]
    for axis in range(_VOLUMES):
        scan = np.pad(np.flip(values, axis % 3), repeats, mode="symmetric")[:side, :side, :side].copy()
        scan[0, 0, 0] = scan[-1, -1, -1] = max(float(scan.max()), 1.0)  # the crop to non-zero keeps all of it
        yield scan


def _measure_kind(folder: Path, scans: Iterator[np.ndarray], crop: int, repeats: int) -> dict[str, Any]:
    folder.mkdir(parents=True)
    cases = []
    for index, scan in enumerate(scans):
        path = folder / f"scan_{index}.nii.gz"
        nib.save(nib.Nifti1Image(scan, np.diag([1.0, 1.0, 1.0, 1.0])), path)
        cases.append({"image": str(path)})
    chain = _monai_chain(crop)
    store = VolumeStore(folder / "store", StoreSettings())
    persistent = PersistentDataset(cases, chain, cache_dir=folder / "persistent")
    preparing = _in_turn(
        {"store": lambda i: store.prepare_one(cases[i]), "PersistentDataset": lambda i: persistent[i]}, _VOLUMES
    )
    table, _ = store.prepare(cases)
    cached = CacheDataset(cases, chain, num_workers=1, progress=False)
    exact, _ = VolumeStore(folder / "store", StoreSettings(dtype="float32")).prepare(cases)
    whole = [volume.read((0, 0, 0), volume.shape) for volume in exact]
    for index, values in enumerate(whole):
        np.save(folder / f"whole_{index}.npy", values)
    plain = SpatialCrop(crop, rotation_probability=0, zoom_probability=0, flip_probability=0)
    ours = CropDataset(table, spatial=plain, seed=0)
    rng = np.random.default_rng(0)

    def numpy_crop(mode: Any) -> torch.Tensor:
        array = np.load(folder / f"whole_{rng.integers(_VOLUMES)}.npy", mmap_mode=mode)
        low = [int(rng.integers(n - crop + 1)) for n in array.shape]
        return torch.from_numpy(np.array(array[tuple(slice(a, a + crop) for a in low)]))

    ways: dict[str, Callable[[int], Any]] = {
        "store": lambda i: ours[1, i]["region"][0].float(),
        "MONAI PersistentDataset": lambda i: persistent[int(rng.integers(_VOLUMES))]["image"],
        "MONAI CacheDataset, in memory": lambda i: cached[int(rng.integers(_VOLUMES))]["image"],
        ".npy, whole": lambda i: numpy_crop(None),
        ".npy, mapped": lambda i: numpy_crop("r"),
    }
    for name, way in ways.items():
        assert tuple(way(0).shape)[-3:] == (crop,) * 3, name
    warm = _in_turn(ways, 8 * repeats)
    files = {
        "store": [Path(volume.path) for volume in table],
        "MONAI PersistentDataset": list((folder / "persistent").glob("*.pt")),
        ".npy, whole": list(folder.glob("whole_*.npy")),
        ".npy, mapped": list(folder.glob("whole_*.npy")),
    }
    raw = sum(values.nbytes for values in whole)
    result: dict[str, Any] = {
        "preparing": {name: statistics.mean(seconds) for name, seconds in preparing.items()},
        "warm": {name: 1 / statistics.mean(seconds) for name, seconds in warm.items()},
        "cold": _cold({name: ways[name] for name in files}, files, repeats),
        "bytes": {name: sum(path.stat().st_size for path in paths) / raw for name, paths in files.items()},
        "formats": _formats(folder, whole, plain, repeats),
        "loader": _loaders(table, persistent, crop, 4 * repeats),
    }
    shutil.rmtree(folder)
    return result


def _monai_chain(crop: int) -> Compose:
    """Return MONAI's transforms that give such crops."""
    return Compose(
        [
            LoadImaged("image", image_only=True),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=(1, 1, 1)),
            NormalizeIntensityd("image"),
            EnsureTyped("image", dtype=torch.float32, track_meta=False),
            RandSpatialCropd("image", roi_size=[crop] * 3, random_size=False),
        ]
    )


def _in_turn(ways: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Run all ways in turn and return the processor time of every call."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way(index)
            seconds[name].append(time.process_time() - began)
    return seconds


def _cold(ways: dict[str, Callable[[int], Any]], files: dict[str, list[Path]], repeats: int) -> dict[str, float] | None:
    """Return samples per second of wall time when nothing is in the page cache, None where it cannot be emptied."""
    if not hasattr(os, "posix_fadvise"):
        return None
    os.sync()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(2 * repeats):
        for name, way in ways.items():
            for path in files[name]:
                with open(path, "rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            way(index)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


def _formats(folder: Path, whole: Sequence[np.ndarray], spatial: Any, repeats: int) -> list[dict[str, Any]]:
    """Compare precisions, codecs and chunks of the store."""
    codecs, filters = blosc2.Codec, blosc2.Filter
    own, small, large = ((64,) * 3, (16, 16, 32)), ((64,) * 3, (32,) * 3), ((128,) * 3, (32,) * 3)
    variants: dict[str, tuple[str, Any, int, Any, Any]] = {
        "float16, lz4, bitshuffle (the store)": ("float16", codecs.LZ4, 5, filters.BITSHUFFLE, own),
        "the same, blocks of 32^3": ("float16", codecs.LZ4, 5, filters.BITSHUFFLE, small),
        "the same, chunks of 128^3, blocks of 32^3": ("float16", codecs.LZ4, 5, filters.BITSHUFFLE, large),
        "float16, lz4, shuffle": ("float16", codecs.LZ4, 5, filters.SHUFFLE, own),
        "float16, zstd 1, bitshuffle": ("float16", codecs.ZSTD, 1, filters.BITSHUFFLE, own),
        "float32, lz4, bitshuffle (store_dtype float32)": ("float32", codecs.LZ4, 5, filters.BITSHUFFLE, own),
        "float32, zstd 1, bitshuffle": ("float32", codecs.ZSTD, 1, filters.BITSHUFFLE, own),
    }
    values = whole[0]
    ways: dict[str, Callable[[int], Any]] = {}
    rows = []
    for index, (name, (dtype, codec, level, filter_, (chunks, blocks))) in enumerate(variants.items()):
        path = folder / f"format_{index}.b2nd"
        blosc2.asarray(
            values.astype(dtype),
            chunks=list(map(min, chunks, values.shape)),
            blocks=list(map(min, blocks, values.shape)),
            cparams={"codec": codec, "clevel": level, "filters": [filter_], "nthreads": 1},
            urlpath=str(path),
        )

        def read(i: int, path: Path = path) -> torch.Tensor:
            draw = spatial.draw(np.random.default_rng(i), values.shape)
            where = tuple(slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True))
            return torch.from_numpy(blosc2.open(str(path), mode="r")[where]).float()

        ways[name] = read
        error = np.abs(values.astype(dtype).astype(np.float32) - values).max()
        rows.append({"name": name, "bytes": path.stat().st_size / values.nbytes, "error": float(error)})
    seconds = _in_turn(ways, 4 * repeats)
    return [row | {"reads": 1 / statistics.mean(seconds[str(row["name"])])} for row in rows]


def _loaders(table: Any, persistent: Any, crop: int, batches: int) -> dict[str, dict[str, float]]:
    """Return samples per second of processor time that one loader process gives, as published and as MONAI."""
    published = CropDataset(table, spatial=SpatialCrop(crop), seed=0)
    plain = CropDataset(table, spatial=SpatialCrop(crop, rotation_probability=0, zoom_probability=0), seed=0)
    steps = batches + 8
    several = torch.utils.data.RandomSampler(range(len(table)), replacement=True, num_samples=2 * steps)
    loaders = {
        "store, rotation and zoom at 0.2": crop_loader(
            published, sampler=EpochSampler(steps=steps, batch_size=2), num_workers=1
        ),
        "store, plain crops": crop_loader(plain, sampler=EpochSampler(steps=steps, batch_size=2), num_workers=1),
        "MONAI PersistentDataset, plain crops": torch.utils.data.DataLoader(
            persistent, batch_size=2, sampler=several, num_workers=1
        ),
    }
    return {name: _processor_time(loader, batches) for name, loader in loaders.items()}


def _processor_time(loader: Any, batches: int) -> dict[str, float]:
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    (process,) = iterator._workers
    worker = psutil.Process(process.pid)
    before, own = worker.cpu_times(), time.process_time()
    for _ in range(batches):
        next(iterator)
    after = worker.cpu_times()
    seconds = after.user + after.system - before.user - before.system
    return {"worker": 2 * batches / seconds, "main": 2 * batches / (time.process_time() - own)}


def data_tables(measured: dict[str, Any], table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> list[str]:
    """Return the figures as Markdown."""
    side, crop, kinds = measured["side"], measured["crop"], measured["kinds"]
    rows = []
    for kind, figures in kinds.items():
        yardstick = figures["warm"]["MONAI PersistentDataset"]
        for name, rate in figures["warm"].items():
            cold = (figures["cold"] or {}).get(name)
            size = figures["bytes"].get(name)
            rows.append(
                [
                    kind,
                    name,
                    f"{rate:.0f}",
                    f"**{rate / yardstick:.1f}**",
                    "" if size is None else f"{size:.0%}",
                    "" if cold is None else f"{cold:.0f}",
                ]
            )
    head = [
        "volumes",
        "way",
        "crops / s",
        "PersistentDataset = 1",
        "disk, float32 arrays = 100 %",
        "cold, crops / s (wall)",
    ]
    text = [f"Random crops of {crop}^3 out of {side}^3, one thread, files in the page cache; processor time:\n"]
    text.append(table(head, rows))
    rows = [
        [kind, row["name"], f"{row['reads']:.0f}", f"{row['bytes']:.0%}", f"{row['error']:.1g}"]
        for kind, figures in kinds.items()
        for row in figures["formats"]
    ]
    text += [
        "Formats of the store, reads alone:\n",
        table(["volumes", "format", "crops / s", "disk, float32 arrays = 100 %", "largest error, in deviations"], rows),
    ]
    rows = [
        [kind, name, f"{seconds:.2f}", f"**{seconds / figures['preparing']['PersistentDataset']:.2f}**"]
        for kind, figures in kinds.items()
        for name, seconds in figures["preparing"].items()
    ]
    text += [
        f"Preparing a {side}^3 volume from .nii.gz, no resampling needed, once:\n",
        table(["volumes", "into", "processor s", "PersistentDataset = 1"], rows),
    ]
    rows = [
        [kind, name, f"{rates['worker']:.0f}", f"{rates['main']:.0f}"]
        for kind, figures in kinds.items()
        for name, rates in figures["loader"].items()
    ]
    text += [
        "The whole loader, batches of 2, processor time:\n",
        table(
            ["volumes", "loader", "samples / s of one loader process", "samples / s that the main process takes"], rows
        ),
    ]
    slowest = min(figures["loader"]["store, rotation and zoom at 0.2"]["worker"] for figures in kinds.values())
    rows = [[f"{step:g}", *(f"{math.ceil(batch / (step * slowest))}" for batch in (2, 8, 32))] for step in _STEPS]
    text += [
        f"Loader processes for one GPU: batch / (seconds of a step x {slowest:.0f} samples/s), rounded up. No GPU was "
        "at hand, so the seconds of a step are assumed; put in those of your history.json:\n",
        table(["seconds of a step", "batch 2", "batch 8", "batch 32"], rows),
    ]
    return text
