# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Random patches of labelled cases, a third of them on foreground, a pure function of (seed, epoch, sample)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ...errors import DataError
from ...tasks import SegmentationTask
from ...views import SpatialCrop, reading_stream
from ..cases import LABEL, Case, case_name, images_of
from ..checking.checks import check_label_values, tell_outside
from ..preparing.settings import StoreSettings
from ..problems import settle
from ..storing.store import VolumeStore
from ..storing.stored import StoredVolume

__all__ = ["PatchDataset"]


class PatchDataset(Dataset[dict[str, Any]]):
    """Read regions of images and labels from the store, which is filled first, with a progress bar.

    A case is drawn uniformly with replacement, as in nnU-Net; an epoch has no relation to the number of cases. Of every
    global batch the last samples, ``batch_size - round(batch_size * (1 - foreground))`` of them, are centred on a voxel
    of a class or region drawn among those that the case holds; the others lie anywhere, or, with an ignored label, on
    any voxel with a verdict.

    Args:
        data: cases with ``image`` and ``label``; those that cannot be used are reported and left out.
        task: whose classes the labels hold.
        spatial: draws the patch before anything is read.
        store_dir: folder of the volume store.
        settings: of the preprocessing.
        seed: of the run.
        batch_size: samples of one optimizer step.
        foreground: share of the samples that are sure to show foreground; 0.33 as published, one of two at batch 2.
        store_dtype: ``float16``, or ``float32`` where intensities are not normalised.
        num_workers: processes that fill the store.
        strict: stop at the first case that cannot be used.

    Raises:
        DataError: with ``strict`` and a bad case, if none is usable, or if no label marks anything.
    """

    def __init__(
        self,
        data: Sequence[Case],
        *,
        task: SegmentationTask,
        spatial: SpatialCrop,
        store_dir: str,
        settings: Mapping[str, Any],
        seed: int,
        batch_size: int,
        foreground: float = 0.33,
        store_dtype: str = "float16",
        num_workers: int = 0,
        strict: bool = False,
    ) -> None:
        self.data = list(data)
        self.task, self.spatial, self.seed = task, spatial, seed
        self.batch_size, self.first_forced = batch_size, round(batch_size * (1 - foreground))
        store = VolumeStore(store_dir, StoreSettings(dtype=store_dtype, **settings))
        self.volumes = _usable(store, self.data, task, num_workers=num_workers, strict=strict)
        ignored = task.ignore_label
        self.verdicts = [
            [value for value in volume.values if value != ignored] if ignored in volume.values else []
            for volume in self.volumes
        ]

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Any]:
        """Read sample ``(epoch, index)``.

        Returns:
            lists of one entry each: ``region (C, d, h, w)`` as stored, ``label_region (d, h, w)``, ``spatial`` (the
            draw), ``path`` (of the source file) and ``key``.
        """
        key = (self.seed, *sample)
        rng = reading_stream(key)
        place = int(rng.integers(len(self.volumes)))
        volume = self.volumes[place]
        centre = None
        if sample[1] % self.batch_size >= self.first_forced:
            present = [own for own in self.task.values if any(value in volume.places for value in own)]
            if present:
                centre = volume.voxel(present[int(rng.integers(len(present)))], rng)
        if centre is None and self.verdicts[place]:
            centre = volume.voxel(self.verdicts[place], rng)
        draw = self.spatial.draw(rng, volume.shape, centre=centre)
        region = torch.from_numpy(volume.read(draw.start, draw.stop))
        label = torch.from_numpy(volume.read(draw.start, draw.stop, mask=LABEL))
        return {
            "region": [region if region.ndim == 4 else region[None]],
            "label_region": [label],
            "spatial": [draw],
            "path": [volume.source],
            "key": [key],
        }


def _usable(
    store: VolumeStore, cases: Sequence[Case], task: SegmentationTask, *, num_workers: int, strict: bool
) -> list[StoredVolume]:
    volumes, _ = store.prepare(cases, num_workers=num_workers, strict=strict)
    by_source = {volume.source: volume for volume in volumes}
    good, problems, empty = [], [], []
    lost: dict[str, Mapping[int, int]] = {}
    for case in cases:
        volume = by_source.get(images_of(case)[0])
        if volume is None:
            continue
        try:
            check_label_values(case[LABEL], volume.values, task)
        except DataError as error:
            problems.append(error)
            continue
        good.append(volume)
        lost[case_name(case)] = volume.outside
        if not any(value in volume.values for own in task.values for value in own):
            empty.append(case_name(case))
    settle(problems, len(good), strict=strict)
    if good and len(empty) == len(good):
        raise DataError(
            f"none of the {len(good)} labels marks a voxel of {', '.join(task.names)} (the first is that of "
            f"{empty[0]}); look at them, or correct --labels"
        )
    tell_outside(lost, task)
    marked = {value for volume in good for value in volume.values}
    unmarked = [name for name, own in zip(task.names, task.values, strict=True) if not marked.intersection(own)]
    if good and unmarked:
        tqdm.write(
            f"note: none of the {len(good)} labels marks a voxel of {', '.join(unmarked)}, which cannot be learned; "
            "look at the labels, or correct --labels"
        )
    if empty:
        named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        tqdm.write(f"note: {len(empty)} of {len(good)} labels mark nothing ({named}); they are used as background")
    return good
