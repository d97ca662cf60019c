# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Watch whether the features of a pre-training get better, at an interval and within a share of its time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ...data import StoredVolume
from ...errors import DataError
from ...files import write_json
from ...handlers import Progress
from ...handlers.progress import AT_START, probe_in_words
from ...terminal import duration, warn
from .crops import crop_sides, undisturbed
from .source import ProbeSource
from .verdicts import decline, outcome
from .views import ViewPairs

__all__ = ["FeatureWatch"]

_SHARE = 0.05  # of a run's time that all probes together may take
_FILE = "probes.json"
_TAG = "probe/"  # in TensorBoard
_FEW = 8  # names in a line


class FeatureWatch:
    """Score frozen features of what is kept, ``method.backbone``, while it learns.

    Without labels: the effective rank of the features of a few volumes, and how much more two views of one agree than
    views of two. With labelled cases: kNN and a linear probe on unseen ones. The scores join the records of
    :class:`Progress` as ``probe_rank``, ``probe_agreement``, ``probe_knn``, ``probe_linear``; those of the weights that
    the run began with are in the record of the first epoch, with ``start_`` before their names. TensorBoard has them
    below ``probe/``.

    Nothing of the run changes: what is scored is read when this is made, modes and generators are left as they were. Of
    several processes the first does it, and the others wait for its next step. After the one of the start, a probe is
    taken only if all so far and this one stay within 5 % of the time, so that the interval grows where it has to.

    Args:
        method: with a ``backbone``, whose features are scored.
        progress: whose records take the scores.
        volumes: to validate on and to learn from.
        patch_size: of the run, whose crops these are, up to a size.
        interval: epochs between probes, the last epoch besides; 0 for none.
        source: of labelled cases.
        seed: of everything random.

    Raises:
        DataError: if the labelled cases cannot be used.
    """

    def __init__(
        self,
        method: nn.Module,
        *,
        progress: Progress,
        volumes: Mapping[str, Sequence[StoredVolume]],
        patch_size: int | Sequence[int],
        interval: int,
        source: ProbeSource | None = None,
        seed: int = 0,
    ) -> None:
        self.backbone = method.get_submodule("backbone")
        self.progress, self.interval = progress, interval
        strides: Sequence[int] = self.backbone.feature_strides  # type: ignore[assignment]
        sides = crop_sides(patch_size, strides[-1])
        self.labelled = None
        if interval and source is not None and source.data:
            from .labelled import labelled_task  # not at the top: a second of imports

            self.labelled = labelled_task(source, sides)  # all processes prepare them
        main = not dist.is_initialized() or dist.get_rank() == 0
        self.pairs = ViewPairs(volumes, sides=sides, seed=seed) if interval and main else None  # None: scores nothing
        self.spent = 0.0  # seconds of all looks since the trainer started
        self._cost = self._began = 0.0
        self._epochs = 0  # since then
        self._every = interval
        self._start: dict[str, float] = {}
        self._declines = False

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, before :class:`Progress`, which times its epochs."""
        if not self.interval:
            return
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(Events.EPOCH_STARTED(once=1), self._before)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        self.progress.measures.append(self._after)

    def _begin(self, _: Engine) -> None:
        self._began, self.spent, self._epochs = time.monotonic(), 0.0, 0
        if self.pairs and any(isinstance(parameter, DTensor) for parameter in self.backbone.parameters()):
            tqdm.write(
                "note: features of sharded weights are not looked at while they are learned; with multi_gpu they are"
            )
            self.pairs = None

    def _forget(self, engine: Engine) -> None:
        """Take the last scores out of what TensorBoard shows for every epoch."""
        for name in [name for name in engine.state.metrics if name.startswith(_TAG)]:
            del engine.state.metrics[name]

    def _before(self, _: Engine) -> None:
        """Score the weights that the run begins with."""
        if self.pairs is None:
            return
        if self.labelled is not None:
            parts = self.labelled.parts
            named = "; ".join(f"{len(names)} {part} case(s): {_few(names)}" for part, names in parts.items())
            tqdm.write(f"probe of {self.labelled.asked}, {named} ({_FILE} has all)")
            for note in self.labelled.notes:
                tqdm.write(f"note: {note}")
            about = {"asked": self.labelled.asked, "score": self.labelled.score, "chance": self.labelled.chance}
            write_json(about | parts, self.progress.history_file.parent / _FILE)
        self._start = self._measured()
        if self._start:
            tqdm.write(f"features before the first step: {', '.join(probe_in_words(self._start))}")

    def _after(self, engine: Engine, record: Mapping[str, float]) -> dict[str, float]:
        """Return the scores of an epoch, if it is time for them."""
        epoch = engine.state.epoch
        self._epochs += 1
        found = {f"{AT_START}{name}": value for name, value in self._start.items()} if epoch == 1 else {}
        due = epoch % self.interval == 0 or epoch == engine.state.max_epochs
        if self.pairs is None or not due or not self._affordable():
            return found
        scores = self._measured()
        engine.state.metrics |= {f"{_TAG}{name.removeprefix('probe_')}": value for name, value in scores.items()}
        found |= scores
        history = [*self.progress.history, {**record, **found}]
        told = decline(history, labelled=self.labelled is not None)
        if told and not self._declines:
            warn(told)
        self._declines = told is not None
        self.progress.summary = self._outcome(history)
        return found

    def _affordable(self) -> bool:
        """Return whether one more probe stays within the share of the time; if not, say once how often they come."""
        passed = time.monotonic() - self._began
        if self.spent + self._cost <= _SHARE * (passed + self._cost):
            return True
        epoch = (passed - self.spent) / self._epochs  # seconds without probes
        every = math.ceil(self._cost * (1 - _SHARE) / (_SHARE * max(epoch, 1e-9)))
        if every > self._every:
            tqdm.write(
                f"note: a look at the features takes {duration(self._cost)}, an epoch {duration(epoch)}; to stay below "
                f"{_SHARE:.0%} of the time it comes about every {every} epochs"
            )
            self._every = every
        return False

    def _measured(self) -> dict[str, float]:
        """Return all scores of the weights as they are, none of what is no number."""
        assert self.pairs is not None
        began = time.monotonic()
        found: dict[str, float] = {}
        try:
            with undisturbed(self.backbone):
                found |= self.pairs.scores(self.backbone)
                if self.labelled is not None:
                    found |= self.labelled.scores(self.backbone)
        except (DataError, torch.OutOfMemoryError) as error:  # nobody loses a training over it
            warn(f"warning: the features cannot be scored: {error}")
        self._cost = time.monotonic() - began
        self.spent += self._cost
        return {f"probe_{name}": value for name, value in found.items() if math.isfinite(value)}

    def _outcome(self, history: Sequence[Mapping[str, float]]) -> str:
        if self.labelled is None:
            return outcome(history)
        return outcome(history, asked=self.labelled.asked, score=self.labelled.score, chance=self.labelled.chance)

    def _finish(self, _: Engine) -> None:
        """Say what it came to."""
        self.progress.summary = self._outcome(self.progress.history)
        if self.pairs is not None and self.progress.summary:
            share = self.spent / max(time.monotonic() - self._began, 1e-9)
            took = f" (probes took {share:.1%} of the time)" if self._epochs else ""
            tqdm.write(f"{self.progress.summary}{took}")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")
