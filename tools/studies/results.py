# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The results of a study as arrays, from whatever runs are finished.

| word | meaning |
|---|---|
| block | all results on one data set with one budget: the same unseen cases for every arm |
| row | an unseen case of one fold |
| unit | what is drawn in a bootstrap and counted in a test: a case, or its patient where that is told |
| runs | which fold and seed an arm has, ``(folds, seeds)`` |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.listing.members import group_columns
from common.errors import DataError
from common.files import read_record

from .definition import PLAIN_ROWS

__all__ = [
    "METRICS",
    "Block",
    "Results",
    "blocks_of",
    "every_run",
    "groups_sentence",
    "patients_sentence",
    "read_json",
    "read_results",
    "shared_runs",
]

METRICS = {  # the first one is tested
    "segmentation": ("dice", "nsd"),
    "classification": ("ap", "balanced_accuracy"),
    "regression": ("r2", "pearson"),
}


@dataclass
class Results:
    """A study's plan and what has come of it."""

    folder: Path
    about: dict[str, Any]
    finished: dict[str, dict[str, Any]]
    failed: dict[str, str]
    missing: list[str]

    def planned(self, **wanted: str) -> list[dict[str, Any]]:
        """Return the runs with these properties, for example ``arm="mae"``."""
        return [run for run in self.about["runs"] if all(str(run[key]) == value for key, value in wanted.items())]

    def data_sets(self, task: str, budget: str) -> list[str]:
        """Return the data sets of a task on which runs with this budget are planned, whether or not one is finished."""
        cards = {name: told.get("card", {}) for name, told in self.about["data_sets"].items()}
        own = [name for name, card in cards.items() if str(card.get("task", "segmentation")) == task]
        return [name for name in own if self.planned(data_set=name, budget=budget)]


@dataclass
class Block:
    """Results on one data set with one budget; ``values`` are NaN where nothing is known.

    Attributes:
        data_set: its name.
        budget: its name.
        task: segmentation, classification or regression.
        arms: those with a finished run.
        classes: scored classes.
        folds: those with a finished run.
        seeds: those with a finished run.
        rows: fold and case.
        fold: index of each row's fold, ``(rows,)``.
        unit: index of each row's unit, ``(rows,)``.
        patients: whether groups are patients, so that they are the units.
        groups: centre, scanner or patient of each row; None where several columns tell of groups.
        values: scores ``(arms, rows, seeds, classes, metrics)``; of classification probabilities, of regression
            predicted numbers, last axis 1.
        truth: of classification: index of the class ``(rows,)``, or labels ``(rows, classes)``; of regression: the
            number ``(rows,)``.
        ran: ``(arms, folds, seeds)``.
        planned: number of runs planned of each arm.
        columns: of each column that tells of groups the group of each row.
        told: whether patients are told, so that nothing is read from groups.
        plain: which of the arms are plain rows.
    """

    data_set: str
    budget: str
    task: str
    arms: list[str]
    classes: list[str]
    folds: list[int]
    seeds: list[int]
    rows: list[tuple[int, str]]
    fold: np.ndarray
    unit: np.ndarray
    patients: bool
    groups: list[str | None]
    values: np.ndarray
    truth: np.ndarray | None
    ran: np.ndarray
    planned: dict[str, int]
    columns: dict[str, list[str | None]] = field(default_factory=dict)
    told: bool = False
    plain: tuple[str, ...] = ()
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores."""
        return METRICS[self.task]

    @property
    def compared(self) -> list[str]:
        """Arms that are tested and ranked: all but the plain rows."""
        return [arm for arm in self.arms if arm not in self.plain]

    def has(self, arm: str) -> bool:
        """Return whether the arm has seen all unseen cases that any arm has."""
        return arm in self.arms and bool(every_run(self, arm).any(1).all())


def read_results(folder: str | Path) -> Results:
    """Read what is there of a study.

    Raises:
        DataError: if there is no study in the folder.
    """
    folder = Path(folder)
    file = folder / "study.json"
    if not file.is_file():
        raise DataError(f"there is no {file}; name the output folder of a study that tools/study.py has begun")
    try:
        about = read_record(file)
    except DataError as error:
        raise DataError(f"{error}. Or run the study again, it writes the file anew") from error
    results = Results(folder, about, {}, {}, [])
    for run in about["runs"]:
        name = run["name"]
        done, broken = (read_json(folder / "runs" / name / file) for file in ("result.json", "failed.json"))
        if done is not None and "cases" in done:
            results.finished[name] = done
        elif broken is not None:
            results.failed[name] = str(broken.get("why", "no reason was written"))
        elif done is None and (folder / "runs" / name / "result.json").is_file():
            results.failed[name] = "its result.json is not as it was written; run the study again, it is made anew"
        else:
            results.missing.append(name)
    return results


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file that holds a dictionary; None if there is none as it was written."""
    try:
        return read_record(path)
    except (OSError, DataError):
        return None


def blocks_of(results: Results) -> list[Block]:
    """Sort the finished runs into blocks, in the order of the study's file."""
    by_name = {run["name"]: run for run in results.about["runs"]}
    found = []
    for data_set in results.about["data_sets"]:
        for budget in map(str, results.about["budgets"]):
            own = [
                (by_name[name], result)
                for name, result in results.finished.items()
                if by_name[name]["data_set"] == data_set and str(by_name[name]["budget"]) == budget
            ]
            if own:
                found.append(_block(data_set, budget, own, results))
    return found


def _block(
    data_set: str, budget: str, own: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], results: Results
) -> Block:
    task = str(own[0][1]["run"]["task"])
    present = {run["arm"] for run, _ in own}
    arms = [arm for arm in results.about["arms"] if arm in present]
    folds, seeds = (sorted({run[key] for run, _ in own}) for key in ("fold", "seed"))
    entries = {(run["fold"], case): entry for run, result in own for case, entry in result["cases"].items()}
    rows = sorted(entries)
    if task == "segmentation":
        cases = [entry for _, result in own for entry in result["cases"].values()]
        classes = list(dict.fromkeys(name for entry in cases for name in entry["scores"]))
    else:
        classes = [str(name) for name in own[0][1]["classes"]]
    depth = len(METRICS[task]) if task == "segmentation" else 1
    values = np.full((len(arms), len(rows), len(seeds), len(classes), depth), np.nan)
    ran = np.zeros((len(arms), len(folds), len(seeds)), bool)
    place = {row: index for index, row in enumerate(rows)}
    for run, result in own:
        arm, seed = arms.index(run["arm"]), seeds.index(run["seed"])
        ran[arm, folds.index(run["fold"]), seed] = True
        for case, entry in result["cases"].items():
            row = place[run["fold"], case]
            if task == "segmentation":
                for name, scores in entry["scores"].items():
                    numbers = [scores.get(metric) for metric in METRICS[task]]
                    values[arm, row, seed, classes.index(name)] = [np.nan if n is None else n for n in numbers]
            else:
                values[arm, row, seed, :, 0] = entry["probabilities" if task == "classification" else "predicted"]
    groups = [entries[row].get("group") for row in rows]
    told = any(entries[row].get("patient") for row in rows)
    small = not told and _are_patients(groups)
    names = dict.fromkeys(column for row in rows for column in entries[row].get("groups", ()))
    columns = {name: [entries[row].get("groups", {}).get(name) for row in rows] for name in names}
    if any(group is not None for group in groups):
        known = group_columns(results.about["data_sets"][data_set].get("group"))
        columns = {known[0].name if known else "group": groups}
    units = [
        str(entries[row].get("patient") or (small and group) or row[1]) for row, group in zip(rows, groups, strict=True)
    ]
    return Block(
        data_set,
        budget,
        task,
        arms,
        classes,
        folds,
        seeds,
        rows,
        np.array([folds.index(fold) for fold, _ in rows]),
        np.unique(units, return_inverse=True)[1],
        small,
        groups,
        values,
        np.array([entries[row]["truth"] for row in rows]) if task != "segmentation" else None,
        ran,
        {arm: len(results.planned(arm=arm, data_set=data_set, budget=budget)) for arm in arms},
        columns,
        told,
        tuple(arm for arm in arms if results.about["arms"][arm]["weights"] in PLAIN_ROWS),
    )


def _are_patients(groups: Sequence[str | None]) -> bool:
    """Return whether groups look like patients: many, of a few cases each. Centres and scanners are few and large.

    Example:
        >>> _are_patients(["a", "a", "b", "c", "c", "d", "e", "f"]), _are_patients(["a", "b"] * 4)
        (True, False)
    """
    sizes = Counter(groups)
    return None not in sizes and 6 <= len(sizes) < len(groups) and len(groups) <= 3 * len(sizes)


def patients_sentence(block: Block) -> str:
    """Say whose scans the unseen cases of a data set are, where patients are told; "" otherwise."""
    count, cases = len(np.unique(block.unit)), len(block.rows)
    told = f"{block.data_set}: {count} patients of {cases} unseen cases, whom intervals and tests count."
    return told if block.told else ""


def groups_sentence(groups: Sequence[str | None], where: str) -> str:
    """Say whether the groups of unseen cases were taken for patients or for centres, and why; "" without groups.

    Example:
        >>> groups_sentence(["a", "b"] * 4, "atl").split(": ")[1]
        '2 groups of 8 unseen cases, read as centres, scanners or the like since they are fewer than six'
    """
    sizes = Counter(group for group in groups if group is not None)
    if not sizes:
        return ""
    count = "1 group" if len(sizes) == 1 else f"{len(sizes)} groups"
    told = f"{where}: {count} of {len(groups)} unseen cases"
    if _are_patients(groups):
        return (
            f"{told}, read as patients since they are many and of three cases or fewer on average: intervals and tests "
            "count whole groups, and no score of a group is shown. If they are centres or scanners, take their scores "
            "from cases.csv, which names the group of each case."
        )
    if None in groups:
        why = "some cases name none"
    elif len(sizes) < 6:
        why = "they are fewer than six"
    else:
        why = "no two cases share one" if len(sizes) == len(groups) else "they are of more than three cases on average"
    shown = "each has its own column below" if len(sizes) > 1 else "alone, it has no table"
    return (
        f"{told}, read as centres, scanners or the like since {why}: {shown}, and intervals and tests count single "
        "cases."
    )


def every_run(block: Block, arm: str) -> np.ndarray:
    """Return the folds and seeds that an arm has, ``(folds, seeds)``."""
    return block.ran[block.arms.index(arm)]


def shared_runs(block: Block, *arms: str) -> np.ndarray:
    """Return the folds and seeds that all these arms have."""
    return np.logical_and.reduce([every_run(block, arm) for arm in arms])
