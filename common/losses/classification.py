# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of classes that exclude each other, or of labels that may come together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError

__all__ = ["ClassificationLoss"]


class ClassificationLoss(nn.Module):
    """Softmax or sigmoid cross-entropy in float32, the mean over samples (and labels).

    Args:
        multilabel: labels that may come together, instead of classes.
        label_smoothing: share of the target that is spread evenly; over all classes, or for a label over 0 and 1.
        weights: of each class, or of the positives of each label.

    Raises:
        SettingsError: if ``label_smoothing`` is not a share.

    Example:
        >>> float(ClassificationLoss()(torch.zeros(2, 2), torch.tensor([0, 1]))) == float(torch.tensor(2.0).log())
        True
    """

    def __init__(
        self, *, multilabel: bool = False, label_smoothing: float = 0.0, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise SettingsError(f"label_smoothing is {label_smoothing}; it must be from 0 to less than 1")
        self.multilabel, self.label_smoothing = multilabel, label_smoothing
        self.weights = None if weights is None else torch.tensor(list(weights))

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Compare logits ``(B, outputs)`` with classes ``(B,)``, or with 0 and 1 ``(B, outputs)``."""
        weights = None if self.weights is None else self.weights.to(pred.device, non_blocking=True)
        with torch.autocast(pred.device.type, enabled=False):
            if not self.multilabel:
                return F.cross_entropy(pred.float(), label, weight=weights, label_smoothing=self.label_smoothing)
            target = label.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(pred.float(), target, pos_weight=weights)
