# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Published OpenMind checkpoints, translated to this project's names, token order and one name per tensor, and back.

What the published files need (facts established on the reference's modules):

* every convolution and norm of ResEnc-L is stored two or four times, within ``decoder.encoder.*`` as well. Where a file
  has other values under these names, the last in the order of modules is taken, as a strict load into the reference's
  network does in silence: ``decoder.encoder...all_modules``, else ``all_modules``, which alone Spark3D trained;
* four of five segmentation heads were never used;
* Primus was trained with its first two token axes swapped (SimMIM's excepted): the position table is transposed and, in
  each head's queries and keys, the channels that turn with axis 0 and axis 1 change places. Attention depends on
  positions and on q.k only, so the converted network is exactly equivalent.

The table of names is read in both directions: left to right by the importer, right to left by the exporter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import WeightsError

__all__ = [
    "ImportedWeights",
    "export_network_weights",
    "import_network_weights",
    "load_imported",
    "network_name",
    "published_name",
    "reference_names",
]

PRIMUS_HEADS = {396: 6, 792: 12, 864: 12, 1056: 16}

_COPY = "architecture."  # in Spark3D's second dictionary, the network once more
_SECOND = re.compile(r"((?:encoder\.st|decoder\.stages).*\.)(conv|norm)\.(weight|bias)")
# a backbone or the method, the reference's name, the name here. "#" is a number, "*" the rest of the name, "last" the
# number of the last level of a decoder. The importer takes the first row that fits, the exporter the last.
_NAMES = [
    ("resenc", "encoder.stem.convs.0.*", "encoder.stem.*"),
    ("resenc", "encoder.stages.#.blocks.#.conv#.*", "encoder.stages.#.#.conv#.*"),
    ("resenc", "encoder.stages.#.blocks.#.skip.0.*", "encoder.stages.#.#.shortcut.*"),  # without a pooling before it
    ("resenc", "encoder.stages.#.blocks.#.skip.1.*", "encoder.stages.#.#.shortcut.*"),
    ("resenc", "decoder.stages.#.convs.0.*", "decoder.stages.#.*"),
    ("resenc", "decoder.transpconvs.#.*", "decoder.upsamplings.#.*"),
    ("resenc", "decoder.seg_layers.last.*", "head.*"),
    ("primus", "eva.*", "encoder.transformer.*"),
    ("primus", "down_projection.proj.*", "encoder.patch_embedding.*"),
    ("primus", "up_projection.decode.#.0.*", "decoder.upsamplings.#.*"),
    ("primus", "up_projection.decode.#.1.*", "decoder.norms.#.*"),
    ("primus", "up_projection.decode.last.*", "decoder.upsamplings.last.*"),
    ("method", "decoder.blocks.*", "decoder.blocks.*"),
    ("method", "decoder.norm.*", "decoder.norm.*"),
    ("method", "decoder.pos_embed", "decoder.pos_embed"),
    ("method", "mask_token", "mask_token"),
    ("method", "mask_tokens.#", "mask_tokens.#"),
    ("method", "densify_projs.#.*", "projections.#.*"),
    ("method", "projector.layer3.0.*", "projection.output.*"),
    ("method", "projector.layer#.0.*", "projection.hidden#.*"),
    ("method", "rotation_proj_head.*", "rotation_head.*"),
    ("method", "contrast_proj_head.*", "contrast_head.*"),
    ("method", "recon_proj_head.#.*", "reconstruction_head.convolutions.#.*"),
]
# parts of names, by backbone; the reference's and those here
_PARTS = {
    "resenc": [(".all_modules.0.", ".conv."), (".all_modules.1.", ".norm.")],
    "primus": [
        (".gamma_", ".scale"),
        ("attn.q_proj.", "attention.query."),
        ("attn.k_proj.", "attention.key."),
        ("attn.v_proj.", "attention.value."),
        ("attn.norm.", "attention.norm."),
        ("attn.proj.", "attention.output."),
        ("mlp.fc1_g.", "mlp.gate."),
        ("mlp.fc1_x.", "mlp.value."),
        ("mlp.fc2.", "mlp.output."),
        ("pos_embed", "position_embedding"),
    ],
}
_LAYERS_OF_A_STEP = 4  # of the reference's reconstruction head: a convolution, a norm, an activation, an up-sampling


def _pattern(template: str) -> re.Pattern[str]:
    wild = {"#": r"(\d+)", "*": "(.+)", "last": r"(?P<last>\d+)"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in re.split(r"(#|\*|last)", template)))


def _fill(template: str, match: re.Match[str], last: int) -> str:
    """Put what a pattern found into another template."""
    found = match.groupdict()
    values = (value for number, value in enumerate(match.groups(), 1) if number != match.re.groupindex.get("last"))
    last = int(found.get("last", last))
    return re.sub(r"#|\*|last", lambda wild: str(last) if wild[0] == "last" else next(values), template)


_FROM_REFERENCE = [(_pattern(theirs), whose, ours) for whose, theirs, ours in _NAMES]
_TO_REFERENCE = [(_pattern(ours), whose, theirs) for whose, theirs, ours in reversed(_NAMES)]


@dataclass
class ImportedWeights:
    """Weights of one checkpoint under this project's names.

    Attributes:
        backbone: state dict of the backbone.
        method: what belongs to the pre-training method alone, under the method's names.
        unused: names in the file that nothing here uses, with the reason.
        contradicted: names in the file that were taken over others of the same tensor with other values, with these.
    """

    backbone: dict[str, Tensor]
    method: dict[str, Tensor] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    contradicted: dict[str, list[str]] = field(default_factory=dict)


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
    first, rank = _first_name(key)
    part, name = _named(first)
    return ("alias", f"second name of {first}") if part == "backbone" and rank != 1 else (part, name)


def network_name(key: str) -> tuple[str, str]:
    """Return what a tensor of a checkpoint belongs to, and its name here, whichever of its names this is.

    Example:
        >>> network_name("module.decoder.encoder.stem.convs.0.norm.bias")
        ('backbone', 'encoder.stem.norm.bias')
    """
    return _named(_first_name(key)[0])


def _first_name(key: str) -> tuple[str, int]:
    """Return which name of a tensor is translated, without wrappers, and this one's place among its names in a file."""
    key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
    key = re.sub(r"^encoder\.(eva\.|down_projection\.|mask_token)", r"\1", key)  # contrastive cells wrap Primus
    rank = 2 if key.startswith("decoder.encoder.") else 0
    key = key.removeprefix("decoder.") if rank else key
    if second := _SECOND.fullmatch(key):
        return f"{second[1]}all_modules.{int(second[2] == 'norm')}.{second[3]}", rank
    return key, rank + 1


def _named(key: str) -> tuple[str, str]:
    """Return what the first name of a tensor belongs to, and its name here; or ``unused`` and why."""
    if key.startswith(_COPY):
        return "unused", "copy of the network"
    for compiled, whose, ours in _FROM_REFERENCE:
        match = compiled.fullmatch(key)
        if match is None:
            continue
        name = _fill(ours, match, 0)
        for theirs, here in (pair for pairs in _PARTS.values() for pair in pairs):
            name = name.replace(theirs, here)
        if name.startswith("reconstruction_head."):
            name = re.sub(r"\d+", lambda number: str(int(number[0]) // _LAYERS_OF_A_STEP), name)
        return "method" if whose == "method" else "backbone", name
    return "unused", "not part of a network of OpenMind"


def reference_names(name: str, *, part: str, backbone: str, last: int = 0, prefix: str = "") -> list[str]:
    """Return the names that the reference gives to a tensor of this project, the trained one first.

    Args:
        name: here, within its part.
        part: ``"backbone"`` or ``"method"``.
        backbone: ``"resenc"`` or ``"primus"``.
        last: number of the last level of the decoder, if there is one.
        prefix: of Primus where the reference wraps it, ``"encoder."``.

    Raises:
        WeightsError: if the reference has no such tensor.

    Example:
        >>> reference_names("encoder.stem.conv.weight", part="backbone", backbone="resenc")
        ['encoder.stem.convs.0.all_modules.0.weight', 'encoder.stem.convs.0.conv.weight']
    """
    spelled = name
    for theirs, here in _PARTS[backbone]:
        spelled = spelled.replace(here, theirs)
    for compiled, whose, theirs in _TO_REFERENCE:
        match = compiled.fullmatch(spelled)
        if match is None or whose != ("method" if part == "method" else backbone):
            continue
        if int(match.groupdict().get("last", last)) != last:
            continue
        key = _fill(theirs, match, last)
        if key.startswith("recon_proj_head."):
            key = re.sub(r"\d+", lambda number: str(int(number[0]) * _LAYERS_OF_A_STEP), key)
        if ".all_modules." in key:
            return [key, key.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")]
        return [prefix + key if part == "backbone" or key == "mask_token" else key]
    raise WeightsError(f"{name} has no counterpart in the reference's networks")


def import_network_weights(
    weights: Mapping[str, Tensor],
    *,
    token_order: str | None = None,
    grid: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> ImportedWeights:
    """Translate ``network_weights`` of a published ResEnc-L or Primus checkpoint, of any method.

    Args:
        weights: the state dict as stored; for a Spark3D training file, joined with its ``spark_weights``.
        token_order: ``"swapped"`` if the network was trained with its first two token axes exchanged, as all published
            Primus cells but SimMIM were; ``"straight"`` otherwise. Only ResEnc-L does without.
        grid: tokens along each axis of the image that Primus was trained on; a cube unless given.
        num_heads: attention heads of Primus; needed for other sizes than the named ones, since no tensor shows it.

    Raises:
        WeightsError: if the names are of neither backbone, the token order of Primus is not given, or a position table
            is not of the grid.
    """
    imported = ImportedWeights(backbone={})
    taken = _taken(weights, imported)
    needed = any(_first_name(key)[0].startswith("eva.") for key in taken)
    if token_order not in ("swapped", "straight") and (needed or token_order is not None):
        raise WeightsError(f"token_order is {token_order!r}; it must be 'swapped' or 'straight'")
    heads = [int(key.split(".")[-2]) for key in weights if re.search(r"(^|\.)decoder\.seg_layers\.\d", key)]
    for key in taken:
        value = weights[key]
        part, name = network_name(key)
        head = re.search(r"decoder\.seg_layers\.(\d+)\.", key)
        if head and part == "backbone" and int(head[1]) != max(heads):
            part, name = "unused", "deep-supervision head; that of the last level is taken"
        if part == "unused":
            imported.unused[key] = name
            continue
        if name.endswith("position_embedding"):
            value = _position_grid(key, value, grid, swapped=token_order == "swapped")
        elif token_order == "swapped" and re.search(r"attention\.(query|key)\.", name):
            value = _swap_rotary_axes(value, num_heads)
        elif name == "mask_token":
            if not value.any():
                imported.unused[key] = "place that no method has filled"
                continue
            value = value.reshape(1, -1, 1, 1, 1)
        (imported.backbone if part == "backbone" else imported.method)[name] = value
    if not any(name.startswith(("encoder.stages.", "encoder.transformer.")) for name in imported.backbone):
        raise WeightsError(
            f"none of the {len(weights)} names in this checkpoint is of a ResEnc-L (encoder.stages...) or Primus "
            f"(eva...) network; the first is {next(iter(weights), 'missing')!r}"
        )
    return imported


def _taken(weights: Mapping[str, Tensor], imported: ImportedWeights) -> list[str]:
    """Return one name in the file for each tensor, the last in the order of modules, and note the others."""
    names: dict[str, list[tuple[int, str]]] = {}
    for key in weights:
        first, rank = _first_name(key)
        names.setdefault(first, []).append((rank, key))
    taken = []
    for several in names.values():
        *others, (_, last) = sorted(several, key=lambda one: one[0])  # of two that are alike, the later in the file
        taken.append(last)
        for _, key in others:
            same = _same(weights[key], weights[last])
            imported.unused[key] = f"second name of {last}" + (
                "" if same else ", with other values that were not taken; in Spark3D files they are untrained"
            )
            if not same:
                imported.contradicted.setdefault(last, []).append(key)
    return taken


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one, or equal."""
    shared = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return one.shape == other.shape and (shared or torch.equal(one, other))


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


def _swap_rotary_axes(projection: Tensor, num_heads: int | None) -> Tensor:
    """Exchange, in each head of a query or key weight or bias, the channels that turn with axes 0 and 1."""
    dim = projection.shape[0]
    heads = num_heads or PRIMUS_HEADS.get(dim)
    if heads is None:
        raise WeightsError(f"queries of {dim} channels are of no Primus size ({sorted(PRIMUS_HEADS)}); give num_heads")
    if dim % (3 * heads):
        raise WeightsError(f"queries of {dim} channels cannot be cut into {heads} heads of three axes each")
    thirds = projection.reshape(heads, 3, -1, *projection.shape[1:])
    return thirds[:, torch.tensor([1, 0, 2])].reshape(projection.shape)


def export_network_weights(
    backbone: Mapping[str, Tensor], method: Mapping[str, Tensor] | None = None, *, wrapped: bool = False
) -> dict[str, Tensor]:
    """Translate a backbone, and what belongs to its method, to the reference's names, aliases included.

    Tokens are in the order of the reference's downstream networks, first spatial axis slowest: ``"straight"`` for
    :func:`import_network_weights`, which gives back the same tensors. Names of one tensor share its memory. Every
    Primus of the reference has a mask token, zeros where no method has learned one. The deep-supervision heads that no
    training ever used are not made up.

    Args:
        backbone: state dict of a ``ResEncUNet`` or ``Primus``, with or without decoder.
        method: state dict of the method without ``backbone.``.
        wrapped: give Primus the prefix ``encoder.`` that contrastive methods have there.

    Raises:
        WeightsError: if the reference has no such tensor.
    """
    kind = "primus" if any(name.startswith("encoder.transformer.") for name in backbone) else "resenc"
    levels = [int(name.split(".")[2]) for name in backbone if name.startswith("decoder.upsamplings.")]
    last = max(levels, default=0)
    prefix = "encoder." if wrapped else ""
    exported: dict[str, Tensor] = {}
    if kind == "primus":
        exported[f"{prefix}mask_token"] = torch.zeros(1, 1, backbone["encoder.patch_embedding.weight"].shape[0])
    for part, tensors in (("backbone", backbone), ("method", method or {})):
        for name, value in tensors.items():
            if name.endswith("position_embedding"):
                value = value.flatten(2).transpose(1, 2).contiguous()  # (1, C, d, h, w) -> (1, N, C)
            elif name == "mask_token":
                value = value.reshape(1, 1, -1)
            for key in reference_names(name, part=part, backbone=kind, last=last, prefix=prefix):
                exported[key] = value
                if kind == "resenc" and levels and key.startswith("encoder."):
                    exported[f"decoder.{key}"] = value
    return exported
