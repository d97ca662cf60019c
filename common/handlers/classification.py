# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What an evaluator's run over whole volumes says: scores of all cases together, and a CSV with a row for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from ..data.listing.members import Members, members_of
from ..files import write_json
from ..metrics.classification import (
    SCORES,
    classification_scores,
    draw_classification,
    format_classification,
    summarise_classification,
)
from ..metrics.groups import GROUPS_PICTURE, draw_groups, format_groups, group_scores
from ..metrics.regression import draw_regression, format_regression, regression_scores, summarise_regression
from ..paths import as_path
from ..tables import write_table
from ..tasks import TARGET, ClassificationTask, RegressionTask

__all__ = ["PooledScores", "Predictions"]


class PooledScores(Metric):
    """Scores of all validation cases together, in every epoch; the engine's metrics get them all.

    The metric itself is the task's key score: the average precision, or R2 of a number. Beside it come ``loss`` and the
    other scores of :mod:`common.metrics.classification` or :mod:`common.metrics.regression`, named as this one but for
    its ending: ``val_ap``, ``val_loss``, ``val_auroc``.

    Args:
        task: classes, labels or a number.
        loss: function of outputs and targets.
        output_transform: turns the engine's output into both.
    """

    def __init__(
        self,
        task: ClassificationTask | RegressionTask,
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
        predicted = self.task.decode(logits).cpu().numpy()
        if isinstance(self.task, RegressionTask):
            scores = regression_scores(predicted, self.task.decode(targets).cpu().numpy())
        else:
            known = classification_scores(predicted, targets.long().cpu().numpy())
            scores = {name: known[name] for name in SCORES}
        return {"loss": float(self.loss(logits, targets)), **scores}

    def compute(self) -> float:
        """Return the key score."""
        return self.all_scores()[self.task.key_score] if self.logits else float("nan")

    def completed(self, engine: Engine, name: str) -> None:
        """Put all scores into the engine's metrics."""
        if not self.logits:
            return
        for score, value in self.all_scores().items():
            engine.state.metrics[f"{name.removesuffix(self.task.key_score)}{score}"] = value


class Predictions:
    """Write what an evaluator predicts for each case, and how good that is where the truth is known.

    Writes, each atomically, after every run of the evaluator:

    * ``file``: a CSV with ``case``, ``probability_<class>`` for each class, ``predicted`` (of labels
      ``predicted_<label>``, 0 or 1 each) and, where it is known, ``true`` in the same form; of a number ``predicted``
      and, where it is known, ``true`` and ``error``, and the ``units`` if they were named;
    * with ``scores``, the scores with intervals as JSON and, beside it, a picture: of ROC curves and decisions, or of
      predicted against true numbers; with
      ``group``, also the AUROC or the mean absolute error of each group, in ``groups.png`` too. (AUROC does not depend
      on how frequent a class is in a group.)

    Args:
        task: classes, labels or a number.
        file: CSV to write.
        scores: JSON to write, None for none.
        group: keys of the cases by which scores are told too, with ends of bands: ``site,age:40,60``.
        patient: key of the cases that says whose scan each is, for the intervals.
        resamples: of the bootstrap.
        trained_on: fingerprints of the cases that the model was trained on; scores that count them say so.
        skipped: what was wrong with cases that could not be used; written to ``skipped.json`` beside ``file``.
    """

    def __init__(
        self,
        task: ClassificationTask | RegressionTask,
        *,
        file: str | Path,
        scores: str | Path | None = None,
        group: str | Sequence[str] | None = None,
        patient: str | None = None,
        resamples: int = 1000,
        trained_on: Sequence[str] = (),
        skipped: Sequence[Exception] = (),
    ) -> None:
        self.trained_on = set(trained_on)
        self.skipped = [str(problem) for problem in skipped]
        self.task, self.file, self.resamples = task, as_path(file), resamples
        self.columns: dict[str, Any] = {"group": group, "patient": patient}
        self.scores = None if scores is None else as_path(scores)
        self.main = not dist.is_initialized() or dist.get_rank() == 0

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        if self.main:
            engine.add_event_handler(Events.EPOCH_STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _start(self, _: Engine) -> None:
        self.predicted: list[Tensor] = []
        self.cases: list[dict[str, Any]] = []

    def _add(self, engine: Engine) -> None:
        self.predicted.append(self.task.decode(engine.state.output["pred"].detach()).cpu())
        self.cases += engine.state.batch["case"]

    def _write(self, _: Engine) -> None:
        if not self.cases:
            return
        left = [self.file.with_name("skipped.json")]  # of an earlier run that this one replaces
        if self.scores is not None:
            left += [self.scores, self.scores.with_suffix(".png"), self.scores.with_name(GROUPS_PICTURE)]
        for path in left:
            path.unlink(missing_ok=True)
        if self.skipped:
            write_json(self.skipped, self.file.with_name("skipped.json"))
        predicted = torch.cat(self.predicted)
        known = [index for index, case in enumerate(self.cases) if case.get(TARGET) is not None]
        write_table(self.file, *self._table(predicted))
        if self.scores is None:
            return
        if not known:
            tqdm.write(f"{len(self.cases)} case(s) predicted; written to {self.file}")
            return
        own = [self.cases[index] for index in known]
        members = members_of([case["case"] for case in own], own, **self.columns)
        picture = self.scores.with_suffix(".png")
        targets = [case[TARGET] for case in own]
        summary, told = self._judged(predicted[known].numpy(), targets, members, picture)
        summary["trained_on"] = sum(name in self.trained_on for name in fingerprints(own))
        write_json(summary, self.scores)
        tqdm.write(told)
        if summary["trained_on"]:
            tqdm.write(
                f"beware: the model was trained on {summary['trained_on']} of these {len(known)} cases, so that these "
                "scores are too good; output_dir/validation_predictions.csv of the training has the others"
            )
        if len(known) < len(self.cases):
            tqdm.write(f"{len(self.cases) - len(known)} of {len(self.cases)} cases have no known target: not scored")
        tqdm.write(f"written to {self.file}, {self.scores} and {picture}")

    def _judged(
        self, predicted: np.ndarray, targets: list[Any], members: Members, picture: Path
    ) -> tuple[dict[str, Any], str]:
        """Draw the cases whose truth is known, and return their scores, also in words."""
        how: dict[str, Any] = {"groups": members.patients, "resamples": self.resamples}
        if isinstance(self.task, RegressionTask):
            numbers = np.array(targets, dtype=np.float64)
            draw_regression(predicted, numbers, self.task, picture)
            summary = summarise_regression(predicted, numbers, self.task, **how)
            name = f"MAE {self.task.units}" if self.task.units else "MAE"
            apart = self._apart(
                lambda rows: regression_scores(predicted[rows], numbers[rows])["mae"],
                members,
                name,
                lower_is_better=True,
            )
            return {**summary, "by_group": apart[0]}, "\n".join([format_regression(summary), *apart[1]])
        truth = self.task.encode(targets).long().numpy()
        draw_classification(predicted, truth, self.task.names, picture)
        summary = summarise_classification(predicted, truth, self.task.names, **how)
        apart = self._apart(
            lambda rows: float(classification_scores(predicted[rows], truth[rows])["auroc"]), members, "AUROC"
        )
        return {**summary, "by_group": apart[0]}, "\n".join([format_classification(summary), *apart[1]])

    def _apart(
        self,
        statistic: Callable[[np.ndarray], float],
        members: Members,
        name: str,
        *,
        lower_is_better: bool = False,
    ) -> tuple[dict[str, Any], list[str]]:
        """Draw the scores of groups, if there are any, and return them, also in words."""
        found = group_scores(
            statistic,
            members.groups,
            patients=members.patients,
            lower_is_better=lower_is_better,
            resamples=self.resamples,
        )
        if not found or self.scores is None:
            return found, []
        whole = statistic(np.arange(len(next(iter(members.groups.values())))))
        known = None if math.isnan(whole) else whole
        draw_groups(found, self.scores.with_name(GROUPS_PICTURE), score=name, whole=known)
        return found, [format_groups(found, score=name)]

    def _table(self, predicted: Tensor) -> tuple[list[str], list[list[Any]]]:
        """Return the names of the columns, and the rows."""
        if isinstance(self.task, RegressionTask):
            return _numbers(self.task, self.cases, predicted.tolist())
        return _classes(self.task, self.cases, predicted)


def _classes(
    task: ClassificationTask, cases: Sequence[Mapping[str, Any]], probabilities: Tensor
) -> tuple[list[str], list[list[Any]]]:
    """Return a table of probabilities, decisions and the truth, where any is known."""
    decided = task.decide(probabilities).tolist()
    columns = ["case", *(f"probability_{name}" for name in task.names)]
    endings = [f"_{name}" for name in task.names] if task.multilabel else [""]
    columns += [f"predicted{ending}" for ending in endings]
    with_truth = any(case.get(TARGET) is not None for case in cases)
    columns += [f"true{ending}" for ending in endings] if with_truth else []
    rows = []
    for case, row, decision in zip(cases, np.asarray(probabilities), decided, strict=True):
        values = decision if task.multilabel else [task.names[decision]]
        truth: list[Any] = []
        if with_truth:
            target = case.get(TARGET)
            truth = [None] * len(endings) if target is None else target
            truth = truth if isinstance(truth, list) else [task.names[truth]]
        rows.append([case["case"], *(f"{value:.6f}" for value in row), *values, *truth])
    return columns, rows


def _numbers(
    task: RegressionTask, cases: Sequence[Mapping[str, Any]], predicted: Sequence[float]
) -> tuple[list[str], list[list[Any]]]:
    """Return a table of predicted numbers, and of the true ones and the errors, where any is known."""
    with_truth = any(case.get(TARGET) is not None for case in cases)
    columns = ["case", "predicted", *(["true", "error"] if with_truth else []), *(["units"] if task.units else [])]
    rows = []
    for case, value in zip(cases, predicted, strict=True):
        row = [case["case"], f"{value:.7g}"]
        if with_truth:
            target = case.get(TARGET)
            row += [None, None] if target is None else [target, f"{value - target:.7g}"]
        rows.append([*row, *([task.units] if task.units else [])])
    return columns, rows
