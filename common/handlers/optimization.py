# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Handlers of the optimizer: rate, clip, the end at a loss that is no number, and the seed of what networks draw."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..errors import SettingsError
from ..views import step_seed

__all__ = ["GradientClip", "Reproducible", "SetLearningRate", "StopAtNonFiniteLoss"]

_LOOK_EVERY = 10  # iterations


class SetLearningRate:
    """Set the rate at the start of every epoch from a pure function of the epoch, counted from 0."""

    def __init__(self, optimizer: Optimizer, schedule: Callable[[int], float]) -> None:
        self.optimizer, self.schedule = optimizer, schedule

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the rate of the epoch that starts."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(engine.state.epoch - 1)


class GradientClip:
    """Clip the global L2 norm of the gradients before each optimizer step, after undoing the loss scale of AMP.

    With gradient accumulation it acts only on the last micro-batch, when the sum is complete. The norm before clipping
    is left on its device as ``engine.state.gradient_norm``.

    Args:
        optimizer: whose gradients are clipped.
        max_norm: largest norm; 12 for ResEnc-L and 1 for Primus in most published cells. None measures only.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float | None) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip, if the optimizer steps in this iteration."""
        steps = getattr(engine, "accumulation_steps", 1)
        position = (engine.state.iteration - 1) % engine.state.epoch_length + 1
        if position % steps and position != engine.state.epoch_length:
            return
        if engine.amp and engine.scaler is not None:
            engine.scaler.unscale_(self.optimizer)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_norm is not None:
            torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1))
        engine.state.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm


class StopAtNonFiniteLoss:
    """Stop a run whose loss is NaN or infinite, with the step, the files of its batch and what to do.

    The loss is looked at on its device; a GPU is asked every ten iterations, before its weights are saved.

    Args:
        ckpt_dir: named in the message: what was saved there before is kept.
    """

    def __init__(self, ckpt_dir: str) -> None:
        self.ckpt_dir = ckpt_dir
        self.recent: deque[tuple[int, list[str]]] = deque(maxlen=_LOOK_EVERY)
        self._first: Tensor | None = None  # iteration of the first bad loss, 0 while there is none

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, before checkpoints."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._watch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._look)

    def _watch(self, engine: Engine) -> None:
        loss, iteration = engine.state.output["loss"].detach(), engine.state.iteration
        if self._first is None:
            self._first = torch.zeros((), dtype=torch.long, device=loss.device)
        bad = ~torch.isfinite(loss).all() & (self._first == 0)
        self._first = torch.where(bad, torch.full_like(self._first, iteration), self._first)
        self.recent.append((iteration, list(engine.state.batch.get("path", []))))
        if iteration % _LOOK_EVERY == 0:
            self._look(engine)

    def _look(self, engine: Engine) -> None:
        step = int(self._first) if self._first is not None else 0
        if step == 0:
            return
        files = next((paths for iteration, paths in self.recent if iteration == step), [])
        named = ", ".join(sorted(set(files))) or "unnamed files"
        raise SettingsError(
            f"the loss is not finite in step {step} (epoch {engine.state.epoch}), whose batch was of {named}; nothing "
            f"of this epoch is saved, what was saved in {self.ckpt_dir} before is kept. Look at these files; the same "
            "command with --amp false goes on from there, a lower --lr is another run and needs another --ckpt_dir"
        )


class Reproducible:
    """Tie every draw to (seed, epoch, iteration), so that a resumed run repeats what it would have done.

    Samples have streams of their own; this gives the sampler its epoch, and seeds the global generator, from which
    dropout and stochastic depth draw, anew in every iteration.

    Args:
        seed: of the run.
        loader: whose batch sampler has a ``set_epoch``; None if its data are fixed.
        bf16: AMP runs in bfloat16, whose range needs no loss scale: switch the scaler off.
    """

    def __init__(self, seed: int, *, loader: DataLoader[object] | None = None, bf16: bool = False) -> None:
        self.seed, self.loader, self.bf16 = seed, loader, bf16
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._set_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._set_seed)

    def _start(self, engine: Engine) -> None:
        if self.bf16 and getattr(engine, "amp", False):
            engine.scaler = torch.amp.GradScaler(enabled=False)

    def _set_epoch(self, engine: Engine) -> None:
        if self.loader is not None:
            self.loader.batch_sampler.set_epoch(engine.state.epoch)  # type: ignore[union-attr]

    def _set_seed(self, engine: Engine) -> None:
        torch.manual_seed(step_seed(self.seed, engine.state.iteration, self.rank))
