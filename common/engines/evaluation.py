# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Dice of predictions against labels, per case and class."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.checks import read_nifti, settle
from ..data.datalists import stem
from ..data.labelled import labelled_lists
from ..data.task import SegmentationTask
from ..errors import DataError

__all__ = ["dice", "evaluate_predictions"]


def dice(prediction: np.ndarray, label: np.ndarray, value: int) -> float:
    """Return the Dice of one class; NaN if neither map holds it, 0 if only one does.

    Example:
        >>> dice(np.array([1, 1, 0]), np.array([1, 0, 0]), 1)
        0.6666666666666666
    """
    p, t = prediction == value, label == value
    total = int(p.sum()) + int(t.sum())
    return 2 * int((p & t).sum()) / total if total else float("nan")


def evaluate_predictions(
    *,
    predictions: str,
    dataset_dir: str,
    output_file: str,
    labels: Sequence[str],
    datalist: str | None = None,
    split: str = "all",
    strict: bool = False,
) -> dict[str, float]:
    """Score every predicted case in its own geometry, write a CSV and print the means.

    A case counts for a class unless both prediction and label lack it. The mean of a class is over its cases; the last
    row's mean is over the foreground classes.

    Args:
        predictions: folder with ``<case>.nii.gz`` as the inference config writes it.
        dataset_dir: labelled data.
        output_file: CSV to write: a row per case, a last row with the means.
        labels: class names, background first.
        datalist: MONAI datalist JSON with labels.
        split: ``training``, ``validation`` or ``all`` cases of the labelled data.
        strict: stop at the first case that cannot be scored.

    Returns:
        mean Dice of each foreground class and their ``mean``.

    Raises:
        DataError: if there is nothing to score.
    """
    SegmentationTask(labels)
    lists = labelled_lists(dataset_dir, datalist)
    if split not in (*lists, "all"):
        raise DataError(f"split is {split!r}; it must be training, validation or all")
    chosen = lists["training"] + lists["validation"] if split == "all" else lists[split]
    cases = list({case["label"]: case for case in chosen}.values())
    rows: list[dict[str, str | float]] = []
    problems: list[DataError] = []
    for case in tqdm(cases, desc="evaluating", unit="case", disable=len(cases) < 2):
        path = Path(predictions) / f"{stem(case['image'])}.nii.gz"
        try:
            if not path.is_file():
                raise DataError(f"there is no prediction {path}; run the inference config on {case['image']} first")
            predicted, affine = read_nifti(str(path))
            truth, true_affine = read_nifti(case["label"])
            if predicted.shape != truth.shape or not np.allclose(affine, true_affine, atol=1e-2):
                raise DataError(f"{path} and {case['label']} do not share one grid; predict the image of that label")
        except DataError as error:
            problems.append(error)
            continue
        scores = {name: dice(predicted, truth, value) for value, name in enumerate(labels) if value}
        rows.append({"case": stem(case["image"]), **scores})
    settle(problems, len(rows), strict=strict)
    means = {name: _mean([float(row[name]) for row in rows]) for name in labels[1:]}
    means["mean"] = _mean(list(means.values()))
    for row in rows:
        row["mean"] = _mean([float(row[name]) for name in labels[1:]])
    Path(output_file).parent.mkdir(parents=True, exist_ok=True)
    with open(output_file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=["case", *labels[1:], "mean"])
        writer.writeheader()
        writer.writerows([*rows, {"case": "mean", **means}])
    scores_text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    tqdm.write(f"Dice of {len(rows)} case(s): {scores_text}; written to {output_file}")
    return means


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
