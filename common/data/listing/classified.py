# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Whole volumes with classes or a number: a folder of images, a CSV with a row for each case, how both are split.

==========================  =========================================================================================
column ``case``             name of the image without its ending, or its path from the folder, where names repeat; of
                            several channels, what ``<case>_0000``, ``<case>_0001``, ... have in common
target, one column          a class for each case: binary or multi-class, of classes that exclude each other
target, a list of columns   0 or 1 in each: multi-label, of labels that may come together
target of a regression      a number for each case, such as an age
group column                cases with one value, such as a patient's scans, stay on one side of every split
==========================  =========================================================================================

The columns may also be entries of a MONAI datalist.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import DataError, SettingsError
from ...tables import is_missing, read_table
from ...tasks import TARGET, ClassificationTask, RegressionTask
from ...transforms import without_ending
from ..cases import Case, case_name, images_of
from ..problems import settle
from .datalists import channel_cases, read_datalist
from .folders import LABELLED, existing_folder, volumes_in
from .labelled import split_cases, whole_patients
from .members import wanted_columns
from .quantities import check_numbers, number_of, ranges, spread, standardised

__all__ = [
    "class_weights",
    "classified_cases",
    "classified_lists",
    "fingerprints",
    "prediction_cases",
    "target_digest",
]

_TRUTH = {"0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1}
_START = 2**16  # bytes of a file that tell it from others
_MANY_NUMBERS = 10  # different ones; more are classes only if --classes lists them
CLASSIFICATION, REGRESSION = "classification", "regression"


def classified_cases(
    dataset_dir: str = "",
    datalist: str | None = None,
    *,
    table: str | None = None,
    channels: int = 1,
    strict: bool = False,
) -> dict[str, list[Case]]:
    """List the cases of a folder or a datalist; with a table, those that it has a row for, with its columns.

    Args:
        dataset_dir: folder searched for NIfTI at any depth, but for the label maps beside a folder of images.
        datalist: MONAI datalist JSON to use instead.
        table: CSV with a column ``case``; commas, semicolons or tabs.
        channels: images of a case.
        strict: stop at a row without image.

    Returns:
        ``training``, ``validation`` and ``test``; of a folder, all are ``training``. ``case`` is what the user calls a
        case, ``name`` the same without slashes.

    Raises:
        DataError: if something cannot be read or found, naming the file, line and remedy.
    """
    if datalist:
        lists = read_datalist(datalist, dataset_dir, channels=True)
        for case in (case for part in lists.values() for case in part):
            case.setdefault("case", case_name(case))
    else:
        lists = {"training": _folder_cases(existing_folder(dataset_dir), channels), "validation": [], "test": []}
    if not table:
        return lists
    rows = read_table(table)
    known: dict[str, list[Case]] = {}
    for case in (case for part in lists.values() for case in part):
        for name in {case["case"], case_name(case), Path(case["case"]).name}:
            known.setdefault(name, []).append(case)
    problems: list[DataError] = []
    wanted: set[int] = set()
    for line, row in rows:
        name = without_ending(row["case"])
        found = known.get(name, [])
        if len(found) > 1 and all(case is not found[0] for case in found[1:]):
            there = ", ".join(sorted(case["case"] for case in found)[:2])
            problems.append(DataError(f"{table}, line {line}: several images are called {name} ({there}); write one"))
        elif not found:
            where = datalist or dataset_dir
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"images are called like {min(known, default='nothing')}"
            problems.append(DataError(f"{table}, line {line}: there is no image {name} in {where}; {hint}"))
        elif id(found[0]) in wanted:
            raise DataError(f"{table}, line {line}: {name} has a row already; keep one row for each case")
        else:
            wanted.add(id(found[0]))
            found[0].update({key: value for key, value in row.items() if key != "case"})
    settle(problems, len(wanted), strict=strict)
    left = sum(id(case) not in wanted for part in lists.values() for case in part)
    if left:
        tqdm.write(f"{left} image(s) have no row in {table} and are not used")
    return {part: [case for case in cases if id(case) in wanted] for part, cases in lists.items()}


def classified_lists(
    dataset_dir: str = "",
    datalist: str | None = None,
    *,
    table: str | None = None,
    task: str = CLASSIFICATION,
    target: str | Sequence[str] = "",
    classes: Sequence[str] | None = None,
    units: str | None = None,
    channels: int = 1,
    group: str | None = None,
    patient: str | None = None,
    fold: int | str | None = None,
    folds: int = 5,
    splits: str | None = None,
    validation_share: float = 0.2,
    seed: int = 12345,
    strict: bool = False,
) -> dict[str, Any]:
    """List cases with their targets for training and validation.

    Every part of a split holds each class, combination of labels, or range of the numbers in about its share of all
    cases, as far as groups allow it. (The published splits are drawn without regard to class or patient.) Cases without
    a target, or of a class that is not among ``classes``, are told and left out.

    Args:
        dataset_dir: folder of images.
        datalist: MONAI datalist JSON to use instead; its validation list, if any, is used as it is.
        table: CSV with the columns ``case``, target and group; not needed if the datalist's entries hold them.
        task: classification or regression.
        target: column with the class or the number, or list of columns with 0 and 1.
        classes: of the one column, in the order of the outputs; by default its distinct values, sorted.
        units: of the number, in words.
        channels: images of a case.
        group: column whose values are never torn apart by a split.
        patient: column of the patients, who are never torn apart either.
        fold: which of ``folds`` is validated on, from 0; ``all`` is both on everything; None holds out once.
        folds: number of cross-validation folds.
        splits: JSON list of ``{"train": [names], "val": [names]}``; ``fold`` then counts its entries.
        validation_share: share of the cases held out without folds; at least one case.
        seed: of the split.
        strict: stop at the first case that cannot be used.

    Returns:
        ``task``, and ``training`` and ``validation`` cases, each with ``image``, ``name``, ``case`` and ``target``.

    Raises:
        DataError: if table, folder or list cannot be used.
        SettingsError: if a setting is missing or does not fit.
    """
    _check_told(task, target, table or datalist, classes=classes, units=units)
    source = table or str(datalist)
    lists = classified_cases(dataset_dir, datalist, table=table, channels=channels, strict=strict)
    cases, given = lists["training"], lists["validation"]
    columns = [target] if isinstance(target, str) else [str(name) for name in target]
    _check_columns(cases + given, [*columns, *filter(None, (group, patient))], source)
    asked = _asked(cases + given, target, task=task, classes=classes, units=units, source=source)
    problems: list[DataError] = []
    for case in cases + given:
        try:
            case[TARGET] = _target(case, columns, asked, source)
        except DataError as error:
            problems.append(error)
    usable = [[case for case in part if TARGET in case] for part in (cases, given)]
    settle(problems, sum(map(len, usable)), strict=strict)
    if given and fold is None and splits is None:
        split = whole_patients({"training": usable[0], "validation": usable[1]}, patient, source)
    else:
        split = split_cases(
            usable[0],
            fold=fold,
            folds=folds,
            splits=splits,
            group=group,
            patient=patient,
            validation_share=validation_share,
            seed=seed,
            stratify=ranges(usable[0], parts=folds) if isinstance(asked, RegressionTask) else asked.stratum,
        )
    return {"task": _settled(asked, split, source), **split}


def _settled(
    task: ClassificationTask | RegressionTask, split: Mapping[str, Sequence[Case]], source: str
) -> ClassificationTask | RegressionTask:
    """Say what the parts of a split hold, and return the task, of a number with the mean of the training cases."""
    if not split["training"]:
        raise DataError(f"there are no cases to train on: {source} has all of them for validation")
    if isinstance(task, RegressionTask):
        task = standardised(task, split["training"], source=source)
        known = {part: cases for part, cases in split.items() if cases}
        tqdm.write("; ".join(f"{part} {len(cases)} case(s): {spread(task, cases)}" for part, cases in known.items()))
    else:
        _tell(split, task)
    return task


def _check_told(
    task: str,
    target: str | Sequence[str],
    source: str | None,
    *,
    classes: Sequence[str] | None,
    units: str | None,
) -> None:
    """Refuse what is lacking, said twice or of the other task, before any file is read."""
    if task not in (CLASSIFICATION, REGRESSION):
        raise SettingsError(f"task is {task!r}; it must be {CLASSIFICATION} or {REGRESSION}")
    if not target:
        raise SettingsError(
            "no target given; add --target COLUMN with the classes, or --target \"['first','second']\" for columns of "
            "0 and 1; a column of numbers, such as an age, also needs --task regression"
        )
    if task == REGRESSION and not isinstance(target, str):
        raise SettingsError(f"target is {list(target)}, but a regression predicts one number; name one column")
    if task == REGRESSION and classes is not None:
        raise SettingsError(f"classes is {classes!r}, but a regression predicts a number; drop --classes")
    if task == CLASSIFICATION and units is not None:
        raise SettingsError(f"units is {units!r}, but classes have none; drop it, or add --task regression")
    if not source:
        raise SettingsError("no table given; add --table FILE.csv with a column case and the target columns")
    if not isinstance(target, str) and classes is not None:
        raise SettingsError(f"classes is {list(classes)}, but a list of target columns is its own classes; drop it")


def prediction_cases(
    dataset_dir: str = "",
    datalist: str | None = None,
    *,
    task: ClassificationTask | RegressionTask,
    target: str | Sequence[str],
    table: str | None = None,
    group: str | Sequence[str] | None = None,
    patient: str | None = None,
    channels: int = 1,
    strict: bool = False,
) -> list[Case]:
    """List the cases to predict, with their targets where a table or the datalist knows them.

    Args:
        dataset_dir: folder of images.
        datalist: MONAI datalist JSON to use instead: its ``test`` entries, else ``validation``, else ``training``.
        task: of the model.
        target: column or columns of the truth.
        table: CSV with the columns ``case`` and target, for scores; only its cases are then predicted.
        group: columns by whose values scores are told, with ends of bands: ``site,age:40,60``.
        patient: column of the patients, for intervals.
        channels: images of a case.
        strict: stop at a row without image, or a case without a known target.

    Raises:
        DataError: if there are none, or the table cannot be used.
    """
    lists = classified_cases(dataset_dir, datalist, table=table, channels=channels, strict=strict)
    cases = lists["test"] or lists["validation"] or lists["training"]
    twice = [name for name, count in Counter(case["case"] for case in cases).items() if count > 1]
    if twice:
        raise DataError(
            f"several cases are called {twice[0]}, and what is predicted for them could not be told apart; give each a "
            f'"name" of its own in {datalist or dataset_dir}'
        )
    columns = [target] if isinstance(target, str) else [str(name) for name in target]
    if table:
        _check_columns(cases, [*columns, *wanted_columns(group, patient)], table)
    problems: list[DataError] = []
    for case in cases:
        try:
            case[TARGET] = _target(case, columns, task, table or str(datalist))
        except DataError as error:
            case[TARGET] = None
            problems.append(error)
        if patient and table and is_missing(case.get(patient, "")):
            raise DataError(f"{table}: {case['case']} has no {patient!r}; add it, or drop --patient")
    if table and problems:
        told = "\n".join(f"  - {problem}" for problem in problems)
        if strict:
            raise DataError(f"{len(problems)} of {len(cases)} cases cannot be scored:\n{told}")
        tqdm.write(f"{len(problems)} of {len(cases)} cases are predicted but cannot be scored:\n{told}")
    return cases


def class_weights(
    cases: Sequence[Case], task: ClassificationTask | RegressionTask, *, balance: bool = True
) -> list[float] | None:
    """Return weights that make up for unequal numbers of cases; None without ``balance``.

    Of classes: ``n / (classes * n_class)``, so that their mean over the cases is 1; of labels: ``without / with``, the
    weight of a positive.

    Raises:
        DataError: if a class has no case to weigh.
        SettingsError: if there are no classes.

    Example:
        >>> class_weights([{"target": 0}, {"target": 0}, {"target": 0}, {"target": 1}], ClassificationTask(("a", "b")))
        [0.6666666666666666, 2.0]
    """
    if not balance:
        return None
    if isinstance(task, RegressionTask):
        raise SettingsError("--balance true weighs classes, and a regression has none; drop it")
    counts = task.counts(cases)
    lacking = [name for name, count in counts.items() if not count or (task.multilabel and count == len(cases))]
    if lacking:
        raise DataError(
            f"--balance true needs training cases with and without each class, and {counts[lacking[0]]} of "
            f"{len(cases)} are {lacking[0]}; leave it out of the classes, or use another split"
        )
    if task.multilabel:
        return [(len(cases) - count) / count for count in counts.values()]
    return [len(cases) / (task.outputs * count) for count in counts.values()]


def target_digest(cases: Sequence[Case]) -> str:
    """Return a fingerprint of the targets of cases, by which a changed table is told from the same one."""
    content = sorted((case_name(case), case.get(TARGET)) for case in cases)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def fingerprints(cases: Sequence[Case]) -> list[str]:
    """Return a short digest of each case's image, sorted: enough to recognize a file under any name, and no more."""
    found = []
    for case in cases:
        path = Path(images_of(case)[0])
        if path.is_file():
            with open(path, "rb") as stream:
                start = stream.read(_START)
            found.append(hashlib.sha256(start + str(path.stat().st_size).encode()).hexdigest()[:16])
    return sorted(found)


def _folder_cases(folder: Path, channels: int) -> list[Case]:
    """List the images at any depth, and call each by its path from the folder."""
    maps = {folder / labels for images, labels in LABELLED if (folder / images).is_dir()}
    by_folder: dict[Path, list[Path]] = {}
    for path in volumes_in(folder):
        if maps.isdisjoint(path.parents):
            by_folder.setdefault(path.parent, []).append(path)
    cases: list[Case] = []
    for parent, files in by_folder.items():
        for case in channel_cases([file.absolute() for file in files], channels=channels):
            inner = parent.relative_to(folder) / case_name(case)
            own = {"case": inner.as_posix(), "name": inner.as_posix().replace("/", "_")}
            cases.append(case | own)
    return cases


def _check_columns(cases: Sequence[Case], columns: Sequence[str], source: str) -> None:
    there = {key for case in cases for key in case} - {"image", "name", "label"}
    for column in columns:
        if column not in there:
            near = difflib.get_close_matches(column, there, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(there)) or 'none'}"
            raise DataError(f"{source} has no column {column!r}; {hint}")
    if len(set(columns)) < len(columns):
        raise SettingsError(f"the columns {', '.join(columns)} name one twice; name each once")


def _plain(value: Any) -> str:
    """Write a value as a class: ``1.0`` and ``1`` are one."""
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def _known(cases: Sequence[Case], column: str) -> list[str]:
    """Return what a column says of the cases that it says something of."""
    return [_plain(case[column]) for case in cases if not is_missing(case.get(column, ""))]


def _asked(
    cases: Sequence[Case],
    target: str | Sequence[str],
    *,
    task: str,
    classes: Sequence[str] | None,
    units: str | None,
    source: str,
) -> ClassificationTask | RegressionTask:
    """Return what the target asks for; of a number, before its mean is known."""
    if not isinstance(target, str):
        return ClassificationTask(tuple(map(str, target)), multilabel=True)
    if task == CLASSIFICATION:
        return _one_column(cases, target, classes, source)
    check_numbers(_known(cases, target), target, source)
    return RegressionTask(target, units=None if units is None else str(units))


def _one_column(cases: Sequence[Case], column: str, classes: Sequence[str] | None, source: str) -> ClassificationTask:
    values = _known(cases, column)
    found = sorted(set(values))
    numbers = all(_number(value) is not None for value in found)
    if numbers:
        found.sort(key=float)
    if classes is not None:
        if isinstance(classes, (str, int)) or len({_plain(name) for name in classes}) < max(2, len(classes)):
            raise SettingsError(f"classes is {classes!r}; list two or more: --classes \"['healthy','ill']\"")
        names = [_plain(name) for name in classes]
        absent = [name for name in names if name not in found]
        if absent:
            there = ", ".join(found[:5]) or "none"
            raise DataError(f"{source} has no case of the class {absent[0]!r} in {column!r}, which holds {there}")
        return ClassificationTask(tuple(names))
    if len(found) < 2:
        there = f"only {found[0]!r}" if found else "nothing"
        raise DataError(f"the column {column!r} of {source} holds {there}; a target needs two classes or more")
    if len(found) > max(2, len(values) // 2) or (numbers and len(found) > _MANY_NUMBERS):
        remedy = "predict the number with --task regression" if numbers else "choose another --target"
        raise DataError(
            f"the column {column!r} of {source} holds {len(found)} different values in {len(values)} cases, such as "
            f"{found[0]} and {found[1]}; these are no classes: {remedy}, or list them with --classes"
        )
    return ClassificationTask(tuple(found))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _target(case: Case, columns: Sequence[str], task: ClassificationTask | RegressionTask, source: str) -> Any:
    values = []
    for column in columns:
        value = case.get(column, "")
        if is_missing(value):
            raise DataError(f"{source}: {case['case']} has no {column!r}")
        values.append(_plain(value))
    if isinstance(task, RegressionTask):
        return number_of(case, columns[0], source)
    if not task.multilabel:
        if values[0] not in task.names:
            raise DataError(f"{source}: {case['case']} is {values[0]!r}, which is none of {', '.join(task.names)}")
        return task.names.index(values[0])
    for column, value in zip(columns, values, strict=True):
        if value.lower() not in _TRUTH:
            raise DataError(f"{source}: {case['case']} has {value!r} in {column!r}, where only 0 or 1 can be")
    return [_TRUTH[value.lower()] for value in values]


def _tell(split: Mapping[str, Sequence[Case]], task: ClassificationTask) -> None:
    """Say how many cases of each class there are, and which are lacking where."""
    counts = {part: task.counts(cases) for part, cases in split.items()}
    shown = "; ".join(
        f"{part} {len(split[part])} case(s): " + ", ".join(f"{name} {count}" for name, count in own.items())
        for part, own in counts.items()
    )
    tqdm.write(shown)

    for part, own in counts.items():
        for name, count in own.items():
            if not split[part]:
                continue
            if count == 0 or (task.multilabel and count == len(split[part])):
                what = "cannot be learned" if part == "training" else "is not scored"
                tqdm.write(f"note: {count} of the {len(split[part])} {part} cases are {name}, which {what}")
