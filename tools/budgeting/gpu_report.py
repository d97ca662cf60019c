# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure what only a GPU can show, most important first, and write one JSON and one page."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser

from common.bundles import read_config
from common.engines.budget.fitting import GIB
from common.errors import SettingsError
from common.files import replace_file, write_json

from ..benchmarking.settings import Benchmark
from ..benchmarking.steps import build_step, peak_gib
from ..commanding.ending import end
from ..commanding.environment import ROOT
from .settings import GpuReport

__all__ = ["gpu_report", "page"]

Part = Callable[[], dict[str, Any]]
_DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
# of a loss and of a gradient's norm on the GPU against the CPU in float32, whose own rounding is far below; without the
# loss scale of a run, small gradients vanish in float16
_ALLOWED = {"float32": (1e-3, 1e-2), "float16": (3e-2, float("inf")), "bfloat16": (3e-2, 0.2)}
_BATCH = 2


def gpu_report(settings: GpuReport) -> None:
    """Measure, save after each part, and print the page.

    Raises:
        SettingsError: if there is no GPU, and no other device was asked for.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("there is no GPU here; with --device cpu and small sizes all parts run for a test")
    warnings.simplefilter("ignore")
    began = time.monotonic()
    report: dict[str, Any] = {"machine": _machine(settings.device), "settings": _plain(settings), "parts": {}}
    settings.output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        estimates = {cell: pool.submit(_estimate, cell, settings) for cell in settings.cells}
        longest = 0.0
        for name, part in _parts(settings, estimates):
            late = time.monotonic() - began + longest > 60 * settings.minutes
            report["parts"][name] = {"left out": "no time was left"} if late else _tried(part)
            longest = max(longest, report["parts"][name].get("seconds", 0.0))
            report["minutes"] = (time.monotonic() - began) / 60
            write_json(report, settings.output / "report.json")
            text = page(report)
            replace_file(settings.output / "report.md", partial(_write_text, text=text))
        pool.shutdown(cancel_futures=True)
    print(page(report))
    end(settings.output / "report.json", look=settings.output / "report.md")


def _write_text(file: str, text: str) -> None:
    Path(file).write_text(text, "utf-8")


def _tried(part: Part) -> dict[str, Any]:
    """Return what a part found, with its seconds, or how it failed: the other parts go on."""
    began = time.monotonic()
    try:
        found = part()
    except Exception as error:  # whatever fails on this GPU is what the report is for
        text = str(error).strip().splitlines()
        found = {"failed": f"{type(error).__name__}: {text[0] if text else ''}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**found, "seconds": time.monotonic() - began}


def _parts(settings: GpuReport, estimates: Mapping[str, Future[float]]) -> Iterator[tuple[str, Part]]:
    """Yield all parts by name, the most important first."""
    published = _options(settings, settings.patch_size)
    first = [cell for backbone in ("resenc_l", "primus_m") for cell in settings.cells if cell.endswith(backbone)][:1]
    first += [cell for cell in settings.cells if cell.endswith("primus_m")][:1]
    first = list(dict.fromkeys(first))
    yield "convolution in bfloat16", partial(_convolution, settings)
    for cell in settings.cells:
        yield f"CPU and GPU, {cell}", partial(_compare, cell, settings)
    for cell in [*first, *(cell for cell in settings.cells if cell not in first)]:
        yield f"step, {cell}", partial(_step, cell, published, settings.repeats, estimates[cell])
    for cell in first:
        yield f"inference, {cell}", partial(_inference, cell, settings)
    for cell in first:
        yield (
            f"channels_last_3d, {cell}",
            partial(_step, cell, replace(published, channels_last=True), settings.repeats),
        )
    for cell in first:
        yield f"torch.compile, {cell}", partial(_step, cell, replace(published, compile=True), settings.repeats)


def _options(settings: GpuReport, size: int, device: str | None = None) -> Benchmark:
    return Benchmark(
        patch_size=size,
        batch_size=_BATCH,
        device=device or settings.device,  # type: ignore[arg-type]
        settings=settings.settings,
    )


def _plain(settings: GpuReport) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}


def _machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "device": device}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "gib": gpu.total_memory / GIB, "capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    return found


def _estimate(cell: str, settings: GpuReport) -> float:
    """Return the estimate of a step's peak in GiB; in a process of its own, where the stand-in is."""
    from common.engines.budget.step import training_step

    from .checking import content_of

    warnings.simplefilter("ignore")
    options = _options(settings, settings.patch_size, "cpu")
    amp = settings.device == "cuda"
    return training_step({**content_of(options, cell), "amp": amp, "amp_dtype": "bfloat16"}, like_cuda=amp).peak / GIB


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median of timed calls after a first one."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _convolution(settings: GpuReport) -> dict[str, Any]:
    """Hold a convolution in bfloat16 against float32 of the same numbers: forward, and both gradients."""
    device, side = settings.device, settings.patch_size
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(_BATCH, 32, side, side, side, generator=generator).to(device, torch.bfloat16)
    weight = (torch.randn(32, 32, 3, 3, 3, generator=generator) / 30).to(device, torch.bfloat16)
    found: dict[str, Any] = {"size": side}
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (each.to(dtype).requires_grad_() for each in (image, weight))
        y = F.conv3d(x, w, padding=1)
        y.backward(torch.ones_like(y))  # type: ignore[no-untyped-call]
        results[dtype] = (y.detach(), x.grad, w.grad)
        forward = partial(F.conv3d, x.detach(), w.detach(), padding=1)
        found[f"s {dtype}".replace("torch.", "")] = _seconds(forward, device, settings.repeats)
        del x, w, y, forward
    pairs = zip(("forward", "gradient of the image", "gradient of the weight"), *results.values(), strict=True)
    for name, exact, rough in pairs:
        found[f"error of the {name}"] = float(_relative(rough, exact))
    found["right"] = all(value < 0.02 for name, value in found.items() if name.startswith("error"))
    return found


def _relative(rough: Any, exact: Any) -> Any:
    """Return the largest error of any sample or filter, relative to its norm: one wrong part is not averaged away."""
    difference = (rough.float() - exact).flatten(1).norm(dim=1)
    return (difference / exact.flatten(1).norm(dim=1).clamp(min=1e-12)).max()


def _compare(cell: str, settings: GpuReport) -> dict[str, Any]:
    """Hold loss and gradient of one step on the device against the CPU in float32, from the same weights and views."""
    settings = replace(settings, settings={**settings.settings, "drop_path": 0.0})  # nothing is drawn in the step
    reference = build_step(cell, _options(settings, settings.small_size, "cpu"))[1]("ours")
    weights = {name: value.clone() for name, value in reference.module.state_dict().items()}
    _, loss, norm = reference(norm=True)
    found: dict[str, Any] = {"loss": loss, "norm": norm}
    for name, dtype in _DTYPES.items():
        step = build_step(cell, _options(settings, settings.small_size))[1]("ours")
        step.module.load_state_dict(weights)
        step.batch = {key: _moved(value, settings.device) for key, value in reference.batch.items()}
        step.mixed, step.dtype = dtype is not None, dtype or torch.bfloat16
        _, other, length = step(norm=True)
        errors = (abs(other / loss - 1), abs(length / norm - 1))
        right = all(error <= most for error, most in zip(errors, _ALLOWED[name], strict=True))
        found[name] = {"loss": errors[0], "gradient": errors[1], "right": right}
    return found


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _step(cell: str, options: Benchmark, repeats: int, estimate: Future[float] | None = None) -> dict[str, Any]:
    """Time a step at published size, batch 2, and take its peak memory."""
    device = options.device
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = build_step(cell, replace(options, compile=options.compile and device == "cuda"))[1]("ours")
    if options.compile and device == "cpu":  # a test of what follows, without compiling for a CPU
        step.method = torch.compile(step.module, backend="eager")
    step()
    seconds = [step(index)[0] for index in range(1, repeats + 1)]
    found: dict[str, Any] = {"batch": options.batch_size, "s a step": statistics.median(seconds)}
    found["peak GiB"] = peak_gib(device)
    if device == "cuda":
        found["reserved GiB"] = torch.cuda.max_memory_reserved() / GIB
    if estimate is not None:
        found["estimated GiB"] = estimate.result()
    return found


def _inference(cell: str, settings: GpuReport) -> dict[str, Any]:
    """Predict a volume with the config's own network and inferer."""
    device = settings.device
    content = {**read_config(ROOT / "bundles" / cell / "configs" / "inference.yaml")}
    content |= {name: value for name, value in settings.settings.items() if name in content}
    content |= {"bundle_root": str(ROOT / "bundles" / cell), "device": f"$torch.device('{device}')"}
    content["patch_size"] = [settings.patch_size] * 3
    parser = ConfigParser(content)
    network = parser.get_parsed_content("network_def").to(device).eval()
    window = parser.get_parsed_content("inferer")
    volume = torch.randn(1, parser.get_parsed_content("channels"), *settings.volume)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        window(volume.to(device), network)
    _wait(device)
    found = {"volume": list(settings.volume), "s": time.perf_counter() - began}
    return {**found, "peak GiB": peak_gib(device)}


def page(report: Mapping[str, Any]) -> str:
    """Return a report as Markdown."""
    machine = ", ".join(f"{name} {_told(value)}" for name, value in report["machine"].items())
    lines = ["# What this GPU does", "", machine, "", f"{report.get('minutes', 0):.1f} minutes", ""]
    lines += ["| part | found |", "| --- | --- |"]
    for name, found in report["parts"].items():
        lines.append(f"| {name} | {_told(found)} |")
    wrong = [name for name, found in report["parts"].items() if '"right": false' in json.dumps(found)]
    failed = [name for name, found in report["parts"].items() if "failed" in found]
    late = [name for name, found in report["parts"].items() if "left out" in found]
    for what, names in (("wrong", wrong), ("failed", failed), ("left out", late)):
        lines += ["", f"{what}: {', '.join(names) or 'nothing'}"]
    return "\n".join([*lines, ""])


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_told(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " x ".join(map(_told, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
