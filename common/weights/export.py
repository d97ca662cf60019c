# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Weights of this project, written for the reference's downstream code or as safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from ..files import sha256, write_json, write_record
from ..paths import as_path
from .cells import OWN_TRAINER, Cell, backbone_of, describe, paper_of
from .files import check_values, read_checkpoint, write_checkpoint, write_safetensors
from .published import export_network_weights
from .receipt import Receipt
from .reference import PLAN_FILE
from .transfer import keep_previous, origin_receipt

__all__ = ["IMPORTED", "adaptation_plan", "export_checkpoint", "export_safetensors", "resenc_arguments"]

IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")  # arguments of a residual U-Net that are names of classes
_PRIMUS_NAMES = {(396, 12): "PrimusS", (792, 12): "PrimusB", (864, 16): "PrimusM", (1056, 24): "PrimusL"}


def adaptation_plan(cell: Cell, weights: Mapping[str, Tensor], receipt: Receipt) -> tuple[dict[str, Any], list[str]]:
    """Return the plan by which the reference's downstream code builds and fills its network, and what to know of it.

    Args:
        cell: the bundle.
        weights: of its backbone, under this project's names.
        receipt: of the weights.
    """
    notes: list[str] = []
    primus = cell.num_heads is not None
    wrapper = "encoder." if primus and _wrapped(cell.bundle) else ""
    spacing = receipt.spacing_mm if receipt.spacing_mm is not None else cell.spacing_mm
    spacing = [spacing] * 3 if isinstance(spacing, (int, float)) else spacing
    patch = list(receipt.patch_size or cell.patch_size)
    if primus:
        table = weights["encoder.transformer.position_embedding"]
        token = weights["encoder.patch_embedding.weight"].shape[2:]
        patch = [side * edge for side, edge in zip(table.shape[2:], token, strict=True)]
        depth = 1 + max(int(name.split(".")[3]) for name in weights if name.startswith("encoder.transformer.blocks."))
        architecture = _PRIMUS_NAMES.get((table.shape[1], depth))
        arguments = None
        if architecture is None:
            architecture = "Primus"
            arguments = {"embed_dim": table.shape[1], "eva_depth": depth, "eva_numheads": cell.num_heads}
            notes.append("the reference has no name for this size of Primus; its downstream code will not build it")
    else:
        architecture, arguments = _resenc(weights)
    plan = {
        "architecture_plans": {
            "arch_class_name": architecture,
            "arch_kwargs": arguments,
            "arch_kwargs_requiring_import": list(IMPORTED) if architecture == "ResidualEncoderUNet" else None,
        },
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind" if receipt.revision else "unknown",
            "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": [1, 1, 1],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {
                "onemmiso": {
                    "data_identifier": "nnsslPlans_onemmiso",
                    "preprocessor_name": "DefaultPreprocessor",
                    "spacing_style": "onemmiso",
                    "normalization_schemes": ["ZScoreNormalization"],
                    "use_mask_for_norm": [False],
                    "resampling_fn_data": "resample_data_or_seg_to_shape",
                    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
                    "resampling_fn_mask": "resample_data_or_seg_to_shape",
                    "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
                    "spacing": spacing,
                    "patch_size": patch,
                }
            },
            "experiment_planner_used": "FixedResEncUNetPlanner",
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": f"{wrapper}eva" if primus else "encoder.stages",
        "key_to_stem": f"{wrapper}down_projection" if primus else "encoder.stem",
        "keys_to_in_proj": (
            [f"{wrapper}down_projection.proj"]
            if primus
            else ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"]
        ),
        "key_to_lpe": f"{wrapper}eva.pos_embed" if primus else None,
    }
    if primus:
        plan["token_order"] = "straight"  # first spatial axis slowest
    return plan, notes


def _wrapped(bundle: str) -> bool:
    return bundle.startswith(("voco", "simclr", "swinunetr"))


def _resenc(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any] | None]:
    """Return the reference's name of a residual U-Net of this size, and the arguments if it has no name of its own."""
    features: dict[int, int] = {}
    blocks: dict[int, int] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"encoder\.stages\.(\d+)\.(\d+)\.conv2\.conv\.weight", name)
        if match:
            stage = int(match[1])
            features[stage] = value.shape[0]
            blocks[stage] = max(blocks.get(stage, 0), int(match[2]) + 1)
    if [*features.values()] == [32, 64, 128, 256, 320, 320] and [*blocks.values()] == [1, 3, 4, 6, 6, 6]:
        return "ResEncL", None
    return "ResidualEncoderUNet", resenc_arguments([*features.values()], [*blocks.values()])


def resenc_arguments(features: Sequence[int], blocks: Sequence[int]) -> dict[str, Any]:
    """Return the arguments with which the reference builds a residual U-Net like those of this collection.

    Args:
        features: channels of each stage.
        blocks: residual blocks of each stage.
    """
    stages = len(features)
    return {
        "n_stages": stages,
        "features_per_stage": list(features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
        "n_blocks_per_stage": list(blocks),
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def export_checkpoint(source: str | Path, cell: Cell, *, output: str | Path) -> Receipt:
    """Write a checkpoint, and its adaptation plan beside it, that the reference's downstream code reads.

    Args:
        source: flat state dict of the bundle's backbone, or a pre-training state with the whole method.
        cell: the bundle.
        output: checkpoint to write; ``adaptation_plan.json`` goes beside it.

    Returns:
        the receipt, which is also written beside the checkpoint.

    Raises:
        WeightsError: if the source cannot be read or is not of this bundle.
    """
    output = as_path(output)
    receipt, backbone, method = _read_own(source, cell)
    paper = paper_of(cell.bundle)
    left = [name for name in method if paper is not None and name.startswith(paper.ours)]
    method = {name: value for name, value in method.items() if name not in left}
    if left:
        receipt.notes.append(
            f"{len(left)} tensors of the pre-training alone have no place in the reference's network and are left out: "
            + ", ".join(sorted({name.partition(".")[0] for name in left}))
        )
    wrapped = cell.num_heads is not None and _wrapped(cell.bundle)
    weights = export_network_weights(backbone, method, wrapped=wrapped)
    spark = {name: weights.pop(name) for name in list(weights) if name.startswith(("mask_tokens.", "densify_projs."))}
    plan, notes = adaptation_plan(cell, backbone, receipt)
    receipt.notes += notes
    own = receipt.method == describe(cell.bundle)[0]  # else it was imported, and is of no method of this collection
    trainer = f"{OWN_TRAINER}/{cell.bundle if own else backbone_of(cell.bundle)}"
    content: dict[str, Any] = {
        "network_weights": weights,
        "nnssl_adaptation_plan": plan,
        "trainer_name": trainer,
        "citations": [{"type": "Pretraining", "name": receipt.method, "apa_citations": receipt.citation}],
    }
    if spark:
        content["spark_weights"] = spark
    for file in (output, output.with_name(PLAN_FILE)):
        keep_previous(str(file))
    write_checkpoint(content, output)
    write_json(plan | {"trainer_name": trainer}, output.with_name(PLAN_FILE))
    about = receipt.as_dict() | {"made_by": "export for the reference", "source_sha256": receipt.sha256}
    write_record(about | {"sha256": sha256(output)}, output.with_suffix(".json"))
    return receipt


def export_safetensors(source: str | Path, cell: Cell, *, output: str | Path) -> Receipt:
    """Write a bundle's backbone under this project's names as safetensors, with its receipt as metadata.

    Raises:
        WeightsError: if the source cannot be read or is not of this bundle.
    """
    receipt, backbone, _ = _read_own(source, cell)
    keep_previous(str(output))
    settings = receipt.provenance.get("settings", {"bundle": cell.bundle})
    about = receipt.as_dict() | {"settings": settings}
    del about["provenance"]
    write_safetensors(backbone, output, receipt=about)
    return receipt


def _read_own(source: str | Path, cell: Cell) -> tuple[Receipt, dict[str, Tensor], dict[str, Tensor]]:
    """Read an encoder file or a pre-training state of a bundle.

    Returns:
        receipt, tensors of the backbone, and those of the method alone (empty for an encoder file).

    Raises:
        WeightsError: if the file is of another network.
    """
    content = read_checkpoint(source, mmap=True)
    receipt = origin_receipt(source)
    method: dict[str, Tensor] = {}
    backbone = content
    if "method" in content and isinstance(content["method"], dict):
        settings = content.get("settings", {})
        receipt.method, receipt.backbone, receipt.citation = describe(str(settings.get("bundle", cell.bundle)))
        receipt.spacing_mm = settings.get("spacing_mm")
        whole = content["method"]
        backbone = {key.removeprefix("backbone."): value for key, value in whole.items() if key.startswith("backbone.")}
        method = {key: value for key, value in whole.items() if not key.startswith(("backbone.", "teacher."))}
    check_values(backbone, source)
    if receipt.method == "unknown" and "method" not in receipt.provenance:
        receipt.method, receipt.backbone, receipt.citation = describe(cell.bundle)
    state = cell.backbone.state_dict()
    wrong = [
        f"{name} is {list(value.shape)} in the file"
        for name, value in backbone.items()
        if name not in state or (state[name].shape != value.shape and not name.endswith("position_embedding"))
    ]
    wrong += [f"{name} is missing" for name in state if name.startswith("encoder.") and name not in backbone]
    if wrong:
        raise WeightsError(
            f"{source} is not of {cell.bundle} as configured ({'; '.join(wrong[:3])}); "
            "give the network settings it was made with"
        )
    receipt.taken = list(backbone)
    receipt.parameters = {"taken": sum(value.numel() for value in backbone.values())}
    receipt.missing = [name for name in state if name not in backbone]
    receipt.encoder_share = 1.0
    return receipt, backbone, method
