# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which half of a network learns in which epoch of a fine-tuning."""

from __future__ import annotations

import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..optimizers import FineTuningSchedule

__all__ = ["FineTuningPhases"]


class FineTuningPhases:
    """At the start of every epoch, set the rate and freeze or free the encoder as the schedule says.

    A frozen parameter asks for no gradient: the encoder then keeps no activations, its tensors have no part in the norm
    that is clipped, and no weight decay or momentum moves them. (In the reference the decoder's group holds the encoder
    too, so that nothing is frozen, or its gradients pile up and spoil the clip.) Everything here follows from the
    epoch alone, so that a resumed run is in the right phase.

    Args:
        network: with an ``encoder``; what is frozen for good when this is made stays so.
        optimizer: of all its parameters; it forgets its momentum where the encoder begins to learn.
        schedule: of rates and phases.
        adapted_input: the first layer was made for other channels than the file's, and learns with the decoder.
    """

    def __init__(
        self, network: nn.Module, optimizer: Optimizer, schedule: FineTuningSchedule, *, adapted_input: bool = False
    ) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        first = next(module for module in network.get_submodule("encoder").modules() if isinstance(module, nn.Conv3d))
        kept = {id(parameter) for parameter in first.parameters()} if adapted_input else set()
        self.encoder = [
            parameter
            for name, parameter in network.named_parameters()
            if name.startswith("encoder.") and parameter.requires_grad and id(parameter) not in kept
        ]

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after what restores a run."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the rate and the phase of the epoch that starts."""
        epoch = engine.state.epoch - 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(epoch)
        alone = self.schedule.decoder_only(epoch)
        for parameter in self.encoder:
            parameter.requires_grad_(not alone)
            if alone:
                parameter.grad = None
        if self.schedule.starts_anew(epoch):
            self.optimizer.state.clear()
        if self.main and self.schedule.starts_anew(epoch):
            tqdm.write(f"epoch {epoch + 1}: from here on the encoder learns too")
        elif self.main and epoch == 0 and alone:
            until = min(self.schedule.decoder_epochs, self.schedule.epochs)
            tqdm.write(f"the encoder is frozen until epoch {until} of {self.schedule.epochs}")
