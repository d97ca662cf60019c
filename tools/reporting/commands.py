# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the command ``study report`` does."""

from __future__ import annotations

from ..commanding.ending import end, tool_command
from ..studies.commands import opened, written
from ..studies.execution import state
from ..studies.settings import Report
from .report import write_report

__all__ = ["report"]


def report(settings: Report) -> None:
    """Write the report of what is finished."""
    with opened(settings.study, settings.output) as study:
        written(study)
        page = write_report(study.folder)
    output = () if settings.output is None else ("--output", settings.output)
    done = all(state(study.folder / "runs" / run.name) == "finished" for run in study.runs())
    end(page, following=None if done else tool_command("study", "run", settings.study, *output))
