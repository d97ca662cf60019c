# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A page as a list of parts, written as one HTML file that needs no other and no network, or as Markdown."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .charts import Points, curves_svg
from .files import replace_file
from .viewing import MEGABYTES, SCRIPT, STYLE, Scene, scene_html

__all__ = ["Chart", "Heading", "Part", "Picture", "Strong", "Table", "Text", "Volume", "write_html", "write_markdown"]

_LEAST_MEGABYTES = 1.5  # of a volume, however many there are
_STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; color: #1b1f24; background: #fff }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1.2rem 4rem }
nav { position: sticky; top: 0; z-index: 1; background: #fff; border-bottom: 1px solid #d0d7de; overflow-x: auto;
  white-space: nowrap; padding: .5rem 1.2rem; font-size: .9rem }
nav a { margin-right: 1.1rem; color: #0b4f9e; text-decoration: none }
nav a:hover, nav a:focus { text-decoration: underline }
h1 { font-size: 1.6rem; line-height: 1.25 }
h2 { font-size: 1.3rem; margin-top: 2.6rem; border-bottom: 1px solid #d0d7de }
h3 { font-size: 1.05rem; margin-top: 1.8rem } h2, h3 { scroll-margin-top: 3.2rem; overflow-wrap: anywhere }
p { max-width: 48rem; overflow-wrap: anywhere }
.lead { font-size: 1.12rem; border-left: 4px solid #0b4f9e; padding-left: .9rem }
.note { color: #4b535d; font-size: .92rem }
.wide { overflow-x: auto; margin: .8rem 0 } table { border-collapse: collapse; font-size: .92rem }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; white-space: nowrap }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right; white-space: nowrap;
  vertical-align: top }
th:first-child, td:first-child, .text th, .text td { text-align: left }
.text td { white-space: normal; min-width: 7rem; max-width: 30rem; overflow-wrap: anywhere }
thead th { background: #f6f8fa } tr.part td { background: #eef1f4; font-weight: 600; text-align: left }
.numbers td:first-child, .numbers th:first-child { position: sticky; left: 0; background: #fff }
.numbers thead th:first-child { background: #f6f8fa } .numbers tr.part td:first-child { background: #eef1f4 }
td small { color: #4b535d; display: block }
img { max-width: 100%; height: auto } img.large { min-width: 42rem }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap; margin: .3rem 0 }
section.chart { display: inline-block; vertical-align: top; width: min(100%, 32rem); margin-right: 1.5rem }
figure.chart { margin: 0 } .chart text { font-size: 12px; fill: #4b535d }
.chart figcaption { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem }
.code { position: relative; margin: .8rem 0 } .code button { position: absolute; top: .4rem; right: .4rem }
button { font: inherit; font-size: .8rem; padding: .15rem .6rem; border: 1px solid #8c959f; border-radius: 4px;
  background: #fff; cursor: pointer }
@media (max-width: 40rem) { caption { white-space: normal; max-width: 88vw } main { padding: .5rem .8rem 3rem }
  .numbers td:first-child, .numbers th:first-child {
  min-width: 9.2rem; max-width: 11rem; white-space: normal; overflow-wrap: anywhere } th, td { padding: .3rem .5rem } }
"""
_COPY = """
document.querySelectorAll(".code button").forEach((button) => button.addEventListener("click", async () => {
  const text = button.nextElementSibling;
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    const area = document.createRange();
    area.selectNodeContents(text);
    getSelection().removeAllRanges();
    getSelection().addRange(area);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}));
"""


@dataclass
class Heading:
    """A heading of level 2 or 3; those of level 2 are the table of contents, by their ``short`` name."""

    text: str
    level: int = 2
    short: str = ""


@dataclass
class Text:
    """A paragraph; ``kind`` is "", "lead", "note" or "code", which can be copied."""

    text: str
    kind: str = ""


@dataclass
class Strong:
    """A cell in bold, or with a second, smaller line."""

    text: str
    small: str = ""
    bold: bool = True


@dataclass
class Table:
    """Rows of cells under heads; a row of one cell is the title of those below it. ``words`` are set to the left."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Strong]]
    caption: str = ""
    words: bool = False


@dataclass
class Picture:
    """A PNG with what it shows in words; ``large`` ones scroll on a narrow screen instead of getting too small."""

    name: str
    png: bytes
    alt: str
    large: bool = True
    caption: bool = False


@dataclass
class Chart:
    """Lines over epochs, by name; Markdown leaves them out."""

    title: str
    lines: Mapping[str, Points]


@dataclass
class Volume:
    """A scan with label maps to look through; Markdown leaves it out."""

    scene: Scene


Part = Heading | Text | Table | Picture | Chart | Volume


def write_html(title: str, parts: Sequence[Part], path: Path, *, head: str = "") -> None:
    """Write all parts as one file that needs no other; volumes share what a page with two of them may hold.

    Args:
        title: of the page.
        parts: of the page, in order.
        path: to write.
        head: more elements for the page's head.
    """
    heads = [part for part in parts if isinstance(part, Heading) and part.level == 2]
    links = "".join(f'<a href="#{_anchor(head.text)}">{html.escape(head.short or head.text)}</a>' for head in heads)
    volumes = sum(isinstance(part, Volume) for part in parts)
    share = max((MEGABYTES - 1) / max(volumes, 2), _LEAST_MEGABYTES)
    style = _STYLE + STYLE if volumes else _STYLE
    script = _COPY if any(isinstance(part, Text) and part.kind == "code" for part in parts) else ""
    script += SCRIPT if volumes else ""
    scripts = f"<script>{script}</script>" if script else ""
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>{head}<style>{style}</style></head>\n<body>"
        f'<nav aria-label="contents">{links}</nav><main><h1>{html.escape(title)}</h1>\n'
        + "\n".join(
            scene_html(part.scene, megabytes=share) if isinstance(part, Volume) else _html(part) for part in parts
        )
        + f"\n</main>{scripts}</body></html>\n"
    )
    replace_file(
        path, lambda temporary: Path(temporary).write_text(text, "utf-8", "replace")
    )  # names of files that are no UTF-8


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _html(part: Heading | Text | Table | Picture | Chart) -> str:
    if isinstance(part, Heading):
        return f'<h{part.level} id="{_anchor(part.text)}">{html.escape(part.text)}</h{part.level}>'
    if isinstance(part, Text):
        text = html.escape(part.text)
        if part.kind == "code":
            return f'<div class="code"><button type="button">Copy</button><pre>{text}</pre></div>'
        return f'<p class="{part.kind}">{text}</p>' if part.kind else f"<p>{text}</p>"
    if isinstance(part, Chart):
        drawn = curves_svg(part.lines, alt=part.title)
        return f'<section class="chart"><h3>{html.escape(part.title)}</h3>{drawn}</section>'
    if isinstance(part, Picture):
        content = base64.b64encode(part.png).decode()
        size = ' class="large"' if part.large else ""
        source = f"data:image/png;base64,{content}"
        picture = f'<div class="wide"><img{size} alt="{html.escape(part.alt)}" src="{source}"></div>'
        return picture + (f'<p class="note">{html.escape(part.alt)}</p>' if part.caption else "")
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in part.heads)
    rows = []
    for row in part.rows:
        if len(row) == 1 and len(part.heads) > 1:
            rows.append(f'<tr class="part"><td colspan="{len(part.heads)}">{_cell(row[0])}</td></tr>')
        else:
            rows.append("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>")
    caption = f"<caption>{html.escape(part.caption)}</caption>" if part.caption else ""
    kind = "text" if part.words else "numbers"
    return (
        f'<div class="wide"><table class="{kind}">{caption}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(cell: str | Strong) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    text = html.escape(cell.text)
    return (f"<b>{text}</b>" if cell.bold else text) + (
        f"<small>{html.escape(cell.small)}</small>" if cell.small else ""
    )


def write_markdown(title: str, parts: Sequence[Part], path: Path) -> None:
    """Write all parts as Markdown, with each picture as a file beside it."""
    lines = [f"# {_plain(title)}"]
    for part in parts:
        if isinstance(part, Heading):
            lines.append(f"{'#' * part.level} {_plain(part.text)}")
        elif isinstance(part, Text):
            lines.append(f"```\n{part.text}\n```" if part.kind == "code" else _plain(part.text))
        elif isinstance(part, Picture):
            _write_bytes(path.parent / part.name, part.png)
            lines.append(f"![{_plain(part.alt)}]({part.name})")
            lines += [_plain(part.alt)] if part.caption else []
        elif isinstance(part, Table):
            lines.append(_markdown_table(part))
    text = "\n\n".join(lines) + "\n"
    replace_file(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))


def _write_bytes(path: Path, content: bytes) -> None:
    replace_file(path, lambda temporary: Path(temporary).write_bytes(content))


def _markdown_table(table: Table) -> str:
    align = ["---"] + ["---" if table.words else "---:"] * (len(table.heads) - 1)
    lines = [f"| {' | '.join(_plain(head) for head in table.heads)} |", f"|{'|'.join(align)}|"]
    for row in table.rows:
        cells = [_markdown_cell(cell) for cell in row]
        if len(row) == 1 and len(table.heads) > 1:
            cells = [f"*{cells[0]}*"] + [""] * (len(table.heads) - 1)
        lines.append(f"| {' | '.join(cells)} |")
    return (f"**{_plain(table.caption)}**\n\n" if table.caption else "") + "\n".join(lines)


def _markdown_cell(cell: str | Strong) -> str:
    if isinstance(cell, str):
        return _plain(cell)
    text = f"**{_plain(cell.text)}**" if cell.bold else _plain(cell.text)
    return f"{text} {_plain(cell.small)}" if cell.small else text


def _plain(text: str) -> str:
    """Return text in which nothing is read as Markdown."""
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(text.split()))
