# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How far apart the arms are: Dice of cases that none has seen, paired differences, seconds of an iteration."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import read_record, write_record
from common.metrics import known_mean

from ..benchmarking.sections import write_section
from ..benchmarking.witness import nnunet_version
from ..reporting.comparison import compare, interval, resampled, score
from ..reporting.significance import pair_tests
from ..reporting.tables import bounds, number, p_value
from ..studies.definition import SCRATCH
from ..studies.execution import machine
from ..studies.results import Block, Results, blocks_of
from .running import RESULT, SECONDS, Comparison

__all__ = ["block_of", "figures", "markdown", "write_report"]

_SECTION = "nnU-Net"


def block_of(comparison: Comparison, results: dict[tuple[str, int], dict[str, Any]]) -> Block:
    """Return the scores of all arms and seeds as those of a study with one data set."""
    runs = [
        {"name": f"{arm} {seed}", "arm": arm, "seed": seed, "data_set": "unseen", "budget": "all", "fold": 0}
        for arm, seed in results
    ]
    about = {
        "arms": {arm: {"weights": SCRATCH} for arm in comparison.arms},
        "data_sets": {"unseen": {"card": {"task": "segmentation"}}},
        "budgets": ["all"],
        "runs": runs,
    }
    finished = {
        f"{arm} {seed}": {"run": {"task": "segmentation"}, "cases": found["cases"]}
        for (arm, seed), found in results.items()
    }
    return blocks_of(Results(comparison.folder, about, finished, {}, []))[0]


def figures(block: Block, results: dict[tuple[str, int], dict[str, Any]], iterations: int) -> list[dict[str, Any]]:
    """Return a row for each arm; differences are from the first one.

    The score of an arm is the mean over classes of the means over cases of each case's mean over seeds. Intervals draw
    cases again and hold the luck of seeds too (:mod:`..reporting.comparison`). Seconds of an iteration are the median
    of the epochs of all seeds.
    """
    first = block.arms[0]
    tests = {row["other"]: row for row in pair_tests([block]) if row["arm"] == first}
    rows: list[dict[str, Any]] = []
    for index, arm in enumerate(block.arms):
        dice = block.values[index, ..., 0]  # (rows, seeds, classes)
        own = [found for (name, _), found in results.items() if name == arm]
        row: dict[str, Any] = {
            "arm": arm,
            "dice": float(score(block, arm)[0]),
            "interval": interval(resampled(block, arm)[:, 0]),
            "seeds": known_mean(known_mean(dice, axis=0), axis=1).tolist(),
            "classes": dict(zip(block.classes, known_mean(known_mean(dice, axis=1), axis=0).tolist(), strict=True)),
            "parameters": own[0]["parameters"],
            "seconds": statistics.median(epoch / iterations for found in own for epoch in found[SECONDS]),
        }
        if arm != first and (found := compare(block, arm, first)) is not None:
            row |= {name: float(found[name][0]) for name in ("difference", "low", "high")}
            row |= {"p": tests[arm]["p"], "ratio": row["seconds"] / rows[0]["seconds"]}
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]], about: str) -> list[str]:
    """Return what is compared, and a table."""
    classes = list(rows[0]["classes"])
    head = ["", "Dice", *classes, "of each seed", "difference", "p", "s/iteration", "ratio"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = [row["arm"], f"{number(row['dice'])} {bounds(*row['interval'])}"]
        cells += [number(row["classes"][name]) for name in classes]
        cells.append(", ".join(map(number, row["seeds"])))
        if "difference" in row:
            difference = number(row["difference"], 2, sign=True)
            cells += [f"**{difference}** {bounds(row['low'], row['high'], sign=True)}", p_value(row["p"])]
        else:
            cells += ["", ""]
        cells += [f"{row['seconds']:.3f}", f"**{row['ratio']:.2f}**" if "ratio" in row else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return [about, "", *lines, ""]


def write_report(comparison: Comparison, page: Path | None) -> None:
    """Write ``comparison.json`` and ``comparison.md``, the section of a page if one is named, and print the table."""
    asked, planned = comparison.asked, comparison.planned
    results = {
        (arm, seed): read_record(comparison.place(arm, seed) / RESULT)
        for seed in range(asked.seeds)
        for arm in comparison.arms
    }
    rows = figures(block_of(comparison, results), results, asked.iterations)
    where, theirs = machine("cpu"), nnunet_version(comparison.python)
    patch, spacing = planned.patch_size, [f"{side:g}" for side in planned.data["spacing_mm"]]
    about = (
        f"{where['when'][:10]}; nnunetv2 {theirs}; ours with torch {where['torch']}, monai {where['monai']}; "
        f"{where['cpu']}. {len(comparison.training)} cases to learn from, {len(comparison.unseen)} unseen; "
        f"{asked.seeds} seed(s); {asked.epochs} x {asked.iterations} iterations of {asked.batch_size} patches of "
        f"{' x '.join(map(str, patch))} voxels of {' x '.join(spacing)} mm; features "
        f"{planned.network['features_per_stage']}, blocks {planned.network['blocks_per_stage']}; "
        f"learning rate {asked.lr or 0.01:g}, momentum {0.99 if asked.momentum is None else asked.momentum:g}."
    )
    about += f" Settings of ours: {asked.settings}." if asked.settings else ""
    about += "".join(f" {name}: {settings}." for name, settings in asked.variants.items())
    about += " One seed each: intervals and p are of cases, not of the luck of a run." if asked.seeds == 1 else ""
    write_record({"about": about, "rows": rows}, comparison.folder / "comparison.json")
    text = markdown(rows, about)
    write_section(comparison.folder / "comparison.md", _SECTION, text)
    if page is not None:
        write_section(page, _SECTION, text)
    print("\n".join(text), flush=True)
