# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the command ``study report`` does."""

from __future__ import annotations

from ..studies.commands import opened, written

__all__ = ["report"]


def report(study: str, output: str = "") -> None:
    """Write the report of what is finished.

    Args:
        study: YAML file.
        output: folder of the study, instead of the one that the file says.
    """
    told = opened(study, output)
    written(told)
    from ..reporting.report import write_report

    print(f"written: {write_report(told.folder)}")
