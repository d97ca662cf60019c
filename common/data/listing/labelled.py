# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Labelled cases in the forms that users have them, and how they are split."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...errors import DataError, SettingsError
from ...paths import as_path
from ...transforms import ENDINGS
from ..cases import Case, case_name, images_of, stem
from .case_tables import CaseTable
from .datalists import channel_cases, read_datalist
from .descriptions import described_cases
from .folders import LABELLED, existing_folder, is_series, named_below, path_below, volumes_in

__all__ = ["add_columns", "labelled_lists", "split_cases", "whole_patients"]


def labelled_lists(
    dataset_dir: str = "",
    datalist: str | None = None,
    *,
    channels: int | None = 1,
    fold: int | str | None = None,
    folds: int = 5,
    splits: str | None = None,
    groups: str | None = None,
    group: str | None = None,
    patient: str | None = None,
    validation_share: float = 0.2,
    seed: int = 12345,
) -> dict[str, list[Case]]:
    """List image and label pairs for training and validation.

    Args:
        dataset_dir: folder with ``images`` and ``labels`` holding files of the same name, in the same folders where two
            are called alike, which their names then hold; an nnU-Net raw folder
            (``imagesTr/<case>_0000.nii.gz``, ``labelsTr/<case>.nii.gz``, or the files that its ``dataset.json`` lists
            under ``dataset``); or a Decathlon task folder with its ``dataset.json``.
        datalist: MONAI datalist JSON to use instead; also a Decathlon ``dataset.json``. A validation list in it is
            used as it is.
        channels: images of a case; None, where only labels are read, finds it by the names.
        fold: which of ``folds`` is validated on, from 0; ``all`` trains and validates on everything; None holds out
            ``validation_share`` once.
        folds: number of cross-validation folds; the five of nnU-Net by default.
        splits: JSON list of ``{"train": [names], "val": [names]}``, such as nnU-Net's ``splits_final.json``; ``fold``
            then counts its entries.
        groups: table with a column ``case`` and further columns, such as the centre or the patient, or BIDS'
            ``participants.tsv``.
        group: column, of that file or of the datalist's entries, whose values are never torn apart by a split.
        patient: column of the patients, who are never torn apart either.
        validation_share: share of the cases held out without folds; at least one case.
        seed: of the split.

    Raises:
        DataError: if folder or list is missing or empty, or an image has no label.
        SettingsError: if a fold or split does not exist.
    """
    given: list[Case] = []
    if datalist:
        lists = read_datalist(datalist, dataset_dir, channels=True)
        cases, given = lists["training"], lists["validation"]
        for case in cases + given:
            if "label" not in case:
                raise DataError(f'{datalist}: {case["image"]} has no "label"')
        if not cases and not given:
            raise DataError(f'{datalist} has no entries under "training"')
    else:
        cases = _pairs(existing_folder(dataset_dir), channels)
    add_columns(cases + given, groups)
    if given and fold is None and splits is None:  # an empty training list is fine for evaluation
        return whole_patients({"training": cases, "validation": given}, patient, str(datalist))
    return split_cases(
        cases,
        fold=fold,
        folds=folds,
        splits=splits,
        group=group,
        patient=patient,
        validation_share=validation_share,
        seed=seed,
    )


def add_columns(cases: Sequence[Case], file: str | None) -> None:
    """Add the columns of a table, as :class:`.case_tables.CaseTable` reads it, to the cases it names.

    Raises:
        DataError: if it cannot be read, has no column ``case`` or names none of the cases.
    """
    if not file:
        return
    table = CaseTable(file)
    known = [case for case in cases if table.of(case_name(case))]
    if cases and not known:
        raise DataError(f"{file} names none of the cases, such as {case_name(cases[0])}; write names without .nii.gz")
    for case in known:
        row = table.of(case_name(case))
        case.update({key: value for key, value in row.items() if key not in ("case", *case) and key is not None})


def split_cases(
    cases: Sequence[Case],
    *,
    fold: int | str | None = None,
    folds: int = 5,
    splits: str | None = None,
    group: str | None = None,
    patient: str | None = None,
    validation_share: float = 0.2,
    seed: int = 12345,
    stratify: Callable[[Case], str] | None = None,
) -> dict[str, list[Case]]:
    """Split cases into ``training`` and ``validation``; the arguments are those of :func:`labelled_lists`.

    With ``seed`` 12345 and neither groups nor strata, the folds are nnU-Net's. With ``stratify`` each part holds every
    stratum, such as a diagnosis, in about the share that all cases have, as far as groups allow it.

    Raises:
        DataError: if names are not unique, a case has no group, or a split names unknown cases.
        SettingsError: if a fold or split does not exist.
    """
    cases = sorted(cases, key=case_name)
    twice = [name for name, count in Counter(map(case_name, cases)).items() if count > 1]
    if twice:
        raise DataError(f"several cases are called {twice[0]}; rename them")
    if fold == "all":
        return {"training": cases, "validation": cases}
    if fold is not None and (isinstance(fold, bool) or not isinstance(fold, int) or fold < 0):
        raise SettingsError(f"fold is {fold!r}; it must be a number from 0, all, or null")
    if splits:
        return whole_patients(_given_split(cases, splits, fold or 0), patient, splits)
    if len(cases) < 2:
        return {"training": cases, "validation": cases}
    members = _members(cases, group, patient)
    strata = [stratify(case) for case in cases] if stratify else None
    together = bool(group or patient)
    count = max(1, round(validation_share * len(cases)))
    if fold is None and strata is None:
        chosen = _hold_out(members, count, seed)
    elif fold is None and strata is not None and not together:
        chosen = _stratified_hold_out(strata, min(count, len(cases) - 1), seed)
    elif fold is None and strata is not None and len(set(members)) > 1:
        parts = min(len(set(members)), max(2, round(len(cases) / count)))
        chosen = set(_folds(len(cases), parts, seed=seed, groups=members, strata=strata)[0])
    elif fold is None:
        chosen = set(range(len(cases)))
    elif folds < 2:
        raise SettingsError(f"folds is {folds}; cross-validation needs at least 2, or leave out --fold")
    else:
        if fold >= folds:
            raise SettingsError(f"fold {fold} does not exist among {folds} folds; they count from 0")
        if len(set(members)) < folds:
            raise SettingsError(f"{len(set(members))} case(s) or groups do not make {folds} folds; lower --folds")
        chosen = set(_folds(len(cases), folds, seed=seed, groups=members if together else None, strata=strata)[fold])
    if len(chosen) == len(cases):  # one single group: validate on what is trained on
        return {"training": cases, "validation": cases}
    return {
        "training": [case for index, case in enumerate(cases) if index not in chosen],
        "validation": [case for index, case in enumerate(cases) if index in chosen],
    }


def whole_patients(lists: dict[str, list[Case]], patient: str | None, source: str) -> dict[str, list[Case]]:
    """Return a split that is given as it is, if it tears no patient apart.

    Raises:
        DataError: if it does, or if a case has no patient.
    """
    if patient:
        training, validation = ({*_values(lists[part], patient, "patient")} for part in ("training", "validation"))
        if both := sorted(training & validation):
            raise DataError(
                f"{source} has {len(both)} {patient}(s), such as {both[0]}, both in training and in validation; mend it"
            )
    return lists


def _members(cases: Sequence[Case], group: str | None, patient: str | None) -> list[str]:
    """Return what must stay together: the values of the group or patient column, or each case by itself.

    Raises:
        DataError: if a case lacks one, or a patient is in two groups.
    """
    if not group and not patient:
        return [case_name(case) for case in cases]
    patients = _values(cases, patient, "patient") if patient else []
    if not group:
        return patients
    groups = _values(cases, group, "group")
    of: dict[str, str] = {}
    for one, own in zip(patients, groups, strict=bool(patients)):
        if of.setdefault(one, own) != own:
            raise DataError(
                f"the {patient} {one} is in the {group} {of[one]!r} and {own!r}, so that a split cannot keep both "
                "together; drop --group or --patient"
            )
    return groups


def _values(cases: Sequence[Case], column: str, option: str) -> list[str]:
    for case in cases:
        if str(case.get(column, "")) == "":
            raise DataError(
                f"{case_name(case)} has no {column!r}; add it to the table or the datalist, or drop --{option}"
            )
    return [str(case[column]) for case in cases]


def _hold_out(members: Sequence[str], count: int, seed: int) -> set[int]:
    """Draw whole groups until ``count`` cases are held out, but leave one group for training."""
    names = sorted(set(members))
    order = random.Random(seed).sample(range(len(names)), len(names))
    chosen: set[int] = set()
    for place in order[:-1]:
        if len(chosen) >= count:
            break
        chosen |= {index for index, member in enumerate(members) if member == names[place]}
    return chosen or set(range(len(members)))


def _stratified_hold_out(strata: Sequence[str], count: int, seed: int) -> set[int]:
    """Draw ``count`` cases, of each stratum its share; what rounding leaves goes to the largest remainders."""
    sizes = Counter(strata)
    quotas = {name: count * size / len(strata) for name, size in sizes.items()}
    taken = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: (taken[name] - quotas[name], name))
    for name in by_remainder[: count - sum(taken.values())]:
        taken[name] += 1
    rng = random.Random(seed)
    return {
        index
        for name in sorted(sizes)
        for index in rng.sample([at for at, other in enumerate(strata) if other == name], taken[name])
    }


def _folds(
    count: int, folds: int, *, seed: int, groups: Sequence[str] | None, strata: Sequence[str] | None
) -> list[list[int]]:
    """Return the cases that each fold validates on."""
    # not at the top: a second of imports that listing does not need
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    if strata is not None:
        rare = sorted(name for name, size in Counter(strata).items() if size < folds)
        if rare:
            named = ", ".join(rare[:5]) + (", ..." if len(rare) > 5 else "")
            tqdm.write(f"note: {len(rare)} kind(s) of cases ({named}) have fewer cases than the {folds} parts")
        if max(Counter(strata).values()) < folds:
            tqdm.write("every kind is that rare, so the parts are drawn without regard to it")
            strata = None
    if strata is None:
        splitter = (GroupKFold if groups else KFold)(n_splits=folds, shuffle=True, random_state=seed)
    else:
        splitter = (StratifiedGroupKFold if groups else StratifiedKFold)(
            n_splits=folds, shuffle=True, random_state=seed
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # told above
        parts = [part.tolist() for _, part in splitter.split(np.zeros(count), strata, groups)]
    if not all(parts):
        raise DataError(f"the groups do not spread over {folds} parts: one would be empty; lower --folds")
    return parts


def _given_split(cases: Sequence[Case], splits: str, fold: int) -> dict[str, list[Case]]:
    try:
        content: Any = json.loads(as_path(splits).read_text("utf-8"))
        parts = {"training": list(content[fold]["train"]), "validation": list(content[fold]["val"])}
    except IndexError as error:
        raise SettingsError(f"{splits} has no fold {fold}; it holds {len(content)}, counted from 0") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{splits} cannot be read as a list of train and val names: {error!r}") from error
    known = {case_name(case): case for case in cases}
    missing = [name for names in parts.values() for name in names if name not in known]
    if missing:
        raise DataError(f"{splits} names {missing[0]}, which is not among the {len(cases)} cases")
    return {part: [known[name] for name in names] for part, names in parts.items()}


def _pairs(folder: Path, channels: int | None) -> list[Case]:
    if (listed := described_cases(folder)) is not None:
        return listed
    for images, labels in LABELLED:
        if (folder / images).is_dir():
            cases = _with_labels(folder / images, folder / labels, channels)
            for case in cases:
                if "label" not in case:
                    image = case["image"] if isinstance(case["image"], str) else case["image"][0]
                    raise DataError(
                        f"{image} has no label: {folder / labels / case_name(case)}.nii.gz is missing; add it or move "
                        "the image away"
                    )
            return cases
    expected = " or ".join(f"{a}/ and {b}/" for a, b in LABELLED)
    raise DataError(
        f"{folder} holds no labelled data: it needs {expected} with files of the same name, or a --datalist"
    )


def _with_labels(images: Path, labels: Path, channels: int | None) -> list[Case]:
    """Find the label of each case, under the name of its file or of what its channels have in common."""
    files = [path.absolute() for path in volumes_in(images)]
    alone: list[Case] = [{"image": str(file)} for file in files]
    together = channel_cases(files, channels=channels)
    series = Counter(stem(images_of(case)[0]) for case in alone if is_series(case))
    found = [
        [
            case
            | _label_of(case, images, labels, [name for file in images_of(case) if series[name := stem(file)] == 1])
            for case in named_below(cases, images)
        ]
        for cases in ((together, alone) if channels is not None and channels > 1 else (alone, together))
    ]
    return max(found, key=lambda cases: sum("label" in case for case in cases) / len(cases))  # the first, if equal


def _label_of(case: Case, images: Path, labels: Path, own: Sequence[str]) -> dict[str, str]:
    """Find a label that lies as its image does, or under the name of the case or another of its own."""
    for name in (path_below(case, images), case_name(case), *own):
        for ending in ENDINGS:
            file = labels / f"{name}{ending}"
            if file.is_file():
                return {"label": str(file.absolute())}
    return {}
