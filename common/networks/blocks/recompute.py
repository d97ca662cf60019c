# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Recomputation: compute again in the backward pass what was not kept.

=============  =======================================================================================================
``none``       everything that a gradient needs is kept
``selective``  outputs of convolutions, projections and attention are kept; norms, activations, joined maps and what
               else costs next to nothing is computed again, each just before it is needed
``full``       besides, of a residual or transformer block its input alone is kept, and all of it computed again
=============  =======================================================================================================

The gradients are the same: what is computed again goes through the same operations on the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

__all__ = ["MODES", "Again", "convolve_joined", "in_chunks", "mode_of", "recalled", "run", "selects"]

T = TypeVar("T")
MODES = ("none", "selective", "full")
_local = threading.local()  # whether all that is computed now will be computed again


def mode_of(checkpointing: bool | str | None) -> str:
    """Return which of :data:`MODES` is meant; true and false are full and none.

    Raises:
        ValueError: if none of them is.

    Example:
        >>> mode_of(True), mode_of(False), mode_of("selective")
        ('full', 'none', 'selective')
    """
    mode = {True: "full", False: "none", None: "none"}.get(checkpointing, checkpointing)  # type: ignore[arg-type]
    if mode not in MODES:
        raise ValueError(f"checkpointing is {checkpointing!r}; it must be none, selective or full")
    return mode  # type: ignore[return-value]


def selects(module: nn.Module) -> bool:
    """Tell whether a module, whose ``checkpointing`` is one of :data:`MODES`, now chooses what it keeps."""
    return (
        module.checkpointing != "none"
        and module.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # a compiler chooses by itself
        and not getattr(_local, "whole", False)
    )


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switch selection off within a function that is computed again as a whole."""

    @wraps(function)
    def call(*inputs: Any) -> Any:
        before, _local.whole = getattr(_local, "whole", False), True
        try:
            return function(*inputs)
        finally:
            _local.whole = before

    return call


def run(module: Callable[..., T], *inputs: Any, recompute: bool) -> T:
    """Call ``module(*inputs)``; with ``recompute`` its activations are not kept but computed again for the gradient."""
    if recompute:
        return checkpoint(_whole(module.__call__), *inputs, use_reentrant=False)  # type: ignore[no-any-return,operator]
    return module(*inputs)


def in_chunks(
    function: Callable[[Tensor], tuple[Tensor, ...]],
    x: Tensor,
    chunks: int,
    parameters: Iterable[nn.Parameter] = (),
) -> tuple[Tensor, ...]:
    """Call ``function`` on parts of a batch and join its outputs, with the memory of one part.

    For losses over a whole batch, where gradients cannot be summed over micro-batches: a first pass keeps the outputs
    only, the backward pass computes each part again with its share of the loss's gradient. This is the two-pass
    embedding cache of Gao et al. (arXiv:2101.06983), and exact.

    Args:
        function: maps ``(B, ...)`` to tensors whose first axis is ``B``; no sample may influence another.
        x: ``(B, ...)``.
        chunks: number of parts; 1 is a plain call.
        parameters: all that ``function`` uses, if ``x`` gets no gradient: then the second pass can recompute
            selectively, as it does if there are no parts.
    """
    if chunks == 1:
        return function(x)
    weights = [parameter for parameter in parameters if parameter.requires_grad]  # not those of a teacher, which moves
    if not torch.is_grad_enabled():
        outputs = [function(part) for part in x.chunk(chunks)]
    elif weights and not x.requires_grad and not any(hasattr(weight, "device_mesh") for weight in weights):
        outputs = [_Part.apply(function, part, *weights) for part in x.chunk(chunks)]  # type: ignore[no-untyped-call]
    else:  # fully sharded weights are gathered for each block in turn, which PyTorch's own recomputation knows
        outputs = [checkpoint(_whole(function), part, use_reentrant=False) for part in x.chunk(chunks)]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


class _Part(torch.autograd.Function):
    """Outputs of a function, of which nothing is kept but its input and the state of the random numbers."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.autocast = function, _autocast_of(x.device)
        ctx.save_for_backward(x, *parameters)
        ctx.random = torch.get_rng_state(), get_device_states(x)
        return function(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        kind, dtype, enabled = ctx.autocast
        here, (devices, states) = ctx.random
        with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
            torch.set_rng_state(here)
            if devices:
                set_device_states(devices, states, device_type=kind)
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled):
                outputs = ctx.function(x)
        return None, None, *torch.autograd.grad(outputs, parameters, grads, allow_unused=True)


def _autocast_of(device: torch.device) -> tuple[str, torch.dtype, bool]:
    kind = device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


class Again:
    """A tensor that is not kept for the backward pass but computed again there, and let go of after its last use.

    Args:
        compute: how, from tensors that are kept; without randomness.
        device: of the tensor, whose autocast is as it is now.
        needs: others that ``compute`` calls, each once.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> doubled = 2 * x
        >>> with Again(lambda: 2 * x.detach(), x.device).instead_of(doubled):
        ...     y = doubled.square().sum()
        >>> y.backward()
        >>> x.grad
        tensor([ 8., 16.])
    """

    def __init__(self, compute: Callable[[], Tensor], device: torch.device, *needs: Again) -> None:
        self._compute, self._autocast = compute, _autocast_of(device)
        self._value: Tensor | None = None
        self._users = self._left = 0
        for other in needs:
            other._users += 1

    def __call__(self) -> Tensor:
        """Return the tensor to one of its users."""
        value = self._value
        if value is None:
            kind, dtype, enabled = self._autocast
            with torch.no_grad(), torch.autocast(kind, dtype, enabled=enabled):
                value = self._compute()
            self._left = self._users
        self._left -= 1
        self._value = value if self._left > 0 else None
        return value

    @contextmanager
    def instead_of(self, tensor: Tensor, *, cast: bool = False) -> Iterator[None]:
        """Within it, operations on ``tensor`` keep how it is computed instead of the tensor, which must be alive.

        With ``cast`` so do operations on copies of other precision; there must be no weights of the same shape.
        """
        storage, shape, stride = tensor.untyped_storage()._cdata, tensor.shape, tensor.stride()
        first, plain = tensor.storage_offset(), tensor.is_contiguous()

        def pack(saved: Tensor) -> Any:
            same = saved.untyped_storage()._cdata == storage
            if not same and not (cast and saved.shape == shape):
                return saved
            self._users += 1
            return saved.dtype, saved.shape, saved.stride(), saved.storage_offset() - (first if same else 0)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            dtype, size, strides, offset = packed
            value = self().to(dtype)
            if value.stride() != stride and not (plain and value.is_contiguous()):
                # what was kept may be a view of it, which is found by the layout that it had
                value = torch.empty_strided(shape, stride, dtype=dtype, device=value.device).copy_(value)
            return value.as_strided(size, strides, value.storage_offset() + offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def through(self, layer: nn.Module, tensor: Tensor) -> Tensor:
        """Return ``layer(tensor)``, kept as within :meth:`instead_of`, in the precision of autocast if it is on."""
        _, dtype, enabled = self._autocast
        lowered = tensor.to(dtype) if enabled else tensor
        with self.instead_of(lowered):
            return layer(lowered)  # type: ignore[no-any-return]


def recalled(
    function: Callable[..., Tensor], first: Tensor, *others: Tensor, source: Again | None = None
) -> tuple[Tensor, Again]:
    """Call a function whose result is not to be kept; return it, and how it is computed again.

    Args:
        function: without randomness.
        first: its first argument, which is kept unless there is a ``source``.
        others: further arguments, which are kept.
        source: how ``first`` is computed again.
    """
    kept = [x.detach() for x in others]
    if source is None:
        start = first.detach()
        return function(first, *others), Again(lambda: function(start, *kept), first.device)
    again = Again(lambda: function(source(), *kept), first.device, source)
    with source.instead_of(first):
        return function(first, *others), again


class _Joined(torch.autograd.Function):
    """Convolution of two joined maps that keeps the second and how the first is computed.

    The joined map is there for a moment only, and never together with its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv3d, again: Again
    ) -> Tensor:
        ctx.save_for_backward(second, weight)
        ctx.conv, ctx.again, ctx.dtype = conv, again, first.dtype
        return conv(torch.cat([first, second], dim=1))  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        second, weight = ctx.saved_tensors
        conv, needs = ctx.conv, ctx.needs_input_grad
        split, lowered = weight.shape[1] - second.shape[1], weight.to(grad.dtype)
        d_first = d_second = d_weight = d_bias = None
        if needs[2] or needs[3]:
            _, d_weight, d_bias = torch.ops.aten.convolution_backward(
                grad,
                torch.cat([ctx.again(), second], dim=1).to(grad.dtype),
                lowered,
                [weight.shape[0]],
                *(conv.stride, conv.padding, conv.dilation, False, [0, 0, 0], 1),
                [False, needs[2], needs[3]],
            )
            d_weight = d_weight.to(weight.dtype) if needs[2] else None
            d_bias = d_bias.to(conv.bias.dtype) if needs[3] else None
        if needs[0] or needs[1]:
            both = F.conv_transpose3d(grad, lowered, None, conv.stride, conv.padding, 0, 1, conv.dilation)
            d_first, d_second = both[:, :split].to(ctx.dtype), both[:, split:].to(second.dtype)
        return d_first, d_second, d_weight, d_bias, None, None


def convolve_joined(conv: nn.Conv3d, first: Tensor, second: Tensor, again: Again) -> Tensor:
    """Return ``conv(torch.cat([first, second], dim=1))``.

    Args:
        conv: of stride 1, with one group.
        first: ``(B, C1, D, H, W)``, not kept.
        second: ``(B, C2, D, H, W)``, kept.
        again: how ``first`` is computed; it has no other users.
    """
    return _Joined.apply(  # type: ignore[no-any-return, no-untyped-call]
        first, second, conv.weight, conv.bias, conv, again
    )
