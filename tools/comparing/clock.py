# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How much of the processor the iterations of a training take; ``clock.yaml`` adds it to a bundle's train config."""

from __future__ import annotations

import time
from pathlib import Path

from ignite.engine import Engine, Events

from common.files import write_json

__all__ = ["ProcessorClock"]


class ProcessorClock:
    """Write the processor seconds of each epoch, from its start to the end of its last iteration.

    That is reading, augmenting and learning, if no other process reads; not validation, pictures or checkpoints.

    Args:
        file: JSON with a list, complete when the training is.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.seconds: list[float] = []
        self._began = self._ended = 0.0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after all else."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, _: Engine) -> None:
        self._began = time.process_time()

    def _step(self, _: Engine) -> None:
        self._ended = time.process_time()

    def _end(self, _: Engine) -> None:
        self.seconds.append(self._ended - self._began)

    def _write(self, _: Engine) -> None:
        write_json(self.seconds, self.file)
