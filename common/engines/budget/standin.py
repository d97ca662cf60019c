# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A device that is not there: what a GPU would hold and compute, on any machine, without allocating anything.

Tensors on the device ``standin`` have shapes and types, but no values. What runs on the CPU runs as ever, so draws of
views are real numbers; what runs on the device only says what it would take. Wherever a value of the device is read, a
GPU makes the host wait, and here an error is raised: :class:`SynchronisationError`.

PyTorch's fake tensors cannot stand for CUDA in a build that has none, so the place of a backend of one's own is used,
once for a whole process. Autocast casts there by CUDA's rules.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import flop_registry

__all__ = ["NAME", "PARTS", "StandIn", "SynchronisationError", "prepare", "undrawn"]

NAME = "standin"
PARTS = ("weights", "gradients", "optimizer", "activations", "temporaries")
_BLOCK = 512  # bytes; PyTorch's allocator hands out multiples of it
_aten = torch.ops.aten
# by CUDA's autocast: computed in the lower precision, in float32, in the widest type among the inputs
_LOWER = (
    *("conv3d", "conv_transpose3d.input", "convolution", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm"),
    *("einsum", "scaled_dot_product_attention"),
)
_FULL = (
    *("layer_norm", "native_layer_norm", "group_norm", "softmax.int", "log_softmax.int", "nll_loss", "nll_loss_nd"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "cosine_similarity", "logsumexp"),
    *("exp", "log", "log1p", "rsqrt", "reciprocal", "softplus", "pow.Tensor_Scalar", "pow.Tensor_Tensor"),
    *("pow.Scalar", "sum", "sum.dim_IntList", "prod", "cumsum", "linalg_vector_norm", "norm.Scalar"),
    *("upsample_trilinear3d", "upsample_trilinear3d.vec", "upsample_nearest3d", "upsample_nearest3d.vec"),
)
_WIDEST = ("addcdiv", "addcmul", "cat", "dot", "grid_sampler", "index_put", "scatter_add", "stack")
_FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
_registered: list[torch.library.Library] = []


class SynchronisationError(RuntimeError):
    """A value on the device was asked for, which makes the host wait for a GPU."""


class _Backend:
    """What PyTorch asks of the module of a device."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def device(index: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def prepare() -> torch.device:
    """Make the device known to PyTorch in this process, once, and return it."""
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
        library: Any = torch.library.Library  # which has no types
        casts, attention, rest = library("aten", "IMPL"), library("aten", "IMPL"), library("_", "IMPL")
        for names, rule in ((_LOWER, _lower), (_FULL, _full), (_WIDEST, _widest)):
            for name in names:
                casts.impl(name, _autocast(name, rule), "AutocastPrivateUse1")
        for key in ("AutogradPrivateUse1", "PrivateUse1"):
            attention.impl("scaled_dot_product_attention", _attention, key)
        rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        _registered.extend([casts, attention, rest])
    return torch.device(NAME)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Make networks of fake tensors: what they would start with is not drawn, since some read what they have drawn."""
    starts = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with contextlib.ExitStack() as stack:
        for name in starts:
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        # a teacher is a copy, and a copied tensor would be of a mode of its own
        stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True))
        yield


def _floats(values: Any) -> list[Tensor]:
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.dtype in kinds]


def _lower(values: Any) -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def _full(values: Any) -> torch.dtype:
    return torch.float32


def _widest(values: Any) -> torch.dtype | None:
    found = {t.dtype for t in _floats(values)}
    return found.pop() if len(found) == 1 else torch.float32 if found else None


def _autocast(name: str, rule: Callable[[Any], torch.dtype | None]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    function = getattr(getattr(_aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, "AutocastPrivateUse1"))  # noqa: B009 (not in the stubs)

    def cast_and_call(*args: Any, **kwargs: Any) -> Any:
        dtype = rule((args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(key):
            if dtype is not None:
                floats = {id(t) for t in _floats((args, kwargs))}
                args, kwargs = tree_map(lambda v: v.to(dtype) if id(v) in floats else v, (args, kwargs))
            return function(*args, **kwargs)

    return cast_and_call


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Keep what a GPU's fused attention keeps; the plain one would hold a number for each pair of tokens."""
    out: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out


class _Generator(torch.Generator):
    """A stream of the CPU where one of the stand-in is asked for; nothing is drawn from it there."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        where = "cpu" if torch.device(device).type == NAME else device
        return super().__new__(cls, where)  # type: ignore[call-arg]


class _Autocast(torch.autocast):
    """MONAI's trainer names CUDA."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(NAME if device_type == "cuda" else device_type, *args, **kwargs)


class StandIn(TorchDispatchMode):
    """Within it the device can be used; what is held there and computed is counted.

    Args:
        strict: raise also where the host waits for a copy, as it does without ``non_blocking=True``.

    Attributes:
        held: bytes of each of :data:`PARTS` now.
        peak: the same at the moment when their sum was highest.
        highest: highest sum of activations and temporaries at any moment.
        flops: floating-point operations of convolutions, matrix products and attention, two for each multiply-add.
        phase: which part new tensors belong to.
    """

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.strict = prepare(), strict
        self.phase = "temporaries"
        self.held = dict.fromkeys(PARTS, 0)
        self.peak = dict(self.held)
        self.highest = self.flops = 0
        self._storages: dict[int, list[Any]] = {}  # of each living storage: part, bytes and weak reference
        self._fake = FakeTensorMode()
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> StandIn:
        self._patches.enter_context(mock.patch.object(torch, "Generator", _Generator))
        self._patches.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Make networks on the device; what they would start with is not drawn."""
        with undrawn(), self.as_part("weights"), self.device:
            yield

    @contextlib.contextmanager
    def as_part(self, part: str) -> Iterator[None]:
        """Count new tensors as one of :data:`PARTS`."""
        before, self.phase = self.phase, part
        try:
            yield
        finally:
            self.phase = before

    def assign(self, tensor: Tensor | None, part: str) -> None:
        """Count a tensor that there is as another part."""
        if isinstance(tensor, FakeTensor) and (found := self._storages.get(id(tensor.untyped_storage()))):
            self.held[found[0]] -= found[1]
            self.held[part] += found[1]
            found[0] = part

    def forget(self) -> None:
        """Begin to look for peaks, and to count operations, anew."""
        self.peak, self.flops = dict(self.held), 0
        self.highest = self.held["activations"] + self.held["temporaries"]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        here = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if not here and not any(isinstance(leaf, torch.device) and leaf.type == NAME for leaf in leaves):
            return func(*args, **kwargs)
        if self.strict:
            _check_copy(func, args, kwargs)
        if any(isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) for leaf in leaves):
            args, kwargs = tree_map(self._without_values, (args, kwargs))
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise SynchronisationError(f"{func} reads a value of the device") from error
        if not isinstance(out, torch.device):
            self._count(func, args, kwargs, out)
        return out

    def _without_values(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._fake.from_tensor(value) if real else value

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        packet = func._overloadpacket
        formula = flop_registry.get(_FLOPS.get(packet, packet))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == NAME:
                self._hold(tensor.untyped_storage())

    def _hold(self, storage: torch.UntypedStorage) -> None:
        name = id(storage)
        if name in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._storages[name] = [self.phase, size, weakref.ref(storage, lambda _: self._let_go(name))]
        self.held[self.phase] += size
        if sum(self.held.values()) > sum(self.peak.values()):
            self.peak = dict(self.held)
        self.highest = max(self.highest, self.held["activations"] + self.held["temporaries"])

    def _let_go(self, name: int) -> None:
        part, size, _ = self._storages.pop(name)
        self.held[part] -= size


def _check_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse copies between the CPU and the device for which the host waits."""
    if func is _aten._to_copy.default:
        one, other, waits = args[0], kwargs.get("device"), not kwargs.get("non_blocking", False)
        there = NAME if other is None and isinstance(one, FakeTensor) else torch.device(other or "cpu").type
    elif func is _aten.copy_.default:
        one, waits = args[1], not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        there = args[0].device.type
    else:
        return
    if waits and {one.device.type, there} == {"cpu", NAME} and one.numel():
        raise SynchronisationError(
            f"{func} of {tuple(one.shape)} from {one.device.type} to {there} makes the host wait"
        )
