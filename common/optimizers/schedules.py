# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as pure functions of the epoch."""

from __future__ import annotations

from ..errors import SettingsError

__all__ = ["Poly"]


class Poly:
    """Polynomial decay with exponent 0.9, after a linear warm-up if asked.

    ``lr (1 + e) / W`` in the first W epochs, then ``lr (1 - (e - W) / (E - W)) ** 0.9``, e counting from 0.

    Args:
        lr: peak learning rate.
        epochs: E, the length of the run.
        warmup_epochs: W; 0 as published for ResEnc-L, 50 for Primus.

    Raises:
        SettingsError: if the warm-up is not shorter than the run.

    Example:
        >>> schedule = Poly(3e-4, epochs=1000, warmup_epochs=50)
        >>> [round(schedule(epoch), 7) for epoch in (0, 49, 50, 999)]
        [6e-06, 0.0003, 0.0003, 6e-07]
    """

    def __init__(self, lr: float, *, epochs: int, warmup_epochs: int = 0) -> None:
        if not 0 <= warmup_epochs < max(epochs, 1):
            raise SettingsError(
                f"warmup_epochs {warmup_epochs} must be less than epochs {epochs}; add --warmup_epochs {epochs // 10}"
            )
        self.lr, self.epochs, self.warmup_epochs = lr, epochs, warmup_epochs

    def __call__(self, epoch: int) -> float:
        """Return the rate of an epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            return self.lr * (1 + epoch) / self.warmup_epochs
        return self.lr * (1 - (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)) ** 0.9
