# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The table and the picture of a label curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.document import Heading, Part, Picture, Table, Text, write_html
from common.engines.pages import label_names, volume_part
from common.files import replace_file, write_json
from common.metrics import crossed_interval
from common.paths import output_file
from common.tables import write_table
from common.terminal import near

from ..commanding.ending import config_command, end
from ..studies.definition import Run

__all__ = ["ARMS", "curve_table", "dice_of", "write_curve"]

ARMS = ("pre-trained", "from scratch")
_HEADS = ("labelled cases", *ARMS, "difference [95 %]", "")
_COLOURS = {"pre-trained": "#0077bb", "from scratch": "#cc6677"}


def curve_table(
    results: Sequence[tuple[Run, Mapping[str, Mapping[str, float]]]], *, groups: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Summarise runs: for every number of cases both means and the paired difference, with 95 % intervals.

    The Dice of an unseen case is averaged over classes first. Intervals hold what differs between unseen cases (groups,
    where cases belong together) and between the runs of a fold, by the draw of training cases and by the seed (see
    :func:`common.metrics.crossed_interval`). Only pairs of which both runs exist are used.

    Args:
        results: runs, and the Dice of their unseen cases by case and class.
        groups: of the cases.

    Returns:
        a row for each number of cases.
    """
    runs = {(run.cases, run.fold, run.seed, run.arm): scores for run, scores in results}
    rows = []
    for count in sorted({run.cases for run, _ in results}):
        pairs = {
            (fold, seed): (one, runs[c, fold, seed, "from scratch"])
            for (c, fold, seed, arm), one in runs.items()
            if c == count and arm == "pre-trained" and (c, fold, seed, "from scratch") in runs
        }
        cases = sorted(
            {(fold, case) for (fold, _), (one, other) in pairs.items() for case in one.keys() & other.keys()}
        )
        seeds = sorted({seed for _, seed in pairs})
        if not cases:
            continue
        values = np.full((len(cases), len(seeds), 3), np.nan)
        for place, (fold, case) in enumerate(cases):
            for column, seed in enumerate(seeds):
                if (fold, seed) in pairs and all(case in scores for scores in pairs[fold, seed]):
                    one, other = (float(np.mean([*scores[case].values()])) for scores in pairs[fold, seed])
                    values[place, column] = one, other, one - other
        units = [groups[case] if groups else case for _, case in cases]
        interval = crossed_interval(values, [fold for fold, _ in cases], units=units)
        means = np.nanmean(values, axis=0)  # (seeds, 3)
        spread = means.std(0, ddof=1) if len(seeds) > 1 else np.full(3, np.nan)
        row: dict[str, Any] = {"cases": count, "pairs_of_runs": len(pairs), "unseen": len(cases)}
        for index, name in enumerate(("pretrained", "scratch", "difference")):
            value = np.nanmean(values[:, :, index])
            limits = min(-1.0 if name == "difference" else 0.0, value), max(1.0, value)  # of Dice
            low, high = (np.nan, np.nan) if interval is None else np.clip(interval[:, index], *limits)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            if index < 2:
                row[f"{name}_seed_sd"] = spread[index]
        rows.append({key: value if isinstance(value, int) else round(float(value), 5) for key, value in row.items()})
    return rows


def _verdict(row: Mapping[str, Any]) -> str:
    if np.isnan(row["difference_low"]):
        return "one unseen case tells nothing"
    if np.isnan(row["scratch_seed_sd"]):
        return "one seed, so no verdict"
    if row["difference_low"] > 0:
        return "pre-trained is better"
    return "from scratch is better" if row["difference_high"] < 0 else "no difference shown"


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"| {' | '.join(_HEADS)} |".replace("|  |", "| |"), "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    means = [
        f"{row[name]:.3f}" + ("" if np.isnan(row[f"{name}_seed_sd"]) else f" ± {row[f'{name}_seed_sd']:.3f}")
        for name in ("pretrained", "scratch")
    ]
    return [str(row["cases"]), *means, _difference(row), _verdict(row)]


def _difference(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"


def dice_of(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the Dice of a run's result by case and class, where there is one."""
    cases = {
        case: {name: scores["dice"] for name, scores in entry["scores"].items() if scores["dice"] is not None}
        for case, entry in result.get("cases", {}).items()
    }
    return {case: own for case, own in cases.items() if own}


def write_curve(
    folder: Path,
    *,
    results: Sequence[tuple[Run, Mapping[str, Any]]],
    rates: Mapping[str, float],
    asked: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Print the table and write curve.csv, curve.json, curve.md, curve.png and report.html.

    Args:
        folder: of the curve.
        results: finished runs, and what is in their result.json.
        rates: learning rate of each arm.
        asked: settings, for the record.

    Returns:
        the rows of the table.
    """
    units = {
        case: str(entry.get("patient") or entry["group"] or case)
        for _, result in results
        for case, entry in result["cases"].items()
    }
    together = units if asked["group"] or asked.get("patient") else None
    rows = curve_table([(run, dice_of(result)) for run, result in results], groups=together)
    if not rows:
        print("no pair of runs is complete; there is no curve yet")
        return rows
    table = _markdown(rows)
    folds, seeds = len({run.fold for run, _ in results}), len({run.seed for run, _ in results})
    seconds = [result["seconds"]["training"] for _, result in results]
    tuned = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
    notes = (
        f"Mean Dice on unseen cases ({rows[0]['unseen']} in all), {asked['bundle']}, {folds} fold(s), {seeds} seed(s) "
        f"(± is their standard deviation); learning rates {tuned}, each the best of its own on held-out cases; same "
        "cases, steps and seeds for both. "
        f"{len(results)} runs of {np.mean(seconds):.0f} s on average. Settings: "
        + ", ".join(f"{name} {value}" for name, value in asked["settings"].items())
        + "."
    )
    text = f"{table}\n\n{notes}\n"
    replace_file(folder / "curve.md", lambda temporary: Path(temporary).write_text(text, "utf-8"))
    write_json({"rows": rows, "rates": dict(rates), "asked": dict(asked)}, folder / "curve.json")
    write_table(folder / "curve.csv", list(rows[0]), [list(row.values()) for row in rows])
    _draw(rows, folder / "curve.png", bundle=str(asked["bundle"]))
    _write_page(folder, rows, results, notes=notes, asked=asked)
    print(f"\n{table}\n\n{notes}\nwritten: {near(folder)}/curve.csv, curve.json, curve.md, curve.png, report.html")
    following = config_command(str(asked["bundle"]), "train", "LABELLED_FOLDER")
    end(folder / "curve.csv", look=folder / "report.html", following=following)
    return rows


def _write_page(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[tuple[Run, Mapping[str, Any]]],
    *,
    notes: str,
    asked: Mapping[str, Any],
) -> None:
    """Write ``report.html``: the verdict, cases to look through, the table and the picture."""
    largest = rows[-1]
    verdict = f"With {largest['cases']} labelled cases: {_verdict(largest)} ({_difference(largest)} Dice)."
    parts: list[Part] = [Text(verdict, "lead"), Heading("Cases to look through", short="Cases")]
    parts += _kept_cases(folder, results, largest["cases"], label_names(asked.get("labels")))
    parts.append(Heading("Dice against the number of labelled cases", short="Curve"))
    parts.append(Table(_HEADS, [_cells(row) for row in rows], words=True))
    parts.append(Picture("curve.png", (folder / "curve.png").read_bytes(), "Dice against the number of labelled cases"))
    parts.append(Text(notes, "note"))
    write_html(f"Label curve of {asked['bundle']}", parts, folder / "report.html")


def _kept_cases(
    folder: Path, results: Sequence[tuple[Run, Mapping[str, Any]]], count: int, names: Mapping[int, str]
) -> list[Part]:
    """Return the best and the worst kept case of the pre-trained runs with so many labelled cases."""
    found: list[tuple[float, Run, str, Mapping[str, Any]]] = []
    for run, result in results:
        dice = dice_of(result)
        for case in set((result.get("kept") or {}).values()) & dice.keys():
            if (run.arm, run.cases) == (ARMS[0], count):
                found.append((float(np.mean([*dice[case].values()])), run, case, result["cases"][case]))
    if not found:
        return [Text("No prediction is kept.", "note")]
    found.sort(key=lambda one: (one[0], one[1].name, one[2]))
    twins = {(run.cases, run.fold, run.seed): run for run, _ in results if run.arm == ARMS[1]}
    parts: list[Part] = []
    for what, (value, run, case, entry) in {"best": found[-1], "worst": found[0]}.items():
        runs = {ARMS[0]: run, ARMS[1]: twins.get((run.cases, run.fold, run.seed))}
        files = {
            arm: output_file(folder / "runs" / each.name / "predictions", case, ".nii.gz")
            for arm, each in runs.items()
            if each
        }
        maps = {"label": entry["label"], **{arm: file for arm, file in files.items() if file.is_file()}}
        title = f"{what} kept case: {case}, Dice {value:.3f} {ARMS[0]}"
        parts.append(volume_part(entry["image"][0], maps, labels=names, title=title))
    return parts


def _draw(rows: Sequence[Mapping[str, Any]], path: Path, *, bundle: str) -> None:
    from common.figures import plt

    counts = [row["cases"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for name, label in (("pretrained", "pre-trained"), ("scratch", "from scratch")):
        mean = [row[name] for row in rows]
        left.plot(counts, mean, marker="o", color=_COLOURS[label], label=label)
        left.fill_between(
            counts,
            [row[f"{name}_low"] for row in rows],
            [row[f"{name}_high"] for row in rows],
            color=_COLOURS[label],
            alpha=0.15,
            lw=0,
        )
    left.set(title=f"{bundle}: mean Dice on unseen cases", ylabel="Dice")
    left.legend(loc="lower right")
    errors = [  # not negative by rounding
        [max(row["difference"] - row["difference_low"], 0.0) for row in rows],
        [max(row["difference_high"] - row["difference"], 0.0) for row in rows],
    ]
    right.errorbar(counts, [row["difference"] for row in rows], yerr=errors, fmt="o-", color="#222222", capsize=3)
    right.axhline(0, color="#999999", lw=1)
    right.set(title="pre-trained minus from scratch, paired by case", ylabel="difference in Dice")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("labelled cases for fine-tuning")
        axis.grid(alpha=0.3)
    figure.supxlabel("bands and bars: 95 % intervals of what differs between unseen cases and between runs", fontsize=7)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)
