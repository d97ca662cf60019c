# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as pure functions of the epoch."""

from __future__ import annotations

import math

from ..errors import SettingsError

__all__ = ["SCHEDULES", "ClassificationSchedule", "FineTuningSchedule", "Poly"]

SCHEDULES = ("default", "warmup", "sawtooth", "valley", "frozen")


def _check_epoch(epoch: int, epochs: int) -> None:
    if epoch >= epochs:
        raise SettingsError(
            f"the schedule ends with epoch {epochs}, but epoch {epoch + 1} starts; set epochs to those of the whole "
            "run, in a federation rounds x epochs of a round"
        )


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
        _check_epoch(epoch, self.epochs)
        if epoch < self.warmup_epochs:
            return self.lr * (1 + epoch) / self.warmup_epochs
        return self.lr * (1 - (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)) ** 0.9


class FineTuningSchedule:
    """Rate of each epoch of a fine-tuning, and which half of the network learns in it.

    ==========  ======================================================================================================
    default     everything learns, polynomial decay
    warmup      everything learns, linear warm-up over W epochs, then decay; published for Primus
    sawtooth    D epochs for the decoder alone (linear up to D/2, then decay), then everything, as in warmup; published
                for ResEnc-L
    valley      D epochs for the decoder alone, decaying from the full rate, then everything, as in warmup
    frozen      the decoder alone, as in warmup
    ==========  ======================================================================================================

    Everything here is a pure function of the epoch, counted from 0, so that a resumed run cannot be in another phase
    than the one that was cut. Where everything starts to learn, the optimizer starts anew.

    Args:
        kind: name of the schedule.
        lr: peak learning rate.
        epochs: E, the length of the run.
        warmup_epochs: W; published: 15 of 150 and 50 of 1000.
        decoder_epochs: D; published: the same.

    Raises:
        SettingsError: if the kind is unknown or its phases are longer than the run.

    Example:
        >>> schedule = FineTuningSchedule("sawtooth", lr=1e-3, epochs=150, warmup_epochs=15, decoder_epochs=15)
        >>> [round(schedule(epoch), 6) for epoch in (0, 6, 7, 14, 15, 29, 30, 149)]
        [0.000143, 0.001, 0.001, 0.000154, 6.7e-05, 0.001, 0.001, 1.3e-05]
        >>> [schedule.decoder_only(epoch) for epoch in (14, 15)], schedule.starts_anew(15)
        ([True, False], True)
    """

    def __init__(
        self, kind: str, *, lr: float, epochs: int, warmup_epochs: int | None = None, decoder_epochs: int | None = None
    ) -> None:
        if kind not in SCHEDULES:
            raise SettingsError(f"schedule is {kind!r}; it must be one of {', '.join(SCHEDULES)}")
        usual = min(50, epochs // 10)
        warmup = usual if warmup_epochs is None else warmup_epochs
        alone = usual if decoder_epochs is None else decoder_epochs
        self.kind, self.lr, self.epochs = kind, lr, epochs
        self.warmup_epochs = 0 if kind == "default" else warmup
        self.decoder_epochs = alone if kind in ("sawtooth", "valley") else epochs if kind == "frozen" else 0
        whole = self.warmup_epochs + (0 if kind == "frozen" else self.decoder_epochs)
        if min(self.warmup_epochs, self.decoder_epochs) < 0 or whole >= max(epochs, 1):
            raise SettingsError(
                f"the {kind} schedule has {self.decoder_epochs} epochs for the decoder and {self.warmup_epochs} of "
                f"warm-up, which must be less than epochs {epochs}; lower --decoder_epochs and --warmup_epochs"
            )

    def __call__(self, epoch: int) -> float:
        """Return the rate of an epoch, counted from 0."""
        _check_epoch(epoch, self.epochs)
        start = 0 if self.kind == "frozen" else self.decoder_epochs
        if epoch >= start:
            return self._rise_and_decay(epoch - start, self.warmup_epochs, self.epochs - start)
        return self._rise_and_decay(epoch, start // 2 if self.kind == "sawtooth" else 0, start)

    def _rise_and_decay(self, epoch: int, rise: int, length: int) -> float:
        if epoch < rise:
            return self.lr * (1 + epoch) / rise
        return self.lr * (1 - (epoch - rise) / (length - rise)) ** 0.9

    def decoder_only(self, epoch: int) -> bool:
        """Return whether the encoder is frozen in an epoch, counted from 0."""
        return epoch < self.decoder_epochs

    def starts_anew(self, epoch: int) -> bool:
        """Return whether the optimizer forgets what it gathered at the start of an epoch, counted from 0."""
        return epoch > 0 and self.decoder_only(epoch - 1) and not self.decoder_only(epoch)


class ClassificationSchedule:
    """Rate of each epoch of a classifier, and whether its encoder learns in it.

    ``lr (1 + e) / (W + 1)`` in the first W epochs, then half a cosine from ``lr`` to 0. With H epochs for the head
    alone (sawtooth), these come first, rising linearly over the first half of them and decaying as :class:`Poly` over
    the second, and the rest is as above; where everything starts to learn, the optimizer starts anew. It has the
    methods of :class:`FineTuningSchedule`.

    Args:
        lr: peak learning rate.
        epochs: E, the length of the run.
        warmup_epochs: W; published: 20 of 200.
        head_epochs: H; 0 for none.

    Raises:
        SettingsError: if the phases are longer than the run.

    Example:
        >>> schedule = ClassificationSchedule(1e-4, epochs=200, warmup_epochs=20)
        >>> [f"{schedule(epoch):.3g}" for epoch in (0, 19, 20, 110, 199)]
        ['4.76e-06', '9.52e-05', '0.0001', '5e-05', '7.62e-09']
        >>> sawtooth = ClassificationSchedule(1e-4, epochs=200, warmup_epochs=20, head_epochs=4)
        >>> [f"{sawtooth(epoch):.3g}" for epoch in range(5)], sawtooth.decoder_only(3), sawtooth.starts_anew(4)
        (['5e-05', '0.0001', '0.0001', '5.36e-05', '4.76e-06'], True, True)
    """

    def __init__(self, lr: float, *, epochs: int, warmup_epochs: int = 20, head_epochs: int = 0) -> None:
        if min(warmup_epochs, head_epochs) < 0 or warmup_epochs + head_epochs >= max(epochs, 1):
            raise SettingsError(
                f"{head_epochs} epochs for the head and {warmup_epochs} of warm-up must be less than epochs {epochs}; "
                "lower --head_epochs and --warmup_epochs"
            )
        self.lr, self.epochs, self.warmup_epochs, self.decoder_epochs = lr, epochs, warmup_epochs, head_epochs

    def __call__(self, epoch: int) -> float:
        """Return the rate of an epoch, counted from 0."""
        _check_epoch(epoch, self.epochs)
        if self.decoder_only(epoch):
            return Poly(self.lr, epochs=self.decoder_epochs, warmup_epochs=self.decoder_epochs // 2)(epoch)
        epoch -= self.decoder_epochs
        if epoch < self.warmup_epochs:
            return self.lr * (1 + epoch) / (self.warmup_epochs + 1)
        share = (epoch - self.warmup_epochs) / (self.epochs - self.decoder_epochs - self.warmup_epochs)
        return self.lr * 0.5 * (1 + math.cos(math.pi * share))

    def decoder_only(self, epoch: int) -> bool:
        """Return whether only the head learns in an epoch, counted from 0."""
        return epoch < self.decoder_epochs

    def starts_anew(self, epoch: int) -> bool:
        """Return whether the optimizer forgets what it gathered at the start of an epoch, counted from 0."""
        return epoch == self.decoder_epochs > 0
