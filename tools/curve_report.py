# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The table and the picture of a label curve."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import ROOT

__all__ = ["curve_table", "write_curve"]

Entry = tuple[int, int, int, str, str]  # fold, cases, seed, arm, folder
_COLOURS = {"pre-trained": "#0077bb", "from scratch": "#cc6677"}


def curve_table(
    results: Sequence[tuple[Entry, Mapping[str, Mapping[str, float]]]], *, groups: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Summarise runs: for every number of cases both means and the paired difference, with 95 % intervals.

    The Dice of an unseen case is averaged over classes and seeds first; intervals are of bootstrap resamples of these
    cases (of groups, where cases belong together), so that seeds do not pass for independent evidence. Only pairs of
    which both runs exist are used.

    Args:
        results: what each run was, and the Dice of its unseen cases by case and class.
        groups: of the cases.

    Returns:
        a row for each number of cases.
    """
    sys.path.insert(0, str(ROOT))
    from common.metrics import bootstrap_interval

    runs = {(entry[1], entry[0], entry[2], entry[3]): scores for entry, scores in results}
    rows = []
    for count in sorted({entry[1] for entry, _ in results}):
        pairs: dict[str, list[tuple[float, float]]] = {}
        by_seed: dict[int, list[tuple[float, float]]] = {}
        complete = 0
        for c, fold, seed, arm in runs:
            one, other = runs.get((c, fold, seed, "pre-trained")), runs.get((c, fold, seed, "from scratch"))
            if c != count or arm != "pre-trained" or one is None or other is None:
                continue
            complete += 1
            for case in one.keys() & other.keys():
                pair = (float(np.mean([*one[case].values()])), float(np.mean([*other[case].values()])))
                pairs.setdefault(case, []).append(pair)
                by_seed.setdefault(seed, []).append(pair)
        if not pairs:
            continue
        cases = sorted(pairs)
        values = np.array([np.mean(pairs[case], axis=0) for case in cases])  # (cases, 2)
        values = np.column_stack([values, values[:, 0] - values[:, 1]])
        belongs = [groups[case] for case in cases] if groups else None
        interval = bootstrap_interval(lambda x: x.mean(0), values, groups=belongs)
        means = np.array([np.mean(seed_pairs, axis=0) for seed_pairs in by_seed.values()])
        spread = means.std(0, ddof=1) if len(means) > 1 else np.full(2, np.nan)
        row: dict[str, Any] = {"cases": count, "pairs_of_runs": complete, "unseen": len(cases)}
        for index, name in enumerate(("pretrained", "scratch", "difference")):
            low, high = (np.nan, np.nan) if interval is None else interval[:, index]
            row |= {name: values[:, index].mean(), f"{name}_low": low, f"{name}_high": high}
            if index < 2:
                row[f"{name}_seed_sd"] = spread[index]
        rows.append({key: value if isinstance(value, int) else round(float(value), 5) for key, value in row.items()})
    return rows


def _verdict(row: Mapping[str, Any]) -> str:
    if np.isnan(row["difference_low"]):
        return "one unseen case tells nothing"
    if row["difference_low"] > 0:
        return "pre-trained is better"
    return "from scratch is better" if row["difference_high"] < 0 else "no difference shown"


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| labelled cases | pre-trained | from scratch | difference [95 %] | |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        sds = [
            "" if np.isnan(row[f"{name}_seed_sd"]) else f" ± {row[f'{name}_seed_sd']:.3f}"
            for name in ("pretrained", "scratch")
        ]
        difference = f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
        lines.append(
            f"| {row['cases']} | {row['pretrained']:.3f}{sds[0]} | {row['scratch']:.3f}{sds[1]} | {difference} | "
            f"{_verdict(row)} |"
        )
    return "\n".join(lines)


def write_curve(
    folder: Path, *, plan: Sequence[Entry], rates: Mapping[str, float], asked: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Read all results, print the table and write curve.csv, curve.json, curve.md and curve.png.

    Args:
        folder: of the curve.
        plan: its runs.
        rates: learning rate of each arm.
        asked: settings, for the record.

    Returns:
        the rows of the table.
    """
    results = []
    seconds = []
    for entry in plan:
        file = folder / entry[4] / "result.json"
        if file.exists():
            content = json.loads(file.read_text("utf-8"))
            results.append((entry, content["dice"]))
            seconds.append(content["seconds"])
    groups = folder / "groups.json"
    rows = curve_table(results, groups=json.loads(groups.read_text("utf-8")) if groups.exists() else None)
    if not rows:
        print("no pair of runs is complete; there is no curve yet")
        return rows
    table = _markdown(rows)
    folds, seeds = len({entry[0] for entry in plan}), len({entry[2] for entry in plan})
    tuned = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
    notes = (
        f"Mean Dice on unseen cases ({rows[0]['unseen']} in all), {asked['bundle']}, {folds} fold(s), {seeds} seed(s) "
        f"(± is their standard deviation); learning rates {tuned}, each the best of its own on held-out cases; same "
        "cases, steps and seeds for both. "
        f"{len(results)} runs of {np.mean(seconds):.0f} s on average. Settings: "
        + ", ".join(f"{name} {value}" for name, value in asked["settings"].items())
        + "."
    )
    write = {
        "curve.md": f"{table}\n\n{notes}\n",
        "curve.json": json.dumps({"rows": rows, "rates": dict(rates), "asked": dict(asked)}, indent=1) + "\n",
    }
    for name, text in write.items():
        part = folder / f".{name}.part"
        part.write_text(text, "utf-8")
        os.replace(part, folder / name)
    with open(folder / "curve.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _draw(rows, folder / "curve.png", bundle=str(asked["bundle"]))
    print(f"\n{table}\n\n{notes}\nwritten: {folder}/curve.csv, curve.json, curve.md, curve.png")
    return rows


def _draw(rows: Sequence[Mapping[str, Any]], path: Path, *, bundle: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
    errors = [
        [row["difference"] - row["difference_low"] for row in rows],
        [row["difference_high"] - row["difference"] for row in rows],
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
    figure.text(0.995, 0.005, "bands and bars: 95 % of bootstrap resamples of the unseen cases", ha="right", fontsize=7)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=130, format="png")
    os.replace(part, path)
    plt.close(figure)
