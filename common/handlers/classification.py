# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What an evaluator's run over whole volumes says: scores of all cases together, and a CSV with a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from torch import Tensor
from tqdm import tqdm

from ..data.listing.classified import fingerprints
from ..files import write_json
from ..metrics.classification import (
    SCORES,
    classification_scores,
    draw_classification,
    format_classification,
    summarise_classification,
)
from ..paths import as_path
from ..tables import write_table
from ..tasks import TARGET, ClassificationTask

__all__ = ["PooledScores", "Predictions"]


class PooledScores(Metric):
    """Scores of all validation cases together, in every epoch; the engine's metrics get them all.

    The metric itself is the average precision. Beside it come ``loss`` and the other scores of
    :mod:`common.metrics.classification`, named as this one but for its ending: ``val_ap``, ``val_loss``, ``val_auroc``.

    Args:
        task: classes or labels.
        loss: function of logits and targets.
        output_transform: turns the engine's output into both.
    """

    def __init__(
        self,
        task: ClassificationTask,
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        output_transform: Callable[[Any], Any] = lambda x: x,
    ) -> None:
        self.task, self.loss = task, loss
        super().__init__(output_transform=output_transform)

    def reset(self) -> None:
        """Forget everything."""
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        """Keep one batch."""
        logits, target = output
        self.logits.append(logits.detach().float())
        self.targets.append(target)

    def all_scores(self) -> dict[str, float]:
        """Return the loss and every score."""
        logits, targets = torch.cat(self.logits), torch.cat(self.targets)
        probabilities = self.task.probabilities(logits).cpu().numpy()
        scores = classification_scores(probabilities, targets.long().cpu().numpy())
        return {"loss": float(self.loss(logits, targets)), **{name: scores[name] for name in SCORES}}

    def compute(self) -> float:
        """Return the average precision."""
        return self.all_scores()["ap"] if self.logits else float("nan")

    def completed(self, engine: Engine, name: str) -> None:
        """Put all scores into the engine's metrics."""
        if not self.logits:
            return
        for score, value in self.all_scores().items():
            engine.state.metrics[f"{name.removesuffix('ap')}{score}"] = value


class Predictions:
    """Write what an evaluator predicts for each case, and how good that is where the truth is known.

    Writes, each atomically, after every run of the evaluator:

    * ``file``: a CSV with ``case``, ``probability_<class>`` for each class, ``predicted`` (of labels
      ``predicted_<label>``, 0 or 1 each) and, where it is known, ``true`` in the same form;
    * with ``scores``, the scores with intervals as JSON and, beside it, a picture of ROC curves and decisions.

    Args:
        task: classes or labels.
        file: CSV to write.
        scores: JSON to write, None for none.
        group: key of the cases that says which belong together, for the intervals.
        resamples: of the bootstrap.
        trained_on: fingerprints of the cases that the model was trained on; scores that count them say so.
        skipped: what was wrong with cases that could not be used; written to ``skipped.json`` beside ``file``.
    """

    def __init__(
        self,
        task: ClassificationTask,
        *,
        file: str | Path,
        scores: str | Path | None = None,
        group: str | None = None,
        resamples: int = 1000,
        trained_on: Sequence[str] = (),
        skipped: Sequence[Exception] = (),
    ) -> None:
        self.trained_on = set(trained_on)
        self.skipped = [str(problem) for problem in skipped]
        self.task, self.file, self.group, self.resamples = task, as_path(file), group, resamples
        self.scores = None if scores is None else as_path(scores)
        self.main = not dist.is_initialized() or dist.get_rank() == 0

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        if self.main:
            engine.add_event_handler(Events.EPOCH_STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _start(self, _: Engine) -> None:
        self.probabilities: list[Tensor] = []
        self.cases: list[dict[str, Any]] = []

    def _add(self, engine: Engine) -> None:
        self.probabilities.append(self.task.probabilities(engine.state.output["pred"].detach()).cpu())
        self.cases += engine.state.batch["case"]

    def _write(self, _: Engine) -> None:
        if not self.cases:
            return
        left = [self.file.with_name("skipped.json")]  # of an earlier run that this one replaces
        left += [] if self.scores is None else [self.scores, self.scores.with_suffix(".png")]
        for path in left:
            path.unlink(missing_ok=True)
        if self.skipped:
            write_json(self.skipped, self.file.with_name("skipped.json"))
        probabilities = torch.cat(self.probabilities)
        known = [index for index, case in enumerate(self.cases) if case.get(TARGET) is not None]
        write_table(self.file, *self._table(probabilities))
        if self.scores is None:
            return
        if not known:
            tqdm.write(f"{len(self.cases)} case(s) predicted; written to {self.file}")
            return
        truth = self.task.encode([self.cases[index][TARGET] for index in known]).long().numpy()
        groups = [str(self.cases[index].get(self.group)) for index in known] if self.group else None
        values = probabilities[known].numpy()
        summary = summarise_classification(values, truth, self.task.names, groups=groups, resamples=self.resamples)
        summary["trained_on"] = sum(name in self.trained_on for name in fingerprints([self.cases[i] for i in known]))
        write_json(summary, self.scores)
        picture = self.scores.with_suffix(".png")
        draw_classification(values, truth, self.task.names, picture)
        tqdm.write(format_classification(summary))
        if summary["trained_on"]:
            tqdm.write(
                f"beware: the model was trained on {summary['trained_on']} of these {len(known)} cases, so that these "
                "scores are too good; output_dir/validation_predictions.csv of the training has the others"
            )
        if len(known) < len(self.cases):
            tqdm.write(f"{len(self.cases) - len(known)} of {len(self.cases)} cases have no known class: not scored")
        tqdm.write(f"written to {self.file}, {self.scores} and {picture}")

    def _table(self, probabilities: Tensor) -> tuple[list[str], list[list[Any]]]:
        """Return the names of the columns, and the rows."""
        task = self.task
        decided = task.decide(probabilities).tolist()
        columns = ["case", *(f"probability_{name}" for name in task.names)]
        endings = [f"_{name}" for name in task.names] if task.multilabel else [""]
        columns += [f"predicted{ending}" for ending in endings]
        with_truth = any(case.get(TARGET) is not None for case in self.cases)
        columns += [f"true{ending}" for ending in endings] if with_truth else []
        rows = []
        for case, row, decision in zip(self.cases, np.asarray(probabilities), decided, strict=True):
            values = decision if task.multilabel else [task.names[decision]]
            truth: list[Any] = []
            if with_truth:
                target = case.get(TARGET)
                truth = [None] * len(endings) if target is None else target
                truth = truth if isinstance(truth, list) else [task.names[truth]]
            rows.append([case["case"], *(f"{value:.6f}" for value in row), *values, *truth])
        return columns, rows
