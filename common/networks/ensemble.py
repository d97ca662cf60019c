# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Several trained networks as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """The mean of the logits of networks of the same kind, such as those of a cross-validation's folds.

    Args:
        members: at least one.

    Example:
        >>> mean = Ensemble([nn.Identity(), nn.Flatten()])
        >>> mean(torch.tensor([[1.0, 3.0]]))
        tensor([[1., 3.]])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image to the mean of what the members make of it, float32."""
        total = torch.zeros(())
        for index, member in enumerate(self.members):
            logits = member(image).float()
            total = total + logits if index else logits
        return total / len(self.members)
