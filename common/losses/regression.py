# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Distance of a predicted number from the true one, and the choice of the loss by the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError
from ..tasks import ClassificationTask, RegressionTask
from .classification import ClassificationLoss

__all__ = ["RegressionLoss", "target_loss"]

_KINDS = ("huber", "l1", "mse")


class RegressionLoss(nn.Module):
    """Mean over samples, in float32, of a function of the error in standard deviations of the training cases.

    ``l1`` is its absolute value and asks for the median, ``mse`` its square and asks for the mean, ``huber`` half its
    square up to ``delta`` and straight beyond (Huber, doi:10.1214/aoms/1177703732), so that a few cases far off do not
    decide.

    Args:
        kind: huber, l1 or mse.
        delta: of huber, in standard deviations.

    Raises:
        SettingsError: if there is no such loss.

    Example:
        >>> far = torch.tensor([[3.0]]), torch.tensor([[0.0]])
        >>> [float(RegressionLoss(kind)(*far)) for kind in ("huber", "l1", "mse")]
        [2.5, 3.0, 9.0]
    """

    def __init__(self, kind: str = "huber", *, delta: float = 1.0) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise SettingsError(f"regression_loss is {kind!r}; it must be one of {', '.join(_KINDS)}")
        self.kind, self.delta = kind, delta

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Compare outputs ``(B, 1)`` with standardised numbers ``(B, 1)``."""
        with torch.autocast(pred.device.type, enabled=False):
            if self.kind == "l1":
                return F.l1_loss(pred.float(), label)
            if self.kind == "mse":
                return F.mse_loss(pred.float(), label)
            return F.huber_loss(pred.float(), label, delta=self.delta)


def target_loss(
    task: ClassificationTask | RegressionTask,
    *,
    regression: str | None = None,
    huber_delta: float = 1.0,
    label_smoothing: float = 0.0,
    weights: Sequence[float] | None = None,
) -> ClassificationLoss | RegressionLoss:
    """Return the loss of a task, and refuse settings of the other one.

    Args:
        task: classes, labels or a number.
        regression: loss of a number, huber unless given.
        huber_delta: of huber, in standard deviations.
        label_smoothing: of classes or labels.
        weights: of classes or labels.

    Raises:
        SettingsError: if a setting is of the other task.
    """
    if isinstance(task, RegressionTask):
        if label_smoothing:
            raise SettingsError(f"label_smoothing is {label_smoothing}, but a regression has no classes; drop it")
        return RegressionLoss("huber" if regression is None else regression, delta=huber_delta)
    if regression is not None:
        raise SettingsError(
            f"regression_loss is {regression!r}, but classes are learned; drop it, or add --task regression"
        )
    return ClassificationLoss(multilabel=task.multilabel, label_smoothing=label_smoothing, weights=weights)
