# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Draw the learning rate of each fine-tuning schedule, and when the encoder is frozen."""

from __future__ import annotations

from pathlib import Path

__all__ = ["schedules"]


def schedules(
    epochs: int = 150,
    lr: float = 1e-3,
    warmup_epochs: int | None = None,
    decoder_epochs: int | None = None,
    output: str = "schedules.png",
) -> None:
    """Draw them.

    Args:
        epochs: length of the run.
        lr: peak learning rate.
        warmup_epochs: of all but the default schedule; 15 of 150 and 50 of 1000 unless given.
        decoder_epochs: of sawtooth and valley; the same unless given.
        output: picture to write.
    """
    from common.errors import SettingsError
    from common.figures import plt
    from common.optimizers import FineTuningSchedule
    from common.optimizers.schedules import SCHEDULES

    figure, axes = plt.subplots(
        1, len(SCHEDULES), figsize=(2.6 * len(SCHEDULES), 2.7), sharey=True, layout="constrained"
    )
    for axis, kind in zip(axes, SCHEDULES, strict=True):
        try:
            schedule = FineTuningSchedule(
                kind, lr=lr, epochs=epochs, warmup_epochs=warmup_epochs, decoder_epochs=decoder_epochs
            )
        except SettingsError as error:
            raise SystemExit(f"Stopped: {error}") from error
        axis.plot(range(epochs), [schedule(epoch) for epoch in range(epochs)], color="#0077bb")
        if schedule.decoder_epochs:
            axis.axvspan(0, schedule.decoder_epochs, color="#ddaa33", alpha=0.3, lw=0, label="encoder frozen")
            axis.legend(fontsize=7, loc="upper right")
        axis.set(title=kind, xlabel="epoch", xlim=(0, epochs))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("learning rate")
    Path(output).expanduser().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output).expanduser(), dpi=110)
    print(f"written: {output}")
