# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints, written whole or not at all, and exact resumption of pre-training."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..data.store import StoredVolume
from ..errors import SettingsError, WeightsError
from ..weights.files import read_checkpoint, sha256, write_checkpoint, write_json
from .progress import Progress

__all__ = ["BestModel", "PretrainingCheckpoint", "check_resume"]

_STATE, _ENCODER, _BEST = "pretraining_state.pt", "pretrained_encoder.pt", "pretrained_encoder_best.pt"


def check_resume(ckpt_dir: str, *, settings: Mapping[str, Any], resume: bool = True) -> None:
    """Before any work: make sure that the state in ``ckpt_dir`` can be resumed, or that nothing there is overwritten.

    Raises:
        SettingsError: if there is a state but ``resume`` is off, the state is of a run with other settings, or an
            encoder from elsewhere lies where this run would write.
        WeightsError: if the state cannot be read.
    """
    folder = Path(ckpt_dir)
    file = folder / _STATE
    if file.exists():
        if not resume:
            raise SettingsError(
                f"{file} holds a run already; continue it with --resume true, or give this run another --ckpt_dir"
            )
        state = _read_state(file)
        changed = [
            f"{name} {state['settings'].get(name)!r} -> {value!r}"
            for name, value in settings.items()
            if state["settings"].get(name, value) != value
        ]
        if changed:
            raise SettingsError(
                f"{file} is of a run with other settings ({'; '.join(changed)}); "
                "use those to continue it, or give this run another --ckpt_dir"
            )
    elif (folder / _ENCODER).exists():
        raise SettingsError(
            f"{folder / _ENCODER} exists and is not from a run that could be resumed here; "
            "move it away or give this run another --ckpt_dir"
        )


def _read_state(file: Path) -> dict[str, Any]:
    state = read_checkpoint(file)
    if not {"method", "optimizer", "epoch", "settings", "history", "best"} <= state.keys():
        raise WeightsError(f"{file} is not a pre-training state; give this run another --ckpt_dir")
    return state


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
        ckpt_dir: where to write; every process of a distributed run must see it.
        settings: what the run was; :func:`check_resume` compares them.
        progress: whose history is kept.
        volumes: what is trained and validated on; a resumed run with other volumes says that it differs.
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
        volumes: Mapping[str, Sequence[StoredVolume]],
        interval: int = 1,
        metric: str = "val_loss",
    ) -> None:
        self.method, self.optimizer, self.progress = method, optimizer, progress
        self.backbone: nn.Module = method.get_submodule("backbone")
        self.folder = Path(ckpt_dir)
        self.settings, self.interval, self.metric = dict(settings), interval, metric
        names = [Path(volume.path).name for part in volumes.values() for volume in part]
        self.data = hashlib.sha256("\n".join(names).encode()).hexdigest()
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        self.best = float("inf")

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`Progress`."""
        engine.add_event_handler(Events.STARTED, self._restore)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _restore(self, engine: Engine) -> None:
        file = self.folder / _STATE
        state = _read_state(file) if file.exists() else None
        done = state["epoch"] if state is not None else 0
        if dist.is_initialized():
            epochs: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(epochs, done)
            if len(set(epochs)) > 1:
                raise SettingsError(
                    f"the processes found states of different epochs ({epochs}); every machine must see one --ckpt_dir"
                )
        if state is None:
            return
        self.method.load_state_dict(state["method"])
        if state["optimizer"]:  # an imported state has none
            self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler") and getattr(engine, "scaler", None) is not None:
            engine.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        self.progress.history[:] = state["history"]
        engine.state.epoch = done
        engine.state.iteration = done * engine.state.epoch_length
        if not self.main:
            return
        total = engine.state.max_epochs
        what = "is complete; nothing to do" if done >= total else "goes on"
        tqdm.write(f"{file}: {done} of {total} epochs are done, the run {what}")
        if not state["optimizer"]:
            tqdm.write("it was imported: the optimizer starts afresh")
            return
        if state["epochs"] != total or state["data"] != self.data:
            tqdm.write("its length or its volumes have changed, so it will not equal an uninterrupted run")
        sidecar = self.folder / Path(_ENCODER).with_suffix(".json")
        if not sidecar.is_file() or json.loads(sidecar.read_text("utf-8")).get("epochs") != done:
            self._write_encoder(done)  # the run was killed after the state, before the encoder

    def _save(self, engine: Engine) -> None:
        record, epoch = self.progress.history[-1], engine.state.epoch
        if not math.isfinite(record["train_loss"]):  # of another process, perhaps: this one would have said so
            raise SettingsError(f"the training loss is {record['train_loss']} in epoch {epoch}; nothing of it is saved")
        if not self.main:
            return
        score = record.get(self.metric, record["train_loss"])
        if score < self.best:
            self.best = score
            write_checkpoint(self.backbone.state_dict(), self.folder / _BEST)
        if epoch % self.interval and epoch != engine.state.max_epochs:
            return
        scaler = getattr(engine, "scaler", None)
        write_checkpoint(
            {
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
                "epoch": epoch,
                "epochs": engine.state.max_epochs,
                "data": self.data,
                "best": self.best,
                "history": self.progress.history,
                "settings": self.settings,
            },
            self.folder / _STATE,
        )
        self._write_encoder(epoch)

    def _write_encoder(self, epoch: int) -> None:
        file = self.folder / _ENCODER
        write_checkpoint(self.backbone.state_dict(), file)
        write_json(
            {
                "made_by": "pre-training with this collection",
                "epochs": epoch,
                "sha256": sha256(file),
                "settings": self.settings,
                "last_epoch": self.progress.history[-1],
                "versions": {name: importlib.metadata.version(name) for name in ("monai", "torch")},
                "licence": "yours: trained on your data",
            },
            file.with_suffix(".json"),
        )


class BestModel:
    """Write the model of the best validation, atomically; without any validation, the last one.

    Beside ``model.pt``, a flat state dict, ``model.json`` says what inference has to be set to.

    Args:
        network: whose weights are written.
        path: file to write.
        progress: whose records are read; attach this after it.
        settings: labels, spacing and network settings of the run.
        metric: record that decides, higher is better.
    """

    def __init__(
        self,
        network: nn.Module,
        path: str,
        *,
        progress: Progress,
        settings: Mapping[str, Any],
        metric: str = "val_dice",
    ) -> None:
        self.network, self.path, self.progress = network, Path(path), progress
        self.settings, self.metric = dict(settings), metric
        self.best: float | None = None
        self.written = False

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`Progress`."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._compare)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _compare(self, engine: Engine) -> None:
        score = self.progress.history[-1].get(self.metric)
        if score is not None and not math.isnan(score) and (self.best is None or score > self.best):
            self.best = score
            self._write(engine)

    def _finish(self, engine: Engine) -> None:
        if not self.written:
            self._write(engine)

    def _write(self, engine: Engine) -> None:
        write_checkpoint(self.network.state_dict(), self.path)
        about = {"epoch": engine.state.epoch, self.metric: self.best, "settings": self.settings}
        write_json(about, self.path.with_suffix(".json"))
        self.written = True
