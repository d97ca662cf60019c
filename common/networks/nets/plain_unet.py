# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A small plain U-Net: what any larger, pre-trained or cleverer network has to beat.

========  =====================================================================
goes in   image ``(B, in_channels, D, H, W)``, of any sides
between   feature maps, fine to coarse, ``(B, features[s], ceil(D / 2^s), ...)``
comes out ``(B, out_channels, D, H, W)``
========  =====================================================================

Ronneberger et al., arXiv:1505.04597, in 3D as Cicek et al., arXiv:1606.06650, with the strided convolutions, instance
norm and LeakyReLU of Isensee et al., doi:10.1038/s41592-020-01008-z. Two convolutions at each level, nothing residual,
no attention, no deep supervision. In its default size it has less than a million parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import List, Optional

import torch
from torch import Tensor, nn

from ..blocks.convolution import ConvBlock, Convolution, Upsampling
from .resenc_unet import initialize_he

__all__ = ["PlainUNet"]


def _level(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    """Return the two convolutions of a level."""
    return nn.Sequential(
        ConvBlock(in_channels, out_channels, stride=stride),
        ConvBlock(out_channels, out_channels),
    )


class PlainEncoder(nn.Module):
    """Levels of two convolutions; all but the first halve the sides, rounding up."""

    def __init__(self, in_channels: int, features: Sequence[int]) -> None:
        super().__init__()
        steps = pairwise([in_channels, *features])
        self.levels = nn.ModuleList(
            _level(before, after, stride=2 if index else 1) for index, (before, after) in enumerate(steps)
        )

    def forward(self, image: Tensor) -> List[Tensor]:
        """Map ``(B, C, D, H, W)`` to one map for each level, fine to coarse."""
        features: List[Tensor] = []
        x = image
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class PlainDecoder(nn.Module):
    """From the coarsest map up: a transposed convolution, joined with the map of that level, two convolutions."""

    def __init__(self, features: Sequence[int]) -> None:
        super().__init__()
        coarse_to_fine = list(features)[::-1]
        self.upsamplings = nn.ModuleList(Upsampling(below, skip) for below, skip in pairwise(coarse_to_fine))
        self.levels = nn.ModuleList(_level(2 * skip, skip) for skip in coarse_to_fine[1:])

    def forward(self, features: List[Tensor]) -> Tensor:
        """Merge the maps of the encoder into one ``(B, features[0], D, H, W)``."""
        x = features[-1]
        place = len(features) - 2
        for upsampling, level in zip(self.upsamplings, self.levels):  # noqa: B905 (TorchScript)
            skip = features[place]
            x = upsampling(x)[:, :, : skip.shape[2], : skip.shape[3], : skip.shape[4]]  # odd sides were rounded up
            x = level(torch.cat([x, skip], dim=1))  # (B, 2 C_skip, ...)
            place -= 1
        return x


class PlainUNet(nn.Module):
    """U-Net of plain convolutions, instance norm and LeakyReLU, weights drawn as nnU-Net does.

    Args:
        in_channels: image channels.
        out_channels: channels of the output map.
        features: channels of each level, fine to coarse; with the default 789,109 parameters for one channel and one
            class.
        with_decoder: build the decoder and head; without them only :meth:`encode` works.

    Attributes:
        feature_channels: channels of the maps of :meth:`encode`.
        feature_strides: image voxels along a side of a voxel of these maps.
        stride: sides have to be a multiple of it.

    Raises:
        ValueError: if there are fewer than two levels.

    Example:
        >>> net = PlainUNet(1, 2)
        >>> net(torch.zeros(1, 1, 9, 12, 16)).shape
        torch.Size([1, 2, 9, 12, 16])
        >>> sum(parameter.numel() for parameter in net.parameters()) < 1_000_000
        True
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        features: Sequence[int] = (12, 24, 48, 96),
        with_decoder: bool = True,
    ) -> None:
        super().__init__()
        if len(features) < 2:
            raise ValueError(f"features {list(features)} must be of at least two levels")
        self.stride = 1
        self.feature_channels = list(features)
        self.feature_strides = [2**index for index in range(len(features))]
        self.encoder = PlainEncoder(in_channels, features)
        self.decoder: Optional[PlainDecoder] = None
        self.head: Optional[nn.Conv3d] = None
        if with_decoder:
            self.decoder = PlainDecoder(features)
            self.head = Convolution(features[0], out_channels, kernel_size=1)
        initialize_he(self)

    def encode(self, image: Tensor) -> List[Tensor]:
        """Return the feature maps of all levels, fine to coarse."""
        return self.encoder(image)  # type: ignore[no-any-return]

    def decode(self, features: List[Tensor]) -> Tensor:
        """Map the feature maps of :meth:`encode` to ``(B, out_channels, D, H, W)``."""
        assert self.decoder is not None, "this network was built without a decoder"
        assert self.head is not None
        return self.head(self.decoder(features))

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(B, in_channels, D, H, W)`` to ``(B, out_channels, D, H, W)``."""
        return self.decode(self.encode(image))
