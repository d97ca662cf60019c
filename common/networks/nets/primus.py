# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Primus, the transformer backbone of OpenMind.

========  =====================================================================
goes in   image ``(B, in_channels, D, H, W)``, sides a multiple of 8
between   one grid of tokens ``(B, embed_dim, D/8, H/8, W/8)``
comes out ``(B, out_channels, D, H, W)``
========  =====================================================================

Wald et al., arXiv:2503.01835. Named sizes ``primus_s|b|m|l``. Tokens are flattened with the first spatial axis slowest;
the published pre-training checkpoints (but SimMIM's) swapped the first two axes, which the importer undoes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...views.blocks import VisibleBlocks
from ..blocks.convolution import Upsampling
from ..blocks.recompute import mode_of, recalled, selects
from ..blocks.sparse import MaskedMap, mask_at
from ..blocks.transformer import Transformer
from ..untrained import watch_untrained
from .resenc_unet import initialize_he

__all__ = ["Primus", "primus_b", "primus_l", "primus_m", "primus_s"]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of ``(B, C, D, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every voxel over its channels."""
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class PrimusEncoder(nn.Module):
    """Patch embedding and transformer."""

    def __init__(
        self,
        in_channels: int,
        *,
        input_size: Sequence[int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path: float,
        dropout: float,
        checkpointing: str,
    ) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.transformer = Transformer(
            embed_dim,
            depth=depth,
            num_heads=num_heads,
            grid=(input_size[0] // patch_size, input_size[1] // patch_size, input_size[2] // patch_size),
            drop_path=drop_path,
            dropout=dropout,
            checkpointing=checkpointing,
        )
        initialize_he(self.patch_embedding)

    def forward(
        self,
        image: Tensor,
        visible: Optional[Tensor] = None,
        mask_token: Optional[Tensor] = None,
        visible_count: Optional[int] = None,
    ) -> Tensor:
        """Map ``(B, C, D, H, W)`` to ``(B, embed_dim, d, h, w)``, zero at hidden tokens unless they are replaced."""
        tokens = self.patch_embedding(image)
        if visible is not None and mask_token is not None:
            tokens = torch.where(visible.unsqueeze(1), tokens, mask_token.to(tokens.dtype))
            visible = None
        return self.transformer(tokens, visible, visible_count)


class PatchDecoder(nn.Module):
    """Transposed convolutions from tokens to voxels, halving channels geometrically on the way."""

    def __init__(self, embed_dim: int, out_channels: int, *, patch_size: int, checkpointing: str = "none") -> None:
        super().__init__()
        self.checkpointing = checkpointing
        steps = int(math.log2(patch_size))
        ratio = (embed_dim / (2 * out_channels)) ** (1 / steps)
        widths = [embed_dim, *(max(8, round(embed_dim / ratio**i / 8) * 8) for i in range(1, steps)), out_channels]
        self.upsamplings = nn.ModuleList(Upsampling(before, after) for before, after in pairwise(widths))
        self.norms = nn.ModuleList(
            [*(ChannelNorm(width) for width in widths[1:-1]), nn.Identity()]  # none after the last
        )
        self.activations = nn.ModuleList([*(nn.GELU() for _ in widths[1:-1]), nn.Identity()])
        initialize_he(self)

    def forward(self, grid: Tensor) -> Tensor:
        """Map ``(B, embed_dim, d, h, w)`` to ``(B, out_channels, D, H, W)``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if selects(self):
                return self._recalling(grid)
        for upsampling, norm, activation in zip(self.upsamplings, self.norms, self.activations):  # noqa: B905
            grid = activation(norm(upsampling(grid)))
        return grid

    def _recalling(self, grid: Tensor) -> Tensor:
        """Keep the outputs of the convolutions."""
        again = None
        for upsampling, norm, activation in zip(self.upsamplings, self.norms, self.activations, strict=True):
            with nullcontext() if again is None else again.instead_of(grid):
                grid = upsampling(grid)
            grid, again = recalled(norm, grid)
            grid, again = recalled(activation, grid, source=again)
        return grid


class Primus(nn.Module):
    """Plain vision transformer with 8-voxel patches, rotary and learned positions, and a light patch decoder.

    Hidden places: with ``visible`` the hidden tokens are dropped before the first block, so that they cost nothing, and
    come back as zeros; with ``mask_token`` they are replaced by it instead, before positions are added, and all tokens
    are computed.

    Args:
        in_channels: image channels.
        out_channels: channels of the output map.
        input_size: voxels (one side or three) that the learned position table is made for; other sizes interpolate it.
        patch_size: side of a token's patch in voxels, a power of two.
        embed_dim: channels of a token.
        depth: transformer blocks.
        num_heads: attention heads; ``embed_dim / num_heads`` must be a multiple of 6.
        drop_path: stochastic depth of the last block; published: 0.2 in pre-training, 0 in fine-tuning.
        dropout: dropout after attention and MLP; 0 as published.
        checkpointing: what is computed again in the backward pass instead of kept: ``none``, ``selective`` or ``full``
            (also false and true), see :mod:`..blocks.recompute`.
        with_decoder: build the patch decoder; without it only :meth:`encode` works.

    Attributes:
        feature_channels: channels of the maps of :meth:`encode`.
        feature_strides: image voxels along a side of a voxel of these maps.

    Raises:
        ValueError: if an input side, here or in ``forward``, is not a multiple of ``patch_size``, or the heads do not
            fit.

    Example:
        >>> import torch
        >>> net = Primus(1, 2, input_size=16, embed_dim=24, depth=1, num_heads=2)
        >>> net(torch.zeros(1, 1, 16, 24, 8)).shape
        torch.Size([1, 2, 16, 24, 8])
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        input_size: int | Sequence[int] = 160,
        patch_size: int = 8,
        embed_dim: int = 864,
        depth: int = 16,
        num_heads: int = 12,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        checkpointing: bool | str = "none",
        with_decoder: bool = True,
    ) -> None:
        super().__init__()
        watch_untrained(self)
        size = [input_size] * 3 if isinstance(input_size, int) else list(input_size)
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(f"patch_size {patch_size} is not a power of two")
        if len(size) != 3 or any(side <= 0 or side % patch_size for side in size):
            raise ValueError(f"input_size {size} must be three multiples of patch_size {patch_size}")
        self.checkpointing = checkpointing = mode_of(checkpointing)
        self.patch_size = self.stride = patch_size
        self.feature_channels = [embed_dim]
        self.feature_strides = [patch_size]
        self.encoder = PrimusEncoder(
            in_channels,
            input_size=size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path=drop_path,
            dropout=dropout,
            checkpointing=checkpointing,
        )
        self.decoder: Optional[PatchDecoder] = None
        if with_decoder:
            self.decoder = PatchDecoder(embed_dim, out_channels, patch_size=patch_size, checkpointing=checkpointing)

    def encode(
        self,
        image: Tensor,
        visible: Optional[Tensor] = None,
        mask_token: Optional[Tensor] = None,
        sparse: bool = False,
        visible_count: Optional[int] = None,
    ) -> List[Tensor]:
        """Return the one grid of tokens as a list, fine to coarse like every backbone.

        Args:
            image: ``(B, C, D, H, W)``.
            visible: ``(B, D/8, H/8, W/8)`` boolean; hidden tokens are dropped and returned as zeros.
            mask_token: ``(1, embed_dim, 1, 1, 1)``, put in the place of hidden tokens instead of dropping them.
            sparse: compute visible tokens only; a transformer that drops tokens does so in any case.
            visible_count: tokens that every sample shows, if known; finding it makes a GPU wait.

        Raises:
            ValueError: for a size that does not fit, or if both a mask token and sparse computation are asked for.
        """
        if sparse and mask_token is not None:
            raise ValueError("hidden tokens are either dropped (sparse) or replaced by mask_token, not both")
        for side in image.shape[2:]:
            if side % self.patch_size != 0:
                raise ValueError(
                    f"input sides {list(image.shape[2:])} must be multiples of {self.patch_size}, "
                    f"the patch size of this network; pad or crop the image"
                )
        return [self.encoder(image, visible, mask_token, visible_count)]

    def encode_visible(
        self,
        image: Tensor,
        visible: Tensor,
        *,
        blocks: VisibleBlocks | None = None,
        visible_count: int | None = None,
    ) -> list[MaskedMap]:
        """Return the grid of tokens as a list, computed where tokens are visible; ``blocks`` are not needed here."""
        (tokens,) = self.encode(image, visible, sparse=True, visible_count=visible_count)
        return [MaskedMap(tokens, mask_at(visible, list(image.shape[2:]), self.patch_size))]

    def decode(self, features: List[Tensor]) -> Tensor:
        """Map the grid of :meth:`encode` to ``(B, out_channels, D, H, W)``."""
        assert self.decoder is not None, "this network was built without a decoder"
        return self.decoder(features[-1])

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(B, in_channels, D, H, W)`` to ``(B, out_channels, D, H, W)``."""
        return self.decode(self.encode(image))


def primus_s(in_channels: int = 1, out_channels: int = 1, **kwargs: Any) -> Primus:
    """Build Primus-S: 26 million parameters."""
    return Primus(in_channels, out_channels, **{"embed_dim": 396, "depth": 12, "num_heads": 6, **kwargs})


def primus_b(in_channels: int = 1, out_channels: int = 1, **kwargs: Any) -> Primus:
    """Build Primus-B: 98 million parameters."""
    return Primus(in_channels, out_channels, **{"embed_dim": 792, "depth": 12, "num_heads": 12, **kwargs})


def primus_m(in_channels: int = 1, out_channels: int = 1, **kwargs: Any) -> Primus:
    """Build Primus-M, the benchmark's size: 151,786,529 parameters at 160^3 with one output channel."""
    return Primus(in_channels, out_channels, **{"embed_dim": 864, "depth": 16, "num_heads": 12, **kwargs})


def primus_l(in_channels: int = 1, out_channels: int = 1, **kwargs: Any) -> Primus:
    """Build Primus-L: 332 million parameters."""
    return Primus(in_channels, out_channels, **{"embed_dim": 1056, "depth": 24, "num_heads": 16, **kwargs})
