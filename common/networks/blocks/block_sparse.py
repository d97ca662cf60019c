# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A residual encoder that computes visible blocks only: maps are stacks of their voxels, and nothing else exists.

A map of ``C`` channels in ``N`` visible blocks of ``V`` voxels is ``values (N V + 1, C)``: the voxels of one block
after the other, channels last, and a last row that stands for every hidden voxel. It is 0 in the encoder, so that
whatever looks for a neighbour that is hidden finds a 0 there. A 3x3x3 convolution of large blocks gathers each with a
rim of one voxel and convolves the stack; of small ones, where the rim outweighs the block, it multiplies for each of
the 27 places of the kernel the rows that have a visible neighbour there. Gradients are computed in the same ways, from
the rows alone. Norms take the rows of a sample, pooling and projections never leave a block.

All that depends on the mask is in :class:`VisibleBlocks`, and every shape is known on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...views.blocks import VisibleBlocks
from .recompute import Again, recalled, run, selects

if TYPE_CHECKING:
    from .convolution import ConvBlock, InstanceNorm, ResidualBlock, Stage

__all__ = ["BlockMap", "block_conv", "block_norm", "recall_unit", "run_stage", "run_unit"]

_BY_RIM = 4  # sides of at least so many voxels are gathered with their rim; measured, as the sizes below
_PART = {"cpu": 8 * 2**20}  # bytes that are gathered at once, which a cache still holds
_PART_ELSEWHERE = 256 * 2**20


def _volume(sides: Sequence[int]) -> int:
    return sides[0] * sides[1] * sides[2]


@dataclass(frozen=True, eq=False)
class BlockMap:
    """A map of visible blocks.

    Attributes:
        values: ``(N V + 1, C)`` voxels of each block, channels last, and the hidden voxels' row.
        blocks: which blocks.
        sides: voxels along the sides of a block; ``V`` is their product.
    """

    values: Tensor
    blocks: VisibleBlocks
    sides: tuple[int, int, int]

    @classmethod
    def of(cls, dense: Tensor, blocks: VisibleBlocks) -> BlockMap:
        """Take the visible blocks of ``(B, C, D, H, W)``."""
        z, y, x = (side // cells for side, cells in zip(dense.shape[2:], blocks.grid, strict=True))
        found = _blocked(dense, blocks.grid)[tuple(blocks.where)].flatten(0, 3)  # (N V, C)
        return cls(F.pad(found, (0, 0, 0, 1)), blocks, (z, y, x))

    def dense(self) -> Tensor:
        """Return ``(B, C, D, H, W)``, hidden voxels as the last row has them."""
        return _Dense.apply(self.values, self.blocks, self.sides)  # type: ignore[no-any-return, no-untyped-call]

    def described(self, grid: Sequence[int]) -> Tensor:
        """Return the mean of every block ``(B, C, d, h, w)``, float32, zeros for hidden ones; without a dense map."""
        rows = self.values[:-1].view(len(self.blocks), _volume(self.sides), -1)  # (N, V, C)
        means = rows.sum(1, dtype=torch.float32) / rows.shape[1]  # not the mean, whose gradient would be of float32
        every = means.new_zeros(len(self.blocks.counts), *grid, means.shape[1])
        return every.index_put(tuple(self.blocks.where), means).movedim(-1, 1)

    def normalised(self, fill: Tensor | None, values: Tensor) -> Tensor:
        """Return ``(B, C, D, H, W)`` of these values, normalised over the visible voxels of each sample, ``fill`` at
        the hidden ones.
        """
        return replace(self, values=block_norm(replace(self, values=values), fill=fill)).dense()

    def smaller(self, stride: int) -> tuple[int, int, int]:
        """Return the sides of the blocks of a map that is coarser by ``stride``."""
        return self.sides[0] // stride, self.sides[1] // stride, self.sides[2] // stride


def _blocked(dense: Tensor, grid: Sequence[int]) -> Tensor:
    """View ``(B, C, D, H, W)`` as ``(B, d, h, w, bz, by, bx, C)``."""
    sides = [n for cells, side in zip(grid, dense.shape[2:], strict=True) for n in (cells, side // cells)]
    return dense.view(*dense.shape[:2], *sides).permute(0, 2, 4, 6, 3, 5, 7, 1)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, blocks: VisibleBlocks, sides: tuple[int, int, int]) -> Tensor:
        ctx.blocks, ctx.sides = blocks, sides
        size = [cells * side for cells, side in zip(blocks.grid, sides, strict=True)]
        samples, channels = len(blocks.counts), rows.shape[1]
        dense = rows[-1].view(1, channels, 1, 1, 1).repeat(samples, 1, *size)
        _blocked(dense, blocks.grid)[tuple(blocks.where)] = rows[:-1].view(-1, *sides, channels)
        return dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        blocks: VisibleBlocks = ctx.blocks
        (grad,) = gradients
        rows = grad.new_empty(len(blocks) * _volume(ctx.sides) + 1, grad.shape[1])
        rows[:-1] = _blocked(grad, blocks.grid)[tuple(blocks.where)].flatten(0, 3)
        rows[-1] = grad.sum((0, 2, 3, 4)) - rows[:-1].sum(0)
        return rows, None, None


# convolution


def _window(blocks: VisibleBlocks, sides: tuple[int, int, int], low: int, high: int) -> Tensor:
    """Return ``(N, voxels)`` the row of every voxel of the blocks with a rim of ``low`` and ``high`` voxels."""
    key = ("window", sides, low, high)
    if key not in blocks.tables:
        device = blocks.neighbours.device
        places = [torch.arange(-low, side + high, device=device) for side in sides]
        block = [torch.div(p, side, rounding_mode="floor") + 1 for p, side in zip(places, sides, strict=True)]
        inside = [p % side for p, side in zip(places, sides, strict=True)]
        beside, offset = _joined(block, (3, 3, 3)), _joined(inside, sides)
        number = blocks.neighbours[:, beside]  # (N, voxels)
        hidden, voxels = len(blocks), _volume(sides)
        table = torch.where(number < hidden, number * voxels + offset, hidden * voxels)
        blocks.tables[key] = table.int()
    return blocks.tables[key]


def _joined(axes: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    z, y, x = axes
    joined = (z.view(-1, 1, 1) * sides[1] + y.view(-1, 1)) * sides[2] + x
    return joined.flatten()


def _pairs(blocks: VisibleBlocks, sides: tuple[int, int, int], stride: int) -> tuple[Tensor, Tensor, list[int]]:
    """Find the pairs of rows that each place of the kernel joins.

    Returns:
        ``(27, N V)`` rows of the output, those with a visible neighbour first; ``(27, N V)`` the row of that
        neighbour; and for each place how many they are.
    """
    key, voxels = ("pairs", sides, stride), _volume(sides)
    large = (sides[0] * stride, sides[1] * stride, sides[2] * stride)
    beside, offset, sizes = [], [], []
    for place in range(27):
        around = (place // 9, place // 3 % 3, place % 3)
        found = [
            [divmod(stride * p + k - 1, wide) for p in range(side)]
            for side, wide, k in zip(sides, large, around, strict=True)
        ]
        these = [
            (((z + 1) * 3 + y + 1) * 3 + x + 1, (a * large[1] + b) * large[2] + c)
            for z, a in found[0]
            for y, b in found[1]
            for x, c in found[2]
        ]
        beside.append([block for block, _ in these])
        offset.append([inside for _, inside in these])
        sizes.append(sum(blocks.pairs[block] for block, _ in these))
    if key not in blocks.tables:
        device = blocks.neighbours.device
        hidden = len(blocks)
        number = blocks.neighbours[:, torch.tensor(beside).to(device, non_blocking=True)]  # (N, 27, V)
        rows = number * _volume(large) + torch.tensor(offset).to(device, non_blocking=True)
        absent = (number == hidden).transpose(0, 1).flatten(1)  # (27, N V)
        order = absent.byte().argsort(dim=1, stable=True)
        blocks.tables[key] = torch.stack([order, rows.transpose(0, 1).flatten(1).gather(1, order)])
        assert order.shape[1] == hidden * voxels
    outputs, inputs = blocks.tables[key]
    return outputs, inputs, sizes


def _parts(blocks: VisibleBlocks, table: Tensor, row: Tensor) -> Iterator[slice]:
    """Cut the blocks into as many as are gathered at once."""
    limit = _PART.get(row.device.type, _PART_ELSEWHERE)
    step = max(1, limit // (table.shape[1] * row.shape[1] * row.element_size()))
    for first in range(0, len(blocks), step):
        yield slice(first, min(first + step, len(blocks)))


def _gathered(rows: Tensor, table: Tensor, sides: Sequence[int]) -> Tensor:
    """Gather ``(n, voxels)`` rows as ``(n, C, z, y, x)`` in memory with channels last."""
    found = rows.index_select(0, table.flatten()).view(len(table), *sides, rows.shape[1])
    return found.permute(0, 4, 1, 2, 3)


def _channels_last(stack: Tensor) -> Tensor:
    """View or copy ``(n, C, z, y, x)`` as ``(n z y x, C)``."""
    return stack.permute(0, 2, 3, 4, 1).flatten(0, 3)


def _stacks(
    rows: Tensor, blocks: VisibleBlocks, sides: tuple[int, int, int], low: int, high: int
) -> Iterator[tuple[slice, Tensor]]:
    """Gather some blocks after the other ``(n, C, ...)`` with their rims."""
    table = _window(blocks, sides, low, high)
    for part in _parts(blocks, table, rows):
        yield part, _gathered(rows, table[part], [side + low + high for side in sides])


def _convolved(
    rows: Tensor, weight: Tensor, bias: Tensor | None, blocks: VisibleBlocks, sides: tuple[int, int, int], stride: int
) -> Tensor:
    voxels = _volume(sides) // stride**3
    out = rows.new_empty(len(blocks) * voxels + 1, weight.shape[0])
    out[-1] = 0
    for part, stack in _stacks(rows, blocks, sides, 1, 2 - stride):
        out[part.start * voxels : part.stop * voxels] = _channels_last(F.conv3d(stack, weight, bias, stride))
    return out


class _RimConv(torch.autograd.Function):
    """Convolution of blocks that are gathered with a rim; gathered again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        blocks: VisibleBlocks,
        sides: tuple[int, int, int],
        stride: int,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.blocks, ctx.sides, ctx.stride, ctx.bias = blocks, sides, stride, bias is not None
        return _convolved(rows, weight, bias, blocks, sides, stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad = gradients[0].contiguous()
        return (
            _RimConv.d_rows(ctx, grad, rows, weight) if ctx.needs_input_grad[0] else None,
            _RimConv.d_weight(ctx, grad, rows, weight) if ctx.needs_input_grad[1] else None,
            grad[:-1].sum(0) if ctx.bias else None,
            None,
            None,
            None,
        )

    @staticmethod
    def d_rows(ctx: Any, grad: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """Convolve the gradient with the kernel turned around, by which only visible voxels are computed."""
        blocks, sides, stride, voxels = ctx.blocks, ctx.sides, ctx.stride, _volume(ctx.sides)
        if stride == 1:
            return _convolved(grad, weight.flip(2, 3, 4).transpose(0, 1), None, blocks, sides, 1)
        out = torch.empty_like(rows)
        out[-1] = 0
        small = (sides[0] // stride, sides[1] // stride, sides[2] // stride)
        for part, stack in _stacks(grad, blocks, small, 0, 1):
            found = F.conv_transpose3d(stack, weight, None, stride, 1)[:, :, : sides[0], : sides[1], : sides[2]]
            out[part.start * voxels : part.stop * voxels] = _channels_last(found)
        return out

    @staticmethod
    def d_weight(ctx: Any, grad: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """Sum the kernel's gradient over the parts, in float32."""
        stride, total = ctx.stride, torch.zeros_like(weight, dtype=torch.float32)
        small = [side // stride for side in ctx.sides]
        voxels = _volume(small)
        for part, stack in _stacks(rows, ctx.blocks, ctx.sides, 1, 2 - stride):
            above = grad[part.start * voxels : part.stop * voxels].view(-1, *small, grad.shape[1])
            total += torch.ops.aten.convolution_backward(
                above.permute(0, 4, 1, 2, 3),
                stack,
                weight,
                None,
                [stride] * 3,
                [0] * 3,
                [1] * 3,
                False,
                [0] * 3,
                1,
                [False, True, False],
            )[1]
        return total.to(weight.dtype)


class _PairConv(torch.autograd.Function):
    """Convolution as one product of matrices for each place of the kernel, sums in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        blocks: VisibleBlocks,
        sides: tuple[int, int, int],
        stride: int,
    ) -> Tensor:
        small = (sides[0] // stride, sides[1] // stride, sides[2] // stride)
        outputs, inputs, sizes = ctx.pairs = _pairs(blocks, small, stride)
        ctx.save_for_backward(rows, weight)
        ctx.bias = bias is not None
        out = rows.new_zeros(outputs.shape[1] + 1, weight.shape[0], dtype=torch.float32)
        if bias is not None:
            out[:-1] = bias
        kernel = weight.permute(2, 3, 4, 1, 0).flatten(0, 2).contiguous()  # (27, C_in, C_out)
        for matrix, to, of, size in zip(kernel, outputs, inputs, sizes, strict=True):
            if size:
                out.index_add_(0, to[:size], (rows.index_select(0, of[:size]) @ matrix).float())
        return out.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        (grad,) = gradients
        outputs, inputs, sizes = ctx.pairs
        d_rows = torch.zeros_like(rows, dtype=torch.float32)
        kernel = weight.permute(2, 3, 4, 0, 1).flatten(0, 2).contiguous()  # (27, C_out, C_in)
        d_kernel = torch.zeros_like(kernel)
        for matrix, d_matrix, to, of, size in zip(kernel, d_kernel, outputs, inputs, sizes, strict=True):
            if size:
                above = grad.index_select(0, to[:size])
                torch.mm(above.t(), rows.index_select(0, of[:size]), out=d_matrix)
                d_rows.index_add_(0, of[:size], (above @ matrix).float())
        d_weight = d_kernel.view(3, 3, 3, *weight.shape[:2]).permute(3, 4, 0, 1, 2).contiguous()
        return d_rows.to(rows.dtype), d_weight, grad[:-1].sum(0) if ctx.bias else None, None, None, None


def block_conv(x: BlockMap, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1) -> BlockMap:
    """Convolve visible voxels with a kernel ``(C_out, C, 3, 3, 3)`` or ``(C_out, C, 1, 1, 1)``, hidden ones being 0.

    Under autocast in its type, as PyTorch's convolution is.
    """
    rows, kind = x.values, x.values.device.type
    if torch.is_autocast_enabled(kind):
        rows, weight = rows.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
        bias = None if bias is None else bias.to(weight.dtype)
    if weight.shape[2:] == (1, 1, 1):
        return replace(x, values=F.linear(rows, weight.flatten(1), bias))
    sides = x.smaller(stride)
    way = _RimConv if min(sides) >= _BY_RIM else _PairConv
    found = way.apply(rows, weight, bias, x.blocks, x.sides, stride)  # type: ignore[no-untyped-call]
    return replace(x, values=found, sides=sides)


# norm


def _samples(x: Tensor, counts: Sequence[int], voxels: int) -> list[Tensor]:
    """View ``(N V + 1, C)`` as ``(S, L, C)``: at once if all samples show as many blocks, else one by one."""
    if len(set(counts)) == 1:
        return [x[:-1].view(len(counts), -1, x.shape[1])]
    parts = torch.split(x[:-1], [count * voxels for count in counts])
    return [part[None] for part in parts if len(part)]


def _slices(x: Tensor) -> Iterator[slice]:
    """Cut the ``L`` rows of ``(S, L, C)`` into as many as are computed at once."""
    step = max(1, _PART.get(x.device.type, _PART_ELSEWHERE) // (4 * x.shape[0] * x.shape[2]))
    for first in range(0, x.shape[1], step):
        yield slice(first, min(first + step, x.shape[1]))


class _Moments:
    """Mean and deviation of one or more samples, and how their values follow from them; all in float32."""

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.count = x.shape[1]
        self.mean = x.sum(1, keepdim=True, dtype=torch.float32) / self.count  # (S, 1, C)
        squares = sum((self.centred(x[:, part]).square_().sum(1, keepdim=True) for part in _slices(x)), torch.zeros(()))
        self.rstd = (squares / self.count + eps).rsqrt()
        self.scale = self.rstd if weight is None else self.rstd * weight.float()
        self.shift = torch.zeros_like(self.mean) if bias is None else bias.float().expand_as(self.mean)

    def centred(self, x: Tensor) -> Tensor:
        return x.float() - self.mean

    def normal(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, self.centred(x), self.scale)


class _BlockNorm(torch.autograd.Function):
    """Norm, addition and LeakyReLU in one, part by part; of no addition only the input is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        last: Tensor | None,
        added: Tensor | None,
        how: tuple[VisibleBlocks, int, float, float | None],
    ) -> Tensor:
        blocks, voxels, eps, slope = how
        out = torch.empty_like(values)
        others = [out] if added is None else [out, added]
        ctx.moments = []
        for x, o, *more in zip(*(_samples(t, blocks.counts, voxels) for t in (values, *others)), strict=True):
            moments = _Moments(x, weight, bias, eps)
            for part in _slices(x):
                found = moments.normal(x[:, part])
                for y in more:
                    found += y[:, part]
                o[:, part] = found if slope is None else F.leaky_relu_(found, slope)
            ctx.moments.append(moments)
        out[-1] = 0 if last is None else last.flatten()
        ctx.save_for_backward(values, None if added is None else out)
        ctx.how, ctx.present = how, (weight is not None, bias is not None)
        ctx.last = None if last is None else last.shape
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        values, out = ctx.saved_tensors
        blocks, voxels, _, slope = ctx.how
        d_values = torch.empty_like(values)
        inner = grad if slope is None else d_values if out is None else torch.empty_like(values)  # before LeakyReLU
        d_values[-1] = 0
        d_weight, d_bias = grad.new_zeros(2, grad.shape[1], dtype=torch.float32)
        kept = [values, grad, inner, d_values, *([] if out is None else [out])]
        views = zip(*(_samples(t, blocks.counts, voxels) for t in kept), strict=True)
        for (x, g, i, d, *o), moments in zip(views, ctx.moments, strict=True):
            total, product = torch.zeros_like(moments.mean), torch.zeros_like(moments.mean)
            for part in _slices(x):
                centred, above = moments.centred(x[:, part]), g[:, part].float()
                if slope is not None:
                    result = o[0][:, part].float() if o else moments.normal(x[:, part])
                    above = torch.ops.aten.leaky_relu_backward(above, result, slope, True)
                    i[:, part] = above
                total += above.sum(1, keepdim=True)
                product += centred.mul_(above).sum(1, keepdim=True)
            d_weight += (product * moments.rstd).sum((0, 1))
            d_bias += total.sum((0, 1))
            # the derivative of (x - mean) / std
            level = -moments.scale * total / moments.count
            slant = -moments.scale * product * moments.rstd.square() / moments.count
            for part in _slices(x):
                found = torch.addcmul(level, moments.centred(x[:, part]), slant)
                d[:, part] = found.addcmul_(i[:, part].float(), moments.scale)
        d_added = None
        if out is not None:
            d_added = inner
            d_added[-1] = 0
        return (
            d_values,
            d_weight if ctx.present[0] else None,
            d_bias if ctx.present[1] else None,
            None if ctx.last is None else grad[-1].view(ctx.last),
            d_added,
            None,
        )


def block_norm(
    x: BlockMap,
    norm: InstanceNorm | None = None,
    *,
    added: Tensor | None = None,
    slope: float | None = None,
    fill: Tensor | None = None,
) -> Tensor:
    """Normalise each sample and channel over its visible voxels, add other values, and apply LeakyReLU.

    Args:
        x: what to normalise.
        norm: weight, bias and epsilon; None for none and 1e-5.
        added: values of another map of the same blocks.
        slope: of LeakyReLU; None for none.
        fill: ``C`` values of the last row, which is 0 otherwise.

    Returns:
        values, computed in float32 and returned in the type of ``x``; as of :func:`masked_instance_norm`.
    """
    weight, bias, eps = (None, None, 1e-5) if norm is None else (norm.weight, norm.bias, norm.eps)
    how = (x.blocks, _volume(x.sides), eps, slope)
    return _BlockNorm.apply(x.values, weight, bias, fill, added, how)  # type: ignore[no-any-return, no-untyped-call]


# the layers of the encoder


def _slope(layer: nn.Module) -> float | None:
    return layer.negative_slope if isinstance(layer, nn.LeakyReLU) else None


def _convolved_by(layer: ConvBlock, x: BlockMap) -> BlockMap:
    return block_conv(x, layer.conv.weight, layer.conv.bias, stride=layer.conv.stride[0])


def _finished(layer: ConvBlock, like: BlockMap, values: Tensor) -> Tensor:
    return block_norm(replace(like, values=values), layer.norm, slope=_slope(layer.activation))


def run_unit(layer: ConvBlock, x: BlockMap) -> BlockMap:
    """Compute a :class:`ConvBlock` without dropout on visible blocks."""
    x = _convolved_by(layer, x)
    return replace(x, values=_finished(layer, x, x.values))


def recall_unit(layer: ConvBlock, x: BlockMap) -> tuple[BlockMap, Again]:
    """Do the same with nothing kept but ``x``; tell how the values are computed again."""
    like = replace(x, sides=x.smaller(layer.conv.stride[0]))
    raw, again = recalled(lambda values: _convolved_by(layer, replace(x, values=values)).values, x.values)
    values, again = recalled(partial(_finished, layer, like), raw, source=again)
    return replace(like, values=values), again


def _pooled(x: BlockMap, stride: int, values: Tensor) -> Tensor:
    z, y, w = x.smaller(stride)
    windows = values[:-1].view(-1, z, stride, y, stride, w, stride, values.shape[1])
    return F.pad(windows.mean((2, 4, 6)).view(-1, values.shape[1]), (0, 0, 0, 1))


def _run_block(block: ResidualBlock, x: BlockMap) -> BlockMap:
    stride, shortcut = block.conv1.conv.stride[0], x
    if stride > 1:
        sides = x.smaller(stride)
        pooled, again = recalled(partial(_pooled, x, stride), x.values)
        with again.instead_of(pooled) if selects(block) else nullcontext():
            shortcut = replace(x, values=pooled, sides=sides)
            if block.shortcut is not None:
                shortcut = _convolved_by(block.shortcut, shortcut)
    elif block.shortcut is not None:
        shortcut = _convolved_by(block.shortcut, x)
    if block.shortcut is not None:
        shortcut = replace(shortcut, values=_finished(block.shortcut, shortcut, shortcut.values))
    raw = _convolved_by(block.conv1, x)
    inner, again = recalled(partial(_finished, block.conv1, raw), raw.values)
    with again.instead_of(inner) if selects(block) else nullcontext():
        out = _convolved_by(block.conv2, replace(raw, values=inner))
    values = block_norm(out, block.conv2.norm, added=shortcut.values, slope=_slope(block.activation))
    return replace(out, values=values)


def run_stage(stage: Stage, x: BlockMap) -> BlockMap:
    """Compute a stage of residual blocks on visible blocks."""
    for block in stage:
        x = run(_run_block, block, x, recompute=block.checkpointing == "full" and selects(block))
    return x
