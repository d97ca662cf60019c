# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Losses that two or more methods share: ``loss(pred, batch) -> scalar``."""

from .masked_mse import MaskedMSELoss

__all__ = ["MaskedMSELoss"]
