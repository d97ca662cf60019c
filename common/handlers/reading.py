# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What became of volumes that could not be read while a run went on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine, Events
from tqdm import tqdm

from ..errors import DataError
from ..files import write_json
from ..paths import as_path
from ..terminal import warn

__all__ = ["UnreadableVolumes"]

_ENOUGH = 100  # samples before a share of them says anything


class UnreadableVolumes:
    """Say once of every volume that it could not be read and was replaced, and list them all in a file.

    Loader processes put what they met into the batch, under ``unreadable``; of a distributed run, all processes' lists
    are gathered at the end of an epoch. The file is written when there is anything to list, and removed at the start of
    a run from the beginning.

    Args:
        file: JSON list with ``volume``, ``source``, ``error`` and ``samples``, how often it was drawn.
        evaluator: whose batches are looked at too.
        most: share of the samples that may be replaced.

    Raises:
        DataError: while running, if more than this share had to be replaced.
    """

    def __init__(self, file: str | Path, *, evaluator: Engine | None = None, most: float = 0.1) -> None:
        self.file, self.evaluator, self.most = as_path(file), evaluator, most
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        self.samples = self.replaced = 0
        self.found: dict[str, dict[str, Any]] = {}  # since the last epoch's end
        self.listed: dict[str, dict[str, Any]] = {}

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after the checkpoint."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._gather)
        engine.add_event_handler(Events.COMPLETED, self._close)
        for one in (engine, self.evaluator):
            if one is not None:
                one.add_event_handler(Events.ITERATION_STARTED, self._look)

    def _start(self, engine: Engine) -> None:
        if not self.main or not self.file.is_file():
            return
        if engine.state.epoch == 0:
            self.file.unlink()
        else:  # a resumed run
            self.listed = {entry["volume"]: entry for entry in json.loads(self.file.read_text("utf-8"))}

    def _look(self, engine: Engine) -> None:
        batch = engine.state.batch
        self.samples += len(batch["region"])
        for path, source, error in batch["unreadable"]:
            if path not in self.found and path not in self.listed:
                warn(f"{path} (made from {source}) cannot be read ({error}); other volumes take its place")
            entry = self.found.setdefault(path, {"volume": path, "source": source, "error": error, "samples": 0})
            entry["samples"] += 1
            self.replaced += 1
        if self.samples >= _ENOUGH and self.replaced > self.most * self.samples:
            raise DataError(
                f"{self.replaced} of {self.samples} volumes drawn cannot be read, more than {self.most:.0%}; they are "
                "named above. Find them all with tools/prepare_data.py verify STORE --repair true and run again"
            )

    def _gather(self, engine: Engine) -> None:
        parts: list[dict[str, dict[str, Any]]] = [self.found]
        if dist.is_initialized():
            parts = [{}] * dist.get_world_size()
            dist.all_gather_object(parts, self.found)
        self.found = {}
        for path, entry in ((path, entry) for part in parts for path, entry in part.items()):
            had = self.listed.setdefault(path, entry | {"samples": 0})
            had["samples"] += entry["samples"]
        if self.main and any(parts):
            write_json(list(self.listed.values()), self.file)

    def _close(self, _: Engine) -> None:
        if self.main and self.listed:
            tqdm.write(f"{len(self.listed)} volume(s) could not be read and were replaced; {self.file} lists them")
