# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Convolutional building blocks of the residual U-Net."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from .sparse import masked_instance_norm

__all__ = ["ConvBlock", "InstanceNorm", "ResidualBlock", "Stage"]


class InstanceNorm(nn.InstanceNorm3d):
    """Affine instance normalisation that also accepts maps of a single voxel.

    PyTorch refuses one voxel per channel; its normalised value is 0 whatever the variance, so the output is the bias.
    That lets a six-stage U-Net take inputs as small as its stride.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, D, H, W)`` per sample and channel."""
        return torch.instance_norm(
            x,
            weight=self.weight,
            bias=self.bias,
            running_mean=None,
            running_var=None,
            use_input_stats=True,
            momentum=0.1,
            eps=self.eps,
            cudnn_enabled=torch.backends.cudnn.enabled if not torch.jit.is_scripting() else True,
        )


class ConvBlock(nn.Module):
    """Convolution, dropout, instance norm and, unless ``activate`` is off, LeakyReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        activate: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
        self.dropout = nn.Dropout3d(dropout)
        self.norm = InstanceNorm(out_channels)
        self.activation = nn.LeakyReLU(0.01, inplace=True) if activate else nn.Identity()

    def forward(self, x: Tensor, visible: Optional[Tensor] = None) -> Tensor:
        """Map ``(B, C_in, D, H, W)`` to ``(B, C_out, D/s, H/s, W/s)``.

        With ``visible (B, 1, D/s, H/s, W/s)`` the norm sees visible voxels only and hidden ones become 0.
        """
        x = self.dropout(self.conv(x))
        if torch.jit.is_scripting():
            assert visible is None, "an exported network cannot hide blocks"
            x = self.norm(x)
        elif visible is None:
            x = self.norm(x)
        else:
            x = masked_instance_norm(x, visible, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.activation(x)


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut that pools first and projects second (ResNet-D, arXiv:1812.01187)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = ConvBlock(in_channels, out_channels, stride=stride, dropout=dropout)
        self.conv2 = ConvBlock(out_channels, out_channels, activate=False)
        # sides are even; rounding up gives the formula of the strided convolution, without which ONNX has no free sizes
        self.pool = nn.AvgPool3d(stride, ceil_mode=True) if stride != 1 else nn.Identity()
        self.shortcut: Optional[ConvBlock] = None
        if in_channels != out_channels:
            self.shortcut = ConvBlock(in_channels, out_channels, kernel_size=1, bias=False, activate=False)
        self.activation = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor, visible: Optional[Tensor] = None) -> Tensor:
        """Map ``(B, C_in, D, H, W)`` to ``(B, C_out, D/s, H/s, W/s)``.

        With ``visible (B, 1, D/s, H/s, W/s)`` hidden places stay 0. Pooling keeps them so by itself, since a block of
        the mask is a whole number of its windows.
        """
        shortcut = self.pool(x)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut, visible)
        return self.activation(self.conv2(self.conv1(x, visible), visible) + shortcut)


class Stage(nn.Sequential):
    """Residual blocks one after the other."""

    def forward(self, x: Tensor, visible: Optional[Tensor] = None) -> Tensor:
        """Map ``(B, C_in, D, H, W)`` to ``(B, C_out, D/s, H/s, W/s)``; ``visible`` as in :class:`ResidualBlock`."""
        for block in self:
            x = block(x, visible)
        return x
