# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Cases to predict: which are still to do, a look at their headers, and reading them without stopping at a bad one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import Dataset
from tqdm import tqdm

from ..errors import DataError, SettingsError, causes
from ..transforms.grids import slant_degrees
from ..transforms.restoring import CASE
from .cases import PROBABILITIES, Case, case_name, images_of
from .checking.checks import check_channels, explain, tell_slants
from .problems import attempt, settle

__all__ = ["PROBLEM", "PredictionDataset", "check_headers", "pending_cases", "prediction_file"]

PROBLEM = "problem"  # key of what is wrong with a case that could not be read
RECORD = "inference.json"


def prediction_file(output_dir: str | Path, case: Case) -> Path:
    """Return where the prediction of a case belongs."""
    return Path(output_dir) / f"{case_name(case)}.nii.gz"


def pending_cases(
    cases: Sequence[Case],
    *,
    output_dir: str,
    overwrite: bool = False,
    probabilities: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> list[Case]:
    """Return the cases whose prediction ``output_dir/<case>.nii.gz`` is not there yet; with ``overwrite``, all.

    Args:
        cases: to predict.
        output_dir: where predictions go.
        overwrite: predict again what is there.
        probabilities: what is there must have its probabilities beside it.
        settings: of this run; those of an earlier one with the same ``output_dir`` must be the same.

    Raises:
        DataError: if two cases would write the same file, or a prediction would replace an image.
        SettingsError: if predictions of other settings are there.
    """
    folder = Path(output_dir).expanduser()
    for case in cases:
        replaced = prediction_file(folder, case)
        if any(Path(file).resolve() == replaced.resolve() for file in images_of(case)):
            raise DataError(f"the prediction of {replaced} would replace it; give another --output_dir")
    twice = [name for name, count in Counter(map(case_name, cases)).items() if count > 1]
    if twice:
        raise DataError(
            f"several images are called {twice[0]}, and their predictions would replace each other; rename them"
        )

    def complete(case: Case) -> bool:
        beside = folder / PROBABILITIES / f"{case_name(case)}_probabilities.nii.gz"
        return prediction_file(folder, case).exists() and (beside.exists() or not probabilities)

    pending = [case for case in cases if overwrite or not complete(case)]
    if len(pending) < len(cases):
        done = len(cases) - len(pending)
        _compare(folder / RECORD, settings or {})
        tqdm.write(
            f"{done} of {len(cases)} predictions are in {output_dir} already and are kept; --overwrite true redoes them"
        )
    return pending


def _compare(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to mix predictions of different settings in one folder."""
    try:
        recorded = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return
    now = json.loads(json.dumps(dict(settings)))
    changed = [f"{k} {recorded[k]!r} -> {now[k]!r}" for k in now if k in recorded and recorded[k] != now[k]]
    if changed:
        raise SettingsError(
            f"the predictions in {file.parent} were made otherwise ({'; '.join(changed)}); "
            "give another --output_dir, or redo them with --overwrite true"
        )


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
        return item | {CASE: name, "file": file}
