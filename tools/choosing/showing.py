# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What is printed and drawn of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import replace_file

from .candidates import backbone_of
from .probes import Encoder
from .verdicts import Verdict, cell, draw, markdown_table

__all__ = ["show"]

_COLOURS = {"resenc_l": "#0077bb", "primus_m": "#cc6677", None: "#888888"}


def show(content: Mapping[str, Any], folder: Path, candidates: Mapping[str, Encoder], verdict: Verdict) -> None:
    """Print the tables and the recommendation, and write choose.md and choose.png."""
    probes, tuning = content["probes"], content["fine_tuning"]
    tuned = (tuning or {}).get("arms", {})

    def gap(found: Mapping[str, Any] | None) -> str:
        return cell(found["estimate"], found["interval"], sign=True) if found else ""

    def ranked(scores: Mapping[str, Any]) -> list[str]:
        return sorted(
            scores, key=lambda name: (not scores[name].get("complete", True), -(scores[name]["estimate"] or 0))
        )

    def tuned_row(name: str) -> list[str]:
        found = tuned[name]
        if found["complete"]:
            return [name, cell(found["estimate"], found["interval"]), gap(found["to_best"])]
        return [name, f"incomplete: {found['finished']} of {found['runs']} runs", ""]

    metric = {"AP": "average precision", "R2": "R2"}[content["metric"]["probe"]]
    lines = [
        "**Recommendation**, by " + content["verdict"]["by"] + ": " + " ".join(verdict.sentences),
        "",
        *[f"**Warning**: {warning}\n" for warning in content["warnings"]],
        markdown_table(
            ["frozen encoder", f"{metric} of the probe", "over a random one"],
            [
                [name, cell(found["estimate"], found["interval"]), gap(found["over_random"])]
                for name, found in ((name, probes[name]) for name in ranked(probes))
            ],
        ),
    ]
    score = {"dice": "Dice", "ap": "average precision", "r2": "R2"}[content["metric"]["fine_tuning"]]
    if tuned:
        lines += [
            "",
            markdown_table(
                ["fine-tuned shortly", score, "the best minus this"], [tuned_row(name) for name in ranked(tuned)]
            ),
        ]
    patients = "" if content["units"] == content["cases"] else f" of {content['units']} patients"
    lines += [
        "",
        f"{content['cases']} labelled cases{patients}; in brackets 95 % of a bootstrap over cases"
        + (", and over the runs of fine-tuning" if tuned and tuning["seeds"] > 1 else "")
        + "; differences are paired case by case, their intervals widened for few cases.",
    ]
    if tuning:
        told = ", ".join(f"{name} {value}" for name, value in tuning["settings"].items())
        lines += [
            "",
            f"Fine-tuning was short, the same for all: {told}; {tuning['seeds']} seed(s). A longer one may end in "
            "another order; probes of frozen encoders all the more.",
            *[f"\nFailed: {why}" for why in tuning["failed"]],
        ]
    lines += _plain_rows(tuned)
    lines += _sources(content)
    text = "\n".join(lines) + "\n"
    replace_file(folder / "choose.md", lambda temporary: Path(temporary).write_text(text, "utf-8"))

    def colour(name: str) -> str:
        bundle = candidates[name].bundle if name in candidates else None
        return _COLOURS[backbone_of(bundle) if bundle else None]

    draw(
        {
            f"frozen: {metric} of the probe": {
                name: (probes[name]["estimate"], probes[name]["interval"], colour(name)) for name in ranked(probes)
            },
            f"fine-tuned shortly: {score}": {
                name: (tuned[name]["estimate"], tuned[name]["interval"], colour(name))
                for name in ranked(tuned)
                if tuned[name]["complete"]
            },
        },
        folder / "choose.png",
    )
    print("\n" + text.replace("**", "") + f"\nwritten: {folder}/choose.json, choose.md, choose.png")


def _plain_rows(tuned: Mapping[str, Any]) -> list[str]:
    """Say what the plain rows are, where there are some."""
    plain = [name for name, found in tuned.items() if found.get("plain_row")]
    if not plain:
        return []
    return [
        "",
        f"Plain rows ({', '.join(plain)}) are what any encoder has to beat: a U-Net of less than a million parameters, "
        "from scratch, and of a number the mean of the cases to train on. None of them is recommended.",
    ]


def _sources(content: Mapping[str, Any]) -> list[str]:
    """Return what is said of the encoders themselves: what they are, what else there is, notes, what was left out."""
    lines = ["", markdown_table(["encoder", "what it is", "licence"], _origins(content["origins"]))]
    if content["not_asked"]:
        lines += [
            f"\nNot asked, since they are not at hand: {content['not_asked']} further public checkpoints of these "
            "backbones; python tools/import_checkpoint.py --list names them."
        ]
    notes = dict.fromkeys(note for found in content["probes"].values() for note in found["notes"])
    lines += [f"\nNote: {note}" for note in notes]
    return lines + [f"\nLeft out: {name}: {why}" for name, why in content["left_out"].items()]


def _origins(told: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return rows on what each encoder is, by its receipt."""
    return [
        [
            name,
            about["what"] + (f" ({about['name']})" if about["name"] else ""),
            "; ".join([about["licence"], *about["terms"]]),
        ]
        for name, about in told.items()
    ]
