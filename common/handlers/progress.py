# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Progress of a training run: a bar with the time left, a line and a record per epoch, curves on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from ..weights.files import write_json

__all__ = ["Progress", "shared"]

_Handler = TypeVar("_Handler")
_SHOW_EVERY = 10  # iterations


def shared(handler: _Handler) -> _Handler:
    """Return ``handler``: a config's way to list one that other entries need too.

    MONAI's property check and MONAI Label read every entry of ``train#handlers`` as a dictionary, so a plain reference
    may not stand there.
    """
    return handler


class Progress:
    """Show a bar over the whole run, print one line per epoch, keep and save the history.

    The loss is summed on the device and read every ten iterations, so that a GPU does not wait for the screen.

    Args:
        name: what the bar is called.
        optimizer: whose rate is recorded.
        history_file: JSON with a record per epoch, for curves.
        evaluator: engine whose metrics are recorded after each of its runs.

    Attributes:
        history: one record per finished epoch: epoch, train_loss, lr, seconds and the evaluator's metrics.
    """

    def __init__(
        self,
        name: str,
        optimizer: Optimizer,
        *,
        history_file: str | Path,
        evaluator: Engine | None = None,
    ) -> None:
        self.name, self.optimizer, self.history_file = name, optimizer, Path(history_file)
        self.evaluator = evaluator
        self.history: list[dict[str, float]] = []
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._began = 0.0
        self._bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        """Register with a trainer; attach it after validation and before checkpoints."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start_epoch(self, engine: Engine) -> None:
        if self._bar is None and self.main:
            length = engine.state.epoch_length
            self._bar = tqdm(
                total=engine.state.max_epochs * length,
                initial=(engine.state.epoch - 1) * length,
                desc=self.name,
                unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 10,
                smoothing=0.05,
            )
        self._sum, self._count, self._began = 0.0, 0, time.monotonic()

    def _step(self, engine: Engine) -> None:
        self._sum = self._sum + engine.state.output["loss"].detach()
        self._count += 1
        if self._bar is not None:
            self._bar.update()
            if engine.state.iteration % _SHOW_EVERY == 0:
                loss = f"{float(self._sum) / self._count:.4f}"
                self._bar.set_postfix(epoch=engine.state.epoch, loss=loss, refresh=False)

    def _end_epoch(self, engine: Engine) -> None:
        fresh = self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch
        metrics: Mapping[str, float] = self.evaluator.state.metrics if fresh and self.evaluator else {}
        record = {
            "epoch": engine.state.epoch,
            "train_loss": self._mean_loss(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(time.monotonic() - self._began, 3),
            **{name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))},
        }
        self.history.append(record)
        if self.main:
            write_json(self.history, self.history_file)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "epoch")
            tqdm.write(f"{self.name}: epoch {engine.state.epoch}/{engine.state.max_epochs}, {shown}")

    def _mean_loss(self) -> float:
        """Return the epoch's mean over all steps and, in a distributed run, all processes."""
        mean = torch.as_tensor(self._sum) / max(self._count, 1)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return float(mean)

    def _close(self, _: Engine) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._close(engine)
        raise error
