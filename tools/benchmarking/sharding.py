# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure what each of several processes holds, and how long a training step takes, with weights copied and sharded."""

from __future__ import annotations

import os
import shlex
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from common.engines.budget.fitting import override
from common.errors import SettingsError
from common.processes import leave_processes
from common.terminal import near

from ..commanding.ending import end
from ..commanding.environment import ROOT
from .settings import Benchmark, Sharding
from .steps import bundle_config, regions

__all__ = ["sharding"]

OVERLAYS = {"copied": "multi_gpu.yaml", "sharded": "fsdp.yaml"}


def _megabytes(tensors: Sequence[Tensor]) -> float:
    """Return what this process has of these tensors."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own) / 1e6


def _measure(rank: int, world: int, port: int, overlay: str, asked: Sharding, folder: str) -> None:
    """Take some steps in one process and write what was found."""
    os.chdir(ROOT)
    cuda = asked.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    device = f"cuda:{rank}" if cuda else "cpu"
    share = asked.batch_size // world
    settings = asked.settings | {"device": f"$torch.device('{device}')"}
    options = Benchmark(patch_size=asked.patch_size, batch_size=share, device=asked.device, settings=settings)
    torch.manual_seed(0)
    config = bundle_config(asked.bundle, options, asked.patch_size)
    config.update({"network": ConfigParser.load_config_file(str(ROOT / "common" / "configs" / overlay))["network"]})
    network: nn.Module = config.get_parsed_content("network").train()
    optimizer, loss = config.get_parsed_content("optimizer"), config.get_parsed_content("loss")
    with torch.no_grad():
        views = config.get_parsed_content("views")(regions(config, options))
    seconds, values = [], []
    for _ in range(asked.repeats + 1):  # the first step makes the optimizer's states
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            value = loss(network(views), views)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    parameters = list(network.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    found = {
        "parameters": _megabytes(parameters),
        "gradients": _megabytes([parameter.grad for parameter in parameters if parameter.grad is not None]),
        "states": _megabytes(states),
        "peak": torch.cuda.max_memory_allocated() / 1e6 if cuda else float("nan"),
        "seconds": statistics.median(seconds[1:]),
        "loss": values[0],
    }
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found)
    if rank == 0:
        torch.save(everyone, f"{folder}/found.pt")
    leave_processes()


def sharding(settings: Sharding) -> None:
    """Measure and print a table, the largest of all processes in each place."""
    processes, device = settings.processes, settings.device
    if device == "cuda" and torch.cuda.device_count() < processes:
        raise SettingsError(f"{processes} processes need as many GPUs, and there are {torch.cuda.device_count()}")
    print(
        f"{settings.bundle}, {processes} processes on {device}, crops of {settings.patch_size}^3, batch "
        f"{settings.batch_size}; MB of a process:\n"
    )
    print("| weights | parameters | gradients | optimizer | together | peak on the GPU | s / step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    losses = {}
    for name, overlay in OVERLAYS.items():
        with tempfile.TemporaryDirectory() as folder, socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
            place.close()
            spawn(_measure, args=(processes, port, overlay, settings, folder), nprocs=processes)  # type: ignore[no-untyped-call]
            everyone = torch.load(Path(folder) / "found.pt")
        most = {key: max(found[key] for found in everyone) for key in everyone[0]}
        losses[name] = [found["loss"] for found in everyone]
        held = [most[key] for key in ("parameters", "gradients", "states")]
        shown = [f"{value:.0f}" for value in (*held, sum(held))]
        shown += [f"{most['peak']:.0f}" if device == "cuda" else "", f"{most['seconds']:.2f}"]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)
    if not all(abs(a - b) <= 2e-2 * abs(b) for a, b in zip(*losses.values(), strict=True)):
        raise SystemExit(f"Stopped: the losses differ: {losses}")
    end(following=_following(settings))


def _following(settings: Sharding) -> str:
    """Return the command that pre-trains with sharded weights in as many processes, with the settings of the config."""
    files = [ROOT / "bundles" / settings.bundle / "configs" / "pretrain.yaml"]
    files.append(ROOT / "common" / "configs" / OVERLAYS["sharded"])
    words = ["torchrun", "--standalone", "--nproc_per_node", str(settings.processes), "-m", "monai.bundle", "run"]
    words += ["--config_file", str([near(file) for file in files]), "--dataset_dir", "FOLDER"]
    return f"{shlex.join(words)} {override(settings.settings)}".rstrip()
