# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which setting of a config fits the memory of a GPU, at the batch that one optimizer step is of.

Tried are the parts in which a batch is computed, the config's own and more, and what is computed again in the backward
pass; of those that fit, the one with the fewest multiply-adds, then the fewest parts. Only where none fits the crops
become smaller, in steps of 32 voxels, which is another recipe than the published one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...networks.blocks.recompute import MODES, mode_of
from .parts import number_of_parts
from .step import Step, inference_step, training_step

__all__ = ["GIB", "LEFT_OUT", "Fit", "Fits", "needed_gib", "override", "recomputations", "side_name"]

GIB = 2**30
MARGIN_SHARE, MARGIN_GIB = 0.08, 1.0
LEFT_OUT = (
    "Not counted are what PyTorch's allocator keeps in pieces too small, work space of cuDNN, and the CUDA context "
    f"with its kernels: {100 * MARGIN_SHARE:.0f} % and {MARGIN_GIB:.0f} GiB are added for them."
)
_GRANULE, _LEAST = 32, 64  # voxels of a crop's side
_ALIKE = 1.05  # of the fewest multiply-adds, which count as as few


def needed_gib(step: Step) -> float:
    """Return the memory that a GPU should have for a step, with the margin for what is not counted."""
    return step.peak / GIB * (1 + MARGIN_SHARE) + MARGIN_GIB


def override(changes: Mapping[str, Any]) -> str:
    """Return settings as a command line has them.

    Example:
        >>> override({"accumulation_steps": 4, "checkpointing": "full", "patch_size": [96, 96, 96]})
        "--accumulation_steps 4 --checkpointing full --patch_size '[96, 96, 96]'"
    """
    words = []
    for name, value in changes.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words.append(f"--{name} {text!r}" if " " in text else f"--{name} {text}")
    return " ".join(words)


def recomputations(content: Mapping[str, Any]) -> list[str]:
    """Return the values to try of a config's ``checkpointing``: its own first, then what holds less than ``none``.

    Example:
        >>> recomputations({"checkpointing": "selective"}), recomputations({"checkpointing": False})
        (['selective', 'full'], ['none', 'selective', 'full'])
    """
    own = mode_of(content.get("checkpointing"))
    return [own, *(mode for mode in MODES if mode not in (own, "none"))]


def side_name(content: Mapping[str, Any]) -> str:
    """Return what a config calls the sides of what its network gets."""
    return "patch_size" if "patch_size" in content else "input_size"


@dataclass(frozen=True)
class Fit:
    """A setting that fits: what of the config it changes, and its step."""

    changes: dict[str, Any]
    step: Step


@dataclass
class Fits:
    """Looks for settings of one config; what was computed for one GPU is kept for the next.

    Args:
        content: of the config, complete and not resolved, overrides included.
        processes: that share the batch.
    """

    content: Mapping[str, Any]
    processes: int = 1
    _steps: dict[str, Step | None] = field(default_factory=dict)

    def step(self, **changes: Any) -> Step:
        """Return the step of the config with some settings changed."""
        found = self._step(changes)
        assert found is not None
        return found

    def within(self, gib: float) -> Fit | None:
        """Return the setting for a GPU of so much memory, None if there is none.

        Of a config for inference, it is how many tiles go through the network at once, at most eight.
        """
        if not self._trains():
            for count in (8, 4, 2, 1):
                step = self.step(tiles_per_step=count)
                if needed_gib(step) <= gib:
                    return Fit({} if count == self.content["tiles_per_step"] else {"tiles_per_step": count}, step)
            return None
        own = {**self.content, "checkpointing": mode_of(self.content.get("checkpointing"))}
        own["accumulation_steps"] = number_of_parts(self.content)
        for patch in self._patches():
            fits = []
            for order, mode in enumerate(recomputations(self.content)):
                tried = [{**patch, "accumulation_steps": parts, "checkpointing": mode} for parts in self._parts()]
                found = self._fewest(tried, gib, may_fail=bool(patch))
                if found is not None:
                    step = self.step(**tried[found])
                    fits.append((step.multiply_adds, found, order, tried[found], step))
            if fits:
                work = min(each[0] for each in fits)
                *_, changes, step = min((each for each in fits if each[0] <= _ALIKE * work), key=lambda each: each[1:3])
                return Fit({name: value for name, value in changes.items() if value != own.get(name)}, step)
        return None

    def _step(self, changes: Mapping[str, Any], *, may_fail: bool = False) -> Step | None:
        key = json.dumps(changes, sort_keys=True)
        if key not in self._steps:
            content = {**self.content, **changes}
            try:
                trains = self._trains()
                found = training_step(content, processes=self.processes) if trains else inference_step(content)
                self._steps[key] = found
            except (ValueError, RuntimeError):  # a smaller crop that the method cannot use
                if not may_fail:
                    raise
                self._steps[key] = None
        return self._steps[key]

    def _fewest(self, tried: Sequence[Mapping[str, Any]], gib: float, *, may_fail: bool) -> int | None:
        """Return which of the settings, from one part to parts of one sample, is the first that fits.

        Memory grows with the samples of a part by pieces of straight lines, ever steeper: between both ends it is below
        the line that joins them, so that few have to be looked at.
        """
        low = self._needed(tried[-1], may_fail=may_fail)
        if low > gib:
            return None
        high = self._needed(tried[0])
        if high <= gib:
            return 0
        first, most = (each["accumulation_steps"] for each in (tried[0], tried[-1]))
        for index, changes in enumerate(tried[1:], start=1):
            samples = most / changes["accumulation_steps"]
            line = low + (high - low) * (samples - 1) / (most / first - 1)
            if line <= gib and self._needed(changes) <= gib:
                return index
        return len(tried) - 1

    def _needed(self, changes: Mapping[str, Any], *, may_fail: bool = False) -> float:
        """Return the memory for a setting, without end for one that the method cannot use."""
        step = self._step(changes, may_fail=may_fail)
        return math.inf if step is None else needed_gib(step)

    def _trains(self) -> bool:
        return "train" in self.content

    def _parts(self) -> list[int]:
        samples = int(self.content["batch_size"]) // self.processes
        own = min(number_of_parts(self.content), samples)
        return [parts for parts in range(own, samples + 1) if samples % parts == 0]

    def _patches(self) -> Iterator[dict[str, Any]]:
        yield {}
        name = side_name(self.content)
        patch = self.content[name]
        if "crop_size" in self.content or not isinstance(patch, (list, tuple)):
            return  # a region that crops are cut from, whose size decides how many
        for side in range((max(patch) - 1) // _GRANULE * _GRANULE, _LEAST - 1, -_GRANULE):
            yield {name: [min(side, each) for each in patch]}
