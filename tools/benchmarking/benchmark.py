# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure every bundle: training step, peak memory, views and store reads, each against a yardstick in the same run."""

from __future__ import annotations

import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from common.bundles import read_config
from common.engines.judging import check_device
from common.engines.precision import cpu_has_bfloat16
from common.errors import SettingsError

from ..commanding.ending import end
from ..commanding.environment import ROOT
from .data_path import data_tables, measure_data_path
from .inference import inference_table, measure_inference
from .samples import measure_samples
from .sections import write_section
from .settings import PUBLISHED, Benchmark
from .steps import PEER_FOLDER, measure_precision, measure_sparse, measure_step, prepare_process, step_memory_gib

__all__ = ["benchmark"]

T = TypeVar("T")
PEERS = {
    "dynamic-network-architectures": "0.4.4",
    "batchgenerators": "0.25.5",
    "batchgeneratorsv2": "0.3.6",
    "fft-conv-pytorch": "1.2.0",  # which batchgeneratorsv2 needs
}
_PEAKS = (("peak", "ours"), ("plain_peak", "plain"))
_SPARSE_SIDES = (96, PUBLISHED)
_SPARSE_RATIOS = (0.6, 0.75, 0.9)


def benchmark(settings: Benchmark) -> None:
    """Measure and print Markdown; progress goes to the error stream."""
    _check_names(settings)
    check_device(settings.device)
    if settings.peers and settings.parts != ("inference",):  # nnU-Net has an environment of its own
        _install_peers()
    head = _alone(_hardware, settings) + "\n"
    if "steps" in settings.parts:
        _tell(settings, "steps", head, _measure_steps(settings))
    if "sparse" in settings.parts:
        _tell(settings, "sparse", head, _measure_sparse(settings))
    if "precision" in settings.parts and settings.device == "cpu":
        print("precision", file=sys.stderr, flush=True)
        _tell(settings, "precision", head, [_precision_table(settings)])
    if {"views", "store"} & {*settings.parts}:
        print("views and store", file=sys.stderr, flush=True)
        _tell(settings, "samples", head, [_data_tables(_alone(measure_samples, settings), settings)])
    if "data" in settings.parts:
        print("data", file=sys.stderr, flush=True)
        _tell(settings, "data", head, [data_tables(_alone(_measure_data_path, settings), _table)])
    if "inference" in settings.parts:
        print("inference", file=sys.stderr, flush=True)
        _tell(settings, "inference", head, _measure_inference(settings))
    if settings.output is not None:  # else what is printed is a page
        end(settings.output)


def _tell(settings: Benchmark, section: str, head: str, states: Iterable[Sequence[str]]) -> None:
    """Write the figures of a section into the page as they grow, so that none is lost if a later one fails; print them.

    Args:
        settings: of the command.
        section: of the page.
        head: machine and versions.
        states: the tables with what is measured so far, complete at last.
    """
    text: list[str] = []
    for tables in states:
        text = [head, *tables]
        if settings.output is not None:
            write_section(settings.output, section, text)
    print("\n".join(text), flush=True)


def _check_names(settings: Benchmark) -> None:
    """Refuse a setting that none of the bundles has.

    Raises:
        SettingsError: naming it.
    """
    keys: set[str] = set()
    for cell in settings.cells:
        keys |= set(read_config(ROOT / "bundles" / cell / "configs" / "pretrain.yaml"))
    for name in settings.settings:
        if name not in keys:
            raise SettingsError(f"--{name} is neither an option nor a setting of these bundles")


def _measure_steps(settings: Benchmark) -> Iterator[list[str]]:
    """Measure the step of every bundle, each in processes of its own; yield the tables after each."""
    steps: list[dict[str, Any]] = []
    for index, cell in enumerate(settings.cells):
        step = _alone(measure_step, cell, settings)
        step |= {name: step_memory_gib(cell, kind, settings)[1] for name, kind in _PEAKS}
        steps.append(step)
        told = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in step["ratios"].items())
        print(
            f"[{index + 1}/{len(settings.cells)}] {cell}: {step['seconds']:.2f} s, {told}", file=sys.stderr, flush=True
        )
        yield _step_tables(steps, settings)


def _measure_sparse(settings: Benchmark) -> Iterator[list[str]]:
    """Measure spark3d_resenc_l against the dense U-Net; yield the table after each row."""
    columns = ["crop", "hidden", "checkpointing", "s", "time / dense", "memory / dense"]
    rows: list[list[str]] = []
    for side, mode, ratio in itertools.product(_SPARSE_SIDES, ("none", "selective"), _SPARSE_RATIOS):
        alike = {**settings.settings, "checkpointing": mode, "hidden_ratio": ratio}
        found = _alone(measure_sparse, replace(settings, patch_size=side, batch_size=1, settings=alike))
        times, memory = f"**{found['time']:.2f}**", f"**{found['memory']:.2f}**"
        rows.append([f"{side}^3", f"{ratio:.0%}", f"`{mode}`", f"{found['seconds']:.3g}", times, memory])
        print(f"sparse: {', '.join(rows[-1])}", file=sys.stderr, flush=True)
        yield [_table(columns, rows)]


def _measure_inference(settings: Benchmark) -> Iterator[list[str]]:
    """Predict volumes; yield the table after each row."""
    found: list[dict[str, Any]] = []
    for row in measure_inference(settings):
        found.append(row)
        yield inference_table(found, _table)


def _measure_data_path(options: Benchmark) -> dict[str, Any]:
    """Measure the data path on volumes of 256^3 for crops of the published size."""
    prepare_process(options)
    with tempfile.TemporaryDirectory() as name:
        return measure_data_path(
            Path(name),
            options.views_size * 256 // PUBLISHED,
            options.views_size,
            max(3, options.repeats),
            options.scans,
        )


def _alone(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _hardware(options: Benchmark) -> str:
    """Return one line on machine and versions; needs packages, so it runs in a process of its own."""
    prepare_process(options)

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("model name")
        ]
        processor = names[0].split(":")[1].strip() if names else processor
    threads = f"{torch.get_num_threads()} thread(s), {'processor' if options.shared else 'wall'} time"
    memory = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "monai", "blosc2", "numpy", "scipy")]
    versions += [
        f"{name} {version}" for name, version in PEERS.items() if options.peers and options.parts != ("inference",)
    ]
    return (
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores of {processor}, {memory:.0f} GB, {gpu}; "
        f"{threads}; Python {platform.python_version()}, {', '.join(versions)}"
    )


def _install_peers() -> None:
    """Put the peers alone into a folder of their own; what they need of torch and SciPy is ours."""
    installed = {
        path.name.split("-")[0].replace("_", "-"): path.name.split("-")[1] for path in PEER_FOLDER.glob("*.dist-info")
    }
    if all(installed.get(name) == f"{version}.dist" for name, version in PEERS.items()):
        return
    print(f"installing {', '.join(PEERS)} into {PEER_FOLDER.name} (once)", file=sys.stderr, flush=True)
    pins = [f"{name}=={version}" for name, version in PEERS.items()]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--upgrade", "--target", str(PEER_FOLDER), *pins]).returncode:
        raise SystemExit(f"Stopped: pip could not install {', '.join(pins)}; see its message above")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _step_tables(steps: Sequence[dict[str, Any]], options: Benchmark) -> list[str]:
    unet = "dynamic-network-architectures' U-Net" if options.peers else "plain U-Net"
    rows = []
    for step in steps:
        ratios = dict(step["ratios"])
        yardstick = "plain transformer" if "primus" in step["cell"] else unet
        if "dense" in ratios:
            yardstick = f"plain sparse U-Net; dense U-Net: {ratios['dense']:.2f}"
        rows.append(
            [
                step["cell"],
                step["input"],
                f"{step['seconds']:.3g}",
                f"{step['peak']:.2f}",
                f"**{ratios['plain']:.2f}**",
                f"{step['peak'] / step['plain_peak']:.2f}",
                yardstick,
            ]
        )
    precision = "bf16" if options.device == "cuda" else "float32"
    extras = [name for name in ("channels_last", "compile") if getattr(options, name)]
    text = [
        f"Training step, crops of {options.patch_size}^3, batch {options.batch_size}, "
        f"{', '.join([precision, options.device, *extras, *(f'{k} {v}' for k, v in options.settings.items())])}:\n",
        _table(["bundle", "input", "s", "peak GiB", "time / yardstick", "memory / yardstick", "yardstick"], rows),
    ]
    for step in steps:
        for name, profile in step.get("profiles", {}).items():
            lines = [[key, str(count), f"{ms:.0f}", f"{share:.0%}"] for key, count, ms, share in profile]
            text += [f"{step['cell']}, {name}, one step:\n", _table(["operation", "calls", "ms", "share"], lines)]
    return text


def _precision_table(options: Benchmark) -> list[str]:
    """Measure both backbones in bfloat16; a CPU without its instructions is said to have none."""
    if not cpu_has_bfloat16():
        return ["This CPU has no instructions for bfloat16; its precision was not measured.\n"]
    rows = []
    for cell in ("mae_resenc_l", "mae_primus_m"):
        found = _alone(measure_precision, cell, options)
        for what, (single, half) in found["seconds"].items():
            rows.append([cell, what, f"{single:.3g}", f"{half:.3g}", f"**{half / single:.2f}**"])
    return [
        f"float32 against bfloat16 on the CPU (`--amp true`), crops of {options.patch_size}^3, batch "
        f"{options.batch_size}:\n",
        _table(["bundle", "what", "float32, s", "bfloat16, s", "ratio"], rows),
    ]


def _data_tables(data: dict[str, Any], options: Benchmark) -> list[str]:
    head, rows = ["bundle", "region"], []
    head += ["store reads / s", "whole cached file = 1"] if "store" in options.parts else []
    head += ["views / s", "reads / views"] if "views" in options.parts else []
    for cell, row in data["rows"].items():
        line = [cell, row["region"]]
        if "store" in options.parts:
            line += [f"{row['reads']:.0f}", f"{row['read_ratio']:.1f}"]
        if "views" in options.parts:
            line += [f"{row['views']:.1f}", f"{row['reads'] / row['views']:.1f}"]
        rows.append(line)
    text = [f"Samples of {data['volume']} volumes, one thread, views on {options.device}:\n", _table(head, rows)]
    if "store" in options.parts:
        sizes = ", ".join(f"{dtype} {share:.0%}" for dtype, share in data["bytes"].items())
        text.append(f"Bytes of the stored volume against raw float32: {sizes}.\n")
    if data.get("yardsticks"):
        rows = [
            [
                y["what"],
                y["yardstick"],
                f"{1000 * y['ours']:.1f}",
                f"{1000 * y['theirs']:.1f}",
                f"**{y['ours'] / y['theirs']:.2f}**",
                "" if y["allowed"] is None else f"{y['allowed']:.2f}",
            ]
            for y in data["yardsticks"]
        ]
        text += [
            "One sample on one thread of the CPU:\n",
            _table(["what", "yardstick", "ours, ms", "yardstick, ms", "ratio", "at most"], rows),
        ]
    return text
