# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands that measure."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from common.errors import SettingsError

from ..commanding.environment import ROOT
from ..commanding.settings import Bundle, Existing, From, Reads, RefusalError, Rests, read, settings

__all__ = ["PARTS", "PUBLISHED", "Benchmark", "Sharding"]

PARTS = ("steps", "sparse", "precision", "views", "store", "data", "inference")
PUBLISHED = 160
_BUNDLES = tuple(sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/pretrain.yaml")))


def _cells(value: Any) -> tuple[str, ...]:
    return _chosen(value, _BUNDLES, "bundle")


def _parts(value: Any) -> tuple[str, ...]:
    return _chosen(value, PARTS, "part")


def _chosen(value: Any, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    names: tuple[str, ...] = read(tuple[str, ...], value)
    if names == ("all",):
        return known
    for name in names:
        if name not in known:
            raise RefusalError(f"there is no {what} {name!r}; choose from {', '.join(known)}")
    return names


@settings
class Benchmark:
    """What ``benchmark`` is told."""

    cells: Annotated[tuple[str, ...], Reads(_cells, "bundles with commas between, or all")] = ("all",)
    """Bundles to measure."""
    parts: Annotated[tuple[str, ...], Reads(_parts, "parts with commas between, or all")] = ("all",)
    """Of steps, sparse (Spark3D's step against the dense U-Net's, crops of 96 and 160, one sample), precision (bfloat16
    against float32 on a CPU that has it), views, store, data (the data path against MONAI's datasets and .npy; needs 2
    GB of disk), inference (whole volumes on one thread; with --peers true against nnU-Net in .venv-nnunet)."""
    patch_size: Annotated[int, From(1)] = 64
    """Side of the crops of a training step, a multiple of 32 (for the U-Net at least 64). 160 is published; below that
    VoCo and SimCLR get fewer crops of each image."""
    batch_size: Annotated[int, From(1)] = 2
    """Images of a step."""
    views_size: Annotated[int, From(1)] = PUBLISHED
    """Side of the crops of views and store."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu (float32) or cuda (bf16 autocast)."""
    repeats: Annotated[int, From(1)] = 3
    """Timed rounds."""
    peers: bool = False
    """Compare also with other packages (dynamic-network-architectures, batchgenerators), installed into
    .venv-peers."""
    channels_last: bool = False
    """Lay out networks and images with channels last."""
    compile: bool = False
    """torch.compile the networks."""
    profile: bool = False
    """Also print where the time of a step goes."""
    shared: bool = False
    """For a CPU that others use too: one thread, and processor time instead of wall time."""
    scans: tuple[Existing, ...] = ()
    """Files to measure the data path with instead of simulated scans."""
    output: Path | None = None
    """Markdown file to write into: each part between its own marks, and what is around them is kept."""
    settings: Rests = field(default_factory=dict)
    """Of pretrain.yaml, any at its top level, such as --checkpointing full."""

    def __post_init__(self) -> None:
        if self.shared and self.device != "cpu":
            raise SettingsError("--shared counts processor time, which says nothing about a GPU")


@settings
class Sharding:
    """What ``sharding`` is told."""

    bundle: Bundle = "mae_primus_m"
    """One with a Primus backbone."""
    processes: Annotated[int, From(1)] = 2
    """Of one machine; on cuda one for each GPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu (gloo, float32) or cuda (NCCL, bf16 autocast)."""
    patch_size: Annotated[int, From(1)] = 32
    """Side of the crops."""
    batch_size: Annotated[int, From(1)] = 2
    """Of one step over all processes."""
    repeats: Annotated[int, From(1)] = 2
    """Timed steps, after a first one."""
    settings: Rests = field(default_factory=dict)
    """Of pretrain.yaml, any at its top level, such as --checkpointing full."""

    def __post_init__(self) -> None:
        if not self.bundle.endswith("primus_m"):
            raise SettingsError(f"{self.bundle!r} is no bundle with a Primus backbone, which alone can be sharded")
        if self.batch_size % self.processes:
            raise SettingsError(f"batch_size {self.batch_size} does not split over {self.processes} processes")
