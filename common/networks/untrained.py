# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A network that was not trained to segment knows it, whoever loaded its weights.

A distributed bundle needs a ``models/model.pt`` before anyone has fine-tuned it: a decoder as it was drawn, with a
pre-trained encoder or, to be trained from scratch, one that was drawn too. That file holds one tensor more,
``untrained``. Loading it sets the attribute of that name, loading what training wrote takes it away, and inference asks
for it, so that nobody mistakes noise for a segmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError

__all__ = ["UNTRAINED", "mark_untrained", "refuse_untrained", "watch_untrained"]

UNTRAINED = "untrained"


def mark_untrained(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the tensor that says that its decoder means nothing yet."""
    return {**weights, UNTRAINED: torch.tensor(True)}


def watch_untrained(network: nn.Module) -> None:
    """Give ``network`` the attribute ``untrained``, set whenever weights are loaded into it.

    It is true after loading marked weights, or weights that lack some of the network's parameters, such as an encoder
    alone; false before anything is loaded and after loading complete ones. TorchScript keeps it.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> watch_untrained(network)
        >>> _ = network.load_state_dict(mark_untrained(network.state_dict()))
        >>> network.untrained, sorted(network.state_dict())
        (True, ['bias', 'weight'])
    """
    network.untrained = False  # type: ignore[assignment]
    network.register_load_state_dict_pre_hook(_notice)  # type: ignore[no-untyped-call]


def _notice(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    marked = weights.pop(f"{prefix}{UNTRAINED}", None) is not None
    missing = any(f"{prefix}{name}" not in weights for name, _ in module.named_parameters())
    module.untrained = marked or missing  # type: ignore[assignment]


def refuse_untrained(network: object, file: str = "the model") -> None:
    """Stop before noise is taken for a segmentation.

    Raises:
        WeightsError: if ``network`` says that it is untrained.
    """
    if getattr(network, UNTRAINED, False):
        raise WeightsError(
            f"{file} has not been trained to segment yet: its decoder is random, and its answer would be noise. "
            "Fine-tune it first, with this bundle's train config or Train in MONAI Label"
        )
