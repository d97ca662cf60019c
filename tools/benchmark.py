# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure what this machine gives: training steps and memory of both bundles, store reads, views.

  python tools/benchmark.py                          # small sizes, for any machine
  python tools/benchmark.py --patch_size 160 --batch_size 2 --device cuda

Networks have their full width and depth. Figures are medians over interleaved repetitions, printed as Markdown with the
hardware and versions; compare ratios within one run, not seconds between machines.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import ROOT, RUNTIME, ensure

__all__ = ["benchmark"]


def _training(cell: str, patch_size: int, batch_size: int, device: str, repeats: int, queue: Any) -> None:
    """Time full training steps of one cell in a process of its own, so that its peak memory is its own."""
    import torch

    from common.losses import MaskedMSELoss
    from common.methods.mae import TransformerMAE, UNetMAE
    from common.networks import primus_m, resenc_l
    from common.views import draw_hidden_blocks, view_stream

    torch.manual_seed(0)
    block = 16 if cell == "mae_resenc_l" else 8
    if cell == "mae_resenc_l":
        method: torch.nn.Module = UNetMAE(resenc_l())
    else:
        method = TransformerMAE(primus_m(input_size=patch_size, drop_path=0.2))
    method = method.to(device).train()
    sgd = cell == "mae_resenc_l"
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(method.parameters(), lr=1e-4, momentum=0.99, nesterov=True)
        if sgd
        else torch.optim.AdamW(method.parameters(), lr=1e-4)
    )
    image = torch.randn(batch_size, 1, *[patch_size] * 3, device=device)
    hidden = torch.stack(
        [draw_hidden_blocks([patch_size // block] * 3, 0.75, view_stream((0, 0, i))) for i in range(batch_size)]
    )
    batch = {"image": image, "hidden": hidden.to(device)}
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = MaskedMSELoss()(method(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        import psutil

        memory = psutil.Process().memory_info()
        peak = getattr(memory, "peak_wset", 0) / 2**30
        if os.name == "posix":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    queue.put((statistics.median(seconds[1:]), peak))


def _median_ms(functions: dict[str, Callable[[int], object]], repeats: int) -> dict[str, float]:
    """Run the functions in turn, ``repeats`` times each, and return the median milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function(index)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark(patch_size: int = 64, batch_size: int = 2, device: str = "cpu", repeats: int = 5) -> None:
    """Measure and print a Markdown table.

    Args:
        patch_size: side of the training crop in voxels, a multiple of 32.
        batch_size: samples of a step.
        device: cpu or cuda (bf16 autocast).
        repeats: timed repetitions of a training step, after one that is not counted.
    """
    import blosc2
    import nibabel as nib
    import numpy as np
    import torch
    from scipy.ndimage import map_coordinates

    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    from template_data import simulate_scan, template

    from common.data import StoreSettings, VolumeStore
    from common.views import SpatialCrop, SpatialDraw, reading_stream

    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    threads = torch.get_num_threads()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "monai", "blosc2"))
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, {gpu}, {threads} threads, "
        f"{versions}\n"
    )

    print(
        f"| training step, {patch_size}^3, batch {batch_size}, {'bf16' if device == 'cuda' else 'fp32'} | seconds "
        "| peak GiB |"
    )
    print("|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for cell in ("mae_resenc_l", "mae_primus_m"):
        queue = context.Queue()
        process = context.Process(target=_training, args=(cell, patch_size, batch_size, device, repeats, queue))
        process.start()
        while process.is_alive() and queue.empty():
            process.join(0.5)
        if queue.empty():
            raise SystemExit(f"Stopped: the step of {cell} failed (exit code {process.exitcode}); see above")
        seconds, peak = queue.get()
        process.join()
        print(f"| {cell} | {seconds:.3f} | {peak:.2f} |", flush=True)

    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    image, _, affine = template()
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        path = Path(folder) / "scan.nii.gz"
        nib.save(nib.Nifti1Image(simulate_scan(image, rng), affine), path)
        stored = {
            dtype: VolumeStore(Path(folder) / dtype, StoreSettings(dtype=dtype)).prepare([{"image": str(path)}])[0][0]
            for dtype in ("float16", "float32")
        }
        whole = stored["float32"].read((0, 0, 0), stored["float32"].shape)
        torch.save(torch.from_numpy(whole), Path(folder) / "cached.pt")
        side = min(96, *whole.shape)
        crop = SpatialCrop(side, rotation_probability=0, zoom_probability=0)
        turned = SpatialCrop(side, rotation_probability=1, zoom_probability=1)

        flipped = SpatialDraw((0, 0, 0), None, (True, False, True), (0, 0, 0), (side, side, side))

        def region(index: int, dtype: str) -> np.ndarray:
            draw = crop.draw(reading_stream((0, 0, index)), whole.shape)
            return stored[dtype].read(draw.start, draw.stop)

        def cut(draw: SpatialDraw) -> torch.Tensor:
            where = tuple(slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True))
            return turned.apply(torch.from_numpy(whole[where]), draw)

        def cubic(index: int) -> np.ndarray:
            draw = turned.draw(reading_stream((0, 0, index)), whole.shape)
            half = (side - 1) / 2
            grid = np.stack(np.meshgrid(*[np.arange(side) - half] * 3, indexing="ij")).reshape(3, -1)
            where = np.array(draw.matrix) @ grid + (np.array(draw.low) + half)[:, None]
            return map_coordinates(whole, where, order=3).reshape([side] * 3)

        times = _median_ms(
            {
                "store, float16": lambda i: region(i, "float16"),
                "store, float32": lambda i: region(i, "float32"),
                "a cached tensor file, read whole": lambda i: torch.load(Path(folder) / "cached.pt", weights_only=True),
                "plain crop and flips": lambda i: crop.apply(torch.from_numpy(whole[:side, :side, :side]), flipped),
                "rotation and zoom, trilinear": lambda i: cut(turned.draw(reading_stream((0, 0, i)), whole.shape)),
                "rotation and zoom, cubic splines (SciPy)": cubic,
            },
            repeats=15,
        )
        sizes = {dtype: os.path.getsize(volume.path) / whole.nbytes for dtype, volume in stored.items()}
    print(f"\n| one sample, {side}^3 of {' x '.join(map(str, whole.shape))}, one thread | ms |\n|---|---|")
    for name, value in times.items():
        print(f"| {name} | {value:.1f} |")
    print(
        f"\nBytes of the stored volume against raw float32: float16 {sizes['float16']:.0%}, float32 "
        f"{sizes['float32']:.0%}."
    )


if __name__ == "__main__":
    ensure(RUNTIME)
    import fire

    fire.Fire(benchmark)
