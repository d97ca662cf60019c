# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Score predicted segmentations against references, whoever made them: Dice, NSD, HD95 and volume error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common.data import segmentation_task
from common.data.cases import stem
from common.data.listing.case_tables import CaseTable
from common.data.listing.descriptions import check_names_of_classes
from common.data.listing.folders import volumes_in
from common.data.listing.members import wanted_columns
from common.engines.evaluation import Pair, evaluate_pairs, found_values
from common.errors import DataError
from common.terminal import near
from common.transforms import without_ending

from ..commanding.ending import end, tool_command
from .settings import Evaluate

__all__ = ["evaluate"]


def evaluate(settings: Evaluate) -> None:
    """Score predictions."""
    pairs, missing, unmatched = _pairs(settings)
    labels, ignore_label = settings.labels, settings.ignore_label
    if labels is None:
        known = found_values(pairs, ignore_label=ignore_label, num_workers=settings.num_workers)
        structures: dict[str, Sequence[int]] = {f"class {value}": (value,) for value in known}
    else:
        check_names_of_classes(labels, settings.references, settings.references.parent)
        task = segmentation_task(labels, regions=settings.regions, ignore_label=ignore_label)
        structures, known = dict(zip(task.names, task.values, strict=True)), list(task.label_values)
        ignore_label = task.ignore_label
    named = ", ".join(f"{'+'.join(map(str, own))} {name}" for name, own in structures.items())
    print(f"scoring {near(settings.predictions)} against {near(settings.references)}: {len(pairs)} cases; {named}")
    groups = None if settings.groups is None else str(settings.groups)
    evaluate_pairs(
        pairs,
        output_dir=str(settings.output),
        structures=structures,
        known=known,
        ignore_label=ignore_label,
        tolerance_mm=settings.tolerance_mm,
        group=settings.group,
        patient=settings.patient,
        resamples=settings.resamples,
        seed=settings.seed,
        num_workers=settings.num_workers,
        strict=settings.strict,
        settings={"labels": labels, "groups": groups, "predictions_without_reference": unmatched},
        missing=missing,
        report=settings.report,
    )
    following = tool_command("new_task", "BUNDLE", "--model", "MODEL.pt", "--output", "my_task")
    end(
        settings.output / "scores.csv",
        look=settings.output / ("report.html" if settings.report else "scores.png"),
        following=following,
    )


def _pairs(settings: Evaluate) -> tuple[list[Pair], dict[str, DataError], list[str]]:
    """Return predictions with their references, what references lack a prediction, and what predictions a reference."""
    predicted, wanted = settings.predictions, settings.references
    if predicted.is_dir():
        ours, theirs = _label_maps(predicted), _label_maps(wanted)
    else:
        ours, theirs = {stem(wanted): predicted}, {stem(wanted): wanted}
    missing = {
        name: DataError(f"there is no prediction of {path}; predict it or take the reference away")
        for name, path in theirs.items()
        if name not in ours
    }
    unmatched = [name for name in ours if name not in theirs]
    if unmatched:
        more = ", ..." if len(unmatched) > 10 else ""
        tqdm.write(f"{len(unmatched)} prediction(s) without a reference: {', '.join(unmatched[:10])}{more}")
    if len(missing) == len(theirs):
        raise DataError(
            f"no file of {predicted} has the name of one in {wanted}, for example {next(iter(theirs.values())).name}; "
            "rename them alike"
        )
    table = None
    if settings.groups:
        table = CaseTable(str(settings.groups), columns=wanted_columns(settings.group, settings.patient))
    named = [name for name in theirs if name not in missing]
    about = {name: table.of(name) if table else {} for name in named}
    return [Pair(name, str(ours[name]), str(theirs[name]), about=about[name]) for name in named], missing, unmatched


def _label_maps(folder: Path) -> dict[str, Path]:
    """Return the volumes below a folder by their path in it without endings, and print what is left out."""
    found: dict[str, Path] = {}
    for path in volumes_in(folder):
        name = without_ending(path.relative_to(folder).as_posix())
        if name in found:
            raise DataError(f"{folder} holds both {found[name].name} and {path.name}; keep one of them")
        found[name] = path
    return found
