# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a pre-training run, written whole or not at all, and exact resumption."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..errors import SettingsError, WeightsError
from ..weights.files import read_checkpoint, sha256, write_checkpoint, write_json
from .progress import Progress

__all__ = ["PretrainingCheckpoint"]


class PretrainingCheckpoint:
    """Save state and encoder at the end of epochs; at the start, go on from the state that is there.

    Writes, each atomically:

    * ``pretraining_state.pt``: method, optimizer, loss scaler, epoch, history: everything to resume exactly;
    * ``pretrained_encoder.pt``: flat state dict of the backbone after the last epoch, what fine-tuning reads, with
      ``pretrained_encoder.json`` beside it: where it comes from;
    * ``pretrained_encoder_best.pt``: the same at the lowest validation loss.

    Args:
        method: module with a ``backbone``.
        optimizer: of the run.
        ckpt_dir: where to write.
        settings: what the run was; a resumed run must have the same.
        progress: whose history is kept.
        resume: go on from an existing state; otherwise an existing state stops the run.
        interval: epochs between saves; the last epoch is always saved.
        metric: record of the history that decides the best.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: Optimizer,
        *,
        ckpt_dir: str,
        settings: Mapping[str, Any],
        progress: Progress,
        resume: bool = True,
        interval: int = 1,
        metric: str = "val_loss",
    ) -> None:
        self.method, self.optimizer, self.progress = method, optimizer, progress
        self.backbone: nn.Module = method.get_submodule("backbone")
        self.folder = Path(ckpt_dir)
        self.settings = dict(settings)
        self.resume, self.interval, self.metric = resume, interval, metric
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        self.best = float("inf")
        self._state: dict[str, Any] | None = None

    @property
    def state_file(self) -> Path:
        """The file that a run resumes from."""
        return self.folder / "pretraining_state.pt"

    @property
    def encoder_file(self) -> Path:
        """The file that fine-tuning reads."""
        return self.folder / "pretrained_encoder.pt"

    def guard(self) -> None:
        """Before any work: read the state to resume, or make sure that nothing is overwritten.

        Raises:
            SettingsError: if there is a state but ``resume`` is off, the state is of another run, or an encoder from
                elsewhere lies where this run would write.
        """
        if self.state_file.exists():
            if not self.resume:
                raise SettingsError(
                    f"{self.state_file} holds a run already; continue it with --resume true, or give this run "
                    "another --ckpt_dir"
                )
            state = read_checkpoint(self.state_file)
            if not {"method", "optimizer", "epoch", "settings"} <= state.keys():
                raise WeightsError(f"{self.state_file} is not a pre-training state; give this run another --ckpt_dir")
            changed = [
                f"{name} {state['settings'].get(name)!r} -> {value!r}"
                for name, value in self.settings.items()
                if state["settings"].get(name) != value
            ]
            if changed:
                raise SettingsError(
                    f"{self.state_file} is of a run with other settings ({'; '.join(changed)}); "
                    "use those to continue it, or give this run another --ckpt_dir"
                )
            self._state = state
        elif self.encoder_file.exists():
            raise SettingsError(
                f"{self.encoder_file} exists and is not from a run that could be resumed here; "
                "move it away or give this run another --ckpt_dir"
            )

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`Progress`."""
        engine.add_event_handler(Events.STARTED, self._restore)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _restore(self, engine: Engine) -> None:
        state = self._state
        if state is None:
            return
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler") and getattr(engine, "scaler", None) is not None:
            engine.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        self.progress.history[:] = state["history"]
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        self._state = None
        if self.main:
            done = state["epoch"] >= engine.state.max_epochs
            what = "is complete; nothing to do" if done else "goes on"
            tqdm.write(
                f"{self.state_file}: {state['epoch']} of {engine.state.max_epochs} epochs are done, the run {what}"
            )

    def _save(self, engine: Engine) -> None:
        record = self.progress.history[-1]
        score = record.get(self.metric, record["train_loss"])
        improved, self.best = score < self.best, min(score, self.best)
        last = engine.state.epoch == engine.state.max_epochs
        if not self.main:
            return
        if improved:
            write_checkpoint(self.backbone.state_dict(), self.folder / "pretrained_encoder_best.pt")
        if engine.state.epoch % self.interval and not last:
            return
        scaler = getattr(engine, "scaler", None)
        write_checkpoint(
            {
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
                "epoch": engine.state.epoch,
                "best": self.best,
                "history": self.progress.history,
                "settings": self.settings,
            },
            self.state_file,
        )
        write_checkpoint(self.backbone.state_dict(), self.encoder_file)
        write_json(
            {
                "made_by": "pre-training with this collection",
                "epochs": engine.state.epoch,
                "sha256": sha256(self.encoder_file),
                "settings": self.settings,
                "last_epoch": record,
                "versions": {name: importlib.metadata.version(name) for name in ("monai", "torch")},
                "licence": "yours: trained on your data",
            },
            self.encoder_file.with_suffix(".json"),
        )
