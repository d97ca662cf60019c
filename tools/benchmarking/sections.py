# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The parts of a Markdown page that commands write, each between two marks; what is around them people wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.files import replace_file

__all__ = ["replace_section", "write_section"]


def replace_section(path: Path, marks: tuple[str, str], figures: str) -> bool:
    """Replace what lies between the marks of a page; return whether it has them, in this order.

    Args:
        path: of the page; all else in it is kept.
        marks: before and after.
        figures: Markdown.
    """
    text = path.read_text("utf-8") if path.is_file() else ""
    before, first, rest = text.partition(marks[0])
    _, second, after = rest.partition(marks[1])
    if not first or not second:
        return False
    _put(path, f"{before}{_between(marks, figures)}{after}")
    return True


def write_section(path: Path, section: str, text: Sequence[str]) -> None:
    """Write the figures of a part of a page between its marks, or at its end where there are none yet.

    Args:
        path: of the page; all else in it is kept.
        section: name of the part.
        text: its paragraphs and tables.
    """
    marks, figures = (f"<!-- figures: {section} -->", f"<!-- end of figures: {section} -->"), "\n".join(text)
    if not replace_section(path, marks, figures):
        page = f"{path.read_text('utf-8')}\n" if path.exists() else ""
        _put(path, f"{page}{_between(marks, figures)}\n")


def _between(marks: tuple[str, str], figures: str) -> str:
    return f"{marks[0]}\n\n{figures}\n{marks[1]}"


def _put(path: Path, page: str) -> None:
    replace_file(path, lambda temporary: Path(temporary).write_text(page, "utf-8"))
