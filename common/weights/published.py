# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Published OpenMind checkpoints, translated to this project's names, token order and one name per tensor.

What the published files need (facts established on the reference's modules):

* every convolution and norm of ResEnc-L is stored twice or more; only ``all_modules.*`` was trained in all of them;
* ``decoder.encoder.*`` repeats the encoder; four of five segmentation heads were never used;
* Primus was trained with its first two token axes swapped (SimMIM's excepted): the position table is transposed and, in
each
  head's queries and keys, the channels that turn with axis 0 and axis 1 change places. Attention depends on positions
  and on q.k only, so the converted network is exactly equivalent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import WeightsError

__all__ = ["ImportedWeights", "import_network_weights"]

_PRIMUS_HEADS = {396: 6, 792: 12, 864: 12, 1056: 16}

_RESENC = [
    (r"encoder\.stem\.convs\.0\.(.*)", r"encoder.stem.\1"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(conv\d)\.(.*)", r"encoder.stages.\1.\2.\3.\4"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.\d\.(.*)", r"encoder.stages.\1.\2.shortcut.\3"),
    (r"decoder\.stages\.(\d+)\.convs\.0\.(.*)", r"decoder.stages.\1.\2"),
    (r"decoder\.transpconvs\.(\d+)\.(.*)", r"decoder.upsamplings.\1.\2"),
]
_TRANSFORMER = [
    (r"(.*)blocks\.(\d+)\.gamma_([12])", r"\1blocks.\2.scale\3"),
    (r"(.*)attn\.q_proj\.(.*)", r"\1attention.query.\2"),
    (r"(.*)attn\.k_proj\.(.*)", r"\1attention.key.\2"),
    (r"(.*)attn\.v_proj\.(.*)", r"\1attention.value.\2"),
    (r"(.*)attn\.norm\.(.*)", r"\1attention.norm.\2"),
    (r"(.*)attn\.proj\.(.*)", r"\1attention.output.\2"),
    (r"(.*)mlp\.fc1_g\.(.*)", r"\1mlp.gate.\2"),
    (r"(.*)mlp\.fc1_x\.(.*)", r"\1mlp.value.\2"),
    (r"(.*)mlp\.fc2\.(.*)", r"\1mlp.output.\2"),
    (r"(.*)pos_embed", r"\1position_embedding"),
]
_PATCH_DECODER = [
    (r"up_projection\.decode\.(\d)\.0\.(.*)", r"decoder.upsamplings.\1.\2"),
    (r"up_projection\.decode\.(\d)\.1\.(.*)", r"decoder.norms.\1.\2"),
    (r"up_projection\.decode\.(\d)\.(weight|bias)", r"decoder.upsamplings.\1.\2"),
]


@dataclass
class ImportedWeights:
    """Weights of one checkpoint under this project's names.

    Attributes:
        backbone: state dict of the backbone.
        method: what belongs to the pre-training method alone, under the method's names.
        unused: names in the file that nothing here uses, with the reason.
    """

    backbone: dict[str, Tensor]
    method: dict[str, Tensor] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


def import_network_weights(weights: Mapping[str, Tensor], *, token_order: str = "swapped") -> ImportedWeights:
    """Translate ``network_weights`` of a published ResEnc-L or Primus checkpoint.

    Args:
        weights: the state dict as stored.
        token_order: ``"swapped"`` if the network was trained with its first two token axes exchanged, as all published
            Primus cells but SimMIM were; ``"straight"`` otherwise. No effect on ResEnc-L.

    Raises:
        WeightsError: if the names are of neither backbone, or a position table is not a cube.
    """
    if token_order not in ("swapped", "straight"):
        raise WeightsError(f"token_order is {token_order!r}; it must be 'swapped' or 'straight'")
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}
    if any(key.startswith("encoder.stages.") for key in weights):
        return _import_resenc(weights)
    if any(key.startswith("eva.") for key in weights):
        return _import_primus(weights, swapped=token_order == "swapped")
    raise WeightsError(
        f"none of the {len(weights)} names in this checkpoint is of a ResEnc-L (encoder.stages...) or Primus (eva...) "
        f"network; the first is {next(iter(weights), 'missing')!r}"
    )


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(f"^{pattern}$", replacement, key)
        if count:
            return renamed
    return key


def _import_resenc(weights: dict[str, Tensor]) -> ImportedWeights:
    heads = [int(key.split(".")[2]) for key in weights if key.startswith("decoder.seg_layers.")]
    imported = ImportedWeights(backbone={})
    for key, value in weights.items():
        if key.startswith("decoder.encoder."):
            imported.unused[key] = "copy of the encoder"
        elif re.search(r"\.(conv|norm)\.(weight|bias)$", key):
            imported.unused[key] = "alias of all_modules, untrained in Spark3D files"
        elif key.startswith("decoder.seg_layers.") and int(key.split(".")[2]) != max(heads):
            imported.unused[key] = "deep-supervision head that was never used"
        elif key.startswith("decoder.seg_layers."):
            imported.backbone[f"head.{key.split('.')[-1]}"] = value
        else:
            key = key.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")
            imported.backbone[_rename(key, _RESENC)] = value
    return imported


def _import_primus(weights: dict[str, Tensor], *, swapped: bool) -> ImportedWeights:
    imported = ImportedWeights(backbone={})
    for key, value in weights.items():
        if key.endswith("pos_embed"):
            value = _position_grid(key, value, swapped=swapped)
        elif swapped and re.search(r"attn\.[qk]_proj\.", key):
            value = _swap_rotary_axes(value)
        if key == "mask_token":
            imported.method["mask_token"] = value.reshape(1, -1, 1, 1, 1)
        elif key.startswith("eva."):
            imported.backbone["encoder.transformer." + _rename(key.removeprefix("eva."), _TRANSFORMER)] = value
        elif key.startswith("down_projection.proj."):
            imported.backbone[key.replace("down_projection.proj.", "encoder.patch_embedding.")] = value
        elif key.startswith("up_projection."):
            imported.backbone[_rename(key, _PATCH_DECODER)] = value
        elif key.startswith("decoder."):
            imported.method["decoder." + _rename(key.removeprefix("decoder."), _TRANSFORMER)] = value
        else:
            imported.unused[key] = "not part of Primus"
    return imported


def _position_grid(key: str, table: Tensor, *, swapped: bool) -> Tensor:
    """Turn a table ``(1, N, C)`` into a grid ``(1, C, d, h, w)`` with the first axis slowest."""
    side = round(table.shape[1] ** (1 / 3))
    if side**3 != table.shape[1]:
        raise WeightsError(f"{key} has {table.shape[1]} rows, which is not a cube of tokens")
    grid = table.reshape(side, side, side, -1)
    if swapped:
        grid = grid.transpose(0, 1)
    return grid.permute(3, 0, 1, 2)[None].contiguous()


def _swap_rotary_axes(projection: Tensor) -> Tensor:
    """Exchange, in each head of a query or key weight or bias, the channels that turn with axes 0 and 1."""
    dim = projection.shape[0]
    if dim not in _PRIMUS_HEADS:
        raise WeightsError(f"queries of {dim} channels are of no Primus size ({sorted(_PRIMUS_HEADS)})")
    thirds = projection.reshape(_PRIMUS_HEADS[dim], 3, -1, *projection.shape[1:])
    return thirds[:, torch.tensor([1, 0, 2])].reshape(projection.shape)
