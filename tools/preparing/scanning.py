# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The commands scan and list of prepare_data.py."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.cases import LABEL, MASKS, Case, case_name, images_of
from common.data.checking.filters import Filters
from common.data.checking.survey import Measures, Survey, hints, in_threads, kind_of, measure, survey
from common.data.listing.datalists import read_datalist
from common.data.listing.sources import detect, read_source
from common.data.listing.sources.base import inverted
from common.data.listing.splits import kept_parts, split_by_subject, subjects_of
from common.data.problems import LeftOut
from common.data.problems import report as report_problems
from common.errors import DataError, SettingsError
from common.files import replace_file, write_json
from common.terminal import near, openmind

from ..commanding.ending import config_command, end, tool_command
from .settings import ListCases, Scan

__all__ = ["list_cases", "scan"]

_PICTURES = 12
_PATHS = ("image", *MASKS, LABEL)


def scan(settings: Scan) -> None:
    """Print what is in a folder, from headers alone: volumes, subjects, modalities, sizes, spacings, problems."""
    target = _output_folder(settings.output) if settings.output else None
    cases, left_out, kind, _, _ = _cases(settings)
    print(f"scanning {near(settings.folder)} as {kind}: {len(cases):,} volumes", flush=True)
    found = survey(cases, threads=settings.threads)
    groups = [str(case.get("modality") or "unknown") for case in cases]
    rows = np.flatnonzero(found.readable)
    drawn = rows[np.unique(np.linspace(0, len(rows) - 1, _PICTURES).astype(int))] if len(rows) else rows
    measured = rows if settings.quality else drawn if target else rows[:0]
    measures, slices = _measured(cases, found, measured.tolist(), drawn=set(drawn.tolist()), threads=settings.threads)
    odd = hints(measures, groups)
    report = _report(cases, found, groups, left_out, folder=settings.folder.absolute(), kind=kind)
    report["hints"] = [{"image": cases[row]["image"], "hint": hint} for row, hint in sorted(odd.items())]
    report["measured"] = sum(each is not None for each in measures)
    print(_table(report))
    if target:
        write_json(report, target / "scan.json")
        _draw(cases, found, slices, odd, target / "scan.png")
    if openmind() is None:
        following = tool_command("prepare_data", "list", settings.folder, "--output", "datalist.json")
    else:
        following = config_command("mae_resenc_l", "pretrain", settings.folder)
    if target:
        end(target / "scan.json", look=target / "scan.png", following=following)
    else:
        end(following=following)


def _measured(
    cases: Sequence[Case], found: Survey, rows: Sequence[int], *, drawn: set[int], threads: int
) -> tuple[list[Measures | None], dict[int, tuple[np.ndarray, float]]]:
    """Read the voxels of some cases; return what was measured, and the middle slice and its aspect of those drawn."""
    measures: list[Measures | None] = [None] * len(cases)
    slices: dict[int, tuple[np.ndarray, float]] = {}

    def look(row: int) -> tuple[Measures, np.ndarray | None, float] | str:
        try:
            each, voxels, spacing = measure(cases[row])
        except DataError as error:
            return str(error)
        plane = voxels[:, :, voxels.shape[2] // 2].copy() if row in drawn else None
        return each, plane, float(spacing[1] / spacing[0])

    results = in_threads(look, rows, threads=min(threads, 2), doing="measuring voxels")
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, str):
            found.refuse(row, result)
            continue
        measures[row], plane, aspect = result
        if plane is not None:
            slices[row] = plane, aspect
    return measures, slices


def list_cases(settings: ListCases) -> None:
    """Write a datalist to pre-train on: what passes the filters, split by subject."""
    target = settings.output.absolute()
    if target.exists() and not settings.update:
        raise DataError(f"{target} exists; --update true writes it anew and keeps its split, or give another --output")
    filters = Filters(
        modality=settings.modality,
        max_quality_score=settings.max_quality_score,
        min_size=settings.min_size,
        spacing_mm=settings.spacing_mm,  # type: ignore[arg-type]
        include=_entries(settings.include),
        exclude=_entries(settings.exclude),
        duplicates=settings.duplicates,
    )
    cases, left_out, kind, root, parts = _cases(settings)
    _output_folder(target.parent)
    cache = target.with_name(f".{target.stem}.digests.json")
    result = filters.apply(cases, root=root, threads=settings.threads, cache=cache)
    by_source = len(left_out)
    for problem in result.problems:
        left_out.note(problem)
    report_problems(left_out)
    subjects = subjects_of(result.cases, root)
    earlier = settings.keep or (target if target.exists() else None)
    if earlier is not None:
        parts = kept_parts(read_datalist(earlier, "", keys=_PATHS, channels=True), root)
    lists = split_by_subject(result.cases, subjects, seed=settings.seed, kept=parts)
    for case, subject in zip(result.cases, subjects, strict=True):
        case.setdefault("subject", subject.removeprefix(f"{case.get('dataset') or ''}/"))
    about = {
        "made by": "tools/prepare_data.py list",
        "source": {"kind": kind, "path": str(root), "mask_polarity": settings.mask_polarity},
        "filters": filters.settings(),
        "found": len(cases),
        "removed": result.removed,
        "left out by the source": by_source,
        "split": {
            "seed": settings.seed,
            "by": "subject",
            "subjects": len(set(subjects)),
            "kept from": None if earlier is None else str(earlier),
            **{name: len(members) for name, members in lists.items()},
        },
    }
    content = {name: [_relative(case, target.parent) for case in members] for name, members in lists.items()}
    write_json({"about": about, **content}, target)
    if lists["training"] == lists["validation"]:
        result.notes.append("all volumes are in both parts, since their subjects cannot be split")
    counts = {f"found as {kind}": len(cases), **{name: -count for name, count in result.removed.items()}}
    for name, count in counts.items():
        print(f"{name:<24}{count:>9,}")
    for note in result.notes:
        print(f"note: {note}")
    for name in ("training", "validation"):
        print(f"{name:<24}{len(lists[name]):>9,}")
    print(f"of {len(set(subjects)):,} subject(s); written: {target}")
    end(target, following=config_command("mae_resenc_l", "pretrain", target))


def _output_folder(folder: Path) -> Path:
    """Make a folder that is to be written to, before any work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be written ({error.strerror}); give another --output") from error
    return folder


def _cases(settings: Scan | ListCases) -> tuple[list[Case], LeftOut, str, Path, dict[str, str]]:
    """Return the cases of a source, what it leaves out, which it is, where it is, and the split that it comes with."""
    turned = inverted(settings.mask_polarity)
    place = settings.folder.absolute()
    kind = settings.source or detect(place)
    root = place if place.is_dir() else place.parent
    if kind != "datalist":
        found = read_source(place, kind, mask_polarity=settings.mask_polarity)
        return found.cases, found.left_out, kind, root, {}
    if turned:
        raise SettingsError(
            f"mask_polarity is {settings.mask_polarity!r}, but {place} is a datalist, which says itself with "
            "inverted_masks what is inverted; make it from the source with --mask_polarity, or add them to its entries"
        )
    lists = read_datalist(place, "", keys=_PATHS, channels=True)
    parts = kept_parts(lists, root) if lists["training"] and lists["validation"] else {}
    unique = {tuple(images_of(case)): case for members in lists.values() for case in members}
    return list(unique.values()), LeftOut(), kind, root, parts


def _entries(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Return names and paths, or those that a text file lists."""
    if len(entries) == 1 and entries[0].endswith(".txt"):
        try:
            lines = Path(entries[0]).expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the list {entries[0]} cannot be read ({error}); correct the path") from error
        return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    return entries


def _relative(case: Case, base: Path) -> Case:
    """Write paths below the datalist relative to it."""
    start = f"{base}{os.sep}"

    def below(value: Any) -> Any:
        return [below(each) for each in value] if isinstance(value, list) else value.removeprefix(start)

    return {key: below(value) if key in _PATHS else value for key, value in case.items()}


def _report(
    cases: Sequence[Case], found: Survey, groups: Sequence[str], left_out: LeftOut, *, folder: Path, kind: str
) -> dict[str, Any]:
    """Gather what scan prints and writes."""
    subjects = np.array(subjects_of(cases, folder))
    named = np.array(groups)
    table = []
    for name, _ in Counter(groups).most_common():
        rows = np.flatnonzero((named == name) & found.readable)
        entry: dict[str, Any] = {
            "modality": name,
            "volumes": int((named == name).sum()),
            "subjects": len(set(subjects[named == name])),
            "gigabytes": round(float(found.bytes[rows].sum()) / 1e9, 3),
        }
        if len(rows):
            entry["size"] = [[int(v) for v in row] for row in _least_middle_most(found.shape[rows])]
            entry["spacing_mm"] = [
                [round(float(v), 3) for v in row] for row in _least_middle_most(found.spacing_mm[rows])
            ]
        table.append(entry)
    kinds: dict[str, list[str]] = {}
    for row, problem in found.problems.items():
        kinds.setdefault(kind_of(problem, images_of(cases[row])[0]), []).append(problem)
    noted = [
        {"image": images_of(cases[row])[0], "notes": notes} for row, notes in found.notes.items() if found.readable[row]
    ]
    return {
        "folder": str(folder),
        "source": kind,
        "volumes": len(cases),
        "readable": int(found.readable.sum()),
        "gigabytes": round(float(found.bytes.sum()) / 1e9, 3),
        "subjects": len(set(subjects.tolist())),
        "sessions": len({(s, case.get("session")) for s, case in zip(subjects, cases, strict=True)}),
        "with anonymization_mask": sum("anonymization_mask" in case for case in cases),
        "with anatomy_mask": sum("anatomy_mask" in case for case in cases),
        "with a quality score": sum("quality" in case for case in cases),
        "modalities": table,
        "notes": noted,
        "problems": [{"kind": kind, "count": len(each), "example": each[0]} for kind, each in kinds.items()],
        "left out": {"count": len(left_out), "told": left_out.told()},
    }


def _least_middle_most(rows: np.ndarray) -> np.ndarray:
    """Return the rows ``(N, 3)`` of least, middle and largest product: volumes that exist, not each axis by itself."""
    order = np.argsort(rows.astype(float).prod(1), kind="stable")
    return rows[order[[0, (len(order) - 1) // 2, -1]]]


def _columns(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table of modalities, each column as wide as what is in it."""
    rows = [["modality", "volumes", "subjects", "GB", "size: median (least to most)", "spacing in mm: the same"]]
    for entry in entries:
        row = [
            entry["modality"],
            *(f"{entry[name]:,}" for name in ("volumes", "subjects")),
            f"{entry['gigabytes']:,.3f}",
        ]
        for name in ("size", "spacing_mm"):
            least, middle, most = ["x".join(f"{v:g}" for v in each) for each in entry.get(name, ())] or [""] * 3
            row.append(middle if least == most else f"{middle} ({least} to {most})")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<>>><<"
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def _table(report: Mapping[str, Any]) -> str:
    lines = [
        f"{near(report['folder'])} as {report['source']}: {report['volumes']:,} volumes of {report['subjects']:,} "
        f"subject(s) in {report['sessions']:,} session(s), {report['gigabytes']:,} GB",
        *_columns(report["modalities"]),
    ]
    lines += [
        f"{report[name]:,} {name}"
        for name in ("with anonymization_mask", "with anatomy_mask", "with a quality score")
        if report[name]
    ]
    unusable = report["volumes"] - report["readable"]
    lines.append(f"{unusable:,} volume(s) cannot be used{':' if unusable else ''}")
    lines += [f"  {entry['count']:>6,} x {entry['example']}" for entry in report["problems"]]
    if report["notes"]:
        lines.append(f"{len(report['notes']):,} volume(s) are read differently by other programs; nothing is left out:")
        lines += [f"  {count:>6,} x {example}" for count, example in _kinds_of_notes(report["notes"])]
    if report["left out"]["count"]:
        lines.append(f"{report['left out']['count']:,} files or folders are left out:")
        lines += [f"  {sentence}" for sentence in report["left out"]["told"]]
    if report["measured"]:
        lines.append(
            f"{len(report['hints']):,} of {report['measured']:,} measured volumes look odd; nothing is left out:"
        )
        lines += [f"  {entry['image']}: {entry['hint']}" for entry in report["hints"][:10]]
    return "\n".join(lines)


def _kinds_of_notes(noted: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Return how many files have a note of each kind, and the first of them."""
    kinds: dict[str, list[str]] = {}
    for entry in noted:
        for note in entry["notes"]:
            kinds.setdefault(kind_of(note, entry["image"]), []).append(f"{entry['image']}: {note}")
    return sorted(((len(each), each[0]) for each in kinds.values()), key=lambda each: -each[0])


def _draw(
    cases: Sequence[Case],
    found: Survey,
    slices: Mapping[int, tuple[np.ndarray, float]],
    odd: Mapping[int, str],
    path: Path,
) -> None:
    """Draw histograms of spacings and sizes, and the middle axial slices of a few volumes with their aspects."""
    from common.figures import Figure

    count = -(-max(len(slices), 1) // 6)
    figure = Figure(figsize=(12, 3 + 2.2 * count), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3, 2.2 * count])
    upper, lower = parts
    left, right = upper.subplots(1, 2)
    rows = found.readable
    for axis, values, title in (
        (left, found.spacing_mm[rows], "spacing in mm, finest and coarsest axis"),
        (right, found.shape[rows], "voxels, shortest and longest axis"),
    ):
        if len(values):
            axis.hist([values.min(axis=1), values.max(axis=1)], bins=30, label=["least", "most"])
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("volumes")
        axis.legend(fontsize=8)
    for axis, (row, (plane, aspect)) in zip(np.ravel(lower.subplots(count, 6)), sorted(slices.items()), strict=False):
        axis.imshow(plane.T, cmap="gray", origin="lower", aspect=aspect, vmax=np.percentile(plane, 99.5))
        name = case_name(cases[row])[:28].encode(errors="backslashreplace").decode()
        name = "".join(letter if letter.isprintable() else "?" for letter in name)
        axis.set_title(name + ("\nodd" if row in odd else ""), fontsize=7)
    for axis in lower.axes:
        axis.axis("off")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
