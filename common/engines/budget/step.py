# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What one step of a config holds and computes on a GPU, found out on the stand-in: see :mod:`.standin`.

The step is the config's own: its views, network, loss, optimizer and clip, run by its own trainer. Only the volumes are
made up, and handlers that save, draw and watch are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from ...tasks import ClassificationTask, RegressionTask
from ...views import reading_stream
from ...weights.tuning import prepare_tuning
from .. import inferers
from .standin import NAME, StandIn

__all__ = ["Step", "build", "inference_step", "made_up_cases", "training_step", "tuned"]

_VOLUME = 1.6  # sides of the made-up volumes over those of a crop: 256 for the published 160
_CLIP = "handlers.GradientClip"
_SHARDED = "fully_sharded"


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Attributes:
        weights: bytes of parameters and buffers.
        gradients: bytes.
        optimizer: bytes of its state.
        activations: bytes that the forward pass keeps, at the peak.
        temporaries: bytes of all else at the peak: views, gradients of activations, what is computed again, copies.
        highest: highest sum of activations and temporaries at any moment, which need not be that of the peak.
        multiply_adds: of the step, of convolutions, matrix products and attention.
        read: bytes that the loader reads for it.
        looks: values that the host waits for: in training none, the loss is looked at between steps; in a prediction
            whether the logits of each row of tiles are finite.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    highest: int
    multiply_adds: int
    read: int
    looks: int = 0

    @property
    def peak(self) -> int:
        """Bytes at the moment when most is held."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporaries


def tuned(network: nn.Module, tuning: str, lora_rank: int) -> nn.Module:
    """Return a network of which as much learns as in fine-tuning, without weights from a file."""
    return network if tuning == "full" else prepare_tuning(network, tuning, rank=lora_rank)


def made_up_cases(target: Any, classes: Any, task: str) -> dict[str, Any]:
    """Return the lists of a classification or regression without data: a case with each class, two if none is named."""
    if task == "regression":
        return {"task": RegressionTask(str(target)), "training": [{"target": 0.0}], "validation": []}
    multilabel = isinstance(target, (list, tuple))
    asked = ClassificationTask(tuple(map(str, target if multilabel else classes or "ab")), multilabel)
    values = [[value] * asked.outputs for value in (0, 1)] if multilabel else list(range(asked.outputs))
    return {"task": asked, "training": [{"target": value} for value in values], "validation": []}


class _Phases:
    """Tells the stand-in what new tensors are for, as the trainer goes on after a step that left gradients and state.

    Args:
        device: the stand-in.
        network: that learns.
        optimizer: of it.
        copied: the network is one of several copies, whose gradients lie in buckets that stay.
    """

    def __init__(
        self, device: StandIn, network: nn.Module, optimizer: torch.optim.Optimizer, *, copied: bool = False
    ) -> None:
        self.device = device
        self.buckets: dict[int, Tensor] = {}
        network.register_forward_pre_hook(lambda *_: self._begin("activations"))
        for parameter in (each for each in network.parameters() if each.requires_grad):
            with device.as_part("gradients"):
                parameter.grad = torch.empty_like(parameter)
            if copied:
                self.buckets[id(parameter)] = parameter.grad
            parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
        optimizer.step()  # which makes its state
        for state in optimizer.state.values():
            for value in state.values():
                device.assign(value if isinstance(value, Tensor) else None, "optimizer")
        device.forget()

    def _begin(self, phase: str) -> None:
        self.device.phase = phase

    def _accumulated(self, parameter: Tensor) -> None:
        self.device.assign(parameter.grad, "gradients")
        parameter.grad = self.buckets.get(id(parameter), parameter.grad)

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        for event in (Events.ITERATION_STARTED, IterationEvents.LOSS_COMPLETED):
            engine.add_event_handler(event, lambda _: self._begin("temporaries"))


def build(content: Mapping[str, Any], device: StandIn, made_up: Mapping[str, Any]) -> ConfigParser:
    """Return a parser of a config on the stand-in, its network built.

    Args:
        content: complete and not resolved, overrides included.
        device: the stand-in, entered.
        made_up: what the trainer gets instead of what would need data, when it is asked for.
    """
    changed = {name: value for name, value in content.items() if name not in ("initialize", "run", "validate")}
    changed["device"] = f"$torch.device('{NAME}')"
    name = next(each for each in ("local_network", "method", "network_def") if each in changed)
    changed["network"] = f"@{name}"  # made where it is needed
    if "table" in changed:  # of classes of whole volumes
        names = {"target": "@target", "classes": "@classes", "task": "@task"}
        changed["lists"] = {"_target_": f"{__name__}.made_up_cases", **names}
    if name == "local_network":  # which would read weights
        changed["local_network"] = {
            "_target_": f"{__name__}.tuned",
            "network": "@network_def",
            "tuning": changed.get("tuning", "full"),
            "lora_rank": changed.get("lora_rank", 8),
        }
    if "train" in changed:
        changed["made_up_trainer"] = _trainer(changed["train"])
    parser = ConfigParser(changed, globals={"torch": torch, "made_up": made_up})
    with device.building():
        parser.get_parsed_content(name)
    return parser


def _regions(parser: ConfigParser, device: StandIn, samples: int, parts: int) -> tuple[dict[str, Any], int]:
    """Return what the loader gives for a part of a batch, and the bytes that it reads for all of them."""
    supervised, cases = "local_network" in parser.get(), "table" in parser.get()
    spatial = parser.get_parsed_content("spatial")
    volumes = 1 if supervised else int(parser.get_parsed_content("volumes_per_sample"))
    channels = [int(parser.get_parsed_content("channels"))] if supervised else []
    resized = cases and parser.get_parsed_content("fit") == "resize"
    shape = [int(side * (1 if resized else _VOLUME)) for side in spatial.patch_size]
    masks = ["label_region"] if supervised and not cases else []
    masks += ["anonymised"] if not supervised and parser.get_parsed_content("read_anonymised") else []
    batch: dict[str, Any] = {"key": [], "spatial": [], **{name: [] for name in ("region", *masks)}}
    read = 0
    for index in range(samples * parts):
        rng = reading_stream((0, 1, index))
        for _ in range(volumes):
            draw = spatial.draw(rng, shape)
            sides = [stop - start for start, stop in zip(draw.start, draw.stop, strict=True)]
            read += math.prod(sides) * (2 * math.prod(channels) + len(masks))
            if index < samples:
                batch["spatial"].append(draw)
                batch["region"].append(torch.empty([*channels, *sides], dtype=torch.float16, device=device.device))
                for name in masks:
                    batch[name].append(torch.empty(sides, dtype=torch.uint8, device=device.device))
    batch["key"] = [(0, 1, index) for index in range(samples)]
    if cases:
        listed = parser.get_parsed_content("lists")["training"]
        batch["target"] = [listed[index % len(listed)]["target"] for index in range(samples)]
    return batch, read


def training_step(
    content: Mapping[str, Any], *, processes: int = 1, like_cuda: bool = True, strict: bool = False
) -> Step:
    """Run an optimizer step of a config for training on the stand-in, with what an earlier one has left there.

    Args:
        content: of the config, complete and not resolved, overrides included.
        processes: that share the batch, each with a copy of the network, or with a share of it where the config's
            network says so.
        like_cuda: the optimizer takes all parameters at once, as it does on a GPU; else one after the other.
        strict: the host must not wait for a copy either.

    Raises:
        SynchronisationError: if a value of the device is read.
    """
    made_up: dict[str, Any] = {}
    own = content.get("network")  # what a run over several processes wraps it in
    sharded = isinstance(own, Mapping) and str(own.get("_target_")).endswith(_SHARDED)
    with StandIn(strict=strict) as device:
        parser = build(content, device, made_up)
        parts = int(parser.get_parsed_content("train#trainer#accumulation_steps"))
        samples = max(int(parser.get_parsed_content("batch_size")) // processes // parts, 1)
        batch, read = _regions(parser, device, samples, parts)
        network, optimizer = parser.get_parsed_content("network"), parser.get_parsed_content("optimizer")
        for group in optimizer.param_groups:
            if group.get("foreach") is None and not group.get("fused"):
                group["foreach"] = like_cuda
        few = min(parts, 2)  # the first makes the gradients, and all others are like the second
        phases = _Phases(device, network, optimizer, copied=processes > 1 and not sharded)
        made_up |= {"batches": [batch] * few, "parts": few, "phases": phases}
        parser.get_parsed_content("made_up_trainer").run()
        made = device.flops // 2 * parts // few
        step = Step(**device.peak, highest=device.highest, multiply_adds=made, read=read)
    if sharded:
        held = {name: getattr(step, name) // processes for name in ("weights", "gradients", "optimizer")}
        step = replace(step, **held)
    return step


def _trainer(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's own trainer with made-up batches, and of its handlers the one that clips."""
    clips = [each for each in content["handlers"] if str(each.get("_target_", "")).endswith(_CLIP)]
    return {
        **content["trainer"],
        "train_data_loader": "$made_up['batches']",
        "train_handlers": ["$made_up['phases']", *clips],
        "accumulation_steps": "$made_up['parts']",
        "max_epochs": 1,
    }


def inference_step(content: Mapping[str, Any], *, strict: bool = False) -> Step:
    """Predict a volume of one tile on the stand-in, with the config's own network and inferer.

    A larger volume needs room for its voxels and the sums of a row of tiles besides, these on the device or, where they
    take more than half of what is free there, on the CPU.

    Args:
        content: of the config, complete and not resolved, overrides included.
        strict: the host must not wait for a copy either.

    Raises:
        SynchronisationError: if a value of the device is read, but for the look whether a row is finite.
    """
    with StandIn(strict=strict) as device, mock.patch.object(inferers, "all_finite", return_value=True) as looks:
        parser = build({**content, "accumulate_on": "device"}, device, {})
        network, window = parser.get_parsed_content("network"), parser.get_parsed_content("inferer")
        tiles = [1, int(parser.get_parsed_content("channels")), *window.roi_size]
        tiles[-1] += (window.sw_batch_size - 1) * tiles[-1] // 2  # as many tiles as go through the network at once
        volume = torch.empty(tiles, device=device.device)
        device.forget()
        amp = bool(parser.get_parsed_content("amp"))
        with device.as_part("activations"), torch.autocast(NAME, _lower(parser), enabled=amp), torch.no_grad():
            network.eval()
            window(volume, lambda image: network(image))
        made = device.flops // 2 // window.sw_batch_size
        return Step(**device.peak, highest=device.highest, multiply_adds=made, read=0, looks=looks.call_count)


def _lower(parser: ConfigParser) -> torch.dtype:
    return getattr(torch, str(parser.get("amp_dtype", "float16")))  # type: ignore[no-any-return]
