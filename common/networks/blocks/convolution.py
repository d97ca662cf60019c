# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Convolutional building blocks of the residual U-Net."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recompute import Again, recalled, run, selects
from .sparse import masked_instance_norm

__all__ = ["ConvBlock", "Convolution", "InstanceNorm", "ResidualBlock", "Stage", "Upsampling", "predicting"]


_PREDICTING = ContextVar("predicting", default=False)


@contextmanager
def predicting() -> Iterator[None]:
    """Let networks take the operations that are fastest for a tile on a CPU; what they give differs in the last digits.

    Without it they stay those of training, of TorchScript and of ONNX.
    """
    token = _PREDICTING.set(True)
    try:
        yield
    finally:
        _PREDICTING.reset(token)


def _plain_on_cpu(x: Tensor) -> bool:
    """Return whether a map is float32 and on a CPU, and nobody compiles or exports what is done to it."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _only_predicts(x: Tensor) -> bool:
    """Return whether, besides, nobody learns from it."""
    return (
        _PREDICTING.get() and not torch.is_grad_enabled() and _plain_on_cpu(x) and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


class Convolution(nn.Conv3d):
    """A convolution that CPUs compute well whatever the size of a map, and right in bfloat16.

    PyTorch 2.13.0 hands a single map of at most 20480 lines of voxels to a routine of its own instead of oneDNN, which
    takes up to 20 times as long: most maps of a tile. Within :func:`predicting` oneDNN is asked for by name.

    For maps of fewer planes than its padded kernel has, PyTorch 2.13.0 (oneDNN) writes beside the gradient of the
    weights in bfloat16 on a CPU: it is garbage, silently, or the process ends. There it is computed in float32; such
    maps are tiny.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, D, H, W)``."""
        if not torch.jit.is_scripting():
            thin = x.device.type == "cpu" and x.shape[2] < self.kernel_size[0]
            if thin and torch.is_autocast_enabled("cpu"):
                with torch.autocast("cpu", enabled=False):
                    return self._conv_forward(x.float(), self.weight, self.bias)
            if _only_predicts(x):
                padding: Any = self.padding
                return torch.mkldnn_convolution(
                    x, self.weight, self.bias, padding, self.stride, self.dilation, self.groups
                )
        return self._conv_forward(x, self.weight, self.bias)


class Upsampling(nn.ConvTranspose3d):
    """A transposed convolution that doubles each side: every voxel becomes eight, none of them of two voxels.

    On a CPU it is computed as eight pointwise convolutions, which oneDNN does in a third of the time that PyTorch
    2.13.0 takes, in float32, for its own routine, and in half with the gradient.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map ``(B, C_in, D, H, W)`` to ``(B, C_out, 2D, 2H, 2W)``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if _plain_on_cpu(x):
                return self._pointwise(x)
        return F.conv_transpose3d(x, self.weight, self.bias, self.stride)

    @torch.jit.unused
    def _pointwise(self, x: Tensor) -> Tensor:
        samples, _, depth, height, width = x.shape
        weight = self.weight.flatten(1).T[..., None, None, None]  # (8 C_out, C_in, 1, 1, 1)
        bias = None if self.bias is None else self.bias.repeat_interleave(8)
        if _only_predicts(x):
            eight = torch.mkldnn_convolution(x, weight.contiguous(), bias, [0] * 3, [1] * 3, [1] * 3, 1)
        else:
            eight = F.conv3d(x, weight.contiguous(), bias)
        eight = eight.view(samples, -1, 2, 2, 2, depth, height, width).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return eight.reshape(samples, -1, 2 * depth, 2 * height, 2 * width)


class InstanceNorm(nn.InstanceNorm3d):
    """Affine instance normalisation that also accepts maps of a single voxel.

    PyTorch refuses one voxel per channel; its normalised value is 0 whatever the variance, so the output is the bias.
    That lets a six-stage U-Net take inputs as small as its stride.

    On a CPU it is computed as the norm of groups of one channel, which PyTorch 2.13.0 does in a quarter of the time,
    and in half with the gradient; narrow maps in an eighth.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, D, H, W)`` per sample and channel."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if self._grouped(x):
                return torch.group_norm(x.contiguous(), x.shape[1], self.weight, self.bias, self.eps)
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

    @torch.jit.unused
    def _grouped(self, x: Tensor) -> bool:
        """Return whether groups of one channel are taken, whose gradient of a single voxel is nearly, not quite 0."""
        return _plain_on_cpu(x) and x.shape[2:].numel() > 1

    def flat(self, x: Tensor) -> Tensor:
        """Do the same and return what PyTorch computes, elsewhere than on a CPU ``(1, B * C, D, H, W)``: no view, on
        which an activation in place would cost two copies in the backward pass.
        """
        if self._grouped(x):
            return self(x)  # type: ignore[no-any-return]
        samples = x.shape[0]
        return torch.batch_norm(
            x.reshape(1, -1, *x.shape[2:]),
            weight=self.weight.repeat(samples),
            bias=self.bias.repeat(samples),
            running_mean=None,
            running_var=None,
            training=True,
            momentum=0.1,
            eps=self.eps,
            cudnn_enabled=torch.backends.cudnn.enabled,
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
        self.conv = Convolution(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
        self.dropout = nn.Dropout3d(dropout)
        self.norm = InstanceNorm(out_channels)
        self.activation = nn.LeakyReLU(0.01, inplace=True) if activate else nn.Identity()

    def forward(self, x: Tensor, visible: Optional[Tensor] = None) -> Tensor:
        """Map ``(B, C_in, D, H, W)`` to ``(B, C_out, D/s, H/s, W/s)``.

        With ``visible (B, 1, D/s, H/s, W/s)`` the norm sees visible voxels only and hidden ones become 0.
        """
        return self.activation(self.normalised(self.dropout(self.conv(x)), visible))

    def normalised(self, x: Tensor, visible: Optional[Tensor] = None) -> Tensor:
        """Apply the norm alone."""
        if torch.jit.is_scripting():
            assert visible is None, "an exported network cannot hide blocks"
        elif visible is not None:
            return masked_instance_norm(x, visible, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.norm(x)  # type: ignore[no-any-return]

    def recalled(self, x: Tensor, visible: Optional[Tensor] = None) -> tuple[Tensor, Again]:
        """Call on a map that is kept; return the result, which is not, and how it is computed again."""
        return self.activated(self.dropout(self.conv(x)), visible)

    def recalled_whole(self, x: Tensor, visible: Optional[Tensor] = None) -> tuple[Tensor, Again]:
        """Do the same with nothing kept but ``x``: for few channels, where the convolution too costs little."""
        if self.dropout.p > 0:
            return self.recalled(x, visible)
        raw, again = recalled(self.conv, x)
        return self.activated(raw, visible, again)

    def activated(self, x: Tensor, visible: Optional[Tensor], again: Again | None = None) -> tuple[Tensor, Again]:
        """Norm and activation of what the convolution made, which is kept unless it is told how to compute it again."""
        x, shape = x.contiguous(), x.shape  # what the norm keeps

        def norm(x: Tensor) -> Tensor:
            return self.norm.flat(x) if visible is None else self.normalised(x, visible)

        if again is None:
            kept = x.detach()
            result = Again(lambda: self.activation(norm(kept)).view(shape), x.device)
            x = norm(x)
        else:
            result = Again(lambda: self.activation(norm(again())).view(shape), x.device, again)
            with again.instead_of(x):
                x = norm(x)
        with result.instead_of(x):
            return self.activation(x).view(shape), result


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut that pools first and projects second (ResNet-D, arXiv:1812.01187)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, dropout: float = 0.0, checkpointing: str = "none"
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
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
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if selects(self):
                return self._recalling(x, visible)
        shortcut = self.pool(x)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut, visible)
        out = self.conv2(self.conv1(x, visible), visible)
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if _only_predicts(out):
                return self.activation(out.add_(shortcut))  # type: ignore[no-any-return]
        return self.activation(out + shortcut)

    def _recalling(self, x: Tensor, visible: Optional[Tensor]) -> Tensor:
        """Keep the outputs of the convolutions and of the block."""
        kept = x.detach()
        with Again(lambda: kept, x.device).instead_of(x, cast=True):
            shortcut, again = recalled(self.pool, x)
        if self.shortcut is not None:
            with again.instead_of(shortcut):
                shortcut = self.shortcut(shortcut, visible)
        inner, again = self.conv1.recalled(x, visible)
        with again.instead_of(inner):
            out = self.conv2(inner, visible)
        return self.activation(out + shortcut)  # type: ignore[no-any-return]


class Stage(nn.Sequential):
    """Residual blocks one after the other."""

    def forward(self, x: Tensor, visible: Optional[Tensor] = None) -> Tensor:
        """Map ``(B, C_in, D, H, W)`` to ``(B, C_out, D/s, H/s, W/s)``; ``visible`` as in :class:`ResidualBlock`."""
        for block in self:
            if torch.jit.is_scripting():
                x = block(x, visible)
            else:
                x = run(block, x, visible, recompute=block.checkpointing == "full" and selects(block))
        return x
