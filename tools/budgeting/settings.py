# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands that say what a GPU must have."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from common.errors import SettingsError

from ..commanding.environment import ROOT
from ..commanding.settings import From, Reads, RefusalError, Rests, read, settings

__all__ = ["BUNDLES", "Budget", "GpuReport"]

BUNDLES = tuple(sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/pretrain.yaml")))


def _one_or_all(value: Any) -> str:
    if value not in (*BUNDLES, "all"):
        raise RefusalError(f"there is no bundle {value!r}; choose all, or one of {', '.join(BUNDLES)}")
    return str(value)


def _several(value: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = read(tuple[str, ...], value)
    return BUNDLES if names == ("all",) else tuple(_one_or_all(name) for name in names)


@settings
class GpuReport:
    """What ``gpu_report`` is told."""

    output: Path = Path("gpu_report")
    """Folder of report.json and report.md."""
    minutes: Annotated[float, From(0, above=True)] = 12.0
    """What was not begun by then is left out and named."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu goes through all parts without a GPU, for a test at small sizes."""
    cells: Annotated[tuple[str, ...], Reads(_several, "bundles with commas between, or all")] = ("all",)
    """Bundles to measure."""
    patch_size: Annotated[int, From(16)] = 160
    """Side of the crops of steps and of the check of a convolution."""
    small_size: Annotated[int, From(16)] = 64
    """Side of the crops on which CPU and GPU are compared."""
    volume: tuple[Annotated[int, From(1)], ...] = (512, 512, 300)
    """Voxels of the volume that is predicted."""
    repeats: Annotated[int, From(1)] = 3
    """Timed steps, after a first one."""
    settings: Rests = field(default_factory=dict)
    """Of pretrain.yaml and inference.yaml, of each config that has them."""

    def __post_init__(self) -> None:
        if len(self.volume) != 3:
            raise SettingsError(f"--volume is {','.join(map(str, self.volume))}; it must be three numbers of voxels")


@settings
class Budget:
    """What ``budget`` is told."""

    bundle: Annotated[str, Reads(_one_or_all, "the name of a bundle, or all")]
    """Whose config to look at; all makes the tables of docs/budget.md, at published size."""
    workflow: Literal["pretrain", "train", "train_classification", "inference"] = "pretrain"
    """Which of its configs."""
    gpu: Annotated[float, From(1)] | None = None
    """GiB of a GPU: look for the setting that fits it at the batch of one optimizer step that the config has."""
    processes: Annotated[int, From(1)] = 1
    """GPUs that share the batch."""
    volume: tuple[Annotated[int, From(1)], ...] = (512, 512, 300)
    """Voxels of a volume to predict, after preprocessing."""
    check: Annotated[int, From(32)] | None = None
    """Side of crops: hold the estimate against what a process on this CPU takes for a step of two, in float32."""
    output: Path | None = None
    """Markdown file whose tables are made anew, with all."""
    settings: Rests = field(default_factory=dict)
    """Of the config, as on its own command line: --patch_size [128,128,128] --accumulation_steps 2."""

    def __post_init__(self) -> None:
        if len(self.volume) != 3:
            raise SettingsError(f"--volume is {','.join(map(str, self.volume))}; it must be three numbers of voxels")
        if self.bundle == "all" and (self.settings or self.gpu is not None):
            raise SettingsError(
                "the tables are of published settings; name one bundle for settings or a GPU of your own"
            )
        if self.check is not None and (self.settings or self.gpu is not None or self.workflow != "pretrain"):
            raise SettingsError("--check is of pre-training as it is; leave settings, --gpu and --workflow out")
        if self.output is not None and self.bundle != "all":
            raise SettingsError(f"--output is for the tables of all bundles, and {self.bundle} is one")
