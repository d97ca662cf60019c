# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What features look like without labels: how many dimensions they use, and whether views of a volume agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...data import StoredVolume
from ...errors import DataError
from ...metrics.representations import effective_rank, view_agreement
from ..features import VolumeEmbedder
from .crops import crop_box, read_crop

__all__ = ["ViewPairs"]

_POSITIONS = 64  # of a map


class ViewPairs:
    """Two views of the middle of a few volumes, drawn once: flips along each axis, contrast, brightness and noise.

    Args:
        volumes: those for validation and those to learn from; taken from the first part that has any, then from the
            next, in an order that ``seed`` draws.
        sides: of a crop.
        count: volumes.
        seed: of everything random.
    """

    def __init__(
        self,
        volumes: Mapping[str, Sequence[StoredVolume]],
        *,
        sides: Sequence[int],
        count: int = 8,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng([seed, 0])
        self.sides = list(sides)
        self.crops: list[tuple[Tensor, Tensor]] = []  # (1, d, h, w) each
        self.names: list[str] = []
        for part in ("validation", "training"):
            held = volumes.get(part, ())
            for index in rng.permutation(len(held))[: 4 * count]:  # some may be damaged
                volume = held[int(index)]
                if len(self.crops) >= count or volume.source in self.names:
                    continue
                try:
                    crop = read_crop(volume, *crop_box(volume.shape, sides))
                except (DataError, OSError):  # the run says so itself where it draws this volume
                    continue
                self.crops.append((_view(crop, rng), _view(crop, rng)))
                self.names.append(volume.source)
        self.seed = seed

    def scores(self, backbone: nn.Module) -> dict[str, float]:
        """Return ``rank``, the effective rank of positions of the coarsest map, and ``agreement`` of pooled views.

        Raises:
            DataError: if features are not finite.
        """
        embedder = VolumeEmbedder(backbone, patch_size=self.sides, dense=True, device=_device(backbone))
        rng = np.random.default_rng([self.seed, 1])
        pooled, rows = [], []
        for view in (view for pair in self.crops for view in pair):
            found = embedder(view)
            assert found.dense is not None
            positions = found.dense.reshape(len(found.dense), -1).T  # (d h w, E)
            rows.append(positions[rng.permutation(len(positions))[:_POSITIONS]])
            pooled.append(found.vector)
        if not all(np.isfinite(part).all() for part in rows):  # maps are kept in float16
            raise DataError("its features are beyond what float16 holds")
        scores = {"rank": effective_rank(np.concatenate(rows))} if rows else {}
        if len(self.crops) > 1:
            scores["agreement"] = view_agreement(np.stack(pooled[::2]), np.stack(pooled[1::2]))
        return scores


def _device(backbone: nn.Module) -> torch.device:
    return next(backbone.parameters()).device


def _view(crop: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a view of a crop ``(C, d, h, w)``, whose intensities have mean 0 and deviation 1 over the volume."""
    axes = [axis + 1 for axis in range(3) if rng.random() < 0.5]
    contrast, brightness = rng.uniform(0.8, 1.25), rng.uniform(-0.2, 0.2)
    noise = torch.from_numpy(rng.normal(0, 0.1, tuple(crop.shape)).astype(np.float32))
    return (crop.float().flip(axes) * contrast + brightness + noise).half()
