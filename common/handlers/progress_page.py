# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A page that grows while a training runs: where it is, its curves, its latest picture, what it warned of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch.distributed as dist
from ignite.engine import Engine, Events
from tqdm import tqdm

from ..document import Chart, Heading, Part, Picture, Table, Text, write_html
from ..errors import sentence
from ..paths import as_path
from ..terminal import duration, warned
from ..weights.cells import paper_of
from .progress import AT_START, Progress

__all__ = ["ProgressPage"]

_LEAST_SECONDS = 5  # between two writings
_SHARE = 0.003  # of a run's time that writing may take
_REFRESH_SECONDS = 20
_SILENT_SECONDS = 15 * 60  # without a word, after which a page doubts that its run lives
_LAST_EPOCHS = 10
_PARTS = {  # of a history, by how its names begin: title, and what is left of the name
    "loss": ("Loss", ("train_loss", "val_loss")),
    "probe": ("Frozen features, on unseen labelled cases", ("probe_linear", "probe_knn")),
    "dimensions": ("Effective rank of frozen features", ("probe_rank",)),
    "agreement": ("Two views of one volume, more alike than of two by", ("probe_agreement",)),
    "score": ("Dice of each class in validation", ("val_dice",)),
    "other": ("Scores in validation", ("val_",)),
    "embeddings": (
        "Likeness of embeddings, 1 is collapsed",
        ("embedding_similarity", "embedding_collapse"),
    ),
    "rate": ("Learning rate", ("lr",)),
}
_WHOLE_NAMES = {"loss", "embeddings", "probe", "dimensions", "agreement", "rate"}  # whose names are no beginnings


class ProgressPage:
    """Keep ``progress.html`` up to date, which reloads itself in a browser: one file, also over a mounted folder.

    It is written anew when the run starts, after epochs, now and then within long ones, and at the end; never so often
    that it took more than a few thousandths of the run's time.

    Args:
        progress: whose history it shows; attach the page after it.
        path: of the page.
        pictures: folder whose newest PNG it shows.
        bundle: that trains.
    """

    def __init__(self, progress: Progress, *, path: str | Path, pictures: str | Path, bundle: str = "") -> None:
        self.progress, self.path, self.pictures, self.bundle = progress, as_path(path), as_path(pictures), bundle
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        self._cost = 0.0  # seconds of the last writing
        self._written = 0.0
        self._began = time.monotonic()
        self._told = False

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`Progress`."""
        if not self.main:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._now_and_then)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, lambda engine: self.write(engine, "finished"))
        self.progress.when_it_fails.append(self._fail)

    def _start(self, engine: Engine) -> None:
        self._began = time.monotonic()
        self.write(engine, "running")

    def _now_and_then(self, engine: Engine) -> None:
        if time.monotonic() - self._written > max(_REFRESH_SECONDS, self._cost / _SHARE):
            self.write(engine, "running")

    def _epoch(self, engine: Engine) -> None:
        if time.monotonic() - self._written > max(_LEAST_SECONDS, self._cost / _SHARE):
            self.write(engine, "running")

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self.write(engine, f"stopped: {sentence(error) or f'{type(error).__name__}: {error}'}")

    def write(self, engine: Engine, what: str) -> None:
        """Write the page as things are.

        Args:
            engine: trainer.
            what: ``running``, ``finished``, or why it stopped.
        """
        began = time.monotonic()
        paper = paper_of(self.bundle) if self.progress.name == "pre-training" else None
        parts = [
            Text(self._lead(engine, what), "lead"),
            *_warnings(),
            *_charts(self.progress.history, paper.error if paper else ""),
            *([Text(self.progress.summary, "note")] if self.progress.summary else []),
        ]
        parts += [*_latest(self.pictures), *_table(self.progress.history)]
        now = datetime.now().astimezone()
        parts.append(Text(f"As of {now:%Y-%m-%d %H:%M:%S %Z}. The page reloads itself while the run goes on.", "note"))
        head = _reloading(now.timestamp()) if what == "running" else ""
        try:
            write_html(self._title(engine, what), parts, self.path, head=head)
        except OSError as error:
            if not self._told:  # nobody loses a training over its page
                tqdm.write(f"note: {self.path} cannot be written ({error}); the run goes on without it")
            self._told = True
        self._written = time.monotonic()
        self._cost = self._written - began

    def _title(self, engine: Engine, what: str) -> str:
        state = engine.state
        share = state.iteration / max(state.max_epochs * state.epoch_length, 1)
        name = f"{self.bundle}, {self.progress.name}" if self.bundle else self.progress.name
        return f"{name}: {f'{share:.0%}' if what == 'running' else what.partition(':')[0]}"

    def _lead(self, engine: Engine, what: str) -> str:
        """Say where the run is."""
        state, history = engine.state, self.progress.history
        place = f"epoch {len(history)} of {state.max_epochs} is done"
        if what != "running":
            took = duration(time.monotonic() - self._began)
            return f"{what[0].upper()}{what[1:]}. {place[0].upper()}{place[1:]}; this run took {took}."
        told = [place]
        inside = state.iteration - len(history) * state.epoch_length
        if 0 < inside < state.epoch_length:
            told.append(f"step {inside} of {state.epoch_length} in the next")
        if (left := self.progress.seconds_left(engine)) is not None:
            told.append(f"about {duration(left)} left")
        if history and "samples_per_second" in history[-1]:
            told.append(f"{history[-1]['samples_per_second']:.3g} samples a second")
        if (loss := self.progress.running_loss()) is not None:
            told.append(f"loss {loss:.4g}")
        return f"Running: {', '.join(told)}."


def _warnings() -> list[Part]:
    return [Heading("Warnings"), *(Text(text, "note") for text in warned)] if warned else []


def _charts(history: Sequence[dict[str, float]], error: str) -> list[Part]:
    """Return the curves of a history, those that belong together in one chart."""
    names = list(dict.fromkeys(name for record in history for name in record))
    parts: list[Part] = []
    taken: set[str] = set()
    for key, (title, begins) in _PARTS.items():
        own = [name for name in names if name.startswith(begins) and name not in taken]
        own = [name for name in own if name in begins] if key in _WHOLE_NAMES else own
        taken |= set(own)
        lines = {_word(name, key): _points(history, name) for name in own}
        if lines:
            title = f"{title}: {error}" if key == "loss" and error else title
            parts.append(Chart(title, lines))
    return [Heading("Curves"), *parts] if parts else []


def _points(history: Sequence[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """Return a curve; one that begins with the weights before the first epoch begins at 0."""
    before = history[0].get(f"{AT_START}{name}")
    return [*([] if before is None else [(0, before)]), *((r["epoch"], r[name]) for r in history if name in r)]


def _word(name: str, key: str) -> str:
    if key == "score":
        return name.removeprefix("val_dice").lstrip("_") or "mean"
    words = {"train_loss": "training", "val_loss": "validation", "embedding_similarity": "mean cosine"}
    words["embedding_collapse"] = "share of directions that are not used"
    words |= {"probe_linear": "linear probe", "probe_knn": "nearest neighbours", "probe_rank": "dimensions"}
    words["probe_agreement"] = "difference of mean cosines"
    return words.get(name, name.removeprefix("val_").replace("_", " "))


def _latest(folder: Path) -> list[Part]:
    """Return the newest picture of a folder."""
    found = max(folder.glob("*.png"), key=lambda path: path.stat().st_mtime, default=None)
    if found is None:
        return []
    title = f"Latest picture, {found.stem.replace('_', ' ')}"
    return [Heading(title, short="Picture"), Picture(found.name, found.read_bytes(), title, large=False)]


def _table(history: Sequence[dict[str, float]]) -> list[Part]:
    """Return the last epochs in numbers."""
    last = list(history[-_LAST_EPOCHS:])[::-1]
    if not last:
        return []
    names = [name for name in dict.fromkeys(name for record in last for name in record) if name != "epoch"]
    rows = [[str(r["epoch"]), *(f"{r[name]:.4g}" if name in r else "" for name in names)] for r in last]
    return [Heading("Last epochs", short="Numbers"), Table(["epoch", *(n.replace("_", " ") for n in names)], rows)]


def _reloading(now: float) -> str:
    """Return elements of a head that reload a page and say if its run has been silent for long."""
    silent = (
        f"if (Date.now() / 1000 > {now:.0f} + {_SILENT_SECONDS}) {{ const told = document.createElement('p'); "
        "told.className = 'lead'; told.textContent = 'No news for a long time: the run may have ended.'; "
        "document.querySelector('main').prepend(told); }"
    )
    return (
        f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}">'
        f"<script>addEventListener('DOMContentLoaded', () => {{ {silent} }});</script>"
    )
