# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoint import, transfer, and the receipt of what was loaded."""

from .files import read_checkpoint, sha256, write_checkpoint, write_json
from .published import ImportedWeights, import_network_weights, load_imported
from .transfer import Receipt, fine_tuning_network, keep_previous, trained_network, transfer_weights

__all__ = [
    "ImportedWeights",
    "Receipt",
    "fine_tuning_network",
    "import_network_weights",
    "keep_previous",
    "load_imported",
    "read_checkpoint",
    "sha256",
    "trained_network",
    "transfer_weights",
    "write_checkpoint",
    "write_json",
]
