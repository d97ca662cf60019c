# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Mean squared error on hidden blocks, shared by the methods that rebuild what was hidden."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .reduction import weighted_mean

__all__ = ["MaskedMSELoss"]


class MaskedMSELoss(nn.Module):
    """Mean squared error over the voxels of hidden blocks; visible voxels cost nothing.

    The error is pooled to the grid of blocks first, so the mask is never expanded to voxels. Computed in float32. Where
    the views hold ``ignored``, those voxels (of anonymised regions) cost nothing either.

    Example:
        >>> import torch
        >>> batch = {"image": torch.zeros(1, 1, 4, 4, 4), "hidden": torch.zeros(1, 2, 2, 2, dtype=torch.bool)}
        >>> batch["hidden"][0, 0, 0, 0] = True
        >>> prediction = torch.zeros(1, 1, 4, 4, 4)
        >>> prediction[..., :2, :2, :2] = 3.0
        >>> float(MaskedMSELoss()({"reconstruction": prediction}, batch))
        9.0
    """

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Compare ``pred["reconstruction"] (B, C, D, H, W)`` with ``batch["image"]`` where ``batch["hidden"] (B, d, h,
        w)``, except where ``batch["ignored"] (B, 1, D, H, W)``.

        Raises:
            ValueError: if the blocks do not divide the image.
        """
        image, hidden = batch["image"], batch["hidden"]
        block = [side // blocks for side, blocks in zip(image.shape[2:], hidden.shape[1:], strict=True)]
        if any(b * n != s for b, n, s in zip(block, hidden.shape[1:], image.shape[2:], strict=True)):
            raise ValueError(
                f"a grid of {list(hidden.shape[1:])} blocks does not divide an image of {list(image.shape[2:])}"
            )
        error = (pred["reconstruction"].float() - image.float()).square().mean(1, keepdim=True)
        weight = hidden.float()  # (B, d, h, w)
        if "ignored" in batch:
            counted = (~batch["ignored"]).float()
            error = error * counted
            return weighted_mean(
                F.avg_pool3d(error, block).squeeze(1) * weight, F.avg_pool3d(counted, block).squeeze(1) * weight
            )
        return (F.avg_pool3d(error, block).squeeze(1) * weight).sum() / weight.sum()
