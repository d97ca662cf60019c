# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Whole volumes of the store, one sample for each case; an epoch is one pass over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from ...errors import DataError, SettingsError
from ...tasks import TARGET
from ...views import SpatialCrop, reading_stream, step_stream
from ..cases import Case, case_name, images_of
from ..preparing.settings import StoreSettings
from ..storing.store import VolumeStore
from ..storing.stored import StoredVolume

__all__ = ["CaseSampler", "VolumeDataset"]


class VolumeDataset(Dataset[dict[str, Any]]):
    """Read cases from the store, which is filled first, with a progress bar; bad ones are reported and left out.

    Args:
        data: cases with an ``image`` and, for training and validation, a ``target``.
        spatial: draws how a volume is placed in the input, before it is read.
        store_dir: folder of the volume store.
        settings: of the preprocessing, see :func:`volume_settings`.
        seed: of the run.
        store_dtype: ``float16`` or ``float32``.
        num_workers: processes that fill the store.
        strict: stop at the first case that cannot be used.

    Attributes:
        data: the cases that can be used.
        volumes: what the store has of them.

    Raises:
        DataError: with ``strict`` and a bad case, or if none is usable.
    """

    def __init__(
        self,
        data: Sequence[Case],
        *,
        spatial: SpatialCrop,
        store_dir: str,
        settings: Mapping[str, Any],
        seed: int = 0,
        store_dtype: str = "float16",
        num_workers: int = 0,
        strict: bool = False,
    ) -> None:
        self.spatial, self.seed = spatial, seed
        self.data: list[Case] = []
        self.volumes: list[StoredVolume] = []
        self.problems: list[DataError] = []
        if not data:
            return
        store = VolumeStore(store_dir, StoreSettings(dtype=store_dtype, **settings))
        # label maps that a datalist may name have no part in this
        plain = [{"image": case["image"], "name": case_name(case)} for case in data]
        volumes, self.problems = store.prepare(plain, num_workers=num_workers, strict=strict)
        by_source = {volume.source: volume for volume in volumes}
        self.data = [case for case in data if images_of(case)[0] in by_source]
        self.volumes = [by_source[images_of(case)[0]] for case in self.data]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Any]:
        """Read sample ``(epoch, index of the case)``.

        Returns:
            lists of one entry each: ``region (C, d, h, w)`` as stored, ``spatial`` (the draw), ``target`` (None if the
            case has none), ``case``, ``path`` (of the source file) and ``key``.
        """
        key = (self.seed, *sample)
        case, volume = self.data[sample[1]], self.volumes[sample[1]]
        draw = self.spatial.draw(reading_stream(key), volume.shape)
        region = torch.from_numpy(volume.read(draw.start, draw.stop))
        return {
            "region": [region if region.ndim == 4 else region[None]],
            "spatial": [draw],
            "target": [case.get(TARGET)],
            "case": [case],
            "path": [volume.source],
            "key": [key],
        }


class CaseSampler(Sampler[list[tuple[int, int]]]):
    """Batches of sample names that go once through all cases; the last batch may be smaller.

    Gradients of a smaller last batch are divided by the accumulation steps of a whole one, as in the reference, so that
    its cases count as much as all others.

    Args:
        dataset: whose cases are named.
        batch_size: samples of one optimizer step, over all processes.
        accumulation_steps: micro-batches of one optimizer step.
        seed: of the order; None keeps that of the list, in every epoch alike, for validation and prediction.

    Raises:
        SettingsError: if the batch does not split evenly.

    Example:
        >>> sampler = CaseSampler(range(5), batch_size=4, accumulation_steps=2, seed=0)
        >>> sampler.set_epoch(1)
        >>> [len(batch) for batch in sampler], sorted(index for batch in sampler for _, index in batch)
        ([2, 2, 1], [0, 1, 2, 3, 4])
    """

    def __init__(self, dataset: Any, *, batch_size: int, accumulation_steps: int = 1, seed: int | None = None) -> None:
        parts = accumulation_steps * (dist.get_world_size() if dist.is_initialized() and seed is not None else 1)
        if batch_size < 1 or accumulation_steps < 1 or batch_size % parts:
            raise SettingsError(
                f"batch_size {batch_size} does not split over {accumulation_steps} accumulation step(s) of "
                f"{parts // max(accumulation_steps, 1)} process(es); make it a multiple of {parts}, or "
                "set --accumulation_steps with it"
            )
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if seed is None:  # every process sees all
            self.rank, self.world = 0, 1
        self.count, self.micro, self.seed = len(dataset), batch_size // parts, seed
        self.own = -(-self.count // self.world)
        self.epoch = 0
        if seed is not None and batch_size > self.count:
            tqdm.write(
                f"note: batch_size {batch_size} is more than the {self.count} training cases, so that an epoch is one "
                "optimizer step; a smaller --batch_size takes more"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 1, whose order comes next."""
        self.epoch = epoch if self.seed is not None else 0

    def __len__(self) -> int:
        return -(-self.own // self.micro)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.count)
        if self.seed is not None:
            order = step_stream(self.seed, self.epoch, 0).permutation(self.count)
        order = np.resize(order, self.own * self.world)[self.rank :: self.world]  # equal shares: some see a case twice
        for first in range(0, self.own, self.micro):
            yield [(self.epoch, int(index)) for index in order[first : first + self.micro]]
