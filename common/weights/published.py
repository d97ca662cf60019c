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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import WeightsError

__all__ = ["ImportedWeights", "import_network_weights", "load_imported", "published_name"]

_PRIMUS_HEADS = {396: 6, 792: 12, 864: 12, 1056: 16}

_BLOCKS = [
    (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.scale\2"),
    (r"attn\.q_proj\.", "attention.query."),
    (r"attn\.k_proj\.", "attention.key."),
    (r"attn\.v_proj\.", "attention.value."),
    (r"attn\.norm\.", "attention.norm."),
    (r"attn\.proj\.", "attention.output."),
    (r"mlp\.fc1_g\.", "mlp.gate."),
    (r"mlp\.fc1_x\.", "mlp.value."),
    (r"mlp\.fc2\.", "mlp.output."),
    (r"\bpos_embed$", "position_embedding"),
]
# whole names of the reference; what it belongs to; names here
_RULES = [
    (r"architecture\..*", "unused", "copy of the network"),
    (r"decoder\.encoder\..*", "unused", "copy of the encoder"),
    (
        r"(?:encoder\.st|decoder\.stages).*\.(conv|norm)\.(weight|bias)",
        "alias",
        "alias of all_modules, untrained in Spark3D files",
    ),
    (r"encoder\.stem\.convs\.0\.(.*)", "backbone", r"encoder.stem.\1"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(conv\d)\.(.*)", "backbone", r"encoder.stages.\1.\2.\3.\4"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.\d\.(.*)", "backbone", r"encoder.stages.\1.\2.shortcut.\3"),
    (r"decoder\.stages\.(\d+)\.convs\.0\.(.*)", "backbone", r"decoder.stages.\1.\2"),
    (r"decoder\.transpconvs\.(\d+)\.(.*)", "backbone", r"decoder.upsamplings.\1.\2"),
    (r"decoder\.seg_layers\.\d+\.(.*)", "backbone", r"head.\1"),
    (r"eva\.(.*)", "backbone", r"encoder.transformer.\1"),
    (r"down_projection\.proj\.(.*)", "backbone", r"encoder.patch_embedding.\1"),
    (r"up_projection\.decode\.(\d)\.0\.(.*)", "backbone", r"decoder.upsamplings.\1.\2"),
    (r"up_projection\.decode\.(\d)\.1\.(.*)", "backbone", r"decoder.norms.\1.\2"),
    (r"up_projection\.decode\.(\d)\.(weight|bias)", "backbone", r"decoder.upsamplings.\1.\2"),
    (r"decoder\.((?:blocks|norm)\..*|pos_embed)", "method", r"decoder.\1"),
    (r"mask_token", "method", "mask_token"),
    (r"mask_tokens\.(\d+)", "method", r"mask_tokens.\1"),
    (r"densify_projs\.(\d+)\.(.*)", "method", r"projections.\1.\2"),
    (r"projector\.layer([12])\.0\.(.*)", "method", r"projection.hidden\1.\2"),
    (r"projector\.layer3\.0\.(.*)", "method", r"projection.output.\1"),
    (r"rotation_proj_head\.(.*)", "method", r"rotation_head.\1"),
    (r"contrast_proj_head\.(.*)", "method", r"contrast_head.\1"),
    (r"recon_proj_head\.(\d+)\.(.*)", "method", r"reconstruction_head.convolutions.\1.\2"),
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


def published_name(key: str) -> tuple[str, str]:
    """Return what a tensor of a published checkpoint belongs to, and its name here.

    Returns:
        ``("backbone" or "method", name)``; ``("alias", why)`` for the second name of a tensor; ``("unused", why)``.

    Example:
        >>> published_name("encoder.eva.blocks.3.attn.q_proj.weight")
        ('backbone', 'encoder.transformer.blocks.3.attention.query.weight')
        >>> published_name("optimizer")
        ('unused', 'not part of a network of OpenMind')
    """
    key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
    key = re.sub(r"^encoder\.(eva\.|down_projection\.|mask_token)", r"\1", key)  # contrastive cells wrap Primus
    for pattern, part, name in _RULES:
        match = re.fullmatch(pattern, key)
        if match is None:
            continue
        name = match.expand(name)
        if part in ("unused", "alias"):
            return part, name
        name = name.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")
        for old, new in _BLOCKS:
            name = re.sub(old, new, name)
        if name.startswith("reconstruction_head."):  # a convolution, a norm, an activation and an up-sampling each
            name = re.sub(r"\d+", lambda number: str(int(number[0]) // 4), name)
        return part, name
    return "unused", "not part of a network of OpenMind"


def import_network_weights(
    weights: Mapping[str, Tensor], *, token_order: str = "swapped", grid: Sequence[int] | None = None
) -> ImportedWeights:
    """Translate ``network_weights`` of a published ResEnc-L or Primus checkpoint, of any method.

    Args:
        weights: the state dict as stored; for a Spark3D training file, joined with its ``spark_weights``.
        token_order: ``"swapped"`` if the network was trained with its first two token axes exchanged, as all published
            Primus cells but SimMIM were; ``"straight"`` otherwise. No effect on ResEnc-L.
        grid: tokens along each axis of the image that Primus was trained on; a cube unless given.

    Raises:
        WeightsError: if the names are of neither backbone, or a position table is not of the grid.
    """
    if token_order not in ("swapped", "straight"):
        raise WeightsError(f"token_order is {token_order!r}; it must be 'swapped' or 'straight'")
    imported = ImportedWeights(backbone={})
    heads = [int(key.split(".")[-2]) for key in weights if re.search(r"^(\w+\.)?decoder\.seg_layers\.\d", key)]
    for key, value in weights.items():
        part, name = published_name(key)
        head = re.search(r"decoder\.seg_layers\.(\d+)\.", key)
        if head and part == "backbone" and int(head[1]) != max(heads):
            part, name = "unused", "deep-supervision head that was never used"
        if part in ("unused", "alias"):
            imported.unused[key] = name
            continue
        if name.endswith("position_embedding"):
            value = _position_grid(key, value, grid, swapped=token_order == "swapped")
        elif token_order == "swapped" and re.search(r"attention\.(query|key)\.", name):
            value = _swap_rotary_axes(value)
        elif name == "mask_token":
            value = value.reshape(1, -1, 1, 1, 1)
        (imported.backbone if part == "backbone" else imported.method)[name] = value
    if not any(name.startswith(("encoder.stages.", "encoder.transformer.")) for name in imported.backbone):
        raise WeightsError(
            f"none of the {len(weights)} names in this checkpoint is of a ResEnc-L (encoder.stages...) or Primus "
            f"(eva...) network; the first is {next(iter(weights), 'missing')!r}"
        )
    return imported


def load_imported(method: nn.Module, imported: ImportedWeights) -> list[str]:
    """Fill a pre-training method, its backbone and its own layers, with imported weights.

    Returns:
        names of the method's part of the file that this method has no use for.

    Raises:
        WeightsError: if a tensor of the method is missing or has another shape, or the backbone has others.
    """
    state = method.state_dict()
    given = {f"backbone.{name}": value for name, value in imported.backbone.items()} | imported.method
    wrong = [f"{name} is missing" for name in state if name not in given]
    wrong += [f"{name} is not known here" for name in given if name.startswith("backbone.") and name not in state]
    wrong += [
        f"{name} is {list(value.shape)} in the file, {list(state[name].shape)} here"
        for name, value in given.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        raise WeightsError(f"the checkpoint is of another method or network ({'; '.join(wrong[:3])})")
    method.load_state_dict({name: value for name, value in given.items() if name in state})
    return [name for name in given if name not in state]


def _position_grid(key: str, table: Tensor, grid: Sequence[int] | None, *, swapped: bool) -> Tensor:
    """Turn a table ``(1, N, C)`` into a grid ``(1, C, d, h, w)`` with the first axis slowest."""
    rows = table.shape[1]
    d, h, w = grid or [round(rows ** (1 / 3))] * 3
    if d * h * w != rows:
        raise WeightsError(f"{key} has {rows} rows, which is not {'a cube' if grid is None else list(grid)} of tokens")
    positions = table.reshape(h, d, w, -1).transpose(0, 1) if swapped else table.reshape(d, h, w, -1)
    return positions.permute(3, 0, 1, 2)[None].contiguous()


def _swap_rotary_axes(projection: Tensor) -> Tensor:
    """Exchange, in each head of a query or key weight or bias, the channels that turn with axes 0 and 1."""
    dim = projection.shape[0]
    if dim not in _PRIMUS_HEADS:
        raise WeightsError(f"queries of {dim} channels are of no Primus size ({sorted(_PRIMUS_HEADS)})")
    thirds = projection.reshape(_PRIMUS_HEADS[dim], 3, -1, *projection.shape[1:])
    return thirds[:, torch.tensor([1, 0, 2])].reshape(projection.shape)
