# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pictures of what a method sees and what it makes of it, one function for each kind of method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ignite.engine import Engine, Events
from matplotlib import colormaps
from torch import Tensor

from ..drawing import draw_overlay
from ..figures import subplots
from ..files import replace_file
from ..paths import as_path
from ..tasks import SegmentationTask
from .progress import ON_TRAINING

__all__ = [
    "Curves",
    "Pictures",
    "SegmentationPicture",
    "draw_features",
    "draw_fusion",
    "draw_reconstruction",
    "draw_restoration",
    "draw_similarity",
]

_PLANES = ("axial", "coronal", "sagittal")
_Draw = Callable[[dict[str, Any], dict[str, Tensor], Path], None]


class Pictures:
    """After an evaluator's run, draw its last batch every ``interval`` epochs and at the end.

    Args:
        draw: function of views, predictions and the path to write.
        folder: where ``epoch_<n>.png`` go.
        interval: epochs between pictures; 0 draws none.
        epochs: length of the run, whose last epoch is always drawn.
    """

    def __init__(self, draw: _Draw, *, folder: str | Path, interval: int, epochs: int) -> None:
        self.draw, self.folder, self.interval, self.epochs = draw, as_path(folder), interval, epochs
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
        self.folder.mkdir(parents=True, exist_ok=True)
        output = engine.state.output
        views = output["label"] if isinstance(output["label"], dict) else output
        self.draw(views, output["pred"], self.folder / f"epoch_{epoch}.png")


class Curves:
    """Draw the history of a run at every interval and at the end: loss, validation, learning rate.

    Args:
        history: records that :class:`Progress` keeps.
        path: of the picture.
        interval: epochs between pictures; 0 draws none.
    """

    def __init__(self, history: Sequence[dict[str, float]], *, path: str | Path, interval: int) -> None:
        self.history, self.path, self.interval = history, as_path(path), interval
        self.main = not dist.is_initialized() or dist.get_rank() == 0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after what keeps the history."""
        if self.main and self.interval:
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, _: Engine) -> None:
        """Draw what there is."""
        names = list(dict.fromkeys(name for record in self.history for name in record))
        panels = {
            "training loss": [name for name in names if name.startswith("train_")],
            "validation": [name for name in names if name.startswith("val_")],
            "learning rate": ["lr"],
        }
        shown = {title: keys for title, keys in panels.items() if any(key in names for key in keys)}
        figure, axes = subplots(1, len(shown), figsize=(4.2 * len(shown), 3.4), squeeze=False)
        for axis, (title, keys) in zip(axes[0], shown.items(), strict=True):
            for key in keys:
                points = [(record["epoch"], record[key]) for record in self.history if key in record]
                label = key.removeprefix("train_").removeprefix("val_")
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=label)
            remark = " on training cases" if title == "validation" and ON_TRAINING in names else ""
            axis.set(title=title + remark, xlabel="epoch")
            axis.grid(alpha=0.3)
            if len(keys) > 1:
                axis.legend(fontsize=8)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _save(figure, self.path)


class SegmentationPicture:
    """Draw the last patch of a validation batch, the one on foreground: image, label and prediction over it.

    Args:
        task: classes or regions.
    """

    def __init__(self, task: SegmentationTask) -> None:
        self.task = task

    def __call__(self, views: dict[str, Any], pred: Tensor, path: Path) -> None:
        """Draw ``image`` and ``label`` of the views and the logits ``(B, outputs, D, H, W)``."""
        maps = {
            "label": views["label"][-1, 0].cpu().numpy(),
            "prediction": self.task.decode(pred[-1:].float())[0, 0].cpu().numpy(),
        }
        image = views["image"][-1, 0].float().cpu().numpy()
        draw_overlay(image, maps, path, labels=self.task.by_value, title=f"a validation patch, {path.stem}")


def draw_reconstruction(views: dict[str, Any], pred: dict[str, Tensor], path: Path) -> None:
    """Draw the first crop of a masked method: input, what stays visible, rebuilt.

    The rebuilt column keeps the visible blocks of the input: the loss does not ask for them, so the network's own
    values there mean nothing.
    """
    original, output = _voxels(views["image"]), _voxels(pred["reconstruction"])
    hidden = views["hidden"][0][None, None].float()
    mask = F.interpolate(hidden, size=original.shape, mode="nearest")[0, 0].bool().cpu().numpy()
    columns = {
        "input": original,
        "visible (blue is hidden)": np.ma.array(original, mask=mask),
        "rebuilt, visible kept": np.where(mask, output, original),
    }
    _draw_slices(columns, path, like=original)


def draw_restoration(views: dict[str, Any], pred: dict[str, Tensor], path: Path) -> None:
    """Draw the first crop of a method that restores spoiled ones: spoiled, restored, clean."""
    clean = _voxels(views["target"])
    columns = {"spoiled": _voxels(views["image"]), "restored": _voxels(pred["reconstruction"]), "clean": clean}
    _draw_slices(columns, path, like=clean)


def draw_fusion(views: dict[str, Any], pred: dict[str, Tensor], path: Path) -> None:
    """Draw the first sample of VolumeFusion: fused volume, true share of the foreground, predicted share."""
    probability = pred["logits"][0].float().softmax(0)  # (classes, D, H, W)
    classes = probability.shape[0]
    values = torch.arange(classes, device=probability.device).view(-1, 1, 1, 1) / (classes - 1)
    image = _voxels(views["image"])
    shares = {
        "true share": (views["share"][0].float() / (classes - 1)).cpu().numpy(),
        "predicted share": (probability * values).sum(0).cpu().numpy(),
    }
    _draw_slices({"fused volume": image}, path, like=image, maps=shares)


def draw_similarity(views: dict[str, Any], pred: dict[str, Tensor], path: Path) -> None:
    """Draw the cosine similarity of crops beside the share of their volume that they have in common.

    VoCo: targets against the grid of their own image, for up to eight images. SimCLR: references against partners, up
    to 32 of each.
    """
    overlap = views["overlap"].float().cpu()
    if "base" in pred:
        base, target = (F.normalize(pred[name][:8].float(), dim=-1) for name in ("base", "target"))
        similarity, truth = (target @ base.mT).flatten(0, 1), overlap[:8].flatten(0, 1)
        axes = ("crop of the grid", "target crop")
    else:
        reference, partner = F.normalize(pred["embedding"][:, :32].float(), dim=-1)
        similarity, truth = reference @ partner.mT, overlap[:32, :32]
        axes = ("partner crop", "reference crop")
    figure, panels = subplots(1, 2, figsize=(9, 4.6))
    for panel, values, title in zip(
        panels, (similarity.cpu(), truth), ("cosine similarity of embeddings", "true overlap"), strict=True
    ):
        shown = panel.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(axes[0])
        panel.locator_params(integer=True)
    panels[0].set_ylabel(axes[1])
    figure.colorbar(shown, ax=panels)
    _save(figure, path)


def draw_features(views: dict[str, Any], pred: dict[str, Tensor], path: Path) -> None:
    """Draw what the kept encoder tells apart in the first crop, block by block.

    Columns: the crop; the first three principal components of ``pred["features"] (B, C, d, h, w)`` over all crops of
    the batch, as red, green and blue; and the cosine of the features of the marked block with all others, their mean
    taken away, since all features share much.
    """
    crop = views["globals"][0, 0, 0] if "globals" in views else views["image"][0, 0]
    image, features = crop.float().cpu().numpy(), pred["features"].float()
    grid = features.shape[2:]
    blocks = features.flatten(2).transpose(1, 2)  # (B, N, C)
    centred = (blocks - blocks.mean((0, 1))).cpu()
    rank = min(3, *centred.flatten(0, 1).shape)
    _, _, axes = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)
    scores = centred @ axes[:rank].T  # (B, N, rank)
    low, high = (scores.flatten(0, 1).quantile(share, 0) for share in (0.02, 0.98))
    colours = ((scores[0] - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - rank)).view(*grid, 3).numpy()
    place = [side // 2 for side in grid]
    unit = F.normalize(centred[0], dim=1)
    likeness = (unit @ unit[(place[0] * grid[1] + place[1]) * grid[2] + place[2]]).view(*grid).numpy()
    figure, panels = subplots(3, 3, figsize=(8, 7.8))
    gray = np.percentile(image, [0.5, 99.5])
    for axis, plane in enumerate(_PLANES):
        sides = [side for other, side in enumerate(image.shape) if other != axis]
        extent = (0, sides[1], 0, sides[0])  # blocks are stretched over the voxels that they stand for
        marked = [(place[other] + 0.5) * image.shape[other] / grid[other] for other in range(3) if other != axis]
        columns = {
            "input": (image.take(int((place[axis] + 0.5) * image.shape[axis] / grid[axis]), axis), "gray", gray),
            "three principal components": (colours.take(place[axis], axis), None, (None, None)),
            "cosine with the marked block": (likeness.take(place[axis], axis), "RdBu_r", (-1, 1)),
        }
        for panel, (title, (values, colour, limits)) in zip(panels[axis], columns.items(), strict=True):
            how = {"extent": extent, "origin": "lower", "interpolation": "nearest", "cmap": colour}
            panel.imshow(values, vmin=limits[0], vmax=limits[1], **how)
            panel.set_xticks([])
            panel.set_yticks([])
            if axis == 0:
                panel.set_title(title, fontsize=10)
        panels[axis, 2].plot(marked[1], marked[0], "k+")
        panels[axis, 0].set_ylabel(plane)
    _save(figure, path)


def _voxels(batch: Tensor) -> np.ndarray:
    """Return the first crop of ``(B, 1, D, H, W)``."""
    return batch[0, 0].float().cpu().numpy()  # type: ignore[no-any-return]


def _draw_slices(
    columns: dict[str, np.ndarray], path: Path, *, like: np.ndarray, maps: dict[str, np.ndarray] | None = None
) -> None:
    """Draw the middle slices along each axis (S, A, R): intensities in the range of ``like``, maps from 0 to 1."""
    maps = maps or {}
    low, high = np.percentile(like, [0.5, 99.5])
    gray = colormaps["gray"].with_extremes(bad="#4477aa")
    both: Sequence[tuple[str, np.ndarray]] = [*columns.items(), *maps.items()]
    figure, axes = subplots(3, len(both), figsize=(2.5 * len(both), 7.8))
    for row, plane in enumerate(_PLANES):
        for axis, (title, volume) in zip(axes[row], both, strict=True):
            scale = (
                {"cmap": "viridis", "vmin": 0, "vmax": 1}
                if title in maps
                else {"cmap": gray, "vmin": low, "vmax": high}
            )
            axis.imshow(np.ma.take(volume, volume.shape[row] // 2, axis=row)[::-1], **scale)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(title, fontsize=10)
        axes[row, 0].set_ylabel(plane)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
