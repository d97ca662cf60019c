# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Say what a run needs of a GPU, without one: memory, work, what the loader must deliver, and hours on named GPUs."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from common.bundles import read_config
from common.engines.budget.fitting import GIB, LEFT_OUT, Fit, Fits, needed_gib, override, side_name
from common.engines.budget.parts import number_of_parts
from common.engines.budget.step import Step
from common.engines.inferers import tile_starts
from common.errors import SettingsError
from common.networks.blocks.recompute import mode_of
from common.settings import meant_values, unknown_settings

from ..benchmarking.sections import replace_section
from ..commanding.ending import config_command, end
from ..commanding.environment import ROOT
from .checking import check
from .settings import BUNDLES, Budget

__all__ = ["budget", "budget_content", "gpus"]

EFFICIENCY = (0.1, 0.4)  # of a GPU's peak that a training of these networks is taken to reach, at worst and at best
SIZES_GIB = (8, 12, 16, 24, 40, 80, 141)
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
CASES = 1000  # of a classification, whose epochs are as long as there are cases
_WORKFLOWS = {
    "pretrain": "pre-training",
    "train": "fine-tuning",
    "train_classification": "classification",
    "inference": "inference",
}


def gpus() -> list[dict[str, Any]]:
    """Return the GPUs whose published peak is known."""
    return list(yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text("utf-8")))


def budget_content(bundle: str, workflow: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bundle's config with settings of a command line, complete and not resolved, as a GPU would run it.

    Raises:
        SettingsError: for a setting that the config does not have.
    """
    root = ROOT / "bundles" / bundle
    content = read_config(root / "configs" / f"{workflow}.yaml")
    if told := unknown_settings(settings, content):
        raise SettingsError(told)
    content |= {"bundle_root": str(root), "amp": True, "amp_dtype": "bfloat16"}
    parser = ConfigParser(content)
    parser.update(meant_values(settings))
    return {name: value for name, value in parser.get().items() if name != "_meta_"}


def budget(settings: Budget) -> None:
    """Print what a run needs, or make the tables of all bundles."""
    warnings.simplefilter("ignore")
    if settings.check is not None:
        check(BUNDLES if settings.bundle == "all" else (settings.bundle,), settings.check)
        return
    if settings.bundle == "all":
        page = "\n".join(_tables())
        if settings.output is None:
            print(page)
        else:
            _write(settings.output, page)
            end(settings.output)
        return
    content = budget_content(settings.bundle, settings.workflow, settings.settings)
    fits = Fits(content, settings.processes)
    step = fits.step()
    print("\n".join([*_memory(settings, content, step), *_work(settings, content, step)]))
    found = None if settings.gpu is None else fits.within(settings.gpu)
    if settings.gpu is not None:
        print("\n" + _fit(fits, found, settings.gpu))
    if settings.gpu is None or found is not None:
        end(following=_following(settings, found))


def _following(settings: Budget, found: Fit | None) -> str:
    """Return the command that runs what was asked about, with what makes it fit."""
    data = "FOLDER" if settings.workflow in ("pretrain", "inference") else "LABELLED_FOLDER"
    told = override({**settings.settings, **({} if found is None else found.changes)})
    return f"{config_command(settings.bundle, settings.workflow, data)} {told}".rstrip()


def _memory(settings: Budget, content: Mapping[str, Any], step: Step) -> list[str]:
    """Say what is held at the peak."""
    parts = ("weights", "gradients", "optimizer", "activations", "temporaries")
    held = ", ".join(f"{name} {getattr(step, name) / GIB:.2f}" for name in parts)
    amp = f"AMP in {content['amp_dtype']}" if content["amp"] else "float32"
    lines = [f"{settings.bundle}, {_WORKFLOWS[settings.workflow]}, {_size(content, settings.processes)}, {amp}"]
    lines += [f"memory   {step.peak / GIB:.2f} GiB at the peak: {held}"]
    lines += [f"         plan for {needed_gib(step):.1f} GiB. {LEFT_OUT}"]
    return lines


def _size(content: Mapping[str, Any], processes: int) -> str:
    patch = content[side_name(content)]
    what = "crops" if "patch_size" in content else "volumes"
    words = [f"{what} of " + (" x ".join(map(str, patch)) if isinstance(patch, list) else "the model's size")]
    if "batch_size" in content:
        words.append(f"batch {content['batch_size']} in {number_of_parts(content)} part(s)")
        words.append(f"checkpointing {mode_of(content['checkpointing'])}")
    if processes > 1:
        words.append(f"over {processes} GPUs")
    return ", ".join(words)


def _patch(content: Mapping[str, Any]) -> list[int]:
    return [int(side) for side in ConfigParser(dict(content)).get_parsed_content("patch_size")]


def _work(settings: Budget, content: Mapping[str, Any], step: Step) -> list[str]:
    """Say what is computed and read, and how long that may take."""
    low, high = EFFICIENCY
    predicts = settings.workflow == "inference"
    if predicts:
        overlap = float(content["overlap"])
        sides = zip(settings.volume, _patch(content), strict=True)
        count = math.prod(len(tile_starts(max(side, tile), tile, overlap)) for side, tile in sides)
        size = " x ".join(map(str, settings.volume))
        tile = _patch(content)  # slices first, of which a row of tiles has as many as a tile
        across = [max(pair) for pair in zip(tile[1:], settings.volume[1::-1], strict=True)]
        sums = 4 * math.prod([tile[0], *across]) / GIB
        lines = [
            f"work     {_number(step.multiply_adds / 1e12)} tera multiply-adds a tile; {count} tiles in {size} voxels",
            f"sums     {sums:.2f} GiB more for each class, on the CPU if all are more than half of what is free",
        ]
    else:
        epoch = content.get("iterations_per_epoch") or math.ceil(CASES / int(content["batch_size"]))
        count = int(content["epochs"]) * int(epoch)
        told = f"{count} steps" + ("" if "iterations_per_epoch" in content else f" if there are {CASES} cases")
        lines = [
            f"work     {_number(step.multiply_adds / 1e12)} tera multiply-adds a step on each GPU; {told}",
            f"loader   {step.read / 1e6:.0f} MB for a step of each GPU, as stored, before compression",
        ]
    lines.append(
        f"time     not measured: from {high:.0%} down to {low:.0%} of the published peak, without validation and start"
    )
    for gpu in gpus():
        best, worst = (2 * step.multiply_adds / (gpu["tflops"] * 1e12 * share) for share in (high, low))
        whole = [each * count / (1 if predicts else 3600) for each in (best, worst)]
        told = f"{_number(whole[0])} to {_number(whole[1])} {'s' if predicts else 'h'}"
        if not predicts:
            told += f", {_number(step.read / worst / 1e6)} to {_number(step.read / best / 1e6)} MB/s from the loader"
        fits = "fits" if needed_gib(step) <= gpu["gib"] else "does not fit"
        lines.append(f"  {gpu['name']:<9} {gpu['gib']:>3} GiB, {gpu['tflops']:>3} TFLOP/s  {fits:<12}  {told}")
    return lines


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _fit(fits: Fits, found: Fit | None, gib: float) -> str:
    """Say what fits a GPU."""
    if found is None:
        return f"{gib:g} GiB: nothing that was tried fits, not even crops of 64 voxels one by one"
    told = f"{gib:g} GiB: plan for {needed_gib(found.step):.1f} with "
    told += override(found.changes) if found.changes else "the settings as they are"
    ratio = found.step.multiply_adds / fits.step().multiply_adds
    if side_name(fits.content) in found.changes:
        return f"{told}\nSmaller crops are another recipe than the config's: nothing else fits."
    return f"{told}\nIt computes {ratio:.2f} of the multiply-adds of the settings as they are, on the same batch."


def _tables() -> list[str]:
    """Return the tables of docs/budget.md."""
    lines: list[str] = []
    for workflow, name in _WORKFLOWS.items():
        need = [
            ["bundle", "GiB", "weights", "gradients", "optimizer", "activations", "temporaries", "plan for", "TMAC"]
        ]
        need[0] += [] if workflow == "inference" else ["MB read"]
        fit = [["bundle", *(f"{size} GiB" for size in SIZES_GIB)]]
        known: dict[str, Fits] = {}  # bundles of a backbone share the configs of fine-tuning and inference
        for bundle in BUNDLES:
            print(f"{name} {bundle}", file=sys.stderr, flush=True)
            file = (ROOT / "bundles" / bundle / "configs" / f"{workflow}.yaml").resolve()
            fits = known.setdefault(str(file), Fits(budget_content(bundle, workflow, {})))
            step = fits.step()
            parts = (step.peak, step.weights, step.gradients, step.optimizer, step.activations, step.temporaries)
            row = [bundle, *(f"{part / GIB:.1f}" for part in parts), f"{needed_gib(step):.1f}"]
            row += [_number(step.multiply_adds / 1e12)]
            need.append(row + ([] if workflow == "inference" else [f"{step.read / 1e6:.0f}"]))
            fit.append([bundle, *(_short(fits, size) for size in SIZES_GIB)])
        lines += [f"### {name.capitalize()}", "", *_table(need), "", *_table(fit), ""]
    return lines


def _short(fits: Fits, gib: float) -> str:
    """Return a setting that fits in the words of the table."""
    found = fits.within(gib)
    if found is None:
        return "-"
    if "batch_size" not in fits.content:
        return f"{found.changes.get('tiles_per_step', 1)}"
    told = {**fits.content, **found.changes}
    side = side_name(told)
    words = [] if side not in found.changes else [f"{told[side][0]}^3"]
    return " ".join([*words, f"/ {number_of_parts(told)}", mode_of(told["checkpointing"])])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _write(file: Path, page: str) -> None:
    """Replace what lies between the marks of a page.

    Raises:
        SettingsError: if it has none.
    """
    if not replace_section(file, MARKS, page):
        raise SettingsError(
            f"{file} has no line {MARKS[0]} with a line {MARKS[1]} after it, between which tables belong"
        )
