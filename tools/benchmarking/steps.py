# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The training step of a bundle: seconds and peak memory, against the same mathematics written plainly."""

from __future__ import annotations

import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import psutil
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from common.bundles import read_config
from common.memory import peak_bytes
from common.views import reading_stream

from ..commanding.environment import ROOT
from . import plain
from .memory import local_side, step_memory
from .settings import PUBLISHED, Benchmark

__all__ = [
    "PEER_FOLDER",
    "Step",
    "build_step",
    "bundle_config",
    "clock",
    "measure_precision",
    "measure_sparse",
    "measure_step",
    "peak_gib",
    "prepare_process",
    "regions",
    "step_memory_gib",
]

PEER_FOLDER = ROOT / ".venv-peers"


def bundle_config(cell: str, options: Benchmark, size: int) -> ConfigParser:
    """Read a bundle's pretrain.yaml for crops of ``size``; shapes that do not follow from it shrink with it."""
    content = read_config(ROOT / "bundles" / cell / "configs" / "pretrain.yaml")
    for section in ("train", "validate", "run", "initialize"):  # the trainer around the step
        content.pop(section, None)
    content["batch_size"] = options.batch_size
    content["device"] = f"$torch.device('{options.device}')"
    if "crop_size" not in content:
        content["patch_size"] = [size] * 3
    elif size < PUBLISHED:  # crops as published, but fewer of them
        side = min(content["crop_size"], size)
        small = local_side(content, side) if "local_size" in content else 0
        content["crop_size"] = side
        if "grid" in content:
            content |= {"grid": [2, 1, 1], "targets": 1, "patch_size": [2 * side, side, side]}
        elif "local_size" in content:
            content |= {"local_size": small, "local_crops": 2, "patch_size": [side + side // 2] * 3}
        else:
            content |= {"pairs": 1, "patch_size": [side + side // 2, side + side // 2, side]}
    for name, value in options.settings.items():
        if name in content:
            content[name] = value
    return ConfigParser(content)


def regions(config: ConfigParser, options: Benchmark) -> dict[str, Any]:
    """Return what the loader would give for one step, cut out of noise."""
    spatial = config.get_parsed_content("spatial")
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn([side + 16 for side in spatial.patch_size], generator=generator)
    batch: dict[str, Any] = {"key": [(0, 1, index) for index in range(options.batch_size)], "region": [], "spatial": []}
    for key in batch["key"]:
        rng = reading_stream(key)
        for _ in range(config.get_parsed_content("volumes_per_sample")):
            draw = spatial.draw(rng, volume.shape)
            where = tuple(slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True))
            batch["spatial"].append(draw)
            batch["region"].append(volume[where].to(options.device))
    return batch


class Step:
    """A training step as the engine does it: zero, forward, loss, backward, clip, update."""

    def __init__(
        self,
        method: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        batch: dict[str, Any],
        clip_norm: float | None,
        options: Benchmark,
    ) -> None:
        self.loss, self.optimizer, self.clip_norm, self.device = loss, optimizer, clip_norm, options.device
        self.clock = clock(options)
        self.parameters = list(method.parameters())
        self.batch = batch
        if options.channels_last:
            layout = torch.channels_last_3d
            method = method.to(memory_format=layout)  # type: ignore[call-overload]
            self.batch = {
                name: value.to(memory_format=layout) if isinstance(value, torch.Tensor) and value.ndim == 5 else value
                for name, value in batch.items()
            }
        self.module = method
        self.method: Callable[[Any], Any] = torch.compile(method) if options.compile else method
        self.mixed, self.dtype = options.device == "cuda", torch.bfloat16

    def __call__(self, seed: int = 0, *, norm: bool = False) -> tuple[float, float, float]:
        """Return seconds, loss and, if asked for, the gradient's norm."""
        torch.manual_seed(seed)
        self._wait()
        began = self.clock()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, self.dtype, enabled=self.mixed):
            loss = self.loss(self.method(self.batch), self.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        length = 0.0
        if norm:
            length = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self._wait()
        return self.clock() - began, float(loss.detach()), length

    def forward(self) -> float:
        """Return the seconds of a forward pass alone, as inference does it."""
        self._wait()
        began = self.clock()
        with torch.inference_mode(), torch.autocast(self.device, self.dtype, enabled=self.mixed):
            self.method(self.batch)
        self._wait()
        return self.clock() - began

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def peak_gib(device: str) -> float:
    """Return the largest memory that this process has held: of the GPU, or of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_bytes() / 2**30


def clock(options: Benchmark) -> Callable[[], float]:
    """Return the clock; processor time leaves out what other processes do, if there is one thread."""
    return time.process_time if options.shared else time.perf_counter


def prepare_process(options: Benchmark) -> None:
    """Make our packages, and the peers if wanted, importable in a measuring process."""
    if options.peers:
        sys.path.append(str(PEER_FOLDER))  # last: nothing of ours is taken from there
    os.chdir(ROOT)
    if options.shared:
        torch.set_num_threads(1)


def build_step(cell: str, options: Benchmark) -> tuple[Any, Callable[[str], Step]]:
    """Return a bundle's method and what makes a step of it (``ours``) or of a yardstick (``plain``, ``dense``)."""
    torch.manual_seed(0)
    config = bundle_config(cell, options, options.patch_size)
    method = config.get_parsed_content("network").train()
    loss, optimizer = config.get_parsed_content("loss"), config.get_parsed_content("optimizer")
    with torch.no_grad():
        batch = config.get_parsed_content("views")(regions(config, options))
    accepted = set(inspect.signature(type(optimizer)).parameters)
    same = {name: value for name, value in optimizer.defaults.items() if name in accepted}

    def step(kind: str) -> Step:
        network, score, update = method, loss, optimizer
        if kind != "ours":
            network = plain.plain_method(method, peer=options.peers) if kind == "plain" else plain.DenseUNet(method)
            network = network.to(options.device).train()
            update = type(optimizer)(network.parameters(), **same)
        if kind == "plain":
            formula = plain.LOSSES[type(loss).__name__]

            def score(pred: dict[str, Tensor], views: dict[str, Any]) -> Tensor:
                return formula(loss, pred, views)

        return Step(
            network, score, update, batch=batch, clip_norm=config.get_parsed_content("clip_norm"), options=options
        )

    return method, step


def measure_step(cell: str, options: Benchmark) -> dict[str, Any]:
    """Time a bundle's step and its yardsticks in turn."""
    prepare_process(options)

    method, build = build_step(cell, options)
    steps = {"ours": build("ours")}
    first = {"ours": steps["ours"](norm=True)[1:]}
    method, build = build_step(cell, options)  # the same seed: the weights that the first step began with
    steps["plain"] = build("plain")
    first["plain"] = steps["plain"](norm=True)[1:]
    allowed = (1e-4, 1e-3) if options.device == "cpu" else (2e-2, 1e-1)
    for mine, theirs, limit, what in zip(*first.values(), allowed, ("loss", "gradient"), strict=True):
        if not abs(mine - theirs) <= limit * abs(theirs):
            raise RuntimeError(f"{cell}: the {what} is {mine}, written plainly {theirs}")
    if hasattr(method.backbone, "head") and type(method).__name__ == "Spark3D":
        steps["dense"] = build("dense")
        steps["dense"]()
    del method, build
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.repeats):
        for name in list(steps)[:: 1 if index % 2 else -1]:  # whoever comes first does so in every other round only
            seconds[name].append(steps[name](index)[0])
    result: dict[str, Any] = {
        "cell": cell,
        "input": " x ".join(
            map(str, next(v for v in steps["ours"].batch.values() if isinstance(v, Tensor) and v.ndim > 4).shape)
        ),
        "seconds": statistics.median(seconds["ours"]),
        # neighbours in time are compared, so that a machine that slows down does so for both
        "ratios": {
            name: statistics.median(a / b for a, b in zip(seconds["ours"], other, strict=True))
            for name, other in seconds.items()
            if name != "ours"
        },
    }
    if options.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if options.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        result["profiles"] = {}
        for name, step in steps.items():
            with torch.profiler.profile(activities=activities) as profiler:
                step()
            kind = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
            rows = [(event.key, event.count, getattr(event, kind) / 1000) for event in profiler.key_averages()]
            total = sum(row[2] for row in rows)
            top = sorted(rows, key=lambda row: -row[2])[:8]
            result["profiles"][name] = [[key, count, ms, ms / total] for key, count, ms in top]
    return result


def step_memory_gib(cell: str, kind: str, options: Benchmark) -> tuple[float, float]:
    """Measure the memory of a step (``ours`` or ``plain``) in a process of its own.

    Pieces from 1 MiB are given back to the system there as soon as they are free, so that the peak is not what was kept
    of steps before.

    Returns:
        GiB of that process before the step with its libraries loaded (0 of a GPU), and its peak after two steps.
    """
    command = [sys.executable, "-W", "ignore", "-c", f"from {__name__} import _measure_memory; _measure_memory()"]
    answer = subprocess.run(
        command,
        input=json.dumps([cell, kind, asdict(options)], default=str),
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    base, peak = json.loads(answer.stdout.splitlines()[-1])
    return base, peak


def _measure_memory() -> None:
    """Read what to measure and print it; in the process that :func:`step_memory_gib` starts."""
    cell, kind, fields = json.loads(sys.stdin.read())
    options = Benchmark(**fields)
    prepare_process(options)
    torch.nn.Conv3d(2, 2, 3)(torch.randn(1, 2, 8, 8, 8)).sum().backward()  # loads what every step needs
    build_step(cell, options)  # loads what this one needs
    gc.collect()
    base = 0.0 if options.device == "cuda" else psutil.Process().memory_info().rss / 2**30
    step = build_step(cell, options)[1](kind)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    print(json.dumps([base, peak_gib(options.device)]))


def measure_sparse(options: Benchmark) -> dict[str, float]:
    """Time the step of spark3d_resenc_l and of the dense U-Net in turn; their memory is counted without values."""
    prepare_process(options)
    build = build_step("spark3d_resenc_l", options)[1]
    steps = {"ours": build("ours"), "dense": build("dense")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.repeats + 1):
        for name in list(steps)[:: 1 if index % 2 else -1]:
            seconds[name].append(steps[name](index)[0])
    del steps, build
    ours, dense = (times[1:] for times in seconds.values())  # the first round warms up
    memory = [
        step_memory(cell, patch_size=options.patch_size, batch_size=1, **settings).highest
        for cell, settings in (
            ("spark3d_resenc_l", options.settings),
            ("mae_resenc_l", {k: v for k, v in options.settings.items() if k != "hidden_ratio"}),
        )
    ]
    return {
        "seconds": statistics.median(ours),
        "time": statistics.median(a / b for a, b in zip(ours, dense, strict=True)),
        "memory": memory[0] / memory[1],
    }


def measure_precision(cell: str, options: Benchmark) -> dict[str, Any]:
    """Time a bundle's step and forward pass in float32 and in bfloat16, in turn; return their seconds in that order."""
    prepare_process(options)
    step = build_step(cell, options)[1]("ours")
    seconds: dict[str, tuple[list[float], list[float]]] = {"training step": ([], []), "forward pass": ([], [])}
    for index in range(options.repeats + 1):
        for mixed in (False, True) if index % 2 else (True, False):
            step.mixed = mixed
            seconds["training step"][mixed].append(step(index)[0])
            seconds["forward pass"][mixed].append(step.forward())
    medians = {  # the first round warms up
        what: [statistics.median(times[1:]) for times in pair] for what, pair in seconds.items()
    }
    return {"cell": cell, "seconds": medians}
