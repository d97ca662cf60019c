# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pictures of what a reconstruction method sees, hides and rebuilds."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch.distributed as dist
import torch.nn.functional as F
from ignite.engine import Engine, Events
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["ReconstructionPictures", "draw_reconstruction"]

_PLANES = ("axial", "coronal", "sagittal")


def draw_reconstruction(image: Tensor, hidden: Tensor, rebuilt: Tensor, path: str | Path) -> None:
    """Draw the middle slices of one crop as three columns: input, what stays visible, rebuilt.

    The rebuilt column keeps the visible blocks of the input: the loss does not ask for them, so the network's own
    values there mean nothing.

    Args:
        image: ``(D, H, W)``, axes (S, A, R).
        hidden: ``(d, h, w)`` grid of blocks.
        rebuilt: ``(D, H, W)``.
        path: PNG to write.
    """
    mask = F.interpolate(hidden[None, None].float(), size=image.shape, mode="nearest")[0, 0].bool().cpu().numpy()
    original, output = image.float().cpu().numpy(), rebuilt.float().cpu().numpy()
    seen = np.ma.array(original, mask=mask)
    pasted = np.where(mask, output, original)
    low, high = np.percentile(original, [0.5, 99.5])
    figure, axes = plt.subplots(3, 3, figsize=(7.5, 7.8), layout="constrained")
    colours = plt.get_cmap("gray").copy()
    colours.set_bad("#4477aa")
    for row, plane in enumerate(_PLANES):
        index = original.shape[row] // 2
        for axis, volume in zip(axes[row], (original, seen, pasted), strict=True):
            axis.imshow(np.ma.take(volume, index, axis=row)[::-1], cmap=colours, vmin=low, vmax=high)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(plane)
    for axis, title in zip(axes[0], ("input", "visible (blue is hidden)", "rebuilt, visible kept"), strict=True):
        axis.set_title(title, fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class ReconstructionPictures:
    """After an evaluator's run, draw the first sample of its last batch every ``interval`` epochs and at the end.

    Args:
        folder: where ``reconstruction_epoch_<n>.png`` go.
        interval: epochs between pictures; 0 draws none.
        epochs: length of the run, whose last epoch is always drawn.
    """

    def __init__(self, folder: str | Path, *, interval: int, epochs: int) -> None:
        self.folder, self.interval, self.epochs = Path(folder), interval, epochs
        self.main = not dist.is_initialized() or dist.get_rank() == 0

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator, whose epoch is the trainer's."""
        if self.main and self.interval:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Draw, if it is time."""
        epoch = engine.state.epoch
        if epoch % self.interval and epoch != self.epochs:
            return
        batch, rebuilt = engine.state.output["label"], engine.state.output["pred"]["reconstruction"]
        path = self.folder / f"reconstruction_epoch_{epoch}.png"
        draw_reconstruction(batch["image"][0, 0], batch["hidden"][0], rebuilt[0, 0], path)
