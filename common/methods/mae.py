# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Masked autoencoder: hide most of a crop, rebuild it from the rest (He et al., arXiv:2111.06377).

=========  ========================  ==================================================================
views      ``image``                 ``(B, 1, D, H, W)`` augmented crop, z-scored
           ``hidden``                ``(B, d, h, w)`` boolean grid of blocks, exactly 75 % true in every sample
           (``MaskedViews``)
method     ``reconstruction``        ``(B, 1, D, H, W)`` the whole crop as the network rebuilds it
loss       scalar                    mean squared error over the hidden blocks only
kept       ``backbone``              encoder and decoder; the mask token and the transformer decoder are thrown away
=========  ========================  ==================================================================

Blocks are 16^3 voxels for the U-Net and the 8^3 patch for Primus (Wald et al., arXiv:2410.23132 and arXiv:2412.17041).

Departures, on purpose: targets are the crop's own intensities, not normalised per patch as in the paper, which is the
published recipe. The reference's transformer orders its tokens with the second axis slowest but takes its loss with the
first axis slowest, so a quarter of what it supervises was visible; here the loss falls on exactly the hidden places. It
also validates the transformer in training mode, because its token dropping is tied to that mode; here hiding is an
argument and validation runs without stochastic depth. Primus' patch decoder starts He-normal, as the reference means it
to; a slip there left PyTorch's start in the published runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..networks import Primus, ResEncUNet, Transformer

__all__ = ["TransformerMAE", "UNetMAE"]


class UNetMAE(nn.Module):
    """Rebuild a crop whose hidden blocks were set to 0, the image's mean, with a plain U-Net."""

    def __init__(self, backbone: ResEncUNet) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"reconstruction": (B, 1, D, H, W)}``."""
        features = self.backbone.encode(batch["image"], visible=~batch["hidden"])
        return {"reconstruction": self.backbone.decode(features)}


class TransformerMAE(nn.Module):
    """Encode visible tokens only, put a mask token in every hidden place, and rebuild with a small transformer.

    Args:
        backbone: Primus; its patch is the block.
        decoder_depth: blocks of the transformer that sees all places.
        drop_path: stochastic depth of that transformer's last block.
    """

    def __init__(self, backbone: Primus, *, decoder_depth: int = 2, drop_path: float = 0.2) -> None:
        super().__init__()
        self.backbone = backbone
        encoder = backbone.encoder.transformer
        _, dim, *grid = encoder.position_embedding.shape
        self.decoder = Transformer(
            dim,
            depth=decoder_depth,
            num_heads=dim // encoder.head_dim,
            grid=(grid[0], grid[1], grid[2]),
            drop_path=drop_path,
            checkpointing=encoder.checkpointing,
        )
        self.mask_token = nn.Parameter(torch.empty(1, dim, 1, 1, 1))
        nn.init.normal_(self.mask_token, std=1e-6)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"reconstruction": (B, 1, D, H, W)}``."""
        visible = ~batch["hidden"]
        # hidden tokens are not computed at all: a quarter of the tokens, a sixteenth of the attention
        grid = self.backbone.encode(batch["image"], visible=visible, visible_count=batch.get("visible_count"))[
            0
        ]  # (B, C, d, h, w)
        grid = torch.where(visible[:, None], grid, self.mask_token.to(grid.dtype))
        return {"reconstruction": self.backbone.decode([self.decoder(grid)])}
