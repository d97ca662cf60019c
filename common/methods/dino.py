# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""DINO: a student tells from small crops, and from one with hidden blocks, what its teacher makes of large whole ones
(Caron et al., arXiv:2104.14294; Zhou et al., iBOT, arXiv:2111.07832; Oquab et al., DINOv2, arXiv:2304.07193).

=========  ==========================  ================================================================
views      ``globals``                 ``(B, 2, 1, D, H, W)`` two large crops of each region
           ``locals``                  ``(B, L, 1, d, h, w)`` its small crops
           ``hidden``                  ``(B, d, h, w)`` boolean grid of blocks, of the first large crop
           ``places``                  ``(B, M)`` the hidden blocks by their number in that grid
           ``progress``                share of the run that is done, for the schedules
method     ``student``                 ``(B, 2 + L, K)`` cosines of all crops with K prototypes
           ``teacher``                 ``(B, 2, K)`` of the large crops
           ``student_dense``           ``(B, M, K)`` of the hidden blocks, of which the student saw nothing
           ``teacher_dense``           ``(B, M, K)`` of the same blocks, of which the teacher saw all
           ``pooled``                  ``(B, 2, C)`` the student's averaged features of the large crops
           ``embedding``, ``features``  the teacher's, to watch for collapse and for pictures
loss       scalar                      cross-entropy of crops and of blocks, and a spread of the features
kept       ``backbone``                the encoder of the teacher, a moving average of the student's; heads, student
                                       and mask token are thrown away, a decoder is not built
=========  ==========================  ================================================================

What the teacher says is centred by Sinkhorn and Knopp's iterations: over the whole batch every prototype is asked for
equally often, so that one answer for all is no way out. Both are sharpened, the teacher more, so that the same doubt
about all is none either. KoLeo (Sablayrolles et al., arXiv:1806.03198) pushes each crop from its nearest neighbour.

A crop is described by the averages of all feature maps, a block by those within it, since neither backbone has a class
token. They are standardised by running statistics, where DINO has a batch norm in the heads of convolutional networks:
averages of instance-normalised maps differ little between crops. Small crops, hidden blocks and large crops have
statistics of their own, or which kind a crop is would be most of what the heads see. In the U-Net, whose features of a
block are no tokens, the stem's features of hidden blocks are replaced by the mask token and the encoder goes on
densely, as SimMIM does here; for Primus this is iBOT.

Batches of volumes are small, so the student soon says the same of all crops, and a fast teacher would follow it there.
The teacher is therefore as slow as DINO's authors advise for small batches, and its temperature stays at their 0.04.

Departures, on purpose: of two large crops always the first has hidden blocks and the second has none, where the paper
draws which; crops are random anyway, and so all processes hide as many. Sums over the batch are over all processes, and
KoLeo's neighbours too. Weight decay is constant, and the prototypes learn from the first step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import gather
from ..networks import (
    Primus,
    ResEncUNet,
    at_places,
    block_features,
    follow,
    in_chunks,
    momentum_at,
    pool_features,
    teacher_of,
)
from ..views import (
    BiasField,
    CropAugmentation,
    SampleKey,
    SpatialCrop,
    draw_hidden_blocks,
    progress_of,
    step_stream,
    view_stream,
)

__all__ = ["DINO", "DINOLoss", "DINOViews", "RunningNorm", "crop_sides", "koleo", "sinkhorn"]

# what has statistics of its own: of the teacher and of the student
_KINDS = ("teacher_whole", "teacher_blocks", "hidden", "whole", "small", "blocks")


def crop_sides(side: int, *, spacing_mm: float | Sequence[float] | None, multiple: int) -> tuple[int, int, int]:
    """Return the sides of a crop that is about a cube in space, in voxels.

    Args:
        side: along the finest axis.
        spacing_mm: of the voxels, one or three; None, where each file keeps its own, counts as equal.
        multiple: what all sides are multiples of.

    Raises:
        ValueError: if ``side`` is none.

    Example:
        >>> crop_sides(96, spacing_mm=1.0, multiple=32), crop_sides(96, spacing_mm=[3.0, 1.0, 1.0], multiple=16)
        ((96, 96, 96), (32, 96, 96))
    """
    if side % multiple or side <= 0:
        raise ValueError(f"a crop of side {side} must be a multiple of {multiple}, the total stride of the network")
    each = list(spacing_mm) if isinstance(spacing_mm, Sequence) else [1.0] * 3
    first, second, third = (max(round(side * min(each) / one / multiple), 1) * multiple for one in each)
    return first, second, third


@dataclass(frozen=True)
class CropDraw:
    """Where a crop lies in its region: lower corner and sides in voxels, before it is brought to the network's size."""

    low: tuple[int, int, int]
    sides: tuple[int, int, int]
    stream: torch.Generator


class DINOViews:
    """Cut large and small crops of each region, augment every one on its own, and hide blocks of the first.

    Args:
        spatial: how regions are cut.
        crop_size: side of a large crop as the network gets it, in voxels of the finest axis.
        local_size: side of a small one.
        local_crops: small crops of each region.
        zoom: a large crop covers its side times a factor uniform between these.
        local_zoom: the same of a small one.
        spacing_mm: of the voxels: a crop has fewer along a coarser axis, so that it is a cube in space.
        multiple: of which the network needs its sides.
        block_size: side of a hidden block in voxels.
        hidden_ratio: the share of blocks to hide is drawn between these for each step.
        batch_size: samples of one optimizer step over all processes, by which samples of one step find each other.
        steps: of the run, and of one of its epochs, for ``progress``; None for views that are at its end, as those of
            validation.
        bias: smooth brightening across a crop; None for none.
        augmentation: of each crop; None leaves them as they are, for validation.

    Raises:
        ValueError: if crops or blocks do not fit.
    """

    def __init__(
        self,
        spatial: SpatialCrop,
        *,
        crop_size: int = 96,
        local_size: int = 64,
        local_crops: int = 4,
        zoom: Sequence[float] = (0.8, 1.6),
        local_zoom: Sequence[float] = (0.6, 1.2),
        spacing_mm: float | Sequence[float] | None = 1.0,
        multiple: int = 32,
        block_size: int = 16,
        hidden_ratio: Sequence[float] = (0.1, 0.5),
        batch_size: int = 8,
        steps: Sequence[int] | None = None,
        bias: BiasField | None = None,
        augmentation: CropAugmentation | None = None,
    ) -> None:
        if local_crops < 1:
            raise ValueError(f"local_crops {local_crops} must be at least 1")
        self.spatial, self.local_crops, self.batch_size = spatial, local_crops, batch_size
        self.crop_size = crop_sides(crop_size, spacing_mm=spacing_mm, multiple=multiple)
        self.local_size = crop_sides(local_size, spacing_mm=spacing_mm, multiple=multiple)
        self.zoom = self._fitting("zoom", self.crop_size, zoom)
        self.local_zoom = self._fitting("local_zoom", self.local_size, local_zoom)
        if any(side % block_size for side in self.crop_size):
            raise ValueError(f"crops of {list(self.crop_size)} are not a multiple of block_size {block_size}")
        if augmentation is not None and augmentation.rot90_probability > 0 and len({*self.crop_size[:2]}) > 1:
            raise ValueError(
                f"crops of {list(self.crop_size)} cannot make quarter turns; add --augmentation#rot90_probability 0"
            )
        self.block_size, self.grid = block_size, [side // block_size for side in self.crop_size]
        blocks = self.grid[0] * self.grid[1] * self.grid[2]
        lowest, highest = self.hidden_ratio = (float(hidden_ratio[0]), float(hidden_ratio[1]))
        if not 0 < int(lowest * blocks) <= int(highest * blocks) < blocks:
            raise ValueError(f"hidden_ratio {list(hidden_ratio)} of {blocks} blocks must hide at least one and not all")
        self._steps = steps  # a run may be made longer, and is the same run
        self.bias, self.augmentation = bias, augmentation

    def plain(self) -> DINOViews:
        """Return the same crops as they are, at the end of all schedules: for validation."""
        views = copy.copy(self)
        views.bias, views.augmentation, views._steps = None, None, None
        return views

    def _fitting(self, name: str, sides: Sequence[int], zoom: Sequence[float]) -> tuple[float, float]:
        """Return the range of a zoom, no wider than the region."""
        low, high = zoom
        most = min(whole / side for whole, side in zip(self.spatial.patch_size, sides, strict=True))
        if not 0 < low <= high or low > most:
            raise ValueError(
                f"{name} {[low, high]} of crops of {list(sides)} does not fit into patch_size "
                f"{list(self.spatial.patch_size)}"
            )
        return float(low), float(min(high, most))

    def draw(self, key: SampleKey) -> tuple[list[CropDraw], list[CropDraw], torch.Generator]:
        """Place the crops of one sample: the large ones, the small ones; and return the stream for what is hidden."""
        generator = view_stream(key)
        found: list[list[CropDraw]] = [[], []]
        for kind, (count, sides, (low, high)) in enumerate(
            ((2, self.crop_size, self.zoom), (self.local_crops, self.local_size, self.local_zoom))
        ):
            for _ in range(count):
                numbers = torch.rand(4, dtype=torch.float64, generator=generator).tolist()
                factor = low + (high - low) * numbers[3]
                seed = int(torch.randint(2**62, (), generator=generator))
                covered = [
                    max(1, min(round(side * factor), whole))
                    for side, whole in zip(sides, self.spatial.patch_size, strict=True)
                ]
                corner = [
                    int(place * (whole - side + 1))
                    for place, whole, side in zip(numbers[:3], self.spatial.patch_size, covered, strict=True)
                ]
                stream = torch.Generator().manual_seed(seed)
                found[kind].append(
                    CropDraw((corner[0], corner[1], corner[2]), (covered[0], covered[1], covered[2]), stream)
                )
        return found[0], found[1], generator

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Map a batch of regions, spatial draws and sample keys on the device to the views above."""
        regions = self.spatial(batch)  # (B, 1, D, H, W)
        draws = [self.draw(key) for key in batch["key"]]
        seed, epoch, index = batch["key"][0]
        step = index // self.batch_size
        ratio = float(step_stream(seed, epoch, step).uniform(*self.hidden_ratio))
        hidden = torch.stack([draw_hidden_blocks(self.grid, ratio, stream) for *_, stream in draws])
        places = torch.stack([one.flatten().nonzero().squeeze(1) for one in hidden])  # (B, M)
        return {
            "globals": self._crops(regions, [large for large, *_ in draws], self.crop_size),
            "locals": self._crops(regions, [small for _, small, _ in draws], self.local_size),
            "hidden": hidden.to(regions.device, non_blocking=True),
            "places": places.to(regions.device, non_blocking=True),
            "progress": progress_of(epoch, step, self._steps),
        }

    def _crops(self, regions: Tensor, draws: Sequence[Sequence[CropDraw]], size: Sequence[int]) -> Tensor:
        """Cut crops and bring them to the network's size, ``(B, count, 1, *size)``."""
        crops, streams = [], []
        for region, own in zip(regions, draws, strict=True):
            for draw in own:
                (z, y, x), (d, h, w) = draw.low, draw.sides
                cut = region[None, :, z : z + d, y : y + h, x : x + w]
                crops.append(F.interpolate(cut, size=list(size), mode="trilinear", align_corners=False))
                streams.append(draw.stream)
        stacked = torch.cat(crops)  # (B * count, 1, *size)
        if self.bias is not None:
            stacked = self.bias(stacked, streams)
        if self.augmentation is not None:
            stacked = self.augmentation(stacked, streams)
        return stacked.view(len(regions), -1, *stacked.shape[1:])


class DINOHead(nn.Module):
    """Three linear layers to a unit vector, and its cosines with prototypes.

    Args:
        in_features: width of what comes in.
        hidden_features: of both hidden layers.
        bottleneck_features: of the unit vector.
        prototypes: how many.
    """

    def __init__(self, in_features: int, *, hidden_features: int, bottleneck_features: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, bottleneck_features),
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck_features))
        nn.init.trunc_normal_(self.prototypes, std=0.02)  # only their directions count, and short ones turn faster
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(..., in_features)`` to unit vectors ``(..., E)`` and cosines ``(..., K)``, both float32."""
        x = self.layers(x)
        with torch.autocast(x.device.type, enabled=False):  # a temperature magnifies what bfloat16 rounds
            unit = F.normalize(x.float(), dim=-1)
            return unit, unit @ F.normalize(self.prototypes.float(), dim=-1).T


class RunningNorm(nn.Module):
    """Take away the mean of features and divide by their standard deviation, of the batches so far in all processes.

    Averages of instance-normalised maps are nearly the same for all crops: what tells crops apart is small beside it.

    Args:
        width: of the features.
        share: of the newest batch in the statistics; the first counts in full.
    """

    def __init__(self, width: int, *, share: float = 0.1) -> None:
        super().__init__()
        self.share = share
        self.mean: Tensor
        self.variance: Tensor
        self.batches: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in the features of a batch ``(..., width)``."""
        rows = x.detach().flatten(0, -2).double()
        seen = torch.cat([rows.sum(0), rows.square().sum(0), rows.new_full((1,), len(rows))])
        if dist.is_initialized():
            dist.all_reduce(seen)
        mean, square = (seen[:-1] / seen[-1]).chunk(2)
        weight = (1 / (self.batches + 1)).clamp(min=self.share)
        self.mean.lerp_(mean.float(), weight)
        self.variance.lerp_((square - mean.square()).clamp(min=0).float(), weight)
        self.batches += 1

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to the same, float32."""
        return (x.float() - self.mean) * (self.variance + 1e-5).rsqrt()


class DINO(nn.Module):
    """Encode all crops with the student and the large ones with the teacher, and compare them with prototypes.

    Args:
        backbone: either of the two; its decoder is not used. It becomes the teacher's, a copy of it learns.
        hidden_features: width of the heads' hidden layers.
        bottleneck_features: width of what is compared with prototypes.
        prototypes: of crops, and as many of blocks.
        momentum: share of its old weights that the teacher keeps in a step, at the start and at the end.
        chunks: parts in which a batch is computed, for less memory.
    """

    def __init__(
        self,
        backbone: Primus | ResEncUNet,
        *,
        hidden_features: int = 2048,
        bottleneck_features: int = 256,
        prototypes: int = 512,
        momentum: Sequence[float] = (0.9995, 1.0),
        chunks: int = 1,
    ) -> None:
        super().__init__()
        self.momentum, self.chunks = list(momentum), chunks
        momentum_at(0.0, momentum=momentum)  # in words, before any step
        self.student, self.backbone = teacher_of(backbone).requires_grad_(True), backbone.requires_grad_(False)
        width = sum(backbone.feature_channels)
        sizes = {"hidden_features": hidden_features, "bottleneck_features": bottleneck_features}
        self.head = DINOHead(width, prototypes=prototypes, **sizes)
        self.dense_head = DINOHead(width, prototypes=prototypes, **sizes)
        self.norms = nn.ModuleDict({kind: RunningNorm(width) for kind in _KINDS})
        self.teacher_head, self.teacher_dense_head = teacher_of(self.head), teacher_of(self.dense_head)
        self.mask_token = nn.Parameter(torch.empty(1, backbone.feature_channels[0], 1, 1, 1))
        nn.init.normal_(self.mask_token, std=1e-6)

    def train(self, mode: bool = True) -> DINO:
        """Set the mode of the student alone: the teacher never drops anything."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to cosines and features, see the table above."""
        samples = torch.arange(len(batch["globals"]), device=batch["globals"].device)
        if self.training:
            self._follow(batch["progress"])
        with torch.no_grad():
            pooled, features = in_chunks(lambda which: self._teach(batch, which), samples, self.chunks)
            embedding, teacher = self.teacher_head(self._standardised("teacher_whole", pooled))
            blocks = at_places(features.flatten(2).transpose(1, 2), batch["places"])  # (B, M, C)
            _, teacher_dense = self.teacher_dense_head(self._standardised("teacher_blocks", blocks))
        learning = [*self.student.parameters(), self.mask_token]
        hidden, whole, small, blocks = in_chunks(
            lambda which: self._learn(batch, which), samples, self.chunks, learning
        )
        kinds = {"hidden": hidden, "whole": whole, "small": small}
        seen = torch.cat([self._standardised(kind, x) for kind, x in kinds.items()], dim=1)  # (B, 2 + L, C)
        return {
            "student": self.head(seen)[1],
            "teacher": teacher,
            "student_dense": self.dense_head(self._standardised("blocks", blocks))[1],
            "teacher_dense": teacher_dense,
            "pooled": seen[:, :2],
            "embedding": embedding,
            "features": features,
        }

    def _standardised(self, kind: str, x: Tensor) -> Tensor:
        """Return features by the statistics of their kind, which take in this batch first, in training only."""
        norm = self.norms[kind]
        if self.training:
            norm.update(x)  # type: ignore[operator]
        return norm(x)  # type: ignore[no-any-return]

    def _follow(self, progress: float) -> None:
        """Move the teacher towards what the last step made of the student."""
        momentum = momentum_at(progress, momentum=self.momentum)
        for teacher, student in (
            (self.backbone, self.student),
            (self.teacher_head, self.head),
            (self.teacher_dense_head, self.dense_head),
        ):
            follow(teacher, student, momentum)

    def _learn(self, batch: dict[str, Any], which: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the student's features of some samples.

        Returns:
            ``(b, 1, C)`` of the first large crops with hidden blocks, ``(b, 1, C)`` of the second, which are whole,
            ``(b, L, C)`` of small crops, ``(b, M, C)`` of hidden blocks.
        """
        crops, hidden = batch["globals"].index_select(0, which), batch["hidden"].index_select(0, which)
        b = len(which)
        visible = torch.cat([~hidden, torch.ones_like(hidden)])
        # first all crops with hidden blocks, then all whole ones
        features = self.student.encode(crops.transpose(0, 1).flatten(0, 1), visible=visible, mask_token=self.mask_token)
        pooled = pool_features(features)  # (2 b, C)
        small = pool_features(self.student.encode(batch["locals"].index_select(0, which).flatten(0, 1)))  # (b L, C)
        dense = block_features([x[:b] for x in features], hidden.shape[1:])
        blocks = at_places(dense.flatten(2).transpose(1, 2), batch["places"].index_select(0, which))  # (b, M, C)
        return pooled[:b, None], pooled[b:, None], small.view(b, -1, small.shape[1]), blocks

    def _teach(self, batch: dict[str, Any], which: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's features of the same large crops, which it sees whole: pooled, and of blocks."""
        crops, b = batch["globals"].index_select(0, which), len(which)
        features = self.backbone.encode(crops.transpose(0, 1).flatten(0, 1))
        dense = block_features([x[:b] for x in features], batch["hidden"].shape[1:])
        return pool_features(features).view(2, b, -1).transpose(0, 1), dense


def sinkhorn(cosines: Tensor, *, temperature: float, iterations: int = 3) -> Tensor:
    """Share out what a batch says over the prototypes, so that each is asked for equally often.

    By turns every prototype is divided by its sum over the samples of all processes, and every sample by its sum over
    the prototypes (Cuturi, arXiv:1306.0895; for centring Caron et al., SwAV, arXiv:2006.09882).

    Args:
        cosines: ``(n, K)``, at most 1.
        temperature: divides them.
        iterations: of both.

    Returns:
        ``(n, K)`` float32, rows that sum to 1.

    Example:
        >>> shares = sinkhorn(torch.tensor([[0.9, 0.8], [0.9, 0.1]]), temperature=0.1)
        >>> [[round(float(share), 2) for share in row] for row in shares]
        [[0.14, 0.86], [0.99, 0.01]]
    """
    logits = cosines.float() / temperature  # shares stay logarithms: none is too small for float32
    for _ in range(iterations):
        asked = gather(logits.logsumexp(0, keepdim=True)).logsumexp(0, keepdim=True)  # (1, K) of all processes
        logits = (logits - asked).log_softmax(1)
    return logits.exp()


def koleo(features: Tensor) -> Tensor:
    """Return the mean of the negative logarithm of the distance to the nearest neighbour, of unit vectors.

    Args:
        features: ``(n, C)`` of this process; neighbours are looked for in all of them.

    Returns:
        a scalar, 0 if there is one vector alone.
    """
    unit = gather(F.normalize(features.float(), dim=-1))  # (n, C) of all processes
    if len(unit) < 2:
        return unit.sum() * 0
    with torch.no_grad():
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        nearest = (unit @ unit.T).masked_fill(itself, -2).argmax(1)
    return -((unit - unit.index_select(0, nearest)).norm(dim=1) + 1e-8).log().mean()


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student, of crops and of hidden blocks, and KoLeo.

    Args:
        student_temperature: divides the student's cosines.
        teacher_temperature: the teacher's, at the start and after its warm-up.
        temperature_warmup: share of the run in which it rises.
        dense_weight: of the hidden blocks.
        koleo_weight: of the spread of features.

    Attributes:
        terms: the three parts of the last call, detached.
    """

    def __init__(
        self,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: Sequence[float] = (0.04, 0.04),
        temperature_warmup: float = 0.1,
        dense_weight: float = 1.0,
        koleo_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if min(student_temperature, *teacher_temperature) <= 0:
            raise ValueError(
                f"temperatures {student_temperature} and {list(teacher_temperature)} must be greater than 0"
            )
        self.student_temperature, self.teacher_temperature = student_temperature, list(teacher_temperature)
        self.temperature_warmup, self.dense_weight, self.koleo_weight = temperature_warmup, dense_weight, koleo_weight
        self.terms: dict[str, Tensor] = {}

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Compare what :class:`DINO` returns; ``batch["progress"]`` sets the teacher's temperature."""
        first, last = self.teacher_temperature
        warm = min(batch["progress"] / self.temperature_warmup, 1.0) if self.temperature_warmup > 0 else 1.0
        temperature = first + (last - first) * warm
        with torch.no_grad():
            targets = sinkhorn(pred["teacher"].flatten(0, 1), temperature=temperature).view(pred["teacher"].shape)
            dense = sinkhorn(pred["teacher_dense"].flatten(0, 1), temperature=temperature)
        said = F.log_softmax(pred["student"].float() / self.student_temperature, dim=-1)  # (B, 2 + L, K)
        surprise = -(targets[:, :, None] * said[:, None]).sum(-1).mean(0)  # (2, 2 + L)
        itself = torch.eye(*surprise.shape, dtype=torch.bool, device=surprise.device)
        # a large crop is not compared with itself
        crops = surprise.masked_fill(itself, 0).sum() / (surprise.numel() - 2)
        blocks = F.log_softmax(pred["student_dense"].float().flatten(0, 1) / self.student_temperature, dim=-1)
        hidden = -(dense * blocks).sum(1).mean()
        spread = torch.stack([koleo(pooled) for pooled in pred["pooled"].unbind(1)]).mean()
        self.terms = {"crops": crops.detach(), "blocks": hidden.detach(), "spread": spread.detach()}
        return crops + self.dense_weight * hidden + self.koleo_weight * spread
