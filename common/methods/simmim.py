# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""SimMIM: replace most of a crop by one learned token inside the encoder, rebuild it from the rest (Xie et al.,
arXiv:2111.09886).

=========  ========================  ==================================================================
views      ``image``                 ``(B, 1, D, H, W)`` augmented crop, z-scored
           ``hidden``                ``(B, d, h, w)`` boolean grid of blocks, exactly 75 % true in every sample
           (``MaskedViews``)
method     ``reconstruction``        ``(B, 1, D, H, W)`` the whole crop as the network rebuilds it
loss       scalar                    mean squared error over the hidden blocks only (``MaskedMSELoss``)
kept       ``backbone``              encoder and decoder; the mask token is thrown away
=========  ========================  ==================================================================

Unlike MAE the encoder computes all places, so that it meets mask tokens and there is no second transformer. Primus
replaces its 8^3 tokens before positions are added (published, arXiv:2412.17041). The U-Net has no published
counterpart: it replaces the features of its stem inside hidden 16^3 blocks and goes on densely.

Departures, on purpose: mean squared error on the crop's intensities, which is the published recipe, where the paper
takes the mean absolute error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..networks import Primus, ResEncUNet

__all__ = ["SimMIM"]


class SimMIM(nn.Module):
    """Rebuild a crop whose hidden blocks enter the encoder as a mask token.

    Args:
        backbone: either of the two; what its first features are is what the token stands for.
    """

    def __init__(self, backbone: Primus | ResEncUNet) -> None:
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.empty(1, backbone.feature_channels[0], 1, 1, 1))
        nn.init.normal_(self.mask_token, std=1e-6)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"reconstruction": (B, 1, D, H, W)}``."""
        features = self.backbone.encode(batch["image"], visible=~batch["hidden"], mask_token=self.mask_token)
        return {"reconstruction": self.backbone.decode(features)}
