# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One loss at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DeepSupervision"]


class DeepSupervision(nn.Module):
    """The weighted mean of a loss over outputs of falling resolution (Isensee et al., doi:10.1038/s41592-020-01008-z).

    Each coarser output weighs half of the one before, and the label is taken at the centres of its voxels. A single
    output, as a network gives without deep supervision, is scored as it is.

    Args:
        loss: of an output ``(B, outputs, D, H, W)`` and a label ``(B, 1, D, H, W)``; called for full resolution last.

    Example:
        >>> import torch
        >>> loss = DeepSupervision(nn.MSELoss())
        >>> fine, coarse = torch.full((1, 1, 4, 4, 4), 3.0), torch.full((1, 1, 2, 2, 2), 0.0)
        >>> float(loss([fine, coarse], torch.zeros(1, 1, 4, 4, 4))), float(loss(fine, torch.zeros(1, 1, 4, 4, 4)))
        (6.0, 9.0)
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, pred: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """Compare outputs, fine to coarse, with one label of full resolution."""
        if isinstance(pred, Tensor):
            return self.loss(pred, label)  # type: ignore[no-any-return]
        parts = []
        for level, output in reversed(list(enumerate(pred))):
            there = F.interpolate(label.float(), size=output.shape[2:], mode="nearest-exact").to(label.dtype)
            parts.append(0.5**level * self.loss(output, there))
        return sum(parts) / sum(0.5**level for level in range(len(pred)))  # type: ignore[return-value]
