# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Mixed precision on every device that has it; MONAI's engines open autocast for CUDA, whatever the device.

=============================  ==================================================================================
a GPU                          as MONAI does: ``dtype``, by default bfloat16 where the GPU has it, else float16
a CPU with bfloat16            bfloat16; on two cores about half the time of float32 (``docs/benchmark.md``)
any other CPU                  float32, with a note: without these instructions bfloat16 is twice as slow
=============================  ==================================================================================
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor
from tqdm import tqdm

from ..bundles import runs_for_a_user
from ..errors import SettingsError
from ..terminal import speaks

__all__ = ["AtPrecision", "Precision", "cpu_has_bfloat16"]

_SAVES = "half to two thirds of the time"  # measured: tools/benchmark.py


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies in bfloat16 by itself: AVX512-BF16, AMX, or Arm's BF16 (as Linux tells)."""
    told = torch.cpu.get_capabilities()
    if any(told.get(name, False) for name in ("avx512_bf16", "amx_bf16")):
        return True
    if platform.machine() in ("aarch64", "arm64") and Path("/proc/cpuinfo").is_file():
        return "bf16" in Path("/proc/cpuinfo").read_text("utf-8", "replace").split()
    return False


class Precision:
    """What ``--amp`` and ``--amp_dtype`` mean on the device of a run; see the table above.

    Args:
        amp: mixed precision was asked for.
        device: of the network.
        dtype: ``bfloat16`` or ``float16``; None takes what the device has.

    Attributes:
        on_gpu: MONAI's engine opens autocast itself, in ``dtype``.
        on_cpu: :class:`AtPrecision` opens it, in bfloat16.
        mixed: either.
        dtype: of products under autocast.

    Raises:
        SettingsError: if ``dtype`` is another, or float16 on a CPU, where it takes a hundred times as long.
    """

    def __init__(self, amp: bool, device: str | torch.device, dtype: str | None = None) -> None:
        if dtype not in (None, "bfloat16", "float16"):
            raise SettingsError(f"amp_dtype is {dtype!r}; it must be bfloat16 or float16")
        gpu = torch.device(device).type != "cpu"
        if amp and not gpu and dtype == "float16":
            raise SettingsError("amp_dtype is float16, which CPUs compute a hundred times slower; leave it out")
        has = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else cpu_has_bfloat16()
        self.on_gpu, self.on_cpu = bool(amp and gpu), bool(amp and not gpu and has)
        self.mixed = self.on_gpu or self.on_cpu
        self.dtype = torch.float16 if dtype == "float16" or (gpu and not has and dtype is None) else torch.bfloat16
        if gpu or not runs_for_a_user() or not speaks():
            return
        if amp and not has:
            tqdm.write("note: this CPU has no instructions for bfloat16, --amp true would be slower: float32 is used")
        elif has and not amp:
            tqdm.write(f"this CPU computes in bfloat16 too: --amp true takes {_SAVES} of float32, which is used now")


class AtPrecision(Inferer):
    """Run an inferer under a CPU's autocast where a :class:`Precision` says so; shapes are the inferer's.

    Args:
        inferer: what runs the network.
        precision: of the run.
    """

    def __init__(self, inferer: Inferer, precision: Precision) -> None:
        self.inferer, self.precision = inferer, precision

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the inferer returns."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision.on_cpu):
            return self.inferer(inputs, network, *args, **kwargs)
