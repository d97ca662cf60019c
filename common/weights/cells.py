# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The cells of the matrix as checkpoints show them: their names, papers, and what a file says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .published import network_name

__all__ = [
    "BACKBONES",
    "METHODS",
    "OWN_TRAINER",
    "Cell",
    "Paper",
    "Recognised",
    "backbone_of",
    "describe",
    "paper_of",
    "recognise",
]

OWN_TRAINER = "openmind-bundles"  # trainer_name of our exports is this, a slash, and the bundle


@dataclass(frozen=True)
class Paper:
    """A method or backbone: what it is called, what to cite, and how the reference's trainers of it are named.

    Attributes:
        title: name.
        citation: paper.
        trainer: pattern of the reference's names, empty if it has none.
        error: what a method's loss measures, as the title of a curve.
        picture: what its picture of pre-training shows.
        ours: how names begin of a method's tensors that have no place in the reference's network; ``""`` is all.
    """

    title: str
    citation: str
    trainer: str = ""
    error: str = ""
    picture: str = ""
    ours: tuple[str, ...] = ()


STUDY = "Wald et al. An OpenMind for 3D medical vision self-supervised learning. arXiv:2412.17041"
_HIDDEN = (
    "error on hidden blocks",
    "A validation crop: the network saw only what is not blue. The loss is the mean squared error on hidden blocks; 1 "
    "is the variance of the whole z-scored scan.",
)
_FEATURES = (
    "A validation crop, and what the kept encoder tells apart in it: principal components of its features in colour, "
    "and how alike it finds all places to the marked one."
)
_ALIKE = "Crops of validation scans: how alike the network finds them, and how much they truly overlap."
METHODS = {
    "mae": Paper(
        "MAE",
        "He et al. Masked autoencoders are scalable vision learners. arXiv:2111.06377",
        "Base(Eva)?MAE",
        *_HIDDEN,
        ours=("projection.",),
    ),
    "volumefusion": Paper(
        "VolumeFusion",
        "Wang et al. MIS-FM: 3D medical image segmentation using foundation models pretrained on a large-scale "
        "unannotated dataset. arXiv:2306.16925",
        "VolumeFusion(Eva)?",
        "error in telling the shares of two blended volumes",
        "Two volumes blended, the share of the first in each place, and the share that the network tells.",
    ),
    "models_genesis": Paper(
        "Models Genesis",
        "Zhou et al. Models Genesis. arXiv:2004.07882",
        "Models?Genesis(Eva)?",
        "error of the restored crop",
        "A validation crop as it was spoiled, as the network restored it, and as it was.",
    ),
    "voco": Paper(
        "VoCo",
        "Wu et al. VoCo: a simple-yet-effective volume contrastive learning framework. arXiv:2402.17300",
        "VoCo(Eva)?",
        "error of the predicted overlaps of crops",
        _ALIKE,
    ),
    "simclr": Paper(
        "SimCLR",
        "Chen et al. A simple framework for contrastive learning of visual representations. arXiv:2002.05709",
        "SimCLR(Eva)?",
        "contrastive loss of finding a crop's partner",
        _ALIKE,
    ),
    "swinunetr": Paper(
        "SwinUNETR pre-training",
        "Tang et al. Self-supervised pre-training of Swin transformers for 3D medical image analysis. arXiv:2111.14791",
        "SwinUNETR(Eva)?",
        "loss of rebuilding, telling the turn and recognising",
        "A validation crop with boxes cut out, as the network rebuilt it, and as it was.",
    ),
    "spark3d": Paper(
        "Spark3D",
        "Tian et al. Designing BERT for convolutional networks. arXiv:2301.03580",
        "(Variable)?Spark(MAE)?",
        *_HIDDEN,
    ),
    "simmim": Paper(
        "SimMIM",
        "Xie et al. SimMIM: a simple framework for masked image modeling. arXiv:2111.09886",
        "SimMIM(Eva)?",
        *_HIDDEN,
    ),
    "dino": Paper(
        "DINO",
        "Caron et al. Emerging properties in self-supervised vision transformers. arXiv:2104.14294; Zhou et al. iBOT. "
        "arXiv:2111.07832; Oquab et al. DINOv2. arXiv:2304.07193",
        "",
        "surprise of the student at what its teacher says",
        _FEATURES,
        ours=("",),
    ),
    "jepa": Paper(
        "JEPA",
        "Assran et al. Self-supervised learning from images with a joint-embedding predictive architecture. "
        "arXiv:2301.08243; Balestriero and LeCun. LeJEPA. arXiv:2511.08544",
        "",
        "error of the features that are predicted in hidden places",
        _FEATURES,
        ours=("",),
    ),
}
BACKBONES = {
    "resenc_l": Paper("ResEnc-L", "Isensee et al. nnU-Net revisited. arXiv:2404.09556"),
    "primus_m": Paper(
        "Primus-M", "Wald et al. Primus: Enforcing attention usage for 3D medical image segmentation. arXiv:2503.01835"
    ),
}


def paper_of(bundle: str) -> Paper | None:
    """Return the method that a bundle is named after, if it is one of them."""
    named = [name for name in METHODS if bundle.startswith(f"{name}_")]
    return METHODS[max(named, key=len)] if named else None


@dataclass
class Cell:
    """A bundle as far as its checkpoints go.

    Attributes:
        bundle: its name.
        backbone: its backbone, on any device: only names, shapes and settings are read.
        patch_size: side or sides of what the network sees in pre-training, in voxels.
        num_heads: attention heads of Primus, None for the U-Net.
        spacing_mm: of its pre-training.
    """

    bundle: str
    backbone: nn.Module
    patch_size: Sequence[int]
    num_heads: int | None = None
    spacing_mm: Any = 1.0


@dataclass
class Recognised:
    """What a checkpoint says of itself.

    Attributes:
        backbone: ``resenc_l`` or ``primus_m``, empty if its network is of neither.
        bundles: whose networks have such tensors; of how these were trained that says nothing.
        why: what that was told by.
        method: a key of :data:`METHODS`, if the file says by which of them it was trained.
        said: where it says so; else what it says instead, if anything.
        wrapped: Primus lies inside a wrapper, as in contrastive cells.
    """

    backbone: str
    bundles: list[str]
    why: str
    method: str | None = None
    said: str = ""
    wrapped: bool = False


def describe(bundle: str) -> tuple[str, str, list[str]]:
    """Return method, backbone and citations of a bundle.

    Example:
        >>> describe("mae_resenc_l")[:2]
        ('MAE', 'ResEnc-L')
    """
    for name, backbone in BACKBONES.items():
        method = METHODS.get(bundle.removesuffix(f"_{name}"))
        if bundle.endswith(f"_{name}") and method is not None:
            return method.title, backbone.title, [STUDY, method.citation, backbone.citation]
    return "unknown", "unknown", []


def backbone_of(bundle: str) -> str:
    """Return the backbone that the name of a bundle ends in, empty if it is none of :data:`BACKBONES`."""
    return next((name for name in BACKBONES if bundle.endswith(f"_{name}")), "")


def recognise(weights: Mapping[str, Tensor], trainer: str | None = None) -> Recognised:
    """Say which backbone a checkpoint of the reference, or an export of ours, is of, and how it says it was trained.

    Args:
        weights: under the reference's names.
        trainer: name of the trainer, if the file gives one.
    """
    parts = {key: network_name(key) for key in weights}
    names = {name: key for key, (part, name) in parts.items() if part in ("backbone", "method")}
    wrapped = any(re.search(r"(^|\.)encoder\.eva\.", key) for key in weights)
    if any(name.startswith("encoder.transformer.") for name in names):
        backbone = "primus_m"
    elif any(name.startswith("encoder.stages.") for name in names):
        backbone = "resenc_l"
    else:
        return Recognised("", [], "its names are of neither ResEnc-L (encoder.stages...) nor Primus (eva...)")
    fitting, why = _by_names(names, weights, backbone)
    method = _method_of(trainer)
    said = f"trainer_name is {trainer}" if trainer else ""
    if method is not None and f"{method}_{backbone}" not in fitting:
        method, said = None, f"{said}, which does not go with {why}"  # the file contradicts itself
    return Recognised(backbone, fitting, why, method, said, wrapped)


def _method_of(trainer: str | None) -> str | None:
    """Return the method that a trainer of the reference, or an export of ours, names."""
    if trainer and trainer.startswith(f"{OWN_TRAINER}/"):
        bundle = trainer.split("/", 1)[1]
        method = bundle.removesuffix(f"_{backbone_of(bundle)}")
        return method if method in METHODS else None
    for method, paper in METHODS.items():
        if trainer and paper.trainer and re.fullmatch(f"{paper.trainer}Trainer.*", trainer):
            return method
    return None


def _by_names(names: Mapping[str, str], weights: Mapping[str, Tensor], backbone: str) -> tuple[list[str], str]:
    """Return the bundles whose reference network has such tensors, and by what they were told."""

    def bundles(*methods: str) -> list[str]:
        return [f"{method}_{backbone}" for method in methods]

    if any(name.startswith("projection.") for name in names):
        return bundles("voco", "simclr"), "its projector (VoCo and SimCLR have the same)"
    if "rotation_head.weight" in names:
        return bundles("swinunetr"), "its rotation head"
    if any(name.startswith(("projections.", "mask_tokens.")) for name in names):
        return bundles("spark3d"), "its densifying layers"
    if any(name.startswith("decoder.blocks.") for name in names):
        return bundles("mae"), "its transformer decoder"
    levels = [name for name in names if re.fullmatch(r"decoder\.upsamplings\.\d+\.bias", name)]
    head = names.get("head.bias" if backbone == "resenc_l" else max(levels, default=""))
    if head is None:
        return bundles(*METHODS), "it is an encoder alone, which every method has"
    outputs = len(weights[head])
    if outputs > 1:
        return bundles("volumefusion"), f"its {outputs} output channels"
    if backbone == "primus_m":
        return bundles("models_genesis", "simmim", "spark3d"), "its names, which these methods share"
    return bundles("mae", "models_genesis", "spark3d", "simmim"), "its names, which these methods share"
