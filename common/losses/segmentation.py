# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Cross-entropy plus soft Dice, for classes that exclude each other and for regions that overlap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..tasks import SegmentationTask
from .reduction import gather, weighted_mean

__all__ = ["DiceCrossEntropy"]

_LARGE = 2**22  # numbers of a prediction that is taken sample by sample


class DiceCrossEntropy(nn.Module):
    """The loss of nnU-Net (Isensee et al., doi:10.1038/s41592-020-01008-z), both terms with weight 1, in float32.

    Classes: cross-entropy over the voxels, and ``1 - Dice`` of the softmax, averaged over samples and classes without
    background. Regions: binary cross-entropy and the Dice of the sigmoid of every region. MONAI's ``DiceCELoss`` has
    neither an ignored label nor overlapping regions. (nnU-Net's own Dice term is smaller by 1, which moves no weight.)

    Args:
        task: classes or regions, and the ignored label, whose voxels count nowhere.
        batch_dice: one Dice over the whole batch, and all processes, instead of one for each sample.
        smooth: added above and below; the Dice of what is rightly empty is 1.

    Attributes:
        terms: ``cross_entropy`` and ``dice`` of the last call, detached.

    Example:
        >>> loss = DiceCrossEntropy(SegmentationTask(["background", "lesion"]))
        >>> label = torch.tensor([0, 1, 1, 0]).view(1, 1, 4, 1, 1)
        >>> sure = torch.cat([20.0 * (label == 0), 20.0 * (label == 1)], dim=1)
        >>> round(float(loss(sure, label)), 4), round(float(loss(torch.zeros_like(sure), label)), 4)
        (0.0, 1.1931)
    """

    def __init__(self, task: SegmentationTask, *, batch_dice: bool = False, smooth: float = 1e-5) -> None:
        super().__init__()
        self.task, self.batch_dice, self.smooth = task, batch_dice, smooth
        self.terms: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Compare logits ``(B, outputs, D, H, W)`` with label values ``(B, 1, D, H, W)``."""
        with torch.autocast(pred.device.type, enabled=False):
            if pred.requires_grad and len(pred) > 1 and pred.numel() >= _LARGE:
                pairs = zip(pred.chunk(len(pred)), label.chunk(len(pred)), strict=True)
                parts = [checkpoint(self._sums, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
                sums = [torch.cat(part) for part in zip(*parts, strict=True)]
            else:
                sums = list(self._sums(pred, label))
            entropies, counted, overlap, total = sums
            if self.task.ignore_label is None:
                entropy = entropies.sum() / counted.sum()
            else:
                entropy = weighted_mean(entropies, counted)
            if self.batch_dice:
                overlap, total = gather(overlap).sum(0), gather(total).sum(0)
            dice = (1 - (2 * overlap + self.smooth) / (total + self.smooth)).mean()
        self.terms = {"cross_entropy": entropy.detach(), "dice": dice.detach()}
        return entropy + dice

    def _sums(self, pred: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add up over the voxels of every sample: cross-entropy and count ``(B,)``, overlap and sizes ``(B, classes)``.

        A large batch is taken sample by sample, and again for the gradient: in float32 there are several maps of every
        class.
        """
        logits = pred.float()
        counted = None if self.task.ignore_label is None else (label != self.task.ignore_label).float()
        if self.task.regions is None:
            truth = self.task.indices(label[:, 0])
            if counted is not None:
                truth = truth * counted[:, 0].long()
            entropy = F.cross_entropy(logits, truth, reduction="none").unsqueeze(1)
            probability = logits.softmax(1)[:, 1:]
            target = torch.stack([truth == value for value in range(1, self.task.outputs)], dim=1).float()
        else:
            target = torch.cat([_among(label, values) for values in self.task.values], dim=1).float()
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1, keepdim=True)
            probability = logits.sigmoid()
        if counted is not None:
            entropy, probability, target = entropy * counted, probability * counted, target * counted
        overlap = (probability * target).flatten(2).sum(2)
        total = probability.flatten(2).sum(2) + target.flatten(2).sum(2)
        entropies = entropy.flatten(1).sum(1)
        count = torch.full_like(entropies, entropy[0].numel()) if counted is None else counted.flatten(1).sum(1)
        return entropies, count, overlap, total


def _among(label: Tensor, values: tuple[int, ...]) -> Tensor:
    inside = label == values[0]
    for value in values[1:]:
        inside = inside | (label == value)
    return inside
