# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The table and the picture of a label curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ..reporting.plain import by_arm, outcome_of, plain_sentence
from ..studies.definition import FROZEN_RANDOM, MEAN, PLAIN, Run, config_for
from ..studies.plain import NAMES

__all__ = ["ARMS", "MEAN_ROW", "ROWS", "curve_table", "plain_rows_table", "scores_of", "task_of", "write_curve"]

ARMS = ("pre-trained", "from scratch")
ROWS = {"frozen random": FROZEN_RANDOM, "plain CNN": PLAIN}  # plain rows, and their weights
MEAN_ROW = NAMES[MEAN]  # which a curve of numbers has too
_COLOURS = {"pre-trained": "#0077bb", "from scratch": "#cc6677", "frozen random": "#999999", "plain CNN": "#555555"}
_OTHER_COLOUR = "#bbbbbb"
Scores = Mapping[str, Mapping[str, float]]  # of the unseen cases, by case and class; the higher the better


@dataclass(frozen=True)
class _Words:
    """How scores are told: Dice, or the error of a number, which is kept as a negative score.

    Attributes:
        score: its name.
        means: of the three columns, in a title.
        gap: what a difference is called.
        minus: what the difference of an arm and a plain row is called.
        digits: format of a mean.
        signed: format of a difference.
    """

    score: str = "Dice"
    means: str = "Mean Dice"
    gap: str = "difference"
    minus: str = "{arm} minus it"
    digits: str = ".3f"
    signed: str = "+.3f"

    @property
    def heads(self) -> tuple[str, ...]:
        """Of the main table."""
        return ("labelled cases", *ARMS, f"{self.gap} [95 %]", "")

    @property
    def plain_heads(self) -> tuple[str, ...]:
        """Of the table of plain rows."""
        return ("labelled cases", "plain row", self.score, *(f"{self.minus.format(arm=arm)} [95 %]" for arm in ARMS))


def task_of(target: str | None) -> str:
    """Return what a curve is of: a number of whole volumes where a column of the table holds it, or label maps."""
    return "regression" if target else "segmentation"


def _words(asked: Mapping[str, Any]) -> _Words:
    """Return how the scores of a curve are told."""
    if not asked.get("target"):
        return _Words()
    units = asked["settings"].get("units")
    told = f"{asked['target']}, {units}" if units else str(asked["target"])
    means = f"Mean absolute error of {told},"
    return _Words(f"error of {told}", means, "error lower by", "error of {arm} lower by", ".4g", "+.3g")


def curve_table(
    results: Sequence[tuple[Run, Scores]], *, groups: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Summarise runs: for every number of cases both means and the paired difference, with 95 % intervals.

    The Dice of an unseen case is averaged over classes first. Of a number, scores are negative errors: means are told
    as errors, and a difference is by how much the error is lower. Intervals hold what differs between unseen cases
    (groups, where cases belong together) and between the runs of a fold, by the draw of training cases and by the seed
    (see :func:`common.metrics.crossed_interval`). Only pairs of which both runs exist are used.

    Args:
        results: runs, and the scores of their unseen cases.
        groups: of the cases.

    Returns:
        a row for each number of cases.
    """
    rows = []
    for count in sorted({run.cases for run, _ in results}):
        pair = _pair(results, count, ARMS, groups)
        if pair is None:
            continue
        row: dict[str, Any] = {"cases": count, "pairs_of_runs": pair.runs, "unseen": pair.unseen}
        for index, name in enumerate(("pretrained", "scratch", "difference")):
            value, low, high = pair.told(index)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            if index < 2:
                row[f"{name}_seed_sd"] = pair.spread[index]
        rows.append(_rounded(row))
    return rows


def plain_rows_table(
    results: Sequence[tuple[Run, Scores]], *, groups: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Compare both ways to start with each plain row, as :func:`curve_table` compares them with each other.

    Returns:
        for each number of cases, arm and row the mean of the ``row`` and the ``difference``, arm minus row, with
        intervals, what it shows, and whether there was one seed alone.
    """
    found = []
    for count in sorted({run.cases for run, _ in results}):
        for name in (*ROWS, MEAN_ROW):
            for arm in ARMS:
                pair = _pair(results, count, (arm, name), groups)
                if pair is None or np.isnan(pair.told(2)[1]):
                    continue
                (value, *_), (difference, low, high) = pair.told(1), pair.told(2)
                about = {"cases": count, "arm": arm, "row": name, "one_run": bool(np.isnan(pair.spread[0]))}
                numbers = {"mean": value, "difference": difference, "low": low, "high": high}
                found.append({**_rounded({**about, **numbers}), "outcome": outcome_of(low, high)})
    return found


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, (int, str)) else round(float(value), 5) for key, value in row.items()}


@dataclass
class _Pair:
    """Two arms on their shared runs.

    Attributes:
        means: of the first, the second and the difference, ``(seeds, 3)``.
        interval: of the three, ``(2, 3)``; None with fewer than two units.
        runs: of each.
        unseen: cases.
        whole: means over all, ``(3,)``.
    """

    means: np.ndarray
    interval: np.ndarray | None
    runs: int
    unseen: int
    whole: np.ndarray

    @property
    def errors(self) -> bool:
        """Whether scores are errors of a number."""
        return bool((self.whole[:2] < 0).any())

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation over seeds, NaN with one, ``(3,)``."""
        several = len(self.means) > 1
        return np.asarray(self.means.std(0, ddof=1) if several else np.full(3, np.nan))

    def told(self, index: int) -> tuple[float, float, float]:
        """Return mean and interval of the first, the second or the difference, within what they can be."""
        value = float(self.whole[index])
        low, high = (np.nan, np.nan) if self.interval is None else self.interval[:, index]
        if self.errors and index < 2:
            return -value, float(max(-high, 0.0)), float(-low)
        if not self.errors:
            low, high = np.clip((low, high), min(-1.0 if index == 2 else 0.0, value), max(1.0, value))
        return value, float(low), float(high)


def _pair(
    results: Sequence[tuple[Run, Scores]],
    count: int,
    arms: tuple[str, str],
    groups: Mapping[str, str] | None,
) -> _Pair | None:
    """Compare two arms with so many cases; None if they share no case of a run."""
    first, second = (
        {(run.fold, run.seed): scores for run, scores in results if (run.cases, run.arm) == (count, arm)}
        for arm in arms
    )
    pairs = {place: (first[place], second[place]) for place in first if place in second}
    cases = sorted({(fold, case) for (fold, _), (one, other) in pairs.items() for case in one.keys() & other.keys()})
    seeds = sorted({seed for _, seed in pairs})
    if not cases:
        return None
    values = np.full((len(cases), len(seeds), 3), np.nan)
    for place, (fold, case) in enumerate(cases):
        for column, seed in enumerate(seeds):
            if (fold, seed) in pairs and all(case in scores for scores in pairs[fold, seed]):
                one, other = (float(np.mean([*scores[case].values()])) for scores in pairs[fold, seed])
                values[place, column] = one, other, one - other
    units = [groups[case] if groups else case for _, case in cases]
    interval = crossed_interval(values, [fold for fold, _ in cases], units=units)
    whole = np.nanmean(values, axis=(0, 1))
    return _Pair(np.nanmean(values, axis=0), interval, len(pairs), len(cases), whole)


def _verdict(row: Mapping[str, Any]) -> str:
    if np.isnan(row["difference_low"]):
        return "one unseen case tells nothing"
    if np.isnan(row["scratch_seed_sd"]):
        return "one seed, so no verdict"
    if row["difference_low"] > 0:
        return "pre-trained is better"
    return "from scratch is better" if row["difference_high"] < 0 else "no difference shown"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |".replace("|  |", "| |"), "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _cells(row: Mapping[str, Any], words: _Words) -> list[str]:
    means = []
    for name in ("pretrained", "scratch"):
        spread = row[f"{name}_seed_sd"]
        means.append(f"{row[name]:{words.digits}}" + ("" if np.isnan(spread) else f" ± {spread:{words.digits}}"))
    return [str(row["cases"]), *means, _difference(row, words), _verdict(row)]


def _difference(
    row: Mapping[str, Any], words: _Words, low: str = "difference_low", high: str = "difference_high"
) -> str:
    return f"{row['difference']:{words.signed}} [{row[low]:{words.signed}}, {row[high]:{words.signed}}]"


def _plain_cells(plain: Sequence[Mapping[str, Any]], words: _Words) -> list[list[str]]:
    """Return a line for each number of cases and plain row."""
    lines = []
    for count, name in dict.fromkeys((row["cases"], row["row"]) for row in plain):
        by = {row["arm"]: row for row in plain if (row["cases"], row["row"]) == (count, name)}
        told = [_difference(by[arm], words, "low", "high") if arm in by else "–" for arm in ARMS]
        lines.append([str(count), name, f"{next(iter(by.values()))['mean']:{words.digits}}", *told])
    return lines


def _plain_verdict(plain: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the largest number of cases."""
    largest = [row for row in plain if row["cases"] == max(each["cases"] for each in plain)]
    outcomes = by_arm((row["arm"], row["row"], row["outcome"]) for row in largest)
    told = plain_sentence(outcomes, one_run=any(row["one_run"] for row in largest))
    return f"With {largest[0]['cases']} labelled cases, {told[0].lower()}{told[1:]}" if told else ""


def scores_of(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the scores of a run's result by case and class: the Dice where there is one; of a number less its error.

    Example:
        >>> scores_of({"cases": {"a": {"truth": 30.0, "predicted": [27.5]}}})
        {'a': {'error': -2.5}}
    """
    cases = {
        case: {name: scores["dice"] for name, scores in entry["scores"].items() if scores["dice"] is not None}
        if "scores" in entry
        else {"error": -abs(entry["predicted"][0] - entry["truth"])}
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
    words = _words(asked)
    scored = [(run, scores_of(result)) for run, result in results]
    rows, plain = curve_table(scored, groups=together), plain_rows_table(scored, groups=together)
    if not rows:
        print("no pair of runs is complete; there is no curve yet")
        return rows
    table = _markdown(words.heads, [_cells(row, words) for row in rows])
    if plain:
        table += f"\n\n{_plain_verdict(plain)}\n\n{_markdown(words.plain_heads, _plain_cells(plain, words))}"
    folds, seeds = len({run.fold for run, _ in results}), len({run.seed for run, _ in results})
    seconds = [result["seconds"]["training"] for _, result in results if "training" in result["seconds"]]
    tuned = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
    notes = (
        f"{words.means} on unseen cases ({rows[0]['unseen']} in all), {asked['bundle']}, {folds} fold(s), {seeds} "
        f"seed(s) (± is their standard deviation); learning rates {tuned}, each the best of its own on held-out "
        "cases; same cases, steps and seeds for all. "
        f"{len(seconds)} runs of {np.mean(seconds):.0f} s on average. Settings: "
        + ", ".join(f"{name} {value}" for name, value in asked["settings"].items())
        + "."
    )
    text = f"{table}\n\n{notes}\n"
    replace_file(folder / "curve.md", lambda temporary: Path(temporary).write_text(text, "utf-8"))
    content = {"rows": rows, "plain": plain, "rates": dict(rates), "asked": dict(asked)}
    write_json(content, folder / "curve.json")
    write_table(folder / "curve.csv", list(rows[0]), [list(row.values()) for row in rows])
    _draw(content, folder / "curve.png", words)
    _write_page(folder, content, results, notes=notes)
    print(f"\n{table}\n\n{notes}\nwritten: {near(folder)}/curve.csv, curve.json, curve.md, curve.png, report.html")
    following = config_command(
        str(asked["bundle"]), config_for("train", task_of(asked.get("target"))), "LABELLED_FOLDER"
    )
    end(folder / "curve.csv", look=folder / "report.html", following=following)
    return rows


def _write_page(
    folder: Path,
    content: Mapping[str, Any],
    results: Sequence[tuple[Run, Mapping[str, Any]]],
    *,
    notes: str,
) -> None:
    """Write ``report.html``: the verdict, cases to look through, the tables and the picture."""
    rows, plain, asked = content["rows"], content["plain"], content["asked"]
    largest, words = rows[-1], _words(asked)
    by = (
        f"{_difference(largest, words)} Dice"
        if not asked.get("target")
        else f"error lower by {_difference(largest, words)}"
    )
    parts: list[Part] = [Text(f"With {largest['cases']} labelled cases: {_verdict(largest)} ({by}).", "lead")]
    parts += [Text(_plain_verdict(plain), "lead")] if plain else []
    if not asked.get("target"):
        parts += [Heading("Cases to look through", short="Cases")]
        parts += _kept_cases(folder, results, largest["cases"], label_names(asked.get("labels")))
    title = f"{words.score[0].upper()}{words.score[1:]} against the number of labelled cases"
    parts.append(Heading(title, short="Curve"))
    parts.append(Table(words.heads, [_cells(row, words) for row in rows], words=True))
    if plain:
        heading = Heading("What it has to beat", short="Plain rows")
        parts += [heading, Table(words.plain_heads, _plain_cells(plain, words), words=True)]
    parts.append(Picture("curve.png", (folder / "curve.png").read_bytes(), title))
    parts.append(Text(notes, "note"))
    write_html(f"Label curve of {asked['bundle']}", parts, folder / "report.html")


def _kept_cases(
    folder: Path, results: Sequence[tuple[Run, Mapping[str, Any]]], count: int, names: Mapping[int, str]
) -> list[Part]:
    """Return the best and the worst kept case of the pre-trained runs with so many labelled cases."""
    found: list[tuple[float, Run, str, Mapping[str, Any]]] = []
    for run, result in results:
        dice = scores_of(result)
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


def _draw(content: Mapping[str, Any], path: Path, words: _Words) -> None:
    from common.figures import subplots

    rows, plain, bundle = content["rows"], content["plain"], content["asked"]["bundle"]
    counts = [row["cases"] for row in rows]
    figure, (left, right) = subplots(1, 2, figsize=(9.6, 3.8))
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
    for name in dict.fromkeys(row["row"] for row in plain):
        means = {row["cases"]: row["mean"] for row in plain if row["row"] == name}
        left.plot(
            [*means], [*means.values()], marker=".", linestyle=":", color=_COLOURS.get(name, _OTHER_COLOUR), label=name
        )
    left.set(title=f"{bundle}, unseen cases", ylabel=words.score)
    left.legend(loc="best")
    errors = [  # not negative by rounding
        [max(row["difference"] - row["difference_low"], 0.0) for row in rows],
        [max(row["difference_high"] - row["difference"], 0.0) for row in rows],
    ]
    right.errorbar(counts, [row["difference"] for row in rows], yerr=errors, fmt="o-", color="#222222", capsize=3)
    right.axhline(0, color="#999999", lw=1)
    right.set(title="pre-trained against from scratch, paired by case", ylabel=f"{words.gap}, {words.score}")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("labelled cases for fine-tuning")
        axis.grid(alpha=0.3)
    figure.supxlabel("bands and bars: 95 % intervals of what differs between unseen cases and between runs", fontsize=7)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
