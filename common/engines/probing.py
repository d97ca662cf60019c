# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What frozen features tell about a target: kNN and a regularised linear probe, cross-validated, with intervals.

=========  =======================================================================================
goes in    features ``(cases, E)``, one value of the target per case, optionally a group per case
between    repeated outer folds; within each, everything else is fitted on the training part alone
comes out  out-of-fold predictions, scores with bootstrap intervals over cases or groups
=========  =======================================================================================

Classification is scored by balanced accuracy and macro F1 of the decisions, and by macro average precision and AUROC
of the scores. AUROC compares cases of the same fold only: scores of models that were trained on other folds are not on
one scale. Numbers are scored as in :mod:`common.metrics.regression`.

An interval holds what differs between cases, drawn again by the bootstrap, and that other training cases would have
made other models, told by leaving a part of the cases out of everything at a time (:func:`_stretch`).
Where there is nothing to tell, small sets tend to score a little below chance, not above: what is tested is what the
training part has less of.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from ..data.cases import stem
from ..errors import DataError, SettingsError
from ..metrics.regression import REGRESSION_SCORES, regression_scores
from ..metrics.statistics import bootstrap_samples, equal_units, known_mean, wider_percentiles
from ..tables import read_table
from ..terminal import progress_bar
from ..transforms import without_ending

__all__ = [
    "Probe",
    "ProbeResult",
    "Target",
    "compare_probes",
    "is_missing",
    "outer_folds",
    "probe_features",
    "read_target",
    "task_of",
]

CLASSIFICATION, REGRESSION = "classification", "regression"
NEIGHBOURS = (1, 3, 5, 11)
FEW_PER_CLASS = 20
_LIMITS = {
    **dict.fromkeys(("balanced accuracy", "AUROC", "AP", "F1"), (0.0, 1.0)),
    **dict.fromkeys(("MAE", "RMSE"), (0.0, np.inf)),
    "R2": (-np.inf, 1.0),
    **dict.fromkeys(("Pearson", "Spearman"), (-1.0, 1.0)),
}
MANY_VALUES = 10  # numbers with more distinct values than this are a quantity, not classes
_ATTEMPTS = 20
_PARTS = 16  # of the cases, each left out once


@dataclass
class Target:
    """What is to be told, one entry for each usable case.

    Attributes:
        name: of the column.
        task: classification or regression.
        cases: names, as in the features.
        rows: of the features that are used.
        values: class indices or numbers.
        classes: names of the classes, none for numbers.
        groups: what must not be torn apart, such as the patient.
        notes: what the user should know.
    """

    name: str
    task: str
    cases: list[str]
    rows: np.ndarray
    values: np.ndarray
    classes: list[str] = field(default_factory=list)
    groups: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def read_target(
    table: str | Path, cases: Sequence[str], *, target: str, group: str | None = None, task: str | None = None
) -> Target:
    """Read the target of each case from a CSV.

    Args:
        table: with a first line of names; one of them is ``case``, whose entries are those of the features, with or
            without the ending of the file.
        cases: of the features, in their order.
        target: column to tell.
        group: column whose values are never torn apart by a split, such as the patient.
        task: classification or regression; None infers it: numbers with many distinct values, or with fractions, are
            a quantity, everything else is classes.

    Raises:
        DataError: if the table cannot be read, lacks a column, or leaves nothing to learn.
        SettingsError: if the task is unknown or does not fit.
    """
    if task not in (None, CLASSIFICATION, REGRESSION):
        raise SettingsError(f"task is {task!r}; it must be {CLASSIFICATION} or {REGRESSION}")
    rows = [row for _, row in read_table(table)]
    columns = list(rows[0])
    for column in ("case", target, *([group] if group else [])):
        if column not in columns:
            raise DataError(f"{table} has no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}")
    named = _rows_by_case(rows, {*cases}, [key for key in (target, group) if key], table)
    known = [case for case in cases if case in named]
    if not known:
        raise DataError(f"{table} names none of the {len(cases)} cases of the features, such as {cases[0]}")
    notes = []
    lacking = [case for case in cases if case not in named]
    extra = sorted(named.keys() - {*cases})
    if lacking:
        notes.append(f"{len(lacking)} case(s) of the features, such as {lacking[0]}, are not in the table: left out")
    if extra:
        notes.append(f"{len(extra)} case(s) of the table, such as {extra[0]}, have no features: left out")
    texts = {case: (named[case][target] or "").strip() for case in known}
    empty = [case for case, text in texts.items() if is_missing(text)]
    if empty:
        notes.append(f"{len(empty)} case(s), such as {empty[0]}, have no {target}: left out")
        texts = {case: text for case, text in texts.items() if case not in {*empty}}
    if not texts:
        raise DataError(f"{table} has no value of {target} for any case of the features")
    groups = None
    if group:
        members = {case: (named[case][group] or "").strip() for case in texts}
        if lost := next((case for case, member in members.items() if not member), None):
            raise DataError(f"{table}: {lost} has no {group!r}; add it, or do without that column")
        groups = np.array([*members.values()])
    if task is None:
        task, told = task_of([*texts.values()], target)
        notes.append(told)
    values, classes = (_quantities if task == REGRESSION else _classes)(texts, target, table)
    index = {case: row for row, case in enumerate(cases)}
    rows_used = np.array([index[case] for case in texts])
    return Target(target, task, [*texts], rows_used, values, classes=classes, groups=groups, notes=notes)


def _rows_by_case(
    rows: Iterable[dict[str, str]], ours: Collection[str], keys: Sequence[str], table: str | Path
) -> dict[str, dict[str, str]]:
    """Return the rows of a table by the names of the features' cases, which it may write with ending and folder."""
    named: dict[str, dict[str, str]] = {}
    for row in rows:
        name = without_ending(row["case"])
        name = name if name in ours else stem(name)
        if name in named and any(row[key] != named[name][key] for key in keys):
            raise DataError(f"{table} says two things of the case {name}; keep one line for each case")
        named[name] = row
    return named


def is_missing(text: str) -> bool:
    """Return whether a cell of a table says nothing."""
    return text.strip().lower() in ("", "nan", "na", "n/a", "null", "none")


def task_of(texts: Sequence[str], target: str) -> tuple[str, str]:
    """Return what values are taken for, classification or regression, and a sentence of it."""
    numbers, distinct = [_number(text) for text in texts], len({*texts})
    quantity = None not in numbers and (
        distinct > MANY_VALUES or (distinct > 2 and any(n != int(n) for n in numbers if n is not None))
    )
    task, other = (REGRESSION, CLASSIFICATION) if quantity else (CLASSIFICATION, REGRESSION)
    kind = "numbers" if quantity else "classes"
    return task, f"{target} has {distinct} distinct {kind}: {task} (--task {other} for the other)"


def _quantities(texts: Mapping[str, str], target: str, table: str | Path) -> tuple[np.ndarray, list[str]]:
    """Return the numbers of the cases, and no classes."""
    for case, text in texts.items():
        if _number(text) is None:
            raise DataError(
                f"{table}: the {target} of {case} is {text!r}, not a number; correct it, or use --task {CLASSIFICATION}"
            )
    _check_different(texts.values(), target, "{}")
    return np.array([float(text) for text in texts.values()]), []


def _classes(texts: Mapping[str, str], target: str, table: str | Path) -> tuple[np.ndarray, list[str]]:
    """Return the class of each case, and their names, numbers in their order."""
    _check_different(texts.values(), target, "{!r}")
    whole = all(_number(text) is not None for text in texts.values())
    names = sorted({*texts.values()}, key=(lambda text: (float(text), text)) if whole else None)
    return np.array([names.index(text) for text in texts.values()]), names


def _check_different(texts: Collection[str], target: str, shown: str) -> None:
    if len({*texts}) < 2:
        only = shown.format(next(iter(texts)))
        raise DataError(f"every case has the {target} {only}; there is nothing to tell apart")


def outer_folds(target: Target, *, folds: int, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], str | None]:
    """Split the cases; classes in even shares, groups never torn apart.

    Args:
        target: to split by.
        folds: wanted.
        seed: of the shuffle.

    Returns:
        training and test rows of each fold, and a sentence if there are fewer folds than wanted.

    Raises:
        SettingsError: if fewer than two folds are asked for.
        DataError: if the cases do not make two folds with all classes to train on.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise SettingsError(f"folds is {folds!r}; at least 2 are needed")
    units = np.arange(len(target.values)) if target.groups is None else target.groups
    limit, why = len(set(units.tolist())), "cases" if target.groups is None else "groups"
    if target.task == CLASSIFICATION:
        counts = [len(set(units[target.values == index].tolist())) for index in range(len(target.classes))]
        rarest = int(np.argmin(counts))
        limit, why = counts[rarest], f"{why} of {target.name} {target.classes[rarest]!r}"
    for count in range(min(folds, limit), 1, -1):
        for attempt in range(_ATTEMPTS):
            parts = list(_split(target, np.arange(len(units)), count, seed + 1000 * attempt))
            if all(len(test) for _, test in parts) and (
                target.task == REGRESSION
                or all(len(set(target.values[train].tolist())) == len(target.classes) for train, _ in parts)
            ):
                note = f"only {count} folds instead of {folds}: there are {limit} {why}" if count < folds else None
                return parts, note
    raise DataError(f"there are {limit} {why}, too few for two folds; add cases or leave that class out")


def _split(target: Target, rows: np.ndarray, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split some rows of the target; returns indices into ``rows``."""
    with_classes = target.task == CLASSIFICATION
    groups = None if target.groups is None else target.groups[rows]
    if groups is None:
        kind = StratifiedKFold if with_classes else KFold
    else:
        kind = StratifiedGroupKFold if with_classes else GroupKFold
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        yield from kind(n_splits=folds, shuffle=True, random_state=seed).split(
            np.zeros(len(rows)), target.values[rows], groups
        )


@dataclass
class Probe:
    """A model with the settings that an inner cross-validation chooses from, the most cautious first."""

    name: str
    model: BaseEstimator
    choices: dict[str, list[Any]]


def probes(task: str) -> list[Probe]:
    """Return the probes of a task: nearest neighbours and a linear one."""
    neighbours = {"n_neighbors": sorted(NEIGHBOURS, reverse=True)}
    if task == CLASSIFICATION:
        return [
            Probe("kNN", KNeighborsClassifier(metric="cosine", weights="distance"), neighbours),
            Probe(
                "linear",
                LogisticRegression(class_weight="balanced", max_iter=2000),
                {"C": np.logspace(-5, 3, 9).tolist()},
            ),
        ]
    return [
        Probe("kNN", KNeighborsRegressor(metric="cosine", weights="distance"), neighbours),
        Probe("linear", Ridge(), {"alpha": np.logspace(6, -3, 10).tolist()}),
    ]


@dataclass
class ProbeResult:
    """Scores and predictions of all models.

    Attributes:
        target: what was told.
        folds: number of outer folds.
        fold: which fold tests a case, ``(cases, repeats)``.
        decisions: class indices or numbers predicted by each model, ``(cases, repeats)``.
        scores: probabilities, ``(cases, repeats, classes)``; none in regression.
        metrics: by model and metric: ``estimate``, ``interval``, ``folds`` (mean and standard deviation); None where a
            metric is not defined, as the correlation of a constant.
        chosen: settings that the inner cross-validations chose, with how often.
        notes: what the user should know.
        left_out: scores of each model when a part of the cases was never there, ``(parts, metrics)``, in the first
            repeat.
    """

    target: Target
    folds: int
    fold: np.ndarray
    decisions: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    metrics: dict[str, dict[str, dict[str, Any]]]
    chosen: dict[str, dict[str, int]]
    notes: list[str]
    left_out: dict[str, np.ndarray]


def probe_features(
    features: np.ndarray, target: Target, *, folds: int = 5, repeats: int = 3, resamples: int = 2000, seed: int = 0
) -> ProbeResult:
    """Cross-validate the probes.

    Args:
        features: ``(cases, E)``, of all cases that ``target.rows`` counts.
        target: what to tell.
        folds: outer folds; fewer are used where the cases do not make as many.
        repeats: of the whole cross-validation, with other folds.
        resamples: of the bootstrap.
        seed: of everything random.

    Raises:
        DataError: if there are too few cases.
        SettingsError: if folds or repeats make no sense.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise SettingsError(f"repeats is {repeats!r}; at least 1 is needed")
    x, y = features[target.rows].astype(np.float64), target.values
    notes = list(target.notes)
    classes = len(target.classes)
    if target.task == CLASSIFICATION:
        smallest = int(np.bincount(y, minlength=classes).min())
        if smallest < FEW_PER_CLASS:
            notes.append(
                f"few cases: the rarest class has {smallest}; below {FEW_PER_CLASS} per class, scores are mostly chance"
            )
    elif len(y) < 2 * FEW_PER_CLASS:
        notes.append(f"few cases: {len(y)}; below {2 * FEW_PER_CLASS}, scores are mostly chance")
    fold = np.zeros((len(y), repeats), dtype=int)
    names = ["baseline", *(probe.name for probe in probes(target.task))]
    # the baseline always says the most frequent class or the mean, and scores all cases alike; were it fitted fold by
    # fold, it would lean away from what is held out
    constant = np.bincount(y).argmax() if classes else y.mean()
    decisions = {name: np.full((len(y), repeats), constant) for name in names}
    scores = {name: np.full((len(y), repeats, classes), 1 / classes) for name in names if classes}
    chosen: dict[str, Counter[str]] = {name: Counter() for name in names[1:]}
    used = folds
    first: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]] = []  # training and test rows and models of repeat 0
    for repeat in range(repeats):
        parts, note = outer_folds(target, folds=used, seed=seed + repeat)
        shown = progress_bar(parts, desc=f"probing, repeat {repeat + 1} of {repeats}", unit="fold", leave=False)
        if note and note not in notes:
            notes.append(note.replace(f"instead of {used}", f"instead of {folds}"))
        used = len(parts)
        for number, (train, test) in enumerate(shown):
            fold[test, repeat] = number
            models = {}
            for probe in probes(target.task):
                fitted, setting = _fit(probe, x, target, train, seed=seed + repeat)
                decisions[probe.name][test, repeat] = fitted.predict(x[test])
                if classes:
                    scores[probe.name][test, repeat] = fitted.predict_proba(x[test])
                chosen[probe.name][setting] += 1
                models[probe.name] = fitted
            if repeat == 0:
                first.append((train, test, models))
    left_out = _leave_out(x, target, first, fold[:, 0], seed=seed) if resamples else {}
    metrics = {
        name: _measure(
            target, fold, decisions[name], scores.get(name), left_out.get(name), resamples=resamples, seed=seed
        )
        for name in names
    }
    settings = {name: dict(count) for name, count in chosen.items()}
    return ProbeResult(target, used, fold, decisions, scores, metrics, settings, notes, left_out)


def compare_probes(
    first: ProbeResult, second: ProbeResult, *, metric: str, model: str = "linear", resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Return how much better other features told the same target of the same cases, with a paired interval.

    Args:
        first: of one encoder.
        second: of another one, with the same cases, folds and repeats.
        metric: one of ``first.metrics[model]``.
        model: which probe.
        resamples: of the bootstrap over cases, or over groups.
        seed: of it.

    Returns:
        ``estimate``, first minus second; ``interval`` of 95 %, None where it is undefined; and ``units``, how many
        cases or groups were drawn from.

    Raises:
        ValueError: if the two are not of the same cases.
    """
    target = first.target
    if target.cases != second.target.cases or first.fold.shape != second.fold.shape:
        raise ValueError(f"{len(target.cases)} and {len(second.target.cases)} cases: two probes must be of the same")
    names = _metric_names(target)
    place = names.index(metric)

    def statistic(rows: np.ndarray) -> float:
        both = [
            np.mean([_score_rows(one, model, rows, repeat)[place] for repeat in range(one.fold.shape[1])])
            for one in (first, second)
        ]
        return float(both[0] - both[1])

    everything = np.arange(len(target.values))
    groups = None if target.groups is None else target.groups.tolist()
    samples = bootstrap_samples(statistic, everything, groups=groups, resamples=resamples, seed=seed)
    interval = None
    if samples is not None and first.left_out and second.left_out:
        left_out = first.left_out[model][:, place] - second.left_out[model][:, place]
        interval = _interval(np.array(statistic(everything)), samples, left_out, target)
    return {
        "estimate": statistic(everything),
        "interval": None if interval is None or np.isnan(interval).any() else [float(bound) for bound in interval],
        "units": len(everything) if groups is None else len(set(groups)),
    }


def _metric_names(target: Target) -> list[str]:
    return ["balanced accuracy", "AUROC", "AP", "F1"] if target.classes else [*REGRESSION_SCORES.values()]


def _score_rows(result: ProbeResult, model: str, rows: np.ndarray, repeat: int) -> np.ndarray:
    """Return all metrics of one model on some rows in one repeat."""
    truth, decisions = result.target.values[rows], result.decisions[model][rows, repeat]
    if not result.target.classes:
        return np.array([*regression_scores(decisions, truth).values()])
    return _classification_scores(truth, result.fold[rows, repeat], decisions, result.scores[model][rows, repeat])


def _fit(probe: Probe, x: np.ndarray, target: Target, train: np.ndarray, *, seed: int) -> tuple[Any, str]:
    """Choose the probe's setting and fit it, standardisation included, on the training rows alone."""
    y = target.values[train]
    units = len(set((train if target.groups is None else target.groups[train]).tolist()))
    inner = min(3 if len(train) < 100 else 5, units)
    if target.task == CLASSIFICATION:
        inner = min(inner, int(np.bincount(y).max()))
    splits = list(_split(target, train, inner, seed)) if inner > 1 else []
    splits = [(fitted, judged) for fitted, judged in splits if len(set(y[fitted].tolist())) > 1 and len(judged)]
    model = Pipeline([("scale", StandardScaler()), ("probe", probe.model)])
    ((setting, values),) = probe.choices.items()
    most = min((len(part[0]) for part in splits), default=len(train))
    if setting == "n_neighbors":
        values = [value for value in values if value <= most] or [1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        if not splits:
            model.set_params(**{f"probe__{setting}": values[0]})
            return model.fit(x[train], y), f"{setting}={values[0]:g}"
        search = GridSearchCV(
            model,
            {f"probe__{setting}": values},
            cv=splits,
            scoring="balanced_accuracy" if target.task == CLASSIFICATION else "neg_mean_absolute_error",
        )
        search.fit(x[train], y)
    return search.best_estimator_, f"{setting}={search.best_params_[f'probe__{setting}']:g}"


def _auroc(truth: np.ndarray, score: np.ndarray) -> tuple[float, int]:
    """Return how many pairs of a positive and a negative are ranked rightly, ties counting half, and their number."""
    positive, negative = score[truth], np.sort(score[~truth])
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum()) / 2, len(positive) * len(negative)


def _average_precision(truth: np.ndarray, score: np.ndarray) -> float:
    """Return the sum of precisions times gains in recall as thresholds fall; NaN without positives or negatives."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each threshold
    gained = np.diff(hits[last], prepend=0)
    return float((gained * hits[last] / (last + 1)).sum() / hits[-1]) if 0 < hits[-1] < len(hits) else float("nan")


def _classification_scores(
    truth: np.ndarray, fold: np.ndarray, decisions: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """Return balanced accuracy, AUROC, average precision and F1, macro over classes, of one repeat.

    Args:
        truth: ``(cases,)``.
        fold: ``(cases,)``.
        decisions: ``(cases,)``.
        scores: ``(cases, classes)``.
    """
    classes = scores.shape[1]
    table = np.zeros((classes, classes))
    np.add.at(table, (truth, decisions), 1)
    right, true, said = np.diag(table), table.sum(1), table.sum(0)
    with np.errstate(invalid="ignore"):
        recall = right / true
        f1 = np.where(true + said > 0, 2 * right / (true + said), np.nan)
    seen = true > 0
    ranking, precision = [], []
    for index in range(classes) if classes > 2 else [1]:
        pairs = [_auroc(truth[fold == f] == index, scores[fold == f, index]) for f in np.unique(fold)]
        count = sum(n for _, n in pairs)
        ranking.append(sum(n for n, _ in pairs) / count if count else np.nan)
    for index in range(classes):
        precision.append(_average_precision(truth == index, scores[:, index]))
    return np.array([recall[seen].mean(), np.mean(ranking), known_mean(np.array(precision)), known_mean(f1[seen])])


def _leave_out(
    x: np.ndarray,
    target: Target,
    folds: Sequence[tuple[np.ndarray, np.ndarray, Mapping[str, Any]]],
    fold: np.ndarray,
    *,
    seed: int,
) -> dict[str, np.ndarray]:
    """Score the models as if a part of the cases had never been there, part by part, with the settings as chosen.

    Args:
        x: features ``(cases, E)``.
        target: of the same cases.
        folds: training rows, test rows and fitted models of each.
        fold: which tests a case, ``(cases,)``.
        seed: of the parts.

    Returns:
        scores of each model ``(parts, metrics)``; NaN where a training part without these cases lacks a class.
    """
    y, classes = target.values, len(target.classes)
    units = np.arange(len(y)) if target.groups is None else np.unique(target.groups, return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(units.max() + 1)
    if classes:  # so that no part holds most of a class
        order = order[np.argsort(y[np.unique(units, return_index=True)[1]][order], kind="stable")]
    part = np.empty(len(order), int)
    part[order] = np.arange(len(order)) % _PARTS
    names = ["baseline", *folds[0][2]]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for index in range(part.max() + 1):
        kept = part[units] != index
        rows = np.flatnonzero(kept)
        constant = np.bincount(y[rows]).argmax() if classes else y[rows].mean()
        for name in names:
            decisions = np.full(len(y), constant)
            scores = np.full((len(y), classes), 1 / classes) if classes else None
            usable = True
            for train, test, models in folds if name != "baseline" else ():
                train, test = train[kept[train]], test[kept[test]]
                usable = usable and len(train) > 0 and (not classes or len(np.unique(y[train])) == classes)
                if not usable or not len(test):
                    continue
                model = _fit_again(models[name], x[train], y[train])
                decisions[test] = model.predict(x[test])
                if scores is not None:
                    scores[test] = model.predict_proba(x[test])
            if not usable:
                found[name].append(np.full(len(_metric_names(target)), np.nan))
            elif scores is None:
                found[name].append(np.array([*regression_scores(decisions[rows], y[rows]).values()]))
            else:
                found[name].append(_classification_scores(y[rows], fold[rows], decisions[rows], scores[rows]))
    return {name: np.stack(values) for name, values in found.items()}


def _fit_again(model: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """Return a model of the same settings that is fitted on other cases."""
    again = clone(model)
    neighbours = again.get_params().get("probe__n_neighbors")
    if neighbours is not None:
        again.set_params(probe__n_neighbors=min(neighbours, len(y)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return again.fit(x, y)


def _stretch(samples: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return by how much the spread of the bootstrap is to be widened, at least 1, for each score.

    The bootstrap keeps the models, so that of what a pair of a trained and a judged case adds to the variance it sees
    half. The jackknife by parts of the cases sees it twice (Efron and Stein, Annals of Statistics 9, 1981). Both see
    once what single cases add by being judged. Two thirds of one and a third of the other are right for both kinds;
    of what single cases add by being trained on alone, it is a third.

    Args:
        samples: of the bootstrap, ``(resamples,)`` or ``(resamples, metrics)``.
        left_out: scores without a part, ``(parts,)`` or ``(parts, metrics)``.
    """
    jackknife = (len(left_out) - 1) * known_mean((left_out - known_mean(left_out)) ** 2)
    spread = np.nanvar(samples, axis=0)
    ratio = np.where(spread > 0, jackknife / np.where(spread > 0, spread, 1), 1.0)
    return np.sqrt(np.fmax((2 + ratio) / 3, 1.0))


def _interval(estimate: np.ndarray, samples: np.ndarray, left_out: np.ndarray, target: Target) -> np.ndarray:
    """Return the bounds of 95 % around estimates, ``(2, ...)``: the bootstrap's, centred and stretched."""
    units = len(target.values) if target.groups is None else equal_units(target.groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of scores that are defined in no resample
        bounds = np.nanpercentile(samples, wider_percentiles(units), axis=0)
        return np.asarray(estimate + _stretch(samples, left_out) * (bounds - known_mean(samples)))


def _measure(
    target: Target,
    fold: np.ndarray,
    decisions: np.ndarray,
    scores: np.ndarray | None,
    left_out: np.ndarray | None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Score one model: mean over repeats of the out-of-fold scores, their interval, and mean and spread over folds."""
    repeats = fold.shape[1]
    names = _metric_names(target)

    def one(rows: np.ndarray, repeat: int) -> np.ndarray:
        truth = target.values[rows]
        if scores is None:
            return np.array([*regression_scores(decisions[rows, repeat], truth).values()])
        return _classification_scores(truth, fold[rows, repeat], decisions[rows, repeat], scores[rows, repeat])

    def statistic(rows: np.ndarray) -> np.ndarray:
        return np.mean([one(rows, repeat) for repeat in range(repeats)], axis=0)

    everything = np.arange(len(target.values))
    groups = None if target.groups is None else target.groups.tolist()
    samples = bootstrap_samples(statistic, everything, groups=groups, resamples=resamples, seed=seed)
    by_fold = np.array(
        [
            one(np.flatnonzero(fold[:, repeat] == number), repeat)
            for repeat in range(repeats)
            for number in np.unique(fold[:, repeat])
        ]
    )
    estimate = statistic(everything)
    interval = None
    if samples is not None and left_out is not None:
        limits = np.array([_LIMITS.get(name, (-np.inf, np.inf)) for name in names]).T
        interval = np.clip(_interval(estimate, samples, left_out, target), *limits)
    found: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        known = by_fold[~np.isnan(by_fold[:, index]), index]
        found[name] = {
            "estimate": None if np.isnan(estimate[index]) else float(estimate[index]),
            "interval": (
                None
                if interval is None or np.isnan(interval[:, index]).any()
                else [float(bound) for bound in interval[:, index]]
            ),
            "folds": [None if np.isnan(value) else float(value) for value in by_fold[:, index]],
            "fold_mean": float(known.mean()) if len(known) else None,
            "fold_std": float(known.std(ddof=1)) if len(known) > 1 else None,
        }
    return found
