# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Score predicted segmentations against references, whoever made them: Dice, NSD, HD95 and volume error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..commanding.commands import truth

__all__ = ["evaluate"]


def _label_maps(folder: Path) -> dict[str, Path]:
    """Return the volumes below a folder by their path in it without endings, and print what is left out."""
    from common.data.listing.folders import volumes_in
    from common.errors import DataError
    from common.transforms import without_ending

    found: dict[str, Path] = {}
    for path in volumes_in(folder):
        name = without_ending(path.relative_to(folder).as_posix())
        if name in found:
            raise DataError(f"{folder} holds both {found[name].name} and {path.name}; keep one of them")
        found[name] = path
    return found


def evaluate(
    predictions: str,
    references: str,
    labels: Sequence[str] | Mapping[str, int] | str | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    ignore_label: int | None = None,
    tolerance_mm: float = 1.0,
    groups: str | None = None,
    group: str | None = None,
    output: str = "evaluation",
    resamples: int = 2000,
    seed: int = 12345,
    num_workers: int = 2,
    strict: bool = False,
) -> None:
    """Score predictions.

    Args:
        predictions: folder of label maps, or one file.
        references: folder of label maps of the same names, or one file.
        labels: names of the label values 0, 1, 2, ..., background first; the value of each name; or a dataset.json.
        regions: sets of label values to score instead of the classes.
        ignore_label: value of the references whose voxels count nowhere.
        tolerance_mm: distance up to which NSD takes two surfaces as equal.
        groups: CSV with a column "case" and others.
        group: the column of it by whose values to report too.
        output: folder to write to.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        num_workers: cases that are scored at a time.
        strict: stop if a case cannot be scored.
    """
    from tqdm import tqdm

    from common.data import segmentation_task
    from common.data.cases import stem
    from common.engines.evaluation import Pair, evaluate_pairs, found_values, read_groups
    from common.errors import DataError, SettingsError
    from common.paths import as_path

    predicted, wanted = as_path(predictions), as_path(references)
    for path in (predicted, wanted):
        if not path.exists():
            raise DataError(f"there is no file or folder {path}; check the path")
    if predicted.is_dir() != wanted.is_dir():
        raise SettingsError(f"{predicted} and {wanted} must both be folders, or both files")
    if bool(groups) != bool(group):
        raise SettingsError("groups and group belong together: --groups cases.csv --group centre")
    if regions is not None and labels is None:
        raise SettingsError("regions need the names of the label values: --labels \"['background','edema','core']\"")
    if ignore_label is not None and (isinstance(ignore_label, bool) or not isinstance(ignore_label, int)):
        raise SettingsError(f"ignore_label is {ignore_label!r}; it must be a whole number")
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
    table = read_groups(groups, str(group)) if groups else {}
    pairs = [
        Pair(name, str(ours[name]), str(path), table.get(name)) for name, path in theirs.items() if name not in missing
    ]
    if labels is None:
        known = found_values(pairs, ignore_label=ignore_label, num_workers=num_workers)
        structures: dict[str, Sequence[int]] = {f"class {value}": (value,) for value in known}
    else:
        task = segmentation_task(labels, regions=regions, ignore_label=ignore_label)
        structures, known = dict(zip(task.names, task.values, strict=True)), list(task.label_values)
        ignore_label = task.ignore_label
    evaluate_pairs(
        pairs,
        output_dir=str(output),
        structures=structures,
        known=known,
        ignore_label=ignore_label,
        tolerance_mm=tolerance_mm,
        group=None if group is None else str(group),
        resamples=resamples,
        seed=seed,
        num_workers=num_workers,
        strict=truth(strict),
        settings={"labels": labels, "groups": groups, "predictions_without_reference": unmatched},
        missing=missing,
    )
