# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the command ``study report`` does."""

from __future__ import annotations

from ..studies.commands import opened, written
from ..studies.settings import Report
from .report import write_report

__all__ = ["report"]


def report(settings: Report) -> None:
    """Write the report of what is finished."""
    study = opened(settings.study, settings.output)
    written(study)
    print(f"written: {write_report(study.folder)}")
