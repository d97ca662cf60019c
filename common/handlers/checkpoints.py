# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints, written whole or not at all, and exact resumption."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import socket
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..data.storing.stored import StoredVolume
from ..errors import SettingsError, WeightsError, on_interruption
from ..files import is_as_recorded, read_record, sha256, write_record
from ..ownership import hold, release, set_apart
from ..paths import as_path
from ..recipes import changes
from ..sharding import joined, share
from ..terminal import warn
from ..weights.files import read_checkpoint, write_checkpoint
from ..weights.transfer import keep_previous
from ..weights.tuning import merged_state_dict
from .progress import ON_TRAINING, PROBED, PROBED_FILE, Progress

__all__ = ["FineTuningCheckpoint", "PretrainingCheckpoint", "check_resume", "hold_folders"]

_STATE, _ENCODER, _BEST = "pretraining_state.pt", "pretrained_encoder.pt", "pretrained_encoder_best.pt"
_TUNED = ("finetuning_state.pt", "model.pt", "model_final.pt")
ROUNDS = "rounds"
_KEYS = {"optimizer", "epoch", "settings", "history", "best"}


def hold_folders(ckpt_dir: str, output_dir: str, *, what: str) -> None:
    """Before any work: take the folders of a run, in the first of its processes; all of them stop if that fails.

    Args:
        ckpt_dir: where weights and state are written.
        output_dir: where history and pictures are written.
        what: the run is, for the sentence that another one gets.

    Raises:
        SettingsError: if another run writes to one of the folders.
    """
    told = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            hold(ckpt_dir, output_dir, what=what)
        except SettingsError as error:
            told = str(error)
    if dist.is_initialized():
        everyone = [told]
        dist.broadcast_object_list(everyone)
        told = everyone[0]
    if told:
        raise SettingsError(told)


def check_resume(
    ckpt_dir: str,
    *,
    settings: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    resume: bool | str = True,
    name: str = _STATE,
    epochs: int | None = None,
) -> None:
    """Before any work: make sure that a state in ``ckpt_dir`` is of this very run.

    With ``resume=False`` the checkpoint handlers keep aside what is there, and the run starts again.

    Args:
        ckpt_dir: of the run.
        settings: that its state was written with.
        recipe: what else changes the mathematics, from :func:`common.recipes.recipe`.
        resume: go on from the state.
        name: of the state's file.
        epochs: of the run, if a state of another length is kept aside as well; None if such a run goes on.

    Raises:
        SettingsError: if the state is of a run with other settings, or a pre-trained encoder from elsewhere lies where
            this run would write.
        WeightsError: if the state cannot be read.
    """
    folder = as_path(ckpt_dir)
    file = folder / name
    if not resume:
        return
    if file.exists():
        state = _read_state(file)
        if epochs in (None, state["epochs"]) and (changed := _changed(state, settings, recipe or {})):
            raise SettingsError(_two_ways(file, changed))
    elif name == _STATE and (folder / _ENCODER).exists():
        raise SettingsError(
            f"{folder / _ENCODER} exists and is not from a run that could be resumed here; give this run another "
            "--ckpt_dir, or add --resume false, which keeps that file aside"
        )


def _two_ways(file: Path, changed: str) -> str:
    return (
        f"{file} is of a run with other settings ({textwrap.shorten(changed, 500)}); continue it with those, or start "
        "again with --resume false, which keeps it aside"
    )


def _changed(state: Mapping[str, Any], settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return what differs between a saved run and this one, empty if nothing does."""
    more = {name: value for name, value in recipe.items() if name.split(".")[-1] not in settings}  # each is told once
    return "; ".join(filter(None, (changes(state["settings"], settings), changes(state.get("recipe", {}), more))))


def _read_state(file: Path) -> dict[str, Any]:
    state = read_checkpoint(file)
    if not state.keys() >= _KEYS or not {"method", "network"} & state.keys():
        raise WeightsError(f"{file} is not the state of a training; give this run another --ckpt_dir")
    return state


def _scale(engine: Engine) -> dict[str, Any]:
    scaler = getattr(engine, "scaler", None)
    return scaler.state_dict() if scaler is not None else {}


def _of_all(mine: Any) -> list[Any]:
    """Return what each process gives, in the order of their ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


class _Resumable:
    """What both checkpoints do: keep everything that a run needs to go on, and take it up again.

    A trainer that runs on, as in the rounds of a federation, holds its state itself: nothing is read from the file
    then, and weights that were put into the network between the rounds stay. With ``resume="rounds"`` a client that was
    stopped between rounds goes on as well: its state is taken up when the trainer is built, before those weights come.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        file: Path,
        part: str,
        settings: Mapping[str, Any],
        recipe: Mapping[str, Any] | None,
        progress: Progress,
        volumes: Mapping[str, Sequence[StoredVolume]],
        resume: bool | str,
    ) -> None:
        self.module, self.optimizer, self.progress = module, optimizer, progress
        self.file, self.part, self.settings, self.recipe = file, part, dict(settings), dict(recipe or {})
        names = {part: [Path(volume.path).name for volume in held] for part, held in volumes.items()}
        self.names = [name for held in names.values() for name in held]
        self.validated_on_training = bool({*names.get("training", [])} & {*names.get("validation", [])})
        if self.validated_on_training:
            progress.remarks[ON_TRAINING] = 1.0
        self.data = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        self.resume, self.rounds = bool(resume), resume == ROUNDS
        self.done = 0  # epochs of the state that was taken up
        self.scale: dict[str, Any] = {}  # of AMP's loss scaler, which MONAI builds anew for every run of a trainer

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`Progress`."""
        on_interruption(self._saved)
        if self.validated_on_training and self.main:
            warn("note: validation on training cases; its scores tell how well these are learnt, not how new ones are")
        if self.rounds:
            self._start(engine)
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _folders(self) -> tuple[str, str]:
        return str(self.file.parent), str(self.progress.history_file.parent)

    def _hold(self) -> None:
        hold_folders(*self._folders(), what=str(self.settings.get("bundle", "a training")))

    def _saved(self) -> str:
        """Return what is there if the run is stopped now."""
        done = self.progress.history[-1]["epoch"] if self.progress.history and self.file.exists() else 0
        if not done:
            return "No epoch was saved yet; the same command starts again, with what is prepared already"
        return f"{self.file} holds what the epochs led to; the same command goes on from there"

    def _begin(self, engine: Engine) -> None:
        if self.rounds and engine.state.epoch < self.done:  # a trainer that is at its end starts again from 0
            raise SettingsError(
                f"{self.file} has all {self.done} epochs already; rounds go on where a federation asks for more, and "
                "any other run needs --resume true"
            )
        if not self.rounds and engine.state.epoch == 0:
            self._start(engine)
        if self.scale and getattr(engine, "scaler", None) is not None:
            engine.scaler.load_state_dict(self.scale)

    def _start(self, engine: Engine) -> None:
        """Take the folders, and go on from the file if there is one."""
        raise NotImplementedError

    def _start_again(self) -> None:
        """Keep what an earlier run wrote for people to look at."""
        if self.main and (apart := set_apart(self.progress.history_file.parent)) is not None:
            tqdm.write(f"history and pictures of an earlier run are kept in {apart}")

    def _save(self, engine: Engine) -> None:
        """Write what an epoch led to."""
        raise NotImplementedError

    def _finish(self, engine: Engine) -> None:
        self.scale = _scale(engine)
        if not self.rounds:
            release(*self._folders())

    def _agree(self, engine: Engine, state: dict[str, Any] | None) -> None:
        """Make sure that all processes do one run: the same settings and volumes, and all go on from one epoch."""
        if not dist.is_initialized():
            return
        length = {"epochs": engine.state.max_epochs, "steps in an epoch": engine.state.epoch_length}
        mine = {
            "settings": self.settings | length,
            "recipe": self.recipe,
            "data": self.data,
            "host": socket.gethostname(),
        }
        everyone = _of_all(mine | {"epoch": state["epoch"] if state is not None else 0})
        first = everyone[0]
        for rank, other in enumerate(everyone):
            who = f"process {rank} on {other['host']}"
            if changed := _changed(first, other["settings"], other["recipe"]):
                short = textwrap.shorten(changed, 300)
                raise SettingsError(f"{who} has other settings than process 0 ({short}); start all with one command")
            if other["data"] != first["data"]:
                names = _of_all(self.names)
                odd = sorted({*names[0]} ^ {*names[rank]}) or ["their order"]
                raise SettingsError(
                    f"{who} has other volumes ({len(names[rank])}) than process 0 on {first['host']} "
                    f"({len(names[0])}); they differ in {odd[0]}. Every machine must see the same files, unchanged, "
                    "under the same --dataset_dir"
                )
        epochs = [one["epoch"] for one in everyone]
        if len(set(epochs)) > 1:
            raise SettingsError(
                f"the processes found states of different epochs ({epochs}); every machine must see one --ckpt_dir"
            )

    def _take_up(self, engine: Engine, state: Mapping[str, Any]) -> None:
        current = self.module.state_dict()
        self.module.load_state_dict({name: share(value, current.get(name)) for name, value in state[self.part].items()})
        if state["optimizer"]:  # an imported state has none
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            moments = {
                index: {name: share(value, parameters[index]) for name, value in own.items()}
                for index, own in state["optimizer"]["state"].items()
            }
            self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.scale, self.done = state.get("scaler", {}), state["epoch"]
        self.progress.history[:] = state["history"]
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length

    def _write_state(
        self, engine: Engine, weights: Mapping[str, Any], optimizer: Mapping[str, Any], **more: Any
    ) -> None:
        write_checkpoint(
            {
                self.part: weights,
                "optimizer": optimizer,
                "scaler": _scale(engine),
                "epoch": engine.state.epoch,
                "epochs": engine.state.max_epochs,
                "data": self.data,
                "history": self.progress.history,
                "settings": self.settings,
                "recipe": self.recipe,
                **more,
            },
            self.file,
        )

    def _check_loss(self, engine: Engine) -> None:
        loss, epoch = self.progress.history[-1]["train_loss"], engine.state.epoch
        if not math.isfinite(loss):  # of another process, perhaps: this one would have said so
            raise SettingsError(f"the training loss is {loss} in epoch {epoch}; nothing of it is saved")


def _backbone_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a method's state dict that is kept."""
    return {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}


class PretrainingCheckpoint(_Resumable):
    """Save state and encoder at the end of epochs; at the start, go on from the state that is there.

    Writes, each atomically:

    * ``pretraining_state.pt``: method, optimizer, loss scaler, epoch, history: everything to resume exactly;
    * ``pretrained_encoder.pt``: flat state dict of the backbone after the last epoch, what fine-tuning reads, with
      ``pretrained_encoder.json`` beside it: where it comes from;
    * ``pretrained_encoder_best.pt`` and its JSON: the same at the lowest validation loss;
    * ``pretrained_encoder_probe.pt`` and its JSON: the same at the best probe of labelled cases, if there are any.

    Args:
        method: module with a ``backbone``.
        optimizer: of the run.
        ckpt_dir: where to write; every process of a distributed run must see it.
        settings: what the run was; :func:`check_resume` compares them.
        recipe: what else changes its mathematics; compared, too.
        progress: whose history is kept.
        volumes: what is trained and validated on; a resumed run with other volumes says that it differs.
        interval: epochs between saves; the last epoch is always saved.
        metric: record of the history that decides the best.
        resume: False keeps what is there aside and starts again; ``rounds`` for a client of a federation.

    Raises:
        SettingsError: as :func:`check_resume`, which a federation does not call, with ``resume="rounds"``.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: Optimizer,
        *,
        ckpt_dir: str,
        settings: Mapping[str, Any],
        recipe: Mapping[str, Any] | None = None,
        progress: Progress,
        volumes: Mapping[str, Sequence[StoredVolume]],
        interval: int = 1,
        metric: str = "val_loss",
        resume: bool | str = True,
    ) -> None:
        self.folder = as_path(ckpt_dir)
        super().__init__(
            method,
            optimizer,
            file=self.folder / _STATE,
            part="method",
            settings=settings,
            recipe=recipe,
            progress=progress,
            volumes=volumes,
            resume=resume,
        )
        self.interval, self.metric = interval, metric
        self.best = float("inf")

    def _start(self, engine: Engine) -> None:
        self._hold()
        if self.rounds:
            check_resume(str(self.folder), settings=self.settings, recipe=self.recipe)
        state = _read_state(self.file) if self.file.exists() and self.resume else None
        self._agree(engine, state)
        if state is None:
            if self.main:
                for name in (_STATE, _ENCODER, _BEST, PROBED_FILE):
                    keep_previous(str(self.folder / name), move=True)
            self._start_again()
            return
        self._take_up(engine, state)
        self.best, done = state["best"], state["epoch"]
        if not self.main:
            return
        total = engine.state.max_epochs
        what = "is complete; nothing to do" if done >= total and not self.rounds else "goes on"
        tqdm.write(f"{self.file}: {done} {'' if self.rounds else f'of {total} '}epochs are done, the run {what}")
        if not state["optimizer"]:
            tqdm.write("it was imported: the optimizer starts afresh")
            return
        if (state["epochs"] != total and not self.rounds) or state["data"] != self.data:
            tqdm.write("its length or its volumes have changed, so it will not equal an uninterrupted run")
        if not self._encoder_is_whole(done):  # killed before it was written, removed, or damaged
            self._write_encoder(_ENCODER, done, state["method"])
            tqdm.write(f"{self.folder / _ENCODER} was missing or not whole: written again from {self.file.name}")

    def _encoder_is_whole(self, epochs: int) -> bool:
        """Return whether the encoder of so many epochs is there as it was written."""
        file = self.folder / _ENCODER
        return is_as_recorded(file) and read_record(file.with_suffix(".json")).get("epochs") == epochs

    def _save(self, engine: Engine) -> None:
        self._check_loss(engine)
        record, epoch = self.progress.history[-1], engine.state.epoch
        due = epoch % self.interval == 0 or epoch == engine.state.max_epochs
        weights = joined(self.module.state_dict(), keep=self.main)  # in all processes
        optimizer = joined(self.optimizer.state_dict(), keep=self.main) if due else {}
        if not self.main:
            return
        score = record.get(self.metric, record["train_loss"])
        if score < self.best:
            self.best = score
            self._write_encoder(_BEST, epoch, weights)
        *before, probed = [one[PROBED] for one in self.progress.history if PROBED in one] or [-math.inf]
        if PROBED in record and probed > max(before, default=-math.inf):
            self._write_encoder(PROBED_FILE, epoch, weights)
        if due:
            self._write_state(engine, weights, optimizer, best=self.best)
            self._write_encoder(_ENCODER, epoch, weights)

    def _write_encoder(self, name: str, epoch: int, weights: Mapping[str, Tensor]) -> None:
        file = self.folder / name
        write_checkpoint(_backbone_of(weights), file)
        write_record(
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


class FineTuningCheckpoint(_Resumable):
    """Write the model of the best smoothed validation and the last one; resume a training that was cut.

    Writes, each atomically:

    * ``model.pt``: flat state dict at the best moving average of the validation metric; without any validation, the
      last one. ``model.json`` beside it says what inference has to be set to;
    * ``model_final.pt`` and its JSON: after the last epoch, what the published benchmark evaluates;
    * ``finetuning_state.pt``: everything to resume exactly, until the run is complete.

    Earlier models are kept as ``model_previous.pt`` and ``model_final_previous.pt``. A state of a run on other data or
    of another length is set aside as ``finetuning_state_previous.pt``; one of a run with other settings is refused.

    Args:
        network: whose weights are written.
        optimizer: of the run.
        ckpt_dir: where to write; every process of a distributed run must see it.
        settings: what inference must have.
        recipe: what else a resumed run must have.
        progress: whose records are read and kept; attach this after it.
        volumes: what is trained and validated on.
        interval: epochs between saves of the state.
        metric: record that decides, higher is better.
        smoothing: share of the old average in the new one; 0.9 as in nnU-Net.
        resume: go on from an unfinished run of the same settings and data; False sets it aside. With ``rounds``, for a
            client of a federation, a run of any length is unfinished.
        names: of the three files: state, best, last.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        *,
        ckpt_dir: str,
        settings: Mapping[str, Any],
        recipe: Mapping[str, Any] | None = None,
        progress: Progress,
        volumes: Mapping[str, Sequence[StoredVolume]],
        interval: int = 1,
        metric: str = "val_dice",
        smoothing: float = 0.9,
        resume: bool | str = True,
        names: Sequence[str] = _TUNED,
    ) -> None:
        self.folder = as_path(ckpt_dir)
        state, self.best_model, self.last_model = names
        super().__init__(
            network,
            optimizer,
            file=self.folder / state,
            part="network",
            settings=settings,
            recipe=recipe,
            progress=progress,
            volumes=volumes,
            resume=resume,
        )
        self.interval, self.metric, self.smoothing = interval, metric, smoothing
        self.average: float | None = None
        self.best: float | None = None

    def _start(self, engine: Engine) -> None:
        self._hold()
        state = _read_state(self.file) if self.file.exists() else None
        self._agree(engine, state)
        if state is not None:
            why = "" if self.resume else "--resume false"
            why = why or ("another length" if state["epochs"] != engine.state.max_epochs and not self.rounds else "")
            if not why and (changed := _changed(state, self.settings, self.recipe)):
                raise SettingsError(_two_ways(self.file, changed))
            why = why or ("other data" if state["data"] != self.data else "")
            if not why:
                self._take_up(engine, state)
                self.average, self.best = state["average"], state["best"]
                if self.main:
                    total = "" if self.rounds else f"of {engine.state.max_epochs} "
                    tqdm.write(f"{self.file}: {state['epoch']} {total}epochs are done, the run goes on")
                return
            if dist.is_initialized():
                dist.barrier()  # until all have read it
            if self.main:
                tqdm.write(f"{self.file} is of another run ({why}), this one starts afresh")
                keep_previous(str(self.file), move=True)
        if self.main:
            keep_previous(str(self.folder / self.best_model))
            keep_previous(str(self.folder / self.last_model))
        self._start_again()

    def _save(self, engine: Engine) -> None:
        self._check_loss(engine)
        score = self.progress.history[-1].get(self.metric)
        better = False
        if score is not None and not math.isnan(score):
            old = score if self.average is None else self.average
            self.average = self.smoothing * old + (1 - self.smoothing) * score
            better = self.best is None or self.average > self.best
            self.best = self.average if better else self.best
        if not self.main:
            return
        if better:
            self._write_model(engine, self.best_model)
        last = engine.state.epoch == engine.state.max_epochs
        if self.rounds if last else engine.state.epoch % self.interval == 0:
            weights, optimizer = self.module.state_dict(), self.optimizer.state_dict()
            self._write_state(engine, weights, optimizer, best=self.best, average=self.average)

    def _finish(self, engine: Engine) -> None:
        super()._finish(engine)
        if not self.main:
            return
        self._write_model(engine, self.last_model)
        if self.best is None:
            self._write_model(engine, self.best_model)
        if not self.rounds:
            self.file.unlink(missing_ok=True)

    def _write_model(self, engine: Engine, name: str) -> None:
        file = self.folder / name
        write_checkpoint(merged_state_dict(self.module), file)
        about = {
            "epoch": engine.state.epoch,
            "epochs": engine.state.max_epochs,
            self.metric: self.progress.history[-1].get(self.metric),
            f"{self.metric}_average": self.average,
            ON_TRAINING: self.validated_on_training,
            "sha256": sha256(file),
            "settings": self.settings,
            "versions": {name: importlib.metadata.version(name) for name in ("monai", "torch")},
        }
        write_record(about, file.with_suffix(".json"))
