# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Draw the learning rate of each fine-tuning schedule, and when the encoder is frozen."""

from __future__ import annotations

from common.figures import subplots
from common.optimizers import FineTuningSchedule
from common.optimizers.schedules import SCHEDULES

from ..commanding.ending import config_command, end
from .settings import Schedules

__all__ = ["schedules"]


def schedules(settings: Schedules) -> None:
    """Draw them."""
    epochs = settings.epochs
    figure, axes = subplots(1, len(SCHEDULES), figsize=(2.6 * len(SCHEDULES), 2.7), sharey=True)
    for axis, kind in zip(axes, SCHEDULES, strict=True):
        schedule = FineTuningSchedule(
            kind,
            lr=settings.lr,
            epochs=epochs,
            warmup_epochs=settings.warmup_epochs,
            decoder_epochs=settings.decoder_epochs,
        )
        axis.plot(range(epochs), [schedule(epoch) for epoch in range(epochs)], color="#0077bb")
        if schedule.decoder_epochs:
            axis.axvspan(0, schedule.decoder_epochs, color="#ddaa33", alpha=0.3, lw=0, label="encoder frozen")
            axis.legend(fontsize=7, loc="upper right")
        axis.set(title=kind, xlabel="epoch", xlim=(0, epochs))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("learning rate")
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.output, dpi=110)
    end(settings.output, following=config_command("mae_resenc_l", "train", "LABELLED_FOLDER", "--schedule", "valley"))
