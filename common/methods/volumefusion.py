# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""VolumeFusion: blend two volumes with a different share in each of many boxes, segment the shares (Wang et al.,
arXiv:2306.16925).

=========  ========================  ==================================================================
views      ``image``                 ``(B, 1, D, H, W)`` share * foreground + (1 - share) * background
           ``share``                 ``(B, D, H, W)`` class of the foreground's share: class / (classes - 1)
method     ``logits``                ``(B, classes, D, H, W)``
loss       scalar                    cross-entropy + soft Dice over all classes
kept       ``backbone``              encoder and decoder, all of it: the task is a segmentation
=========  ========================  ==================================================================

Each sample is made of two volumes, both augmented on their own. 10 to 39 boxes with sides of 8 to 100 voxels are drawn
one over the other, each of one class; outside all boxes the class is 0, the background alone, like inside boxes of
class 0. Published for OpenMind (arXiv:2412.17041) with five classes and centre crops of 160^3; validation fuses too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import Primus, ResEncUNet
from ..views import CropAugmentation, SampleKey, SpatialCrop, view_stream

__all__ = ["FusionLoss", "FusionViews", "VolumeFusion", "fuse"]


def fuse(foreground: Tensor, background: Tensor, share: Tensor, *, classes: int) -> Tensor:
    """Blend two batches ``(B, 1, D, H, W)`` by the classes of ``share (B, D, H, W)``.

    Example:
        >>> share = torch.tensor([0, 1, 4]).view(1, 1, 1, 3)
        >>> fuse(torch.ones(1, 1, 1, 1, 3), torch.zeros(1, 1, 1, 1, 3), share, classes=5).flatten()
        tensor([0.0000, 0.2500, 1.0000])
    """
    alpha = share.unsqueeze(1).to(foreground.dtype) / (classes - 1)
    return alpha * foreground + (1 - alpha) * background


class FusionViews:
    """Cut and augment two volumes for each sample and fuse them in random boxes.

    Args:
        spatial: how crops are cut; the loader gives two volumes for each sample, foreground and background.
        classes: shares from 0 to 1 in equal steps.
        boxes: fewest and most boxes.
        box_sides: shortest and longest side of a box in voxels.
        augmentation: of each crop before it is fused; None for validation.

    Raises:
        ValueError: if a box may not fit into the crop.
    """

    def __init__(
        self,
        spatial: SpatialCrop,
        *,
        classes: int = 5,
        boxes: Sequence[int] = (10, 39),
        box_sides: Sequence[int] = (8, 100),
        augmentation: CropAugmentation | None = None,
    ) -> None:
        if not 0 < box_sides[0] <= box_sides[1] <= min(spatial.patch_size):
            raise ValueError(f"box_sides {list(box_sides)} do not fit into patch_size {list(spatial.patch_size)}")
        self.spatial, self.classes, self.augmentation = spatial, classes, augmentation
        self.boxes, self.box_sides = (int(boxes[0]), int(boxes[1])), (int(box_sides[0]), int(box_sides[1]))

    def draw(self, key: SampleKey) -> tuple[Tensor, list[torch.Generator]]:
        """Draw the boxes of one sample.

        Returns:
            ``(boxes, 7)``: lower corner, side lengths and class of each, in the order they are painted; and a stream
            for each of the two volumes.
        """
        generator = view_stream(key)
        count = int(torch.randint(self.boxes[0], self.boxes[1] + 1, (), generator=generator))
        sides = torch.randint(self.box_sides[0], self.box_sides[1] + 1, (count, 3), generator=generator)
        room = torch.tensor(self.spatial.patch_size) - sides + 1
        corners = (torch.rand(count, 3, generator=generator) * room).long()
        values = torch.randint(self.classes, (count, 1), generator=generator)
        seeds = torch.randint(2**62, (2,), generator=generator).tolist()
        return torch.cat([corners, sides, values], dim=1), [torch.Generator().manual_seed(seed) for seed in seeds]

    def paint(self, boxes: Tensor, device: torch.device) -> Tensor:
        """Paint the boxes of one sample one over the other: ``(D, H, W)`` classes."""
        share = torch.zeros(self.spatial.patch_size, dtype=torch.long, device=device)
        for z, y, x, d, h, w, value in boxes.tolist():
            share[z : z + d, y : y + h, x : x + w] = value
        return share

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map a batch with two regions for each sample key on the device to ``image`` and ``share``."""
        crops = self.spatial(batch)  # (2 B, 1, D, H, W), the two volumes of a sample one after the other
        draws = [self.draw(key) for key in batch["key"]]
        if self.augmentation is not None:
            crops = self.augmentation(crops, [stream for _, streams in draws for stream in streams])
        share = torch.stack([self.paint(boxes, crops.device) for boxes, _ in draws])
        return {"image": fuse(crops[0::2], crops[1::2], share, classes=self.classes), "share": share}


class VolumeFusion(nn.Module):
    """Segment the shares with the whole backbone, whose output has a channel for each class."""

    def __init__(self, backbone: Primus | ResEncUNet) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"logits": (B, classes, D, H, W)}``."""
        return {"logits": self.backbone(batch["image"])}


class FusionLoss(nn.Module):
    """Cross-entropy over voxels less the soft Dice, mean over samples and all classes; -1 for a perfect answer.

    Written here because MONAI's ``DiceCELoss`` smooths numerator and denominator by the same amount, which differs
    from the reference where a class is absent.

    Attributes:
        terms: ``cross_entropy`` and ``dice`` of the last call, detached; the latter as one minus the soft Dice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, Tensor] = {}

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Compare ``pred["logits"] (B, classes, D, H, W)`` with ``batch["share"] (B, D, H, W)``."""
        logits, share = pred["logits"].float(), batch["share"]
        cross_entropy = F.cross_entropy(logits, share)
        probability = logits.softmax(1).flatten(2)  # (B, classes, V)
        b, classes, _ = probability.shape
        index = share.flatten(1)  # (B, V)
        # sums over each class without a one-hot volume: the probability of the true class, added up by class
        true = probability.gather(1, index.unsqueeze(1)).squeeze(1)  # (B, V)
        inside = true.new_zeros(b, classes).scatter_add(1, index, true)
        size = true.new_zeros(b, classes).scatter_add(1, index, torch.ones_like(true))
        dice = (2 * inside + 1e-5) / (size + probability.sum(2) + 1e-5).clamp(min=1e-8)
        self.terms = {"cross_entropy": cross_entropy.detach(), "dice": 1 - dice.mean().detach()}
        return cross_entropy - dice.mean()
