# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How engines turn what a loader gives into what a method sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SegmentationBatch", "ViewsBatch", "loss_of"]


class ViewsBatch:
    """``prepare_batch`` of MONAI's engines: move regions to the device and make the method's views there.

    The views are both input and target: a self-supervised method brings its own labels.

    Args:
        views: callable on a batch on the device.
    """

    def __init__(self, views: Callable[[dict[str, Any]], dict[str, Tensor]]) -> None:
        self.views = views

    def __call__(
        self, batch: dict[str, Any], device: torch.device | str, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the views twice, as MONAI's ``(image, label)``."""
        regions = [region.to(device, non_blocking=non_blocking, **kwargs) for region in batch["region"]]
        with torch.no_grad():
            views = self.views({**batch, "region": regions})
        return views, views


class SegmentationBatch:
    """``prepare_batch`` of MONAI's engines for supervised training: image ``(B, C, D, H, W)`` and label of a batch.

    Args:
        views: callable on a batch whose regions are on the device; returns ``image`` and ``label``.
    """

    def __init__(self, views: Callable[[dict[str, Any]], dict[str, Tensor]]) -> None:
        self.views = views

    def __call__(
        self, batch: dict[str, Any], device: torch.device | str, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return image and label."""
        moved = {
            name: [region.to(device, non_blocking=non_blocking, **kwargs) for region in batch[name]]
            for name in ("region", "label_region")
        }
        with torch.no_grad():
            views = self.views({**batch, **moved})
        return views["image"], views["label"]


def loss_of(loss: Callable[[Any, Any], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    """Return the output transform that scores an evaluator's output with ``loss``, for ``ignite.metrics.Average``."""
    return lambda output: loss(output["pred"], output["label"]).detach()
