# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Masked autoencoder: hide most of a crop, rebuild it from the rest (He et al., arXiv:2111.06377).

=========  ========================  ==================================================================
views      ``image``                 ``(B, 1, D, H, W)`` augmented crop, z-scored
           ``hidden``                ``(B, d, h, w)`` boolean grid of blocks, exactly 75 % true in every sample
           (``MaskedViews``)
method     ``reconstruction``        ``(B, 1, D, H, W)`` the whole crop as the network rebuilds it
           ``embedding``             ``(2, B, 2048)`` of two sets of visible blocks, if they are contrasted
loss       scalar                    mean squared error over the hidden blocks only; at a weight, the contrast
kept       ``backbone``              encoder and decoder; mask token, transformer decoder and projection are thrown away
=========  ========================  ==================================================================

Blocks are 16^3 voxels for the U-Net and the 8^3 patch for Primus (Wald et al., arXiv:2410.23132 and arXiv:2412.17041).

With ``contrast_weight``, 0 as published, the encoder also sees each crop through its mask turned around: as many
blocks, mostly others. What it makes of both, averaged and projected as in SimCLR, has to be recognised among all crops
that are computed together (as Huang et al., CMAE, arXiv:2207.13532, but without a teacher). It costs a second encoding.

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
import torch.distributed as dist
from torch import Tensor, nn

from ..losses import MaskedMSELoss, NTXentLoss
from ..networks import Primus, ProjectionHead, ResEncUNet, Transformer, pool_features

__all__ = ["MAELoss", "TransformerMAE", "UNetMAE"]


class UNetMAE(nn.Module):
    """Rebuild a crop whose hidden blocks were set to 0, the image's mean, with a plain U-Net.

    Args:
        backbone: with its decoder.
        contrast: also embed the visible blocks, and those of the mask turned around.
    """

    def __init__(self, backbone: ResEncUNet, *, contrast: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = ProjectionHead(sum(backbone.feature_channels)) if contrast else None

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"reconstruction": (B, 1, D, H, W)}``, and ``embedding`` if there is one."""
        features = self.backbone.encode(batch["image"], visible=~batch["hidden"])
        pred = {"reconstruction": self.backbone.decode(features)}
        if self.projection is not None:
            others = self.backbone.encode(batch["image"], visible=_turned(~batch["hidden"]))
            pred["embedding"] = torch.stack([self.projection(pool_features(seen)) for seen in (features, others)])
        return pred


class TransformerMAE(nn.Module):
    """Encode visible tokens only, put a mask token in every hidden place, and rebuild with a small transformer.

    Args:
        backbone: Primus; its patch is the block.
        decoder_depth: blocks of the transformer that sees all places.
        drop_path: stochastic depth of that transformer's last block.
        contrast: also embed the visible tokens, and those of the mask turned around.
    """

    def __init__(
        self, backbone: Primus, *, decoder_depth: int = 2, drop_path: float = 0.2, contrast: bool = False
    ) -> None:
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
        self.projection = ProjectionHead(dim) if contrast else None

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"reconstruction": (B, 1, D, H, W)}``, and ``embedding`` if there is one."""
        visible, count = ~batch["hidden"], batch.get("visible_count")
        # hidden tokens are not computed at all: a quarter of the tokens, a sixteenth of the attention
        (seen,) = self.backbone.encode(batch["image"], visible=visible, visible_count=count)  # (B, C, d, h, w)
        grid = torch.where(visible[:, None], seen, self.mask_token.to(seen.dtype))
        pred = {"reconstruction": self.backbone.decode([self.decoder(grid)])}
        if self.projection is not None:
            others = self.backbone.encode(batch["image"], visible=_turned(visible), visible_count=count)
            pred["embedding"] = torch.stack([self.projection(pool_features(each)) for each in ([seen], others)])
        return pred


def _turned(visible: Tensor) -> Tensor:
    """Return a mask ``(B, d, h, w)`` mirrored along all axes: as many blocks, elsewhere."""
    return visible.flip((1, 2, 3))


class MAELoss(nn.Module):
    """Mean squared error on hidden blocks, and at a weight the contrast of two sets of visible blocks of each crop.

    Args:
        contrast_weight: of the contrast; 0 leaves it out.
        temperature: divides its similarities.

    Attributes:
        terms: the two parts of the last call, detached; empty without contrast.

    Raises:
        ValueError: if the weight is negative.
    """

    def __init__(self, *, contrast_weight: float = 0.0, temperature: float = 0.5) -> None:
        super().__init__()
        if contrast_weight < 0:
            raise ValueError(f"contrast_weight {contrast_weight} must be at least 0")
        self.contrast_weight = contrast_weight
        self.rebuild, self.contrast = MaskedMSELoss(), NTXentLoss(temperature=temperature)
        self.terms: dict[str, Tensor] = {}

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Compare what the method returns with the views.

        Raises:
            ValueError: if there is one crop alone, among which nothing can be recognised.
        """
        rebuilt: Tensor = self.rebuild(pred, batch)
        if self.contrast_weight == 0:
            return rebuilt
        if pred["embedding"].shape[1] < 2 and not dist.is_initialized():
            raise ValueError(
                f"contrast_weight {self.contrast_weight} tells crops apart, and 1 is computed at a time; raise "
                "--batch_size or lower --accumulation_steps"
            )
        contrast = self.contrast(pred["embedding"])
        self.terms = {"rebuilt": rebuilt.detach(), "contrast": contrast.detach()}
        return rebuilt + self.contrast_weight * contrast
