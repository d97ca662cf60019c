# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the comparison with nnU-Net."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from common.errors import SettingsError

from ..commanding.settings import Bundle, Existing, From, Labels, Rests, settings

__all__ = ["OURS", "BesideNnunet"]

OURS = "ours"  # the arm with nothing but the plan's settings


@settings
class BesideNnunet:
    """What ``beside_nnunet`` is told."""

    data: Existing
    """Folder of labelled cases: images/ and labels/, an nnU-Net raw or a Decathlon folder."""
    labels: Labels | None = None
    """Class names, background first, or the path of a dataset.json; that of the folder unless given."""
    train: Annotated[int, From(2)] = 40
    """Cases to learn from, drawn from the folder."""
    test: Annotated[int, From(2)] = 60
    """Cases that none has seen, drawn from the rest."""
    seeds: Annotated[int, From(1)] = 3
    """Runs of every arm; the cases stay the same."""
    bundle: Bundle = "mae_resenc_l"
    """One with a residual U-Net, whose train.yaml is ours."""
    epochs: Annotated[int, From(1)] = 25
    """Steps of the learning rate, of both."""
    iterations: Annotated[int, From(1)] = 20
    """Of an epoch."""
    batch_size: Annotated[int, From(1)] = 2
    """Patches of an iteration."""
    lr: Annotated[float, From(0, above=True)] | None = None
    """Peak learning rate, of both; the 0.01 that both ship unless given. Short runs of narrow networks need more."""
    momentum: Annotated[float, From(0)] | None = None
    """Of both; the 0.99 that both ship unless given."""
    stages: Annotated[int, From(2)] = 4
    """Resolutions of the network, at most; the plan may have fewer."""
    features: Annotated[int, From(2)] = 8
    """Channels of the first stage; each further one has twice as many, up to the plan's."""
    blocks: Annotated[int, From(1)] = 2
    """Residual blocks of a stage, at most."""
    patch_size: tuple[Annotated[int, From(1)], ...] | None = None
    """Of the plan unless given; slice, row, column."""
    mirror: bool = False
    """Average over mirrored copies in prediction, in both."""
    trainers: tuple[str, ...] = ("nnUNetTrainer",)
    """Of nnU-Net, each an arm; the first is what all are held against."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further arms of ours: name and settings of train.yaml."""
    output: Path = Path("beside_nnunet")
    """Folder to write to."""
    page: Path | None = None
    """Markdown page whose section "nnU-Net" gets the table."""
    settings: Rests = field(default_factory=dict)
    """Of train.yaml, for all arms of ours."""

    def __post_init__(self) -> None:
        if not self.bundle.endswith("resenc_l"):
            raise SettingsError(f"--bundle is {self.bundle}; nnU-Net plans residual U-Nets: name one of *_resenc_l")
        if self.patch_size is not None and len(self.patch_size) != 3:
            raise SettingsError(f"--patch_size is {list(self.patch_size)}; it must be three sides")
        arms = [*self.trainers, OURS, *self.variants]
        if not self.trainers or (twice := next((arm for arm in arms if arms.count(arm) > 1), None)) is not None:
            why = f"{twice!r} is named twice among the arms" if self.trainers else "--trainers is empty"
            raise SettingsError(f"{why}; the arms are --trainers, {OURS!r} and --variants, each with a name of its own")
