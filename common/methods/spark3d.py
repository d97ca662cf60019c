# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Spark3D: a masked autoencoder whose encoder computes visible places only (Tian et al., SparK, arXiv:2301.03580).

=========  ========================  ==================================================================
views      ``image``                 ``(B, 1, D, H, W)`` augmented crop, z-scored
           ``hidden``                ``(B, d, h, w)`` boolean grid of blocks; one ratio per step, U(60, 90) %
           (``MaskedViews``)
method     ``reconstruction``        ``(B, 1, D, H, W)`` the whole crop as the network rebuilds it
loss       scalar                    mean squared error over the hidden blocks only (``MaskedMSELoss``)
kept       ``backbone``              encoder and decoder; mask tokens and projections are thrown away
=========  ========================  ==================================================================

Every map of the sparse encoder is made dense before it is decoded: normalised over its visible places, its hidden ones
filled with a mask token of that map, and passed through a 3x3x3 convolution (the map at full resolution without one).
For the U-Net as in "Revisiting MAE" (Wald et al., arXiv:2410.23132); its coarsest map, whose voxels are larger than a
block, hides nothing. For Primus there is no published counterpart: visible tokens are encoded, the grid of tokens is
made dense in the same way and goes to the patch decoder, without MAE's second transformer.

Departures, on purpose: the hidden blocks of the image are set to 0 before the first convolution, where the reference
lets a rim of one voxel leak into it; the mask is an argument and no state; every weight exists once, where the
reference's files also carry an untrained copy of the encoder. The ratio is drawn for each optimizer step from the
run's seed, the same in all processes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..networks import Convolution, Primus, ResEncUNet, recalled, selects

__all__ = ["Spark3D"]


class Spark3D(nn.Module):
    """Encode visible blocks sparsely, make every map dense, decode.

    Args:
        backbone: either of the two.
        block_size: side of a hidden block in voxels; maps with coarser voxels have no mask token.
    """

    def __init__(self, backbone: Primus | ResEncUNet, *, block_size: int) -> None:
        super().__init__()
        self.backbone, self.checkpointing = backbone, backbone.checkpointing
        maps = list(zip(backbone.feature_channels, backbone.feature_strides, strict=True))
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(torch.empty(1, channels, 1, 1, 1)) for channels, stride in maps if stride <= block_size
        )
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
        self.projections = nn.ModuleList(
            Convolution(channels, channels, kernel_size=3, padding=1) if stride > 1 else nn.Identity()
            for channels, stride in maps
        )

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"reconstruction": (B, 1, D, H, W)}``."""
        features = self.backbone.encode_visible(
            batch["image"], ~batch["hidden"], blocks=batch.get("blocks"), visible_count=batch.get("visible_count")
        )
        dense = []
        for level, (x, projection) in enumerate(zip(features, self.projections, strict=True)):
            fill = functools.partial(x.normalised, self.mask_tokens[level] if level < len(self.mask_tokens) else None)
            if selects(self):
                filled, again = recalled(fill, x.values)
                with again.instead_of(filled):
                    dense.append(projection(filled))
            else:
                dense.append(projection(fill(x.values)))
        return {"reconstruction": self.backbone.decode(dense)}
