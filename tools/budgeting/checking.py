# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Hold the estimate of memory against what a process really takes for the same step, on a CPU in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.bundles import read_config
from common.engines.budget.fitting import GIB
from common.engines.budget.step import training_step

from ..benchmarking.settings import Benchmark
from ..benchmarking.steps import bundle_config, step_memory_gib
from ..commanding.environment import ROOT

__all__ = ["ALLOWED", "check", "content_of", "estimated_gib"]

ALLOWED = 0.15  # share of the real peak by which an estimate may be wrong


def content_of(options: Benchmark, cell: str) -> dict[str, Any]:
    """Return the config of the step that the benchmark measures, complete, not resolved, with its trainer."""
    whole = read_config(ROOT / "bundles" / cell / "configs" / "pretrain.yaml")
    small = bundle_config(cell, options, options.patch_size).get()
    content = {name: value for name, value in small.items() if name != "_meta_"}
    return {**whole, **content, "train": whole["train"], "bundle_root": str(ROOT / "bundles" / cell)}


def estimated_gib(cell: str, size: int, settings: Mapping[str, Any]) -> float:
    """Return the estimate for a step of two crops in float32, on a process that has the stand-in."""
    options = Benchmark(cells=(cell,), patch_size=size, batch_size=2, settings=dict(settings))
    return training_step({**content_of(options, cell), "amp": False}, like_cuda=False).peak / GIB


def check(cells: Sequence[str], size: int) -> None:
    """Print estimate and measurement of each bundle.

    Raises:
        SystemExit: if one is off by more than :data:`ALLOWED`.
    """
    wrong = []
    print(f"crops of {size}^3, batch 2, float32, GiB of a process with its libraries\n")
    print("| bundle | estimate | measured | estimate / measured |\n| --- | --- | --- | --- |")
    for cell in cells:
        base, peak = step_memory_gib(cell, "ours", Benchmark(cells=(cell,), patch_size=size, batch_size=2))
        told = estimated_gib(cell, size, {}) + base
        print(f"| {cell} | {told:.2f} | {peak:.2f} | {told / peak:.2f} |", flush=True)
        if abs(told / peak - 1) > ALLOWED:
            wrong.append(cell)
    if wrong:
        raise SystemExit(f"Stopped: the estimate is off by more than {ALLOWED:.0%} for {', '.join(wrong)}")
