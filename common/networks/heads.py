# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Heads that two methods share; thrown away after pre-training."""

from __future__ import annotations

from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ProjectionHead", "pool_features"]


def pool_features(features: List[Tensor]) -> Tensor:
    """Average every feature map over space and join them: ``(B, sum of channels)``."""
    # not the mean, whose gradient would be spread over a map of float32
    return torch.cat([f.sum([2, 3, 4], dtype=torch.float32) / f[0, 0].numel() for f in features], dim=1)


class ProjectionHead(nn.Module):
    """Three linear layers; the first two are followed by a norm over the features, without weights, and a ReLU.

    The reference normalises with a one-dimensional instance norm on two-dimensional input, which PyTorch takes for one
    unbatched sample: exactly the layer norm that is written here.

    Args:
        in_features: width of the pooled features.
        hidden_features: width of the hidden layers.
        out_features: width of the embedding.
    """

    def __init__(self, in_features: int, *, hidden_features: int = 2048, out_features: int = 2048) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(in_features, hidden_features)
        self.hidden2 = nn.Linear(hidden_features, hidden_features)
        self.output = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_features)`` to ``(B, out_features)``."""
        for layer in (self.hidden1, self.hidden2):
            x = layer(x)
            x = F.relu(F.layer_norm(x, x.shape[-1:]))
        return self.output(x)  # type: ignore[no-any-return]
