# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Normalised-temperature cross-entropy between two views, shared by SimCLR and SwinUNETR pre-training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reduction import gather

__all__ = ["NTXentLoss"]


class NTXentLoss(nn.Module):
    """Pull the two views of a sample together, push all other views of the batch apart (Chen et al., arXiv:2002.05709).

    For each of the 2N views, the cross-entropy of finding its partner among the other 2N - 1 by cosine similarity over
    a temperature; the mean over all views.

    Args:
        temperature: divides the similarities; 0.5 as published for OpenMind.
        negatives: ``global`` contrasts with the views of all processes, so that the method does not change with their
            number; ``local`` with those of the own process only, as the reference does.

    Raises:
        ValueError: if ``negatives`` is neither.

    Example:
        >>> views = torch.eye(4)[:2].repeat(2, 1, 1)  # two samples, equal in both views, orthogonal to each other
        >>> round(float(NTXentLoss(temperature=1.0)(views)), 4)  # log(e^1 + 2 e^0) - 1
        0.5514
    """

    def __init__(self, *, temperature: float = 0.5, negatives: str = "global") -> None:
        super().__init__()
        if negatives not in ("global", "local"):
            raise ValueError(f"negatives is {negatives!r}; it must be 'global' or 'local'")
        self.temperature, self.negatives = temperature, negatives

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the loss of ``embeddings (2, N, E)``: two views of each of N samples."""
        z = F.normalize(embeddings.float(), dim=-1)
        if self.negatives == "global":
            z = gather(z, dim=1)
        n = z.shape[1]
        z = z.flatten(0, 1)  # (2N, E)
        similarity = z @ z.T / self.temperature
        itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
        similarity = similarity.masked_fill(itself, float("-inf"))
        partner = torch.arange(2 * n, device=z.device).roll(n)
        return F.cross_entropy(similarity, partner)
