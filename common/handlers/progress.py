# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Progress of a training run: a bar with the time left, a line and a record per epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..files import write_json
from ..paths import as_path
from ..terminal import duration, progress_bar

__all__ = ["CaseBar", "ListedOutput", "Progress", "probe_in_words", "shared"]

_Handler = TypeVar("_Handler")
_SHOW_EVERY = 10  # iterations
_WORTH_TELLING = 60  # seconds: of a shorter run, the expected time is not told before the first epoch's line
_LINE_EVERY = 600  # seconds, where there is no terminal, beside the lines of epochs
_MOST_CLASSES = 4  # in a line
_SCORES = {"val_ap": "AP {:.3f}", "val_auroc": "AUROC {:.3f}", "val_balanced_accuracy": "balanced accuracy {:.3f}"}
_SCORES |= {"val_mae": "MAE {:.4g}", "val_r2": "R2 {:.3f}"}  # of a number
ON_TRAINING = "validation_on_training_cases"  # a remark: whoever reads such scores is to know it
PROBED = "probe_linear"  # the score of features on labelled cases that decides which are best
PROBED_FILE = "pretrained_encoder_probe.pt"  # in which these are kept
AT_START = "start_"  # before the name of a score of the weights that a run began with, in the record of its first epoch


def shared(handler: _Handler) -> _Handler:
    """Return ``handler``: a config's way to list one that other entries need too.

    MONAI's property check and MONAI Label read every entry of ``train#handlers`` as a dictionary, so a plain reference
    may not stand there.
    """
    return handler


class ListedOutput:
    """Leave the output of a step as a list, as engines of MONAI do that take batches apart.

    Handlers that MONAI adds to a config, such as those of ``--tracking mlflow``, look for the loss in its first entry.
    This is the last of the handlers that a config names.
    """

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after all that read its output."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Put the output into a list."""
        engine.state.output = [engine.state.output]


class CaseBar:
    """Show how many cases an evaluator is through with: a bar on a terminal, a line now and then elsewhere.

    Args:
        name: what the bar is called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator whose batches are cases."""
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _open(self, engine: Engine) -> None:
        self._bar = progress_bar(total=engine.state.epoch_length, desc=self.name, unit="case")

    def _update(self, _: Engine) -> None:
        if self._bar is not None:
            self._bar.update()

    def _close(self, _: Engine) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._close(engine)
        raise error


class Progress:
    """Show a bar over the whole run, print one line per epoch, keep and save the history.

    The loss is summed on the device and read every ten iterations, so that a GPU does not wait for the screen.

    Args:
        name: what the bar is called.
        optimizer: whose rate is recorded.
        history_file: JSON with a record per epoch, for curves.
        evaluator: engine whose metrics are recorded after each of its runs.
        loss: whose ``terms``, if it has any, are recorded too: the parts of its last value, by name.
        samples_per_step: of one iteration over all processes, for the throughput.
        verbose: print every number of an epoch, by its name in the history.

    Attributes:
        history: one record per finished epoch: epoch, train_loss and its terms, gradient_norm, lr, seconds,
            samples_per_second and the evaluator's metrics; times are of training alone, without validation.
        remarks: added to every record, as of validation on training cases.
        measures: called with the engine and the record of an epoch that ends, for what is to be added to it.
        summary: what such measures have come to so far, in a sentence.
        when_it_fails: called with the engine and the error before that ends the run.
    """

    def __init__(
        self,
        name: str,
        optimizer: Optimizer,
        *,
        history_file: str | Path,
        evaluator: Engine | None = None,
        loss: nn.Module | None = None,
        samples_per_step: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.name, self.optimizer, self.history_file = name, optimizer, as_path(history_file)
        self.evaluator, self.loss, self.samples_per_step = evaluator, loss, samples_per_step
        self.verbose = verbose
        self.history: list[dict[str, float]] = []
        self.when_it_fails: list[Callable[[Engine, BaseException], None]] = []
        self.remarks: dict[str, float] = {}
        self.measures: list[Callable[[Engine, Mapping[str, float]], Mapping[str, float]]] = []
        self.summary = ""
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._began = self._ended = 0.0
        self._first: tuple[float, int] | None = None  # when this process began to train, and with which step
        self._told = False
        self._bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        """Register with a trainer; attach it after validation and before checkpoints."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def seconds_left(self, engine: Engine) -> float | None:
        """Return how long the run will take from here, validation included, as it went so far; None before a step."""
        if self._first is None or engine.state.iteration <= self._first[1]:
            return None
        began, step = self._first
        total = engine.state.max_epochs * engine.state.epoch_length
        return (time.monotonic() - began) / (engine.state.iteration - step) * (total - engine.state.iteration)

    def running_loss(self) -> float | None:
        """Return the mean loss of the epoch so far, or of the last one."""
        if "train_loss" in self._sums:
            return float(self._sums["train_loss"]) / self._counts["train_loss"]
        return self.history[-1]["train_loss"] if self.history else None

    def _start_epoch(self, engine: Engine) -> None:
        if self._first is None:
            self._first = time.monotonic(), engine.state.iteration
        if self._bar is None and self.main:
            length = engine.state.epoch_length
            self._bar = progress_bar(
                total=engine.state.max_epochs * length,
                initial=(engine.state.epoch - 1) * length,
                desc=self.name,
                unit="step",
                mininterval=0.5,
                line_every=_LINE_EVERY,
                smoothing=0.05,
            )
        self._sums, self._counts = {}, {}
        self._began = self._ended = time.monotonic()

    def _step(self, engine: Engine) -> None:
        self._ended = time.monotonic()
        self._add("train_loss", engine.state.output["loss"])
        for name, term in getattr(self.loss, "terms", {}).items():
            self._add(f"train_{name}", term)
        norm = getattr(engine.state, "gradient_norm", None)
        if norm is not None:  # of an iteration in which the optimizer stepped
            self._add("gradient_norm", norm)
            engine.state.gradient_norm = None
        if self._bar is not None:
            self._bar.update()
            if engine.state.iteration % _SHOW_EVERY == 0:
                self._bar.set_postfix_str(f"epoch {engine.state.epoch}, loss {self.running_loss():.4g}", refresh=False)
                self._expect(engine)  # where the loss was read, the device is done with these steps

    def _expect(self, engine: Engine) -> None:
        """Say once, early in the first epoch of this process, how long the run will take."""
        assert self._first is not None
        steps = engine.state.iteration - self._first[1]
        if self._told or steps >= engine.state.epoch_length:  # the line of an epoch says it too
            return
        self._told = True
        if (left := self.seconds_left(engine)) is not None and left >= _WORTH_TELLING:
            told = f"expected time about {duration(left)} more, as the first {steps} steps went"
            tqdm.write(f"{self.name}: {told}; validation comes on top")

    def _add(self, name: str, value: Tensor) -> None:
        """Add to a sum on the device; a term that is missing in some steps is averaged over the others."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def _end_epoch(self, engine: Engine) -> None:
        fresh = self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch
        metrics: Mapping[str, float] = self.evaluator.state.metrics if fresh and self.evaluator else {}
        means = self._means()
        seconds = max(self._ended - self._began, 1e-6)
        record = {
            "epoch": engine.state.epoch,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
        }
        if self.samples_per_step is not None:
            record["samples_per_second"] = round(engine.state.epoch_length * self.samples_per_step / seconds, 3)
        names = {"train_loss": "train_loss_epoch"}  # TensorBoard and MLflow have that of each step under the first
        engine.state.metrics.update({names.get(name, name): value for name, value in record.items() if name != "epoch"})
        record |= {**{name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}}
        for measure in self.measures:
            record |= measure(engine, record)
        self.history.append(record | self.remarks)
        if self.main:
            write_json(self.history, self.history_file)
            shown = [f"{k} {v:.4g}" for k, v in record.items() if k != "epoch"] if self.verbose else in_words(record)
            if (left := self.seconds_left(engine)) is not None and not self.verbose and left > 0:
                shown.append(f"{duration(left)} left")
            tqdm.write(f"{self.name}: epoch {engine.state.epoch}/{engine.state.max_epochs}, {', '.join(shown)}")

    def _means(self) -> dict[str, float]:
        """Return the epoch's means over all steps and, in a distributed run, all processes."""
        if not self._sums:
            return {"train_loss": 0.0}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(self._sums, means.tolist(), strict=True))

    def _close(self, _: Engine) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._close(engine)
        for call in self.when_it_fails:
            call(engine, error)
        raise error


def in_words(record: Mapping[str, float]) -> list[str]:
    """Return what somebody wants to know of an epoch: loss, validation and time, the Dice of classes in brackets.

    Example:
        >>> in_words({"train_loss": 0.25, "lr": 0.1, "seconds": 80.0, "val_dice": 0.5, "val_dice_core": 0.5})
        ['loss 0.25', 'validation Dice 0.500 (core 0.500)', '1 min 20 s']
    """
    told = [f"loss {record['train_loss']:.4g}"]
    if "val_loss" in record:
        told.append(f"validation loss {record['val_loss']:.4g}")
    if "val_dice" in record:
        classes = [(k.removeprefix("val_dice_"), v) for k, v in record.items() if k.startswith("val_dice_")]
        more = [f"{len(classes) - _MOST_CLASSES} more"] if len(classes) > _MOST_CLASSES else []
        inside = ", ".join([*(f"{name} {value:.3f}" for name, value in classes[:_MOST_CLASSES]), *more])
        told.append(f"validation Dice {record['val_dice']:.3f}" + (f" ({inside})" if inside else ""))
    told += [f"validation {_SCORES[name].format(value)}" for name, value in record.items() if name in _SCORES]
    return [*told, *probe_in_words(record), duration(record["seconds"])]


def probe_in_words(record: Mapping[str, float]) -> list[str]:
    """Return what the features of an epoch told, if they were looked at.

    Example:
        >>> probe_in_words({"probe_rank": 12.34, "probe_linear": 0.7512, "probe_knn": 0.7})
        ['linear probe 0.751', 'rank of features 12.3']
    """
    shown = {PROBED: ("linear probe", ".3f"), "probe_rank": ("rank of features", ".1f")}
    return [f"{word} {record[name]:{form}}" for name, (word, form) in shown.items() if name in record]
