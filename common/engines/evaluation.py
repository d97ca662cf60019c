# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Score predicted label maps against references, file by file, and write what came out."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ..data.cases import Case, case_name, images_of
from ..data.checking.checks import read_image
from ..data.identity import Origins, same_images
from ..data.listing.case_tables import CaseTable
from ..data.listing.descriptions import segmentation_task
from ..data.listing.labelled import labelled_lists
from ..data.listing.members import Members, members_of, wanted_columns
from ..data.prediction import prediction_outputs
from ..data.problems import settle
from ..errors import DataError, SettingsError
from ..metrics import (
    draw_groups,
    draw_scores,
    format_groups,
    format_summary,
    group_scores,
    group_title,
    known_mean,
    score_maps,
    summarise,
    write_scores,
)
from ..metrics.groups import GROUPS_PICTURE
from ..paths import as_path
from ..terminal import near, progress_bar
from ..transforms import same_grid, whole_numbers
from .pages import PAGE, write_evaluation_page
from .telling import tell_beginning

__all__ = ["Pair", "evaluate_pairs", "evaluate_predictions", "found_values"]

T = TypeVar("T")
R = TypeVar("R")
_MOST_VALUES = 500  # of a label map; an image has more
_DEFINITIONS = {
    "dice": "2 |P and R| / (|P| + |R|) over voxels",
    "nsd": "surface Dice of arXiv:1809.04430: share of both surfaces' area that lies within tolerance_mm of the other",
    "hd95_mm": "larger of the two directions' 95th percentile of distances between border voxels",
    "volume_error_ml": "predicted - reference",
    "empty": "neither holds the class: left out; only one of them: Dice and NSD 0, HD95 infinite and out of its mean",
    "mean": "plain mean over classes of the means over cases",
    "interval": "95 %, bootstrap over cases, or over patients where they are told, with percentiles for few of them",
    "gap": "best less worst group of enough patients; its interval holds the differences of all pairs at once",
}


@dataclass(frozen=True)
class Pair:
    """A predicted label map and its reference, both NIfTI, its scan if that is known, and what a table says of it."""

    case: str
    prediction: str
    reference: str
    image: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def _label_map(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the whole numbers of a label map, and its affine."""
    values, affine = read_image(path)
    return whole_numbers(values, path), affine


def _read(pair: Pair, ignore_label: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return prediction and reference without ignored voxels, and the steps from voxel to voxel in mm, ``(3, 3)``.

    Raises:
        DataError: if one is no label map or they do not share one grid.
    """
    predicted, affine = _label_map(pair.prediction)
    wanted, true_affine = _label_map(pair.reference)
    turn = same_grid(
        pair.prediction,
        predicted.shape,
        affine,
        onto=pair.reference,
        onto_shape=wanted.shape,
        onto_affine=true_affine,
        remedy="predict the image of that label, or resample one onto the other with nearest neighbours",
    )
    predicted = turn.array(predicted)
    if ignore_label is not None:
        counted = wanted != ignore_label
        predicted, wanted = predicted * counted, wanted * counted
    return predicted, wanted, true_affine[:3, :3]


def _map(function: Callable[[T], R], items: Sequence[T], *, title: str, workers: int) -> list[R]:
    """Call ``function`` on every item in threads: reading and geometry release Python's lock."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        return list(progress_bar(pool.map(function, items), total=len(items), desc=title, unit="case"))


def found_values(pairs: Sequence[Pair], *, ignore_label: int | None = None, num_workers: int = 2) -> list[int]:
    """Return the label values other than 0 that the references hold, or only predictions, which is said.

    Raises:
        DataError: if there are none, or so many that the files are no label maps.
    """

    def values(pair: Pair) -> tuple[set[int], set[int]]:
        try:
            predicted, wanted, _ = _read(pair, ignore_label)
        except DataError:
            return set(), set()  # told when it is scored
        return set(np.unique(wanted).tolist()), set(np.unique(predicted).tolist())

    each = _map(values, pairs, title="looking for classes", workers=num_workers)
    for pair, both in zip(pairs, each, strict=True):
        for path, own in zip((pair.reference, pair.prediction), both, strict=True):
            if len(own) > _MOST_VALUES:
                raise DataError(
                    f"{path} holds {len(own):,} different values; give label maps rather than images, or name the "
                    "classes with --labels"
                )
    wanted = {value for own, _ in each for value in own} - {0}
    extra = {value for _, own in each for value in own} - wanted - {0}
    if extra:
        named = ", ".join(map(str, sorted(extra)))
        tqdm.write(f"no reference holds the label value(s) {named}, but predictions do: scored as classes too, Dice 0")
    if any(value < 0 for value in wanted | extra):
        raise DataError(
            f"the label maps hold the negative value {min(wanted | extra)}; renumber it, or leave such voxels out with "
            "--ignore_label if the references hold it"
        )
    if not wanted | extra and any(own for own, _ in each):
        raise DataError("neither references nor predictions mark any voxel; check that these are the label maps")
    return sorted(wanted | extra)


def evaluate_pairs(
    pairs: Sequence[Pair],
    *,
    output_dir: str | Path,
    structures: Mapping[str, Sequence[int]],
    known: Iterable[int],
    ignore_label: int | None = None,
    tolerance_mm: float = 1.0,
    group: str | Sequence[str] | None = None,
    patient: str | None = None,
    resamples: int = 2000,
    seed: int = 12345,
    num_workers: int = 2,
    strict: bool = False,
    settings: Mapping[str, Any] | None = None,
    missing: Mapping[str, DataError] | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Score pairs of label maps; print a table; write ``scores.csv``, ``scores.json``, ``scores.png``, ``report.html``.

    Args:
        pairs: what to score.
        output_dir: folder for the files.
        structures: classes or regions, and the label values of each.
        known: all values that a label map may hold; a case with another is refused.
        ignore_label: value of the reference whose voxels count nowhere.
        tolerance_mm: of NSD.
        group: columns of ``Pair.about`` by whose values to report too, with ends of bands: ``site,age:40,60``.
        patient: column of the patients, who are then drawn instead of cases.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        num_workers: cases that are scored at a time; the scores do not depend on it.
        strict: stop if a case cannot be scored.
        settings: further settings to keep in the JSON.
        missing: cases that are known to lack a file, and why.
        report: write the page too, with the best and the worst case to look through.

    Returns:
        the summary, as in ``scores.json``.

    Raises:
        DataError: if there is nothing to score, or with ``strict`` and a bad case.
        SettingsError: if a setting does not fit.
    """
    _check_numbers(tolerance_mm=tolerance_mm, resamples=resamples, seed=seed, num_workers=num_workers)
    _check_names(pairs)
    members = members_of([pair.case for pair in pairs], [pair.about for pair in pairs], group=group, patient=patient)
    score = partial(_scores_of, structures=structures, ignore_label=ignore_label, tolerance_mm=tolerance_mm)
    score = partial(score, known={0, *known})
    found = _map(score, pairs, title="evaluating", workers=num_workers)
    problems = dict(missing or {})
    problems |= {pair.case: each for pair, each in zip(pairs, found, strict=True) if isinstance(each, DataError)}
    scored = {index: each for index, each in enumerate(found) if not isinstance(each, DataError)}
    settle(list(problems.values()), len(scored), strict=strict)
    if not scored:
        raise DataError("there is nothing to score; check the folders of predictions and references")
    members = members.part([*scored])
    often, scores = {"resamples": resamples, "seed": seed}, [*scored.values()]
    summary = summarise(scores, groups=members.named(), patients=members.patients, **often)
    apart = _apart(scores, members, **often)
    used = {"ignore_label": ignore_label, "tolerance_mm": tolerance_mm, "group": group, "patient": patient}
    cases = [
        {**_files(pairs[index]), **members.row(row), "scores": each} for row, (index, each) in enumerate(scored.items())
    ]
    write_scores(
        cases,
        {
            "summary": summary,
            "by_group": apart,
            "skipped": {case: str(error) for case, error in problems.items()},
            "settings": {"classes": _plain(structures), **used, **often, **(settings or {})},
            "definitions": _DEFINITIONS,
            "versions": _versions(),
        },
        folder=as_path(output_dir),
    )
    tqdm.write(f"{len(scored)} case(s) scored" + (f"; {len(problems)} could not be scored" if problems else ""))
    tqdm.write(format_summary(summary, tolerance_mm=tolerance_mm, group=group_title(members.groups)))
    _show(as_path(output_dir), cases, summary, apart, members, tolerance_mm, structures if report else None)
    return summary


def _apart(
    scores: Sequence[Mapping[str, Mapping[str, float]]], members: Members, *, resamples: int, seed: int
) -> dict[str, Any]:
    """Return the mean Dice of each group, with the gap between best and worst; the mean is that of the summary."""
    dice = np.array([[own["dice"] for own in each.values()] for each in scores])  # (cases, classes)
    return group_scores(
        lambda rows: float(known_mean(known_mean(dice[rows]))),
        members.groups,
        patients=members.patients,
        resamples=resamples,
        seed=seed,
    )


def _files(pair: Pair) -> dict[str, Any]:
    return {"case": pair.case, "prediction": pair.prediction, "reference": pair.reference, "image": pair.image}


def _show(
    folder: Path,
    cases: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    apart: Mapping[str, Any],
    members: Members,
    tolerance_mm: float,
    structures: Mapping[str, Sequence[int]] | None,
) -> None:
    """Draw the scores and their groups, and write the page where structures are given."""
    column, values = next(iter(members.named().items()), (None, None))
    draw_scores(
        [case["scores"] for case in cases],
        folder / "scores.png",
        groups=values,
        group=column,
        tolerance_mm=tolerance_mm,
    )
    written = ["scores.csv", "scores.json", "scores.png"]
    (folder / GROUPS_PICTURE).unlink(missing_ok=True)
    if apart:
        whole = summary["all"]["mean"]["dice"]["mean"]
        draw_groups(apart, folder / GROUPS_PICTURE, score="mean Dice", whole=whole)
        tqdm.write(format_groups(apart, score="mean Dice"))
        written.append(GROUPS_PICTURE)
    (folder / PAGE).unlink(missing_ok=True)
    if structures is not None:
        write_evaluation_page(folder, cases, summary, tolerance_mm=tolerance_mm, groups=apart, structures=structures)
        written.append(PAGE)
    tqdm.write(f"written to {near(folder)}: {', '.join(written)}")


def _plain(structures: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(own) for name, own in structures.items()}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("monai", "numpy", "scipy", "torch")}


def _check_names(pairs: Sequence[Pair]) -> None:
    """Refuse two cases of one name."""
    twice = [name for name, count in Counter(pair.case for pair in pairs).items() if count > 1]
    if twice:
        raise DataError(f"several cases are called {twice[0]}; give them different names")


def _check_numbers(*, tolerance_mm: Any, **counts: Any) -> None:
    """Refuse a tolerance, or numbers of anything, that cannot be."""
    if isinstance(tolerance_mm, bool) or not isinstance(tolerance_mm, (int, float)) or not 0 <= tolerance_mm < 1e6:
        raise SettingsError(f"tolerance_mm is {tolerance_mm!r}; give NSD a distance in millimetres, such as 1.0")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SettingsError(f"{name} is {value!r}; it must be a whole number from 0")


def _scores_of(
    pair: Pair,
    *,
    structures: Mapping[str, Sequence[int]],
    known: Collection[int],
    ignore_label: int | None,
    tolerance_mm: float,
) -> dict[str, dict[str, float]] | DataError:
    """Return the scores of a pair by structure, or why it has none."""
    try:
        predicted, wanted, steps = _read(pair, ignore_label)
        for path, found in ((pair.prediction, predicted), (pair.reference, wanted)):
            if other := [value for value in np.unique(found).tolist() if value not in known]:
                named = ", ".join(map(str, other[:5]))
                raise DataError(
                    f"{path} holds the values {named}, but the classes are {_plain(structures)}; renumber it or list "
                    "its classes with --labels"
                )
        return score_maps(predicted, wanted, structures=structures, spacing_mm=steps, tolerance_mm=tolerance_mm)
    except DataError as error:
        return error


def evaluate_predictions(
    *,
    predictions: str,
    dataset_dir: str,
    output_dir: str,
    labels: Sequence[str] | Mapping[str, int] | str,
    regions: Mapping[str, Sequence[int]] | None = None,
    ignore_label: int | None = None,
    datalist: str | None = None,
    split: str = "all",
    tolerance_mm: float = 1.0,
    groups: str | None = None,
    group: str | Sequence[str] | None = None,
    patient: str | None = None,
    resamples: int = 2000,
    seed: int = 12345,
    num_workers: int = 2,
    strict: bool = False,
    report: bool = True,
) -> dict[str, float | None]:
    """Score the predictions of an inference config in the geometry of their files.

    Args:
        predictions: folder with ``<case>.nii.gz`` as the inference config writes it.
        dataset_dir: labelled data.
        output_dir: folder for ``scores.csv``, ``scores.json``, ``scores.png`` and ``report.html``.
        labels: class names, background first, the values by name, or a ``dataset.json``, as in training.
        regions: sets of label values to score instead of the classes.
        ignore_label: value of voxels that count nowhere.
        datalist: MONAI datalist JSON with labels; its entries may have keys such as ``centre``.
        split: ``training``, ``validation`` or ``all`` cases of the labelled data.
        tolerance_mm: of NSD.
        groups: table with a column ``case``, or BIDS' ``participants.tsv``.
        group: columns of that table, or keys of the datalist, by whose values to report too; a quantity with the ends
            of its bands, ``site,age:40,60``.
        patient: column of the patients, who are then drawn for intervals instead of cases.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        num_workers: cases that are scored at a time.
        strict: stop if a case cannot be scored.
        report: write the page.

    Returns:
        mean Dice of each foreground class or region and their ``mean``; None where it is undefined.

    Raises:
        DataError: if there is nothing to score.
        SettingsError: if a setting does not fit.
    """
    task = segmentation_task(labels, regions=regions, ignore_label=ignore_label)
    lists = labelled_lists(dataset_dir, datalist, channels=None)
    if split not in (*lists, "all"):
        raise SettingsError(f"split is {split!r}; it must be training, validation or all")
    if groups and not group and not patient:
        raise SettingsError(f"groups is {groups}, but no column is chosen; add --group centre, or --patient NAME")
    chosen = lists["training"] + lists["validation"] if split == "all" else lists[split]
    cases = {case["label"]: case for case in chosen}.values()
    table = CaseTable(groups, columns=wanted_columns(group, patient)) if groups else None
    about = {case["label"]: case if table is None else table.of(case_name(case)) for case in cases}
    pairs, missing = _pairs_of(cases, predictions, about)
    tell_beginning(f"scoring {predictions}", cases={"to score": pairs, "without a prediction": len(missing)}, task=task)
    summary = evaluate_pairs(
        pairs,
        output_dir=output_dir,
        structures=dict(zip(task.names, task.values, strict=True)),
        known=task.label_values,
        ignore_label=task.ignore_label,
        tolerance_mm=tolerance_mm,
        group=group,
        patient=patient,
        resamples=resamples,
        seed=seed,
        num_workers=num_workers,
        strict=strict,
        settings={"labels": task.plain_labels, "split": split, "datalist": datalist, "groups": groups},
        missing=missing,
        report=report,
    )["all"]
    means = {name: scores["dice"]["mean"] for name, scores in summary["classes"].items()}
    return {**means, "mean": summary["mean"]["dice"]["mean"]}


def _pairs_of(
    cases: Iterable[Case], predictions: str, about: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Pair], dict[str, DataError]]:
    """Return the cases with their predictions, and why others have none; say how many are told by their names alone.

    Args:
        cases: with labels.
        predictions: folder.
        about: what is known of the cases, by their label.
    """
    pairs: list[Pair] = []
    missing: dict[str, DataError] = {}
    made, untold = Origins(predictions).read(), 0
    for case in cases:
        name = case_name(case)
        output = prediction_outputs(name)[0]
        path = as_path(predictions) / output
        if not path.is_file():
            missing[name] = DataError(f"there is no prediction {path}; run the inference config on its image first")
            continue
        known = _is_of(made.get(output), case)
        if known is False:
            missing[name] = DataError(
                f"{path} was made of another image than {images_of(case)[0]}, or of that one before it was changed; "
                "predict that image again"
            )
            continue
        untold += known is None
        pairs.append(Pair(name, str(path), case["label"], str(images_of(case)[0]), about[case["label"]]))
    if untold:
        tqdm.write(
            f"note: nothing tells of which images {untold} of {len(pairs)} prediction(s) were made; they are taken for "
            "those of the cases by their names alone"
        )
    return pairs, missing


def _is_of(about: Mapping[str, Any] | None, case: Case) -> bool | None:
    """Return whether a prediction was made of the images of a case; None where nothing tells, or they are not here."""
    if about is None:
        return None
    try:
        return same_images(about["images"], case)
    except OSError:
        return None
