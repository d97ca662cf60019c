# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The Dice of all validation patches together, for each class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine
from ignite.metrics import Metric
from torch import Tensor

from ..tasks import SegmentationTask

__all__ = ["PooledDice"]


class PooledDice(Metric):
    """Sum hits and misses over all patches first, then make one Dice of each class; nnU-Net's pseudo Dice.

    A small patch says little about a class, all of them together do. A class that neither a label nor a prediction
    holds is left out of the mean. Beside the mean, the metrics of the engine get ``<name>_<class>`` of each class. Sums
    stay on the device until they are asked for, and are taken over all processes.

    Args:
        task: classes or regions.
        output_transform: turns the engine's output into logits ``(B, outputs, D, H, W)`` and label values
            ``(B, 1, D, H, W)``.
    """

    def __init__(self, task: SegmentationTask, output_transform: Callable[[Any], Any] = lambda x: x) -> None:
        self.task = task
        super().__init__(output_transform=output_transform)

    def reset(self) -> None:
        """Forget everything."""
        self.counts: Tensor | None = None  # (classes, 3): both, predicted, labelled

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        """Count one batch."""
        logits, label = output
        counted = torch.ones_like(label, dtype=torch.bool)
        if self.task.ignore_label is not None:
            counted = label != self.task.ignore_label
        regions = self.task.regions is not None
        chosen = logits > 0 if regions else logits.argmax(1, keepdim=True)
        rows = []
        for index, values in enumerate(self.task.values):
            predicted = (chosen[:, index : index + 1] if regions else chosen == index + 1) & counted
            true = sum((label == value for value in values[1:]), label == values[0]) & counted
            rows.append(torch.stack([(predicted & true).sum(), predicted.sum(), true.sum()]))
        counts = torch.stack(rows)
        self.counts = counts if self.counts is None else self.counts + counts

    def by_class(self) -> list[float]:
        """Return the Dice of each class, NaN where it was not there."""
        if self.counts is None:
            return [math.nan] * len(self.task.names)
        counts = self.counts.clone()
        if dist.is_initialized():
            dist.all_reduce(counts)
        return [
            2 * both / (predicted + true) if predicted + true else math.nan for both, predicted, true in counts.tolist()
        ]

    def compute(self) -> float:
        """Return the mean over the classes that were there."""
        known = [value for value in self.by_class() if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan

    def completed(self, engine: Engine, name: str) -> None:
        """Put the mean and the classes into the engine's metrics."""
        engine.state.metrics[name] = self.compute()
        for label, value in zip(self.task.names, self.by_class(), strict=True):
            engine.state.metrics[f"{name}_{label}"] = value
