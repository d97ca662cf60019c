# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a training step holds at its worst moment, besides weights, gradients and optimizer; nothing is allocated.

The step runs on tensors that have a shape and no values. Every block of memory that one of its operations makes is
counted from then until it is let go of, so that the highest sum at any moment is known, and what it was made of.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.bundles import read_config
from common.engines.budget.standin import undrawn
from common.views import VisibleBlocks, draw_hidden_blocks

__all__ = ["Held", "StepMemory", "cell_step", "local_side", "step_memory"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    """States that stay from step to step."""
    highest: int
    """Highest sum of activations and temporaries at any moment."""
    phase: str
    """Forward, loss, backward or optimizer: when that was."""
    parts: tuple[tuple[str, int], ...]
    """What it was made of, largest first: type, shape and operation, and the bytes of all that are alike."""


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes that operations made and that are still alive.

    Args:
        stop_at: take down what is alive when this sum is first reached.
    """

    def __init__(self, *, stop_at: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.highest = 0
        self.phase = self.at = "forward"
        self.parts: Counter[str] = Counter()
        self.stop_at = stop_at
        self._alive: dict[int, tuple[int, str, weakref.ref[Any]]] = {}

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor (any more)."""
        self._forget(id(tensor.untyped_storage()))

    def exempt(self, tensor: Tensor) -> None:
        """Never count a tensor that there is already."""
        storage = tensor.untyped_storage()
        self._alive[id(storage)] = (0, "", weakref.ref(storage, self._forgetter(id(storage))))

    def _forgetter(self, key: int) -> Callable[[Any], None]:
        return lambda _: self._forget(key)

    def _forget(self, key: int) -> None:
        size, _, _ = self._alive.pop(key, (0, "", None))
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._alive:
                name = f"{str(tensor.dtype)[6:]}{list(tensor.shape)} {func.__name__.split('.')[0]}"
                key = id(storage)
                self._alive[key] = (storage.nbytes(), name, weakref.ref(storage, self._forgetter(key)))
                self.now += storage.nbytes()
        if self.now > self.highest:
            self.highest, self.at = self.now, self.phase
        if self.stop_at is not None and self.now >= self.stop_at and not self.parts:
            for size, name, _ in self._alive.values():
                self.parts[name] += size
        return out


@dataclass
class Step:
    """The parts of a training step of a bundle, without values."""

    network: nn.Module
    loss: Callable[[Any, Any], Tensor]
    optimizer: torch.optim.Optimizer
    inputs: Any
    target: Any
    dtype: torch.dtype | None

    def run(self, held: Held) -> None:
        """Take one step as the trainer does."""
        device = next(self.network.parameters()).device.type
        with torch.autocast(device, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            held.phase = "forward"
            pred = self.network(self.inputs)
            held.phase = "loss"
            loss = self.loss(pred, self.target)
        del pred
        held.phase = "backward"
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        held.phase = "optimizer"
        torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()


def cell_step(
    cell: str,
    workflow: str = "pretrain",
    *,
    patch_size: int | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Step:
    """Make the training step of a bundle, without values; call it, and what it returns, within ``FakeTensorMode``.

    Args:
        cell: name of the bundle.
        workflow: ``pretrain`` or ``train``: which of its configs.
        patch_size: side of the crops; crops of a larger region become fewer instead, as few as the method takes. None
            as published.
        batch_size: None as published.
        dtype: of autocast; None is float32 throughout.
        settings: of the config.
    """
    content = read_config(os.path.join("bundles", cell, "configs", f"{workflow}.yaml"))
    for section in ("train", "validate", "run", "initialize"):
        content.pop(section, None)
    if batch_size is not None:
        content["batch_size"] = batch_size
    content["network"] = "@method" if workflow == "pretrain" else "@network_def"
    if patch_size is not None:
        content |= _small(content, patch_size) if "crop_size" in content else {"patch_size": [patch_size] * 3}
    config = ConfigParser({**content, **settings})
    with undrawn():
        network = config.get_parsed_content("network").train()
    views = _views(config, cell.split("_")[0], workflow)
    inputs, target = (views["image"], views["label"]) if workflow != "pretrain" else (views, views)
    optimizer = config.get_parsed_content("optimizer")
    return Step(network, config.get_parsed_content("loss"), optimizer, inputs, target, dtype)


def _small(content: dict[str, Any], side: int) -> dict[str, Any]:
    side = min(side, content["crop_size"])
    if "local_size" in content:
        return {"crop_size": side, "local_size": local_side(content, side), "local_crops": 2}
    return {"crop_size": side, **({"grid": [2, 1, 1], "targets": 1} if "grid" in content else {"pairs": 1})}


def local_side(content: Mapping[str, Any], side: int) -> int:
    """Return the side of small crops beside large ones of ``side``: as published beside published ones, else half."""
    return content["local_size"] if side == content["crop_size"] else side // 2


def _views(config: ConfigParser, method: str, workflow: str) -> dict[str, Any]:
    """Return what the views of a bundle make, without values."""
    batch: int = config.get_parsed_content("batch_size")
    size: list[int] = list(config.get_parsed_content("patch_size"))
    image = torch.empty(batch, 1, *size)
    if workflow == "train":
        return {"image": image, "label": torch.empty(batch, 1, *size, dtype=torch.uint8)}
    if "local_size" in config.config:
        side, small = (config.get_parsed_content(name) for name in ("crop_size", "local_size"))
        block = config.get_parsed_content("block_size" if "block_size" in config.config else "token_size")
        hidden = torch.empty(batch, *[side // block] * 3, dtype=torch.bool)
        share = sum(config.get_parsed_content("hidden_ratio")) / 2
        return {
            "globals": torch.empty(batch, 2, 1, side, side, side),
            "locals": torch.empty(batch, config.get_parsed_content("local_crops"), 1, small, small, small),
            "hidden": hidden,
            "places": torch.empty(batch, int(share * hidden[0].numel()), dtype=torch.long),
            "progress": 0.0,
        }
    if "hidden_ratio" in config.config:
        ratio = config.get_parsed_content("hidden_ratio")
        share = ratio if isinstance(ratio, (int, float)) else min(ratio)  # which computes most
        names = [name for name in ("block_size", "token_size") if name in config.config]
        grid = [side // config.get_parsed_content(names[0]) for side in size]
        hidden = torch.empty(batch, *grid, dtype=torch.bool)
        made: dict[str, Any] = {"image": image, "hidden": hidden}
        blocks = _blocks(batch, grid, share)
        if "box_share" in config.config:
            seen, all_blocks = blocks.counts[0], hidden[0].numel()
            made |= {"places": torch.empty(batch, all_blocks - seen, dtype=torch.long), "progress": 0.0, "seed": 0}
            made["seen"] = torch.empty(batch, seen, dtype=torch.long)
        return {**made, "visible_count": blocks.counts[0], **({"blocks": blocks} if "block_size" in names else {})}
    if method == "models":
        return {"image": image, "target": torch.empty_like(image)}
    if method == "volumefusion":
        return {"image": image, "share": torch.empty(batch, *size, dtype=torch.long)}
    if method == "swinunetr":
        pair = torch.empty(2 * batch, 1, *size)
        return {"image": pair, "target": torch.empty_like(pair), "rotation": torch.empty(2 * batch, dtype=torch.long)}
    side = config.get_parsed_content("crop_size")
    if method == "simclr":
        pairs = batch * config.get_parsed_content("pairs")
        return {"crops": torch.empty(2 * pairs, 1, side, side, side), "overlap": torch.empty(pairs, pairs)}
    grid, targets = config.get_parsed_content("grid"), config.get_parsed_content("targets")
    near = grid[0] * grid[1] * grid[2]
    crops = torch.empty(batch * (near + targets), 1, side, side, side)
    return {"crops": crops, "overlap": torch.empty(batch, targets, near)}


def _blocks(samples: int, grid: Sequence[int], share: float) -> VisibleBlocks:
    """Return what the host knows of a drawn mask, with tables that have no values."""
    with unset_fake_temporarily():  # type: ignore[no-untyped-call]
        generator = torch.Generator().manual_seed(0)
        drawn = VisibleBlocks.of(~torch.stack([draw_hidden_blocks(grid, share, generator) for _ in range(samples)]))
    where, neighbours = (torch.empty(t.shape, dtype=torch.long) for t in (drawn.where, drawn.neighbours))
    return VisibleBlocks(drawn.grid, drawn.counts, where, neighbours, drawn.pairs)


def step_memory(cell: str, workflow: str = "pretrain", *, composition: bool = False, **how: Any) -> StepMemory:
    """Measure the second training step of a bundle, when the optimizer has its states.

    Args:
        cell: name of the bundle.
        workflow: ``pretrain`` or ``train``.
        composition: tell also what the worst moment is made of.
        how: size, batch, precision and settings, as :func:`cell_step` takes them.
    """
    with FakeTensorMode():
        step = cell_step(cell, workflow, **how)
        step.run(Held())
        held = _measure(step)
        parts = _measure(step, stop_at=held.highest).parts if composition else Counter()
        kept = [*step.network.parameters(), *step.network.buffers()]
        states = [value for each in step.optimizer.state.values() for value in each.values()]
        return StepMemory(
            weights=sum(t.nbytes for t in kept),
            gradients=sum(p.nbytes for p in step.network.parameters() if p.requires_grad),
            optimizer=sum(t.nbytes for t in states if isinstance(t, Tensor)),
            highest=held.highest,
            phase=held.at,
            parts=tuple(parts.most_common()),
        )


def _measure(step: Step, stop_at: int | None = None) -> Held:
    held = Held(stop_at=stop_at)
    for tensor in tree_leaves([step.inputs, step.target]):
        if isinstance(tensor, Tensor):
            held.exempt(tensor)
    for tensor in (*step.network.parameters(), *step.network.buffers()):
        held.exempt(tensor)
    for states in step.optimizer.state.values():
        for value in states.values():
            if isinstance(value, Tensor):
                held.exempt(value)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: held.leave_out(p.grad))  # type: ignore[no-untyped-call]
        for parameter in step.network.parameters()
        if parameter.requires_grad
    ]
    with held:
        step.run(held)
    for hook in hooks:
        hook.remove()
    return held
