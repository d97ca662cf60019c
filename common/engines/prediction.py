# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Predicting a folder of cases: one that fails is reported with what to do, and the rest is done."""

from __future__ import annotations

import errno
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

from ..data.cases import Case
from ..data.checking.checks import tell_nearly_zero
from ..data.identity import Origins
from ..data.prediction import MADE_OF, NEARLY_ZERO, PROBLEM, prediction_outputs
from ..drawing import draw_prediction
from ..errors import DataError, SettingsError, causes, disk_is_full, sentence
from ..files import write_json
from ..paths import as_path, output_file
from ..terminal import near
from ..transforms.restoring import CASE
from .pages import PAGE, write_prediction_page

__all__ = ["EachCase"]

_FAILED = "failed.json"
_SHOWN = 2  # cases on the page


class EachCase:
    """What MONAI's evaluator does with a batch of one case, going on after a failure.

    It is both the evaluator's ``iteration_update`` and one of its handlers. A failed case is listed in
    ``output_dir/failed.json`` with what was wrong; the last line of a run counts. Of the first cases a picture of the
    written prediction on its image goes to ``output_dir/pictures``, and two of them to look through into
    ``output_dir/report.html``. What each prediction was made of is noted beside
    them, see :class:`common.data.identity.Origins`.

    Args:
        cases: all that were asked for.
        pending: those of this run.
        output_dir: where predictions go.
        labels: names of the label values.
        pictures: how many pictures to draw; 0 draws none and writes no page.
        probabilities: they are written too.
        strict: stop at the first failure.
        settings: of this run, noted with the predictions.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        pending: Sequence[Case],
        *,
        output_dir: str,
        labels: Sequence[str] | Mapping[int, str],
        pictures: int | bool = 20,
        probabilities: bool = False,
        strict: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(pictures, int) or pictures < 0:
            raise SettingsError(f"pictures is {pictures!r}; it must be a number of cases from 0")
        self.asked, self.kept, self.folder = len(cases), len(cases) - len(pending), as_path(output_dir)
        self.labels, self.strict, self.settings = labels, strict, dict(settings or {})
        self.probabilities, self.origins = probabilities, Origins(self.folder)
        self.pictures = 20 if pictures is True else int(pictures)
        self.predicted, self.drawn = 0, 0
        self.shown: list[tuple[str, str, Path]] = []  # what the page shows: name, image, prediction
        self.failed: list[dict[str, str]] = []
        self.nearly_zero: dict[str, float] = {}  # share of such voxels, by file

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)

    def __call__(self, engine: Engine, batch: dict[str, Any]) -> Any:
        """Predict one case and write it; the arguments are those of an ignite process function."""
        name, file = batch[CASE][0], batch["file"][0]
        if PROBLEM in batch:
            self._fail(name, file, DataError(batch[PROBLEM][0]))
            return {}
        outputs, picture = prediction_outputs(name, probabilities=True), self._picture(name)
        self.origins.begin(outputs)
        for beside in (self.folder / outputs[1], picture):  # of what the prediction was before
            beside.unlink(missing_ok=True)
        try:
            output = engine._iteration(engine, batch)  # type: ignore[attr-defined]
        except SettingsError:
            raise
        except Exception as error:
            self._fail(name, file, error)
            engine.state.output = engine.state.batch = None  # what is left of it may be what filled the memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return {}
        made = prediction_outputs(name, probabilities=self.probabilities)
        self.origins.note(made, json.loads(batch[MADE_OF][0]), self.settings)
        self.nearly_zero[file] = float(batch[NEARLY_ZERO][0])
        self.predicted += 1
        if self.drawn < self.pictures:
            self._draw(name, file)
        return output

    def _start(self, engine: Engine) -> None:
        for name in (_FAILED, PAGE):  # of an earlier run, whose failed cases are tried again
            (self.folder / name).unlink(missing_ok=True)

    def _fail(self, name: str, file: str, error: Exception) -> None:
        if disk_is_full(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder)) from error
        told = _told(name, error)
        if self.strict:
            raise DataError(told) from error
        record = {"case": name, "image": file, "problem": told}
        if sentence(error) is None:
            *_, first = causes(error)
            record["details"] = "".join(traceback.format_exception(first, chain=False))
        self.failed.append(record)
        write_json(self.failed, self.folder / _FAILED)

    def _draw(self, name: str, file: str) -> None:
        self.drawn += 1
        prediction = self.folder / prediction_outputs(name)[0]
        try:
            draw_prediction(file, prediction, self._picture(name), labels=self.labels, title=name)
            self.shown = [*self.shown, (name, file, prediction)][:_SHOWN]
        except Exception as error:  # the prediction itself is there
            if disk_is_full(error):
                raise
            tqdm.write(f"note: no picture of {name} ({error})")

    def _picture(self, name: str) -> Path:
        return output_file(self.folder / "pictures", name, ".png")

    def report(self) -> None:
        """Say what was predicted and what failed; for the end of a run.

        Raises:
            DataError: if cases failed and none was predicted.
        """
        tell_nearly_zero(self.nearly_zero, total=self.asked - self.kept)
        line = f"{self.predicted + self.kept} of {self.asked} cases predicted"
        if self.kept:
            line += f" ({self.kept} of them before)"
        if self.shown:
            write_prediction_page(self.folder, self.shown, labels=self.labels, told=line)
        if not self.failed:
            tqdm.write(f"{line}; they are in {near(self.folder)}")
            return
        listed = "\n".join(f"  - {failure['problem']}" for failure in self.failed)
        line += f", {len(self.failed)} failed; see {self.folder / _FAILED}"
        if not self.predicted:
            raise DataError(f"nothing could be predicted:\n{listed}\n{line}")
        tqdm.write(f"Failed:\n{listed}\n{line}")


def _told(name: str, error: Exception) -> str:
    """Return a sentence about what went wrong with a case and what to do."""
    known = sentence(error)
    if known is not None:
        return known if name in known else f"{name}: {known}"
    *_, first = causes(error)
    lines = [line for line in str(first).splitlines() if line.strip()] or [""]
    text = lines[-1 if any("Traceback" in line for line in lines) else 0]  # MONAI's writers put theirs into the message
    if isinstance(first, torch.OutOfMemoryError):
        return f"{name} does not fit into the GPU's memory; add --accumulate_on cpu, or predict it with --device cpu"
    if isinstance(first, MemoryError) or "can't allocate memory" in str(first):
        return f"{name} does not fit into the memory; lower --memory_limit_gb or use a machine that has more"
    return f"{name} failed with {type(first).__name__}: {text[:300]}; failed.json holds the details"
