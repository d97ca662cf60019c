# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Cases to predict: which are still to do, a look at their headers, and reading them without stopping at a bad one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import Dataset
from tqdm import tqdm

from ..errors import DataError, SettingsError, causes
from ..paths import as_path, check_names, file_name
from ..transforms.grids import slant_degrees
from ..transforms.restoring import CASE
from .cases import PROBABILITIES, Case, case_name, images_of
from .checking.checks import check_channels, explain, tell_slants
from .identity import Origins, identity_of, same_images
from .problems import attempt, settle

__all__ = [
    "MADE_OF",
    "NEARLY_ZERO",
    "PROBLEM",
    "PredictionDataset",
    "check_headers",
    "pending_cases",
    "prediction_outputs",
]

PROBLEM = "problem"  # key of what is wrong with a case that could not be read
NEARLY_ZERO = "nearly_zero"  # key of the share of its voxels that are nearly but not exactly 0
MADE_OF = "made_of"  # key of what tells its images from all others, as JSON


def prediction_outputs(name: str, *, probabilities: bool = False) -> list[str]:
    """Return the files that are written for a case, below the folder of predictions: label map, then probabilities."""
    file = file_name(name)
    return [f"{file}.nii.gz", *([f"{PROBABILITIES}/{file}_probabilities.nii.gz"] if probabilities else [])]


def pending_cases(
    cases: Sequence[Case],
    *,
    output_dir: str,
    overwrite: bool = False,
    probabilities: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> list[Case]:
    """Return the cases whose prediction ``output_dir/<case>.nii.gz`` is not there yet; with ``overwrite``, all.

    A prediction that was made of another image of the same name, or of this one before it was changed, is none of this
    case. Where nothing tells what a prediction was made of, nothing is predicted.

    Args:
        cases: to predict.
        output_dir: where predictions go.
        overwrite: predict again what is there.
        probabilities: what is there must have its probabilities beside it.
        settings: of this run; those of predictions that are kept must be the same.

    Raises:
        DataError: if two cases would write the same file, or a prediction would replace an image, or nothing tells what
            a prediction was made of.
        SettingsError: if predictions of other settings are there.
    """
    folder = as_path(output_dir)
    check_names(map(case_name, cases))
    made = Origins(folder).read()
    now = json.loads(json.dumps(dict(settings or {})))
    seen: dict[str, str] = {}
    pending: list[Case] = []
    others: list[str] = []
    untold: list[Path] = []
    for case in cases:
        outputs = prediction_outputs(case_name(case), probabilities=probabilities)
        files = [folder / output for output in outputs]
        if any(Path(file).resolve() == files[0].resolve() for file in images_of(case)):
            raise DataError(f"the prediction of {files[0]} would replace it; give another --output_dir")
        if overwrite or not all(file.exists() for file in files):
            pending.append(case)
            continue
        if files[0].exists() and outputs[0] not in made:
            untold.append(files[0])
            continue
        ours = [made.get(output, {"images": None, "settings": now}) for output in outputs]
        if not all(each["images"] and _is_of(each["images"], case, seen) for each in ours):
            others += [outputs[0]] if ours[0]["images"] else []
            pending.append(case)
            continue
        before = ours[0]["settings"]
        if changed := [f"{k} {before.get(k)!r} -> {now[k]!r}" for k in now if before.get(k) != now[k]]:
            raise SettingsError(
                f"the predictions in {folder} were made otherwise ({'; '.join(changed)}); "
                "give another --output_dir, or redo them with --overwrite true"
            )
    if untold:
        raise DataError(
            f"nothing tells which image {untold[0]} was made of (an earlier version wrote it, or another program), nor "
            f"of {len(untold) - 1} more there; give another --output_dir, or predict them again with --overwrite true"
        )
    if others:
        tqdm.write(
            f"{len(others)} prediction(s) in {output_dir}, such as {others[0]}, are of other images of the same names, "
            "or of these before they were changed, and are made anew"
        )
    if len(pending) < len(cases):
        tqdm.write(
            f"{len(cases) - len(pending)} of {len(cases)} predictions are in {output_dir} already and are kept; "
            "--overwrite true redoes them"
        )
    return pending


def _is_of(images: Any, case: Case, seen: dict[str, str]) -> bool:
    try:
        return same_images(images, case, seen)
    except OSError:
        return False  # told when it is read


def check_headers(cases: Sequence[Case], *, channels: int = 1, strict: bool = False) -> list[Case]:
    """Look at the headers of all cases before the first is predicted, and report the bad ones.

    Returns:
        all cases; :class:`PredictionDataset` will refuse the bad ones again.

    Raises:
        DataError: with ``strict`` and a bad case, or if none is usable.
    """
    slants: dict[str, float] = {}

    def look(case: Case) -> None:
        slants[images_of(case)[0]] = slant_degrees(check_channels(case, channels).affine)

    problems = [problem for problem in attempt(look, cases) if problem]
    settle(problems, len(cases) - len(problems), strict=strict)
    tell_slants(slants, total=len(cases))
    return list(cases)


class PredictionDataset(Dataset):
    """Read and preprocess cases; one that cannot be read becomes a dictionary with its ``problem``.

    Args:
        data: cases.
        transform: preprocessing.
        channels: of an image.
    """

    def __init__(
        self, data: Sequence[Case], *, transform: Callable[[dict[str, Any]], dict[str, Any]], channels: int = 1
    ) -> None:
        super().__init__(data, transform)
        self.channels = channels

    def _transform(self, index: int) -> dict[str, Any]:
        case = self.data[index]
        name, file = case_name(case), images_of(case)[0]
        try:
            check_channels(case, self.channels)
            made_of = json.dumps(identity_of(case))  # before it is read, so that a change meanwhile is found later
            item = self.transform({"image": case["image"]})
            if any(float(channel.min()) == float(channel.max()) for channel in item["image"]):
                raise DataError(f"{file} is constant where it is not zero; leave out the file")
        except SettingsError:
            raise
        except Exception as error:
            *_, cause = causes(error)
            if isinstance(cause, SettingsError):
                raise
            return {
                CASE: name,
                "file": file,
                PROBLEM: str(explain(file, cause if isinstance(cause, Exception) else error)),
            }
        near = float(getattr(item["image"], "meta", {}).get("nearly_zero", 0))
        return item | {CASE: name, "file": file, MADE_OF: made_of, NEARLY_ZERO: near}
