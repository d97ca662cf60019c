# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Instance normalisation over visible voxels only, which makes a dense encoder compute as if it were sparse.

A convolution whose output is set to 0 at hidden places equals a submanifold sparse convolution, provided that nothing
else lets hidden places in; the norm's moments are the rest (Tian et al., SparK, arXiv:2301.03580). The mask is an
argument and never kept in a module or a global.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..teacher import block_features

__all__ = ["MaskedMap", "mask_at", "masked_instance_norm"]

_SPATIAL = (2, 3, 4)


class _MaskedInstanceNorm(torch.autograd.Function):
    """Forward and backward in few passes over the map: plain autograd keeps many full-size temporaries.

    The map itself is kept, which is what a convolution made, and centred again for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        visible: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        fill: Tensor | None,
        eps: float,
    ) -> Tensor:
        dtype = x.dtype
        mask = visible.float()
        count = mask.sum(_SPATIAL, keepdim=True).clamp(min=1)  # (B, 1, 1, 1, 1)
        centred = x.float() * mask
        mean = centred.sum(_SPATIAL, keepdim=True) / count  # (B, C, 1, 1, 1)
        centred.addcmul_(mask, mean, value=-1)  # hidden voxels stay 0
        variance = torch.linalg.vector_norm(centred, dim=_SPATIAL, keepdim=True).square_() / count
        rstd = (variance + eps).rsqrt()
        scale = rstd if weight is None else rstd * weight.float().view(1, -1, 1, 1, 1)
        out = centred.mul_(scale)
        if bias is not None:
            out.addcmul_(mask, bias.float().view(1, -1, 1, 1, 1))
        if fill is not None:
            out.addcmul_(1 - mask, fill.float().view(1, -1, 1, 1, 1))
        ctx.save_for_backward(x, mask, count, mean, rstd, scale)
        ctx.present, ctx.dtype = (weight is not None, bias is not None), dtype
        ctx.fill_shape = None if fill is None else fill.shape
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, count, mean, rstd, scale = ctx.saved_tensors
        centred = (x.float() * mask).addcmul_(mask, mean, value=-1)
        outer = gradients[0].float()
        grad = outer * mask
        b, c = centred.shape[:2]
        total = grad.sum(_SPATIAL, keepdim=True)  # (B, C, 1, 1, 1)
        product = torch.bmm(grad.reshape(b * c, 1, -1), centred.reshape(b * c, -1, 1)).view(b, c, 1, 1, 1)
        d_weight = (product * rstd).sum((0, 2, 3, 4)) if ctx.present[0] else None
        d_bias = total.sum((0, 2, 3, 4)) if ctx.present[1] else None
        d_fill = None
        if ctx.fill_shape is not None:
            d_fill = (outer.sum(_SPATIAL, keepdim=True) - total).sum(0).view(ctx.fill_shape)
        # the derivative of (x - mean) / std, over visible voxels
        grad.mul_(scale)
        grad.addcmul_(mask, scale * total / count, value=-1)
        grad.addcmul_(centred, scale * product * rstd.square() / count, value=-1)
        return grad.to(ctx.dtype), None, d_weight, d_bias, d_fill, None


def masked_instance_norm(
    x: Tensor,
    visible: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    fill: Tensor | None = None,
) -> Tensor:
    """Normalise every sample and channel over its visible voxels; hidden ones become 0, or ``fill``.

    Args:
        x: ``(B, C, D, H, W)``; what it holds at hidden places has no influence.
        visible: ``(B, 1, D, H, W)``, 1 or true where visible.
        weight: ``(C,)`` scale, or None.
        bias: ``(C,)`` shift of visible voxels, or None.
        eps: added to the variance.
        fill: ``C`` values of hidden voxels in any shape, or None.

    Returns:
        ``(B, C, D, H, W)``, computed in float32 and returned in the type of ``x``.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 100.0]).view(1, 1, 3, 1, 1)
        >>> seen = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 3, 1, 1)
        >>> [round(float(v), 3) for v in masked_instance_norm(x, seen).flatten()]
        [-1.0, 1.0, 0.0]
    """
    return _MaskedInstanceNorm.apply(x, visible, weight, bias, fill, eps)  # type: ignore[no-any-return, no-untyped-call]


def mask_at(visible: Optional[Tensor], size: List[int], stride: int) -> Optional[Tensor]:
    """Spread a grid of blocks ``(B, d, h, w)`` over the map of an image of ``size`` at a stride.

    Returns:
        ``(B, 1, D/stride, H/stride, W/stride)`` float, 1 where visible; None if nothing is hidden there, as on a map
        coarser than the grid, whose voxels each cover visible and hidden blocks.
    """
    if visible is None or size[0] // stride < visible.shape[1]:
        return None
    shape = [size[0] // stride, size[1] // stride, size[2] // stride]
    return F.interpolate(visible.unsqueeze(1).float(), size=shape, mode="nearest")


@dataclass(frozen=True, eq=False)
class MaskedMap:
    """A dense map with zeros at hidden voxels.

    Attributes:
        values: ``(B, C, D, H, W)``.
        seen: ``(B, 1, D, H, W)``, 1 where visible; None if nothing is hidden.
    """

    values: Tensor
    seen: Tensor | None

    def dense(self) -> Tensor:
        """Return the values."""
        return self.values

    def described(self, grid: Sequence[int]) -> Tensor:
        """Return what :func:`block_features` says of every block, ``(B, C, d, h, w)``, float32."""
        return block_features([self.values], grid)

    def normalised(self, fill: Tensor | None, values: Tensor) -> Tensor:
        """Return ``(B, C, D, H, W)`` of these values, normalised over the visible voxels of each sample, ``fill`` at
        the hidden ones.
        """
        seen = self.seen
        if seen is None:
            seen, fill = values.new_ones(1, 1, 1, 1, 1).expand(values.shape[0], 1, *values.shape[2:]), None
        return masked_instance_norm(values, seen, fill=fill)
