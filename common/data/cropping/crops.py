# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Random crops of stored volumes, a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from ...errors import DataError, SettingsError
from ...files import write_json
from ...paths import as_path
from ...views import SpatialCrop, reading_stream
from ..cases import ANATOMY, ANONYMISED
from ..listing.datalists import pretraining_lists
from ..preparing.filling import one_thread
from ..preparing.settings import StoreSettings
from ..storing.store import VolumeStore
from ..storing.stored import StoredVolume
from ..storing.tables import VolumeTable

__all__ = ["CropDataset", "EpochSampler", "crop_loader", "prepare_pretraining_data"]

_ATTEMPTS = 20


class CropDataset(Dataset[dict[str, Any]]):
    """Read the region of random crops: which volume, where and how transformed comes from the sample's own stream.

    Volumes are drawn uniformly with replacement, as published; an epoch has no relation to the number of volumes. One
    that cannot be read is replaced by another draw of the same stream, so that what is drawn still depends on nothing
    else, and named in the sample.

    Args:
        data: prepared volumes.
        spatial: draws the crop before anything is read.
        seed: of the run.
        volumes_per_sample: volumes drawn for each sample, each with a crop of its own; different ones, if there are.
        anonymised: also read where volumes were anonymised; those without a mask count as untouched.
        anatomy_centred: share of the crops that are centred on a voxel of the volume's anatomy mask, as near as a crop
            within the volume allows; volumes without a mask are cropped anywhere.

    Raises:
        DataError: with ``anonymised`` or ``anatomy_centred``, if no volume has such a mask.
        SettingsError: if ``anatomy_centred`` is no share.
    """

    def __init__(
        self,
        data: Sequence[StoredVolume],
        *,
        spatial: SpatialCrop,
        seed: int,
        volumes_per_sample: int = 1,
        anonymised: bool = False,
        anatomy_centred: float = 0.0,
    ) -> None:
        self.data = data
        self.spatial = spatial
        self.seed = seed
        self.volumes_per_sample = volumes_per_sample
        self.anonymised = anonymised
        self.anatomy_centred = anatomy_centred
        if not 0 <= anatomy_centred <= 1:
            raise SettingsError(f"anatomy_centred is {anatomy_centred}; it is a share of the crops, 0 to 1")
        for asked, mask in (
            (anonymised and "ignore_anonymised true", ANONYMISED),
            (anatomy_centred and "anatomy_centred", ANATOMY),
        ):
            if asked and not any(mask in volume.masks for volume in data):
                raise DataError(f"--{asked} needs a mask for at least one volume: entries {mask!r} in a datalist")

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Any]:
        """Read sample ``(epoch, index)``.

        Returns:
            ``key``, and lists with an entry for each of its volumes: ``region`` (a tensor as stored), ``spatial`` (the
            draw), ``path`` (of the source file) and, if asked for, ``anonymised`` (a tensor of 0 and 1); ``unreadable``
            has an entry for each volume that had to be replaced: its array, its source and why.

        Raises:
            DataError: if one draw after the other cannot be read.
        """
        key = (self.seed, *sample)
        rng = reading_stream(key)
        item: dict[str, Any] = {"key": [key], "region": [], "spatial": [], "path": [], "unreadable": []}
        drawn: list[int] = []
        while len(item["region"]) < self.volumes_per_sample:
            volume = self.data[self._draw(rng, drawn)]
            try:
                self._read(volume, rng, item)
            except Exception as error:
                told = f"{type(error).__name__}: {error}".splitlines()[0]
                item["unreadable"].append((volume.path, volume.source, told))
                if len(item["unreadable"]) >= _ATTEMPTS:
                    raise DataError(
                        f"{_ATTEMPTS} prepared volumes drawn one after the other cannot be read, the last "
                        f"{volume.path} ({told}); is the disk of the store there?"
                    ) from error
        return item

    def _draw(self, rng: np.random.Generator, drawn: list[int]) -> int:
        """Draw a volume, of those that this sample does not have yet if there are any."""
        left = len(self.data) - len(drawn)
        index = int(rng.integers(left if self.volumes_per_sample > 1 and left else len(self.data)))
        if self.volumes_per_sample > 1 and left:
            for other in drawn:  # sorted: the index counts what is left
                index += index >= other
            bisect.insort(drawn, index)
        return index

    def _read(self, volume: StoredVolume, rng: np.random.Generator, item: dict[str, Any]) -> None:
        centre = None
        if self.anatomy_centred and rng.random() < self.anatomy_centred:
            centre = volume.anatomy_voxel(rng)
        draw = self.spatial.draw(rng, volume.shape, centre)
        region = torch.from_numpy(volume.read(draw.start, draw.stop))
        if self.anonymised:
            mask = volume.read(draw.start, draw.stop, mask=ANONYMISED)
            item.setdefault("anonymised", []).append(torch.from_numpy(mask))
        item["region"].append(region)
        item["spatial"].append(draw)
        item["path"].append(volume.source)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of sample names for one process: an equal share of every global batch, in micro-batches.

    Args:
        steps: optimizer steps in an epoch.
        batch_size: samples of one optimizer step, over all processes and micro-batches.
        accumulation_steps: micro-batches of one optimizer step.
        fixed: give the same names in every epoch, for validation.

    Raises:
        SettingsError: if the batch does not split evenly.
    """

    def __init__(self, *, steps: int, batch_size: int, accumulation_steps: int = 1, fixed: bool = False) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        parts = accumulation_steps * self.world
        if batch_size < 1 or batch_size % parts:
            raise SettingsError(
                f"batch_size {batch_size} does not split over {self.world} process(es) x {accumulation_steps} "
                f"accumulation step(s); make it a multiple of {parts}, or set --accumulation_steps with it"
            )
        self.steps, self.batch_size, self.accumulation_steps, self.fixed = steps, batch_size, accumulation_steps, fixed
        self.micro = batch_size // parts
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 1, whose samples come next."""
        self.epoch = 0 if self.fixed else epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(len(self)):
            first = (batch * self.world + self.rank) * self.micro
            yield [(self.epoch, index) for index in range(first, first + self.micro)]


def _collate(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keep regions of different sizes as lists; views make them one batch on the device."""
    return {key: [value for sample in samples for value in sample[key]] for key in samples[0]}


def crop_loader(dataset: CropDataset, *, sampler: EpochSampler, num_workers: int = 0) -> DataLoader[dict[str, Any]]:
    """Build the loader of a :class:`CropDataset`; batches hold lists, since regions differ in size."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=one_thread,
        persistent_workers=num_workers > 0,
    )


def prepare_pretraining_data(
    dataset_dir: str,
    *,
    store_dir: str,
    output_dir: str,
    datalist: str | None = None,
    spacing_mm: float | Sequence[float] | None = 1.0,
    reorient: bool = True,
    store_dtype: str = "float16",
    num_workers: int = 0,
    strict: bool = False,
    volumes_per_sample: int = 1,
    check_sources: bool = True,
) -> dict[str, VolumeTable]:
    """Find, check and prepare all volumes of a pre-training run.

    Volumes that cannot be used are printed and written to ``output_dir/skipped.json``. ``check_sources=False`` opens a
    store as it was opened before, without a look at the source files.

    Returns:
        ``training`` and ``validation`` volumes.

    Raises:
        DataError: if nothing is usable, the disk is full, or ``strict`` and one volume is bad.
    """
    lists = pretraining_lists(dataset_dir, datalist, least=volumes_per_sample)
    store = VolumeStore(store_dir, StoreSettings(spacing_mm=spacing_mm, reorient=reorient, dtype=store_dtype))
    prepared: dict[str, VolumeTable] = {}
    skipped: list[str] = []
    for name, cases in lists.items():
        prepared[name], problems = store.prepare(
            cases, num_workers=num_workers, strict=strict, check_sources=check_sources
        )
        skipped += [str(problem) for problem in problems if str(problem) not in skipped]
    if skipped and (not dist.is_initialized() or dist.get_rank() == 0):
        write_json(skipped, as_path(output_dir) / "skipped.json")
    return prepared
