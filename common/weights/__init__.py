# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoint import and export, transfer, and the receipt of what was loaded."""

from typing import TYPE_CHECKING

from ..lazy import on_demand

if TYPE_CHECKING:
    from ..files import sha256, write_json
    from .cells import Cell
    from .exchange import import_checkpoint, write_imported_state
    from .export import adaptation_plan, export_checkpoint, export_safetensors
    from .files import read_checkpoint, write_checkpoint
    from .inspection import inspect
    from .nnunet import (
        ModelFolder,
        PlannedConfiguration,
        export_model_folder,
        import_model,
        is_model_folder,
        read_configuration,
        read_model_folder,
    )
    from .origins import Known, Told
    from .published import ImportedWeights, export_network_weights, import_network_weights, load_imported
    from .receipt import Receipt
    from .reference import read_reference
    from .sources import fetch
    from .transfer import (
        differences,
        fine_tuning_network,
        keep_previous,
        model_digests,
        trained_network,
        trained_settings,
        transfer_weights,
    )
    from .tuning import memory_note, merged_state_dict, prepare_tuning

__all__ = [
    "Cell",
    "ImportedWeights",
    "Known",
    "ModelFolder",
    "PlannedConfiguration",
    "Receipt",
    "Told",
    "adaptation_plan",
    "differences",
    "export_checkpoint",
    "export_model_folder",
    "export_network_weights",
    "export_safetensors",
    "fetch",
    "fine_tuning_network",
    "import_checkpoint",
    "import_model",
    "import_network_weights",
    "inspect",
    "is_model_folder",
    "keep_previous",
    "load_imported",
    "memory_note",
    "merged_state_dict",
    "model_digests",
    "prepare_tuning",
    "read_checkpoint",
    "read_configuration",
    "read_model_folder",
    "read_reference",
    "sha256",
    "trained_network",
    "trained_settings",
    "transfer_weights",
    "write_checkpoint",
    "write_imported_state",
    "write_json",
]

__getattr__ = on_demand(globals())
