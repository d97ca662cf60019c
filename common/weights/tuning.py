# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How much of a pre-trained network is tuned, and how a tuned network is written down.

============= =====================================================  ==============================================
mode          trains in the encoder                                  trains elsewhere (decoder, head)
============= =====================================================  ==============================================
full          everything                                             everything
sawtooth      everything, but not in the first epochs: see           everything
              :class:`common.handlers.FineTuningPhases`
norm          weights and biases of its norms                        everything
lora          adapters of its attention (Primus)                     everything
frozen        nothing; ``linear_probe`` is another name for it       everything
frozen_random nothing, in an encoder as it was drawn: a control      everything
============= =====================================================  ==============================================

LoRA (Hu et al., arXiv:2106.09685) adds to each of the projections query, key, value and output of every attention a
product of two narrow matrices, which starts at zero. The benchmark has one pair for query, key and value together;
here each has its own, since they are layers of their own. After training the product is added to the weight, so the
written model is the plain network.

Pre-training saw one channel. A first layer for several starts as the mean of them; ``norm`` and ``lora`` therefore
train it too, or the channels could never be told apart.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SettingsError

__all__ = ["FROZEN_RANDOM", "TUNINGS", "memory_note", "merged_state_dict", "prepare_tuning"]

FROZEN_RANDOM = "frozen_random"
TUNINGS = ("full", "sawtooth", "norm", "lora", "frozen", "linear_probe", FROZEN_RANDOM)
_PROJECTIONS = r".*\battention\.(query|key|value|output)"
_ADAPTER = "default"
_DEEP = "deep_heads."


def prepare_tuning(
    network: nn.Module,
    mode: str,
    *,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    optimizer_states: int | None = None,
) -> nn.Module:
    """Freeze what a mode does not train, add adapters if it has any, and return the same network.

    Call it after the pre-trained weights are in the network and before the optimizer is built.

    Args:
        network: with an ``encoder``; all else in it is trained in every mode.
        mode: one of the table above.
        rank: of LoRA's matrices.
        alpha: LoRA's product is scaled by ``alpha / rank``.
        dropout: on the input of LoRA's product.
        optimizer_states: numbers that the optimizer keeps for each parameter (AdamW 2, SGD with momentum 1): print
            :func:`memory_note`.

    Raises:
        SettingsError: if the mode is unknown, or the network has no attention for LoRA.

    Example:
        >>> from common.networks import Primus
        >>> network = prepare_tuning(Primus(input_size=16, embed_dim=12, depth=1, num_heads=2), "norm")
        >>> [name for name, p in network.encoder.named_parameters() if p.requires_grad][:2]
        ['transformer.blocks.0.norm1.weight', 'transformer.blocks.0.norm1.bias']
    """
    if mode not in TUNINGS:
        raise SettingsError(f"tuning is {mode!r}; it must be one of {', '.join(TUNINGS)}")
    encoder = network.get_submodule("encoder")
    if mode not in ("full", "sawtooth"):
        encoder.requires_grad_(False)
    if mode == "lora":
        _add_adapters(encoder, rank=rank, alpha=alpha, dropout=dropout)
    elif mode == "norm":
        for module in encoder.modules():
            if isinstance(module, (nn.LayerNorm, nn.InstanceNorm3d, nn.GroupNorm)):
                module.requires_grad_(True)
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv3d))
    if first.in_channels > 1 and mode in ("norm", "lora"):
        first.requires_grad_(True)
    if mode in ("frozen", "linear_probe", FROZEN_RANDOM):
        # whatever trains, a frozen encoder has no stochastic depth and no dropout; a hook, since the trainer switches
        # the whole network to training in every step
        encoder.register_forward_pre_hook(_stay_in_eval)
        if first.in_channels > 1 and mode != FROZEN_RANDOM:
            tqdm.write(
                f"note: tuning {mode} of {first.in_channels} channels sees only their mean, since pre-training had "
                "one; full, norm and lora learn to tell them apart"
            )
    if optimizer_states is not None:
        tqdm.write(f"tuning {mode}: {memory_note(network, optimizer_states)}")
    return network


def _stay_in_eval(module: nn.Module, _: Any) -> None:
    module.eval()


def _add_adapters(encoder: nn.Module, *, rank: int, alpha: float, dropout: float) -> None:
    if not any(re.fullmatch(_PROJECTIONS, name) for name, _ in encoder.named_modules()):
        raise SettingsError(
            "tuning lora adapts attention, and this backbone has none; --tuning norm trains as few parameters in it"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds, so only here
    except ImportError as error:
        raise SettingsError(
            "tuning lora needs the package peft, which is not installed; run: pip install peft==0.21.2"
        ) from error
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=_PROJECTIONS)
    inject_adapter_in_model(config, encoder, adapter_name=_ADAPTER)


def merged_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain network, with adapters, if there are any, added to the weights they adapt, and
    without the heads of deep supervision.

    Example:
        >>> from common.networks import Primus
        >>> plain = Primus(input_size=16, embed_dim=12, depth=1, num_heads=2)
        >>> names = list(plain.state_dict())
        >>> list(merged_state_dict(prepare_tuning(plain, "lora"))) == names
        True
    """
    adapters: dict[str, Any] = {name: m for name, m in network.named_modules() if hasattr(m, "get_delta_weight")}
    weights: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        owner, inside, leaf = key.partition(".base_layer.")
        if inside and owner in adapters:
            with torch.no_grad():
                weights[f"{owner}.{leaf}"] = (
                    value + adapters[owner].get_delta_weight(_ADAPTER) if leaf == "weight" else value
                )
        elif not key.startswith(_DEEP) and not any(key.startswith(f"{name}.lora_") for name in adapters):
            weights[key] = value
    return weights


def memory_note(network: nn.Module, optimizer_states_per_parameter: int) -> str:
    """Say what is trained and what memory weights, gradients and optimizer take, against tuning everything.

    Args:
        network: after :func:`prepare_tuning`.
        optimizer_states_per_parameter: numbers that the optimizer keeps for each parameter: AdamW 2, SGD with
            momentum 1, without 0.

    Example:
        >>> layer = nn.Linear(1000, 1000)
        >>> layer.weight.requires_grad = False
        >>> memory_note(layer, 2)[:77]
        '1,000 of 1,001,000 parameters train (0.0999 %); weights 4 MB + gradients 0 MB'
    """
    everything = sum(p.numel() for p in network.parameters())
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    gradients = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    states = gradients * optimizer_states_per_parameter
    plain = {name: p for name, p in network.named_parameters() if ".lora_" not in name}
    full = sum(p.numel() * p.element_size() for p in plain.values()) * (2 + optimizer_states_per_parameter)
    return (
        f"{trained:,} of {everything:,} parameters train ({100 * trained / everything:.3g} %); "
        f"weights {size / 1e6:.0f} MB + gradients {gradients / 1e6:.0f} MB + optimizer {states / 1e6:.0f} MB = "
        f"{(size + gradients + states) / 1e6:.0f} MB, against {full / 1e6:.0f} MB when all are tuned; activations come "
        "on top"
    )
