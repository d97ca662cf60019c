# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Vision-transformer blocks of Primus: rotary attention, gated MLP, layer scale, learned positions.

Implements the EVA-02 block (Fang et al., arXiv:2303.11331) with three-dimensional rotary positions as Primus uses it
(Wald et al., arXiv:2503.01835). Tokens are ordered with the first spatial axis slowest: a grid ``(B, C, d, h, w)`` and
its tokens ``(B, N, C)`` are related by ``flatten(2).transpose(1, 2)``.
"""

from __future__ import annotations

import math
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recompute import Again, recalled, run, selects

__all__ = ["DropPath", "Transformer", "TransformerBlock", "rotary_table"]


def rotary_table(grid: List[int], head_dim: int, device: torch.device) -> Tensor:
    """Return sine and cosine of the rotary angles of every token.

    A third of the head's channels turns with each spatial axis; within a third, pairs of channels turn at frequencies
    ``10000 ** (-k / bands)``.

    Args:
        grid: tokens along each of the three axes.
        head_dim: channels of one attention head, a multiple of 6.
        device: where to build it.

    Returns:
        ``(2, N, head_dim)`` float32: sines, then cosines.

    Example:
        >>> table = rotary_table([2, 1, 1], 6, torch.device("cpu"))
        >>> table.shape, [round(float(v), 4) for v in table[0, 1]]
        (torch.Size([2, 2, 6]), [0.8415, 0.8415, 0.0, 0.0, 0.0, 0.0])
    """
    bands = head_dim // 6
    frequencies = 10000.0 ** (-torch.arange(bands, device=device, dtype=torch.float32) / bands)
    parts: List[Tensor] = []
    for axis in range(3):
        position = torch.arange(grid[axis], device=device, dtype=torch.float32)
        angle = position[:, None] * frequencies[None, :]  # (side, bands)
        angle = angle.repeat_interleave(2, dim=1)  # (side, 2 bands)
        shape = [1, 1, 1, 2 * bands]
        shape[axis] = grid[axis]
        parts.append(angle.view(shape).expand(grid[0], grid[1], grid[2], 2 * bands))
    angles = torch.cat(parts, dim=-1).reshape(-1, head_dim)  # (N, head_dim)
    return torch.stack([angles.sin(), angles.cos()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn channel pairs of queries or keys ``(B, heads, N, head_dim)`` by ``rotary (2, B or 1, 1, N, head_dim)``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x * rotary[1] + turned * rotary[0]).to(x.dtype)


class DropPath(nn.Module):
    """Drop a residual branch for whole samples while training, and rescale what stays (arXiv:1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x (B, N, C)``, with samples zeroed at the given rate."""
        if self.rate == 0.0 or not self.training:
            return x
        return self.dropped(x, self.draw(x, x.dtype))

    def draw(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``(B, 1, 1)``, 1 for the samples of ``x`` that keep their branch."""
        return torch.empty([x.shape[0], 1, 1], dtype=dtype, device=x.device).bernoulli_(1.0 - self.rate)

    def dropped(self, x: Tensor, keep: Tensor) -> Tensor:
        """Return ``x`` where it is kept, rescaled, and zeros elsewhere."""
        return x * keep / (1.0 - self.rate)


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary positions and a norm before the output projection; keys have no bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``."""
        x = self.attend(self.query(x), self.key(x), self.value(x), rotary)
        return self.dropout(self.output(self.norm(x)))  # type: ignore[no-any-return]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rotary: Tensor) -> Tensor:
        """Map projections ``(B, N, C)`` to what every token takes from the others ``(B, N, C)``."""
        b, n, c = query.shape
        q = query.view(b, n, self.num_heads, -1).transpose(1, 2)  # (B, heads, N, head_dim)
        k = key.view(b, n, self.num_heads, -1).transpose(1, 2)
        v = value.view(b, n, self.num_heads, -1).transpose(1, 2)
        x = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v)
        return x.transpose(1, 2).reshape(b, n, c)  # (B, N, C)

    def recalling(self, x: Tensor, rotary: Tensor, again: Again) -> Tensor:
        """Do the same with the outputs of projections and attention kept, and ``again`` instead of ``x``."""
        query, key, value = (again.through(layer, x) for layer in (self.query, self.key, self.value))
        x, again = recalled(self.norm, self.attend(query, key, value, rotary))
        return self.dropout(again.through(self.output, x))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """SwiGLU with a norm inside: ``output(norm(silu(gate(x)) * value(x)))`` (arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.value = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, C)``."""
        return self.dropout(self.output(self.norm(F.silu(self.gate(x)) * self.value(x))))

    def recalling(self, x: Tensor, again: Again) -> Tensor:
        """Do the same with the outputs of the projections kept, and ``again`` instead of ``x``."""
        gate, value = again.through(self.gate, x), again.through(self.value, x)
        x, again = recalled(F.silu, gate)
        x, again = recalled(torch.mul, x, value, source=again)
        x, again = recalled(self.norm, x, source=again)
        return self.dropout(again.through(self.output, x))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled by a learned vector that starts at ``layer_scale``."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_hidden: int,
        drop_path: float,
        dropout: float,
        layer_scale: float,
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm1 = nn.LayerNorm(dim)
        self.attention = RotaryAttention(dim, num_heads, dropout)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GatedMLP(dim, mlp_hidden, dropout)
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, C)``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if selects(self):
                return self._recalling(x, rotary)
        x = x + self.drop_path(self.scale1 * self.attention(self.norm1(x), rotary))
        return x + self.drop_path(self.scale2 * self.mlp(self.norm2(x)))

    def _recalling(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Keep the outputs of the projections, of attention and of the block."""
        normed, again = recalled(self.norm1, x)
        branch = self.attention.recalling(normed, rotary, again)
        keep = self._drawn(branch)
        x, again = recalled(lambda branch, x: self._added(x, branch, self.scale1, keep), branch, x)
        normed, again = recalled(self.norm2, x, source=again)
        branch = self.mlp.recalling(normed, again)
        return self._added(x, branch, self.scale2, self._drawn(branch))

    def _drawn(self, branch: Tensor) -> Tensor | None:
        if self.drop_path.rate == 0:
            return None
        return self.drop_path.draw(branch, torch.result_type(self.scale1, branch))

    def _added(self, x: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
        branch = scale * branch
        return x + (branch if keep is None else self.drop_path.dropped(branch, keep))


class Transformer(nn.Module):
    """Learned positions, a stack of blocks and a final norm, over a grid of tokens of any size.

    Args:
        dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads; ``dim / num_heads`` must be a multiple of 6.
        grid: token grid of the learned position table; other grids get it interpolated trilinearly.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop_path: rate of the last block; rates rise linearly from 0.
        dropout: dropout after attention and MLP.
        layer_scale: start of the layer-scale vectors.
        checkpointing: ``none``, ``selective`` or ``full``, see :mod:`.recompute`.

    Raises:
        ValueError: if ``dim`` does not divide into heads of a multiple of 6 channels.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        num_heads: int,
        grid: tuple[int, int, int],
        mlp_ratio: float = 8 / 3,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        layer_scale: float = 0.1,
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 6:
            raise ValueError(
                f"embed_dim {dim} over num_heads {num_heads} gives {dim / num_heads:g} channels a head; rotary "
                "positions "
                "on three axes need a multiple of 6"
            )
        self.head_dim = dim // num_heads
        self.checkpointing = checkpointing
        self.position_embedding = nn.Parameter(torch.empty(1, dim, *grid))
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                num_heads=num_heads,
                mlp_hidden=int(dim * mlp_ratio),
                drop_path=rate,
                dropout=dropout,
                layer_scale=layer_scale,
                checkpointing=checkpointing,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-2, b=2)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # later blocks write less into the residual stream at the start
        with torch.no_grad():
            for index, block in enumerate(self.blocks, start=1):
                assert isinstance(block, TransformerBlock)
                block.attention.output.weight.div_(math.sqrt(2 * index))
                block.mlp.output.weight.div_(math.sqrt(2 * index))

    def forward(self, grid: Tensor, visible: Optional[Tensor] = None, visible_count: Optional[int] = None) -> Tensor:
        """Transform a grid of tokens; hidden ones are dropped, not computed, and come back as zeros.

        Args:
            grid: ``(B, C, d, h, w)``.
            visible: ``(B, d, h, w)`` boolean, the same number of visible tokens in every sample.
            visible_count: that number, if it is known; finding it makes a GPU wait.

        Returns:
            ``(B, C, d, h, w)``.
        """
        b, c, d, h, w = grid.shape
        position: Tensor = self.position_embedding
        exporting = False
        if not torch.jit.is_scripting():
            exporting = torch.compiler.is_exporting()
        # a graph traced at the table's own size would keep that size, and interpolating to it changes nothing
        if exporting or position.shape[2:] != grid.shape[2:]:
            position = F.interpolate(position, size=[d, h, w], mode="trilinear")
        x = (grid + position).flatten(2).transpose(1, 2)  # (B, N, C)
        rotary = rotary_table([d, h, w], self.head_dim, x.device)[:, None, None]  # (2, 1, 1, N, head_dim)
        if visible is None:
            x = self.norm(self._blocks(x, rotary))
        else:
            seen = visible.flatten(1)  # (B, N)
            if visible_count is None:
                count = int(seen[0].sum())
                if not bool((seen.sum(1) == count).all()):
                    raise ValueError(f"every sample must show the same number of tokens, not {seen.sum(1)}")
            else:
                count = visible_count
            # a stable sort puts the visible tokens first, in grid order
            kept = torch.argsort(seen.to(torch.uint8), dim=1, descending=True, stable=True)[:, :count]  # (B, K)
            index = kept[:, :, None].expand(b, count, c)
            turns = rotary[:, 0, 0][:, kept].unsqueeze(2)  # (2, B, 1, K, head_dim)
            shown = self.norm(self._blocks(x.gather(1, index), turns))
            x = torch.zeros(b, d * h * w, c, dtype=shown.dtype, device=shown.device).scatter(1, index, shown)
        return x.transpose(1, 2).reshape(b, c, d, h, w)

    def _blocks(self, x: Tensor, rotary: Tensor) -> Tensor:
        for block in self.blocks:
            if torch.jit.is_scripting():
                x = block(x, rotary)
            else:
                x = run(block, x, rotary, recompute=self.checkpointing == "full" and self.training)
        return x
