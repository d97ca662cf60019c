# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""VoCo: predict how much a random crop overlaps with each crop of a fixed grid (Wu et al., arXiv:2402.17300).

=========  ========================  ==================================================================
views      ``crops``                 ``(B G + B T, 1, d, h, w)`` the G grid crops of each sample, then its T targets
           ``overlap``               ``(B, T, G)`` share of a target that lies in each grid crop
method     ``base``, ``target``      ``(B, G, 2048)``, ``(B, T, 2048)`` projected features
           ``teacher_...``           the same from the teacher, if there is one
loss       scalar                    prediction of the overlaps + regularization of the grid's similarities
kept       ``backbone``              the encoder; projection and teacher are thrown away, a decoder is not built
=========  ========================  ==================================================================

The predicted overlap is the cosine similarity of a target and a grid crop, negative ones cut off. Different grid crops
are pushed apart. Published for OpenMind (arXiv:2412.17041) with a grid of 4 x 4 x 1 crops of 64^3, four targets and
eight images a step.

The OpenMind cell has no teacher: grid embeddings are constants in the prediction and learn from the regularization
alone, and users report a loss that does not fall. ``teacher_momentum`` switches on the teacher of the original
method: a moving average of the whole network. Then the prediction averages the similarities of targets with the
teacher's grid and of the teacher's targets with the grid, and both sides learn from it. The projection then normalises
over the batch, as that of the original: with the published one, over features, all embeddings soon are the same.

Departures, on purpose: the similarities of one image are compared among themselves, so there are no negatives of other
images; sums over the batch are over all processes. The reference divides the negative term by a count that includes
1e-6 for every pair; so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import gather, weighted_mean
from ..networks import Primus, ProjectionHead, ResEncUNet, follow, in_chunks, pool_features, teacher_of
from ..views import CropAugmentation, SampleKey, SpatialCrop, view_stream

__all__ = ["VoCo", "VoCoLoss", "VoCoViews", "grid_overlap", "project_over_batch"]


def grid_overlap(corners: Tensor, *, grid: Sequence[int], crop_size: int) -> Tensor:
    """Return the share of each crop that lies in each crop of the grid, row by row.

    Args:
        corners: ``(T, 3)`` lower corners in voxels.
        grid: crops along each axis.
        crop_size: side of all crops.

    Returns:
        ``(T, G)``, rows that sum to 1 where the crop lies within the grid.

    Example:
        >>> grid_overlap(torch.tensor([[0, 8, 0], [4, 0, 0]]), grid=(2, 2, 1), crop_size=8)
        tensor([[0.0000, 1.0000, 0.0000, 0.0000],
                [0.5000, 0.0000, 0.5000, 0.0000]])
    """
    shares = []
    for axis in range(3):
        start = torch.arange(grid[axis]) * crop_size
        distance = (corners[:, axis, None] - start).abs()
        shares.append((crop_size - distance).clamp(min=0) / crop_size)  # (T, n)
    return torch.einsum("ti,tj,tk->tijk", *shares).flatten(1)


class VoCoViews:
    """Cut the grid and the random targets from each region and augment every crop on its own.

    Args:
        spatial: how regions are cut; its sides are the grid times the crop.
        grid: crops along each axis.
        crop_size: side of the crops in voxels.
        targets: random crops from each region.
        augmentation: of each crop; None leaves them as they are, for validation.

    Raises:
        ValueError: if the grid does not fill the region.
    """

    def __init__(
        self,
        spatial: SpatialCrop,
        *,
        grid: Sequence[int] = (4, 4, 1),
        crop_size: int = 64,
        targets: int = 4,
        augmentation: CropAugmentation | None = None,
    ) -> None:
        if [n * crop_size for n in grid] != list(spatial.patch_size):
            raise ValueError(
                f"a grid of {list(grid)} crops of crop_size {crop_size} needs patch_size "
                f"{[n * crop_size for n in grid]}, not {list(spatial.patch_size)}"
            )
        self.spatial, self.grid, self.crop_size, self.targets = spatial, list(grid), crop_size, targets
        self.augmentation = augmentation
        axes = [torch.arange(n) * crop_size for n in grid]
        self.corners = torch.cartesian_prod(*axes).view(-1, 3)  # (G, 3), row by row

    def draw(self, key: SampleKey) -> tuple[Tensor, list[torch.Generator]]:
        """Return the lower corners of the targets ``(T, 3)`` and a stream for each crop, grid first."""
        generator = view_stream(key)
        most = torch.tensor([side - self.crop_size for side in self.spatial.patch_size])
        corners = (torch.rand(self.targets, 3, generator=generator) * (most + 1)).long()
        seeds = torch.randint(2**62, (len(self.corners) + self.targets,), generator=generator).tolist()
        return corners, [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map a batch of regions, spatial draws and sample keys on the device to ``crops`` and ``overlap``."""
        regions = self.spatial(batch)  # (B, 1, D, H, W)
        draws = [self.draw(key) for key in batch["key"]]
        side, count = self.crop_size, len(self.corners)
        crops, streams = [], []
        for part in ("grid", "targets"):
            for region, (targets, generators) in zip(regions, draws, strict=True):
                corners = self.corners if part == "grid" else targets
                crops += [region[:, z : z + side, y : y + side, x : x + side] for z, y, x in corners.tolist()]
                streams += generators[:count] if part == "grid" else generators[count:]
        stacked = torch.stack(crops)
        if self.augmentation is not None:
            stacked = self.augmentation(stacked, streams)
        overlap = torch.stack([grid_overlap(t, grid=self.grid, crop_size=side) for t, _ in draws])
        return {"crops": stacked, "overlap": overlap.to(stacked.device, non_blocking=True)}


class VoCo(nn.Module):
    """Encode every crop and project its pooled features; with a teacher, by its moving average too.

    Args:
        backbone: either of the two; its decoder is not used.
        hidden_features: width of the projection's hidden layers.
        embedding_features: width of the embedding.
        teacher_momentum: share of its old weights that the teacher keeps in each step, 0.9 in the original; then the
            projection normalises over the batch, too. None for no teacher, as published for OpenMind.
        chunks: parts in which a batch is computed, for less memory.
    """

    def __init__(
        self,
        backbone: Primus | ResEncUNet,
        *,
        hidden_features: int = 2048,
        embedding_features: int = 2048,
        teacher_momentum: float | None = None,
        chunks: int = 1,
    ) -> None:
        super().__init__()
        if teacher_momentum is not None and not 0 <= teacher_momentum < 1:
            raise ValueError(f"teacher_momentum {teacher_momentum} must be at least 0 and less than 1")
        self.backbone, self.chunks, self.teacher_momentum = backbone, chunks, teacher_momentum
        self.projection = ProjectionHead(
            sum(backbone.feature_channels), hidden_features=hidden_features, out_features=embedding_features
        )
        self.teacher: nn.ModuleList | None = None
        if teacher_momentum is not None:
            self.teacher = nn.ModuleList([teacher_of(backbone), teacher_of(self.projection)])

    def embed(self, crops: Tensor) -> tuple[Tensor]:
        """Map crops ``(n, 1, d, h, w)`` to embeddings ``(n, E)``."""
        return (self.projection(self.pool(crops)[0]),)

    def pool(self, crops: Tensor) -> tuple[Tensor]:
        """Map crops ``(n, 1, d, h, w)`` to averaged features ``(n, C)``."""
        return (pool_features(self.backbone.encode(crops)),)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``base (B, G, E)`` and ``target (B, T, E)``."""
        b, t, g = batch["overlap"].shape
        if self.teacher is None:
            (student,) = in_chunks(self.embed, batch["crops"], self.chunks, self.parameters())
        else:
            (pooled,) = in_chunks(self.pool, batch["crops"], self.chunks, self.backbone.parameters())
            student = project_over_batch(self.projection, pooled)
        pred = {"base": student[: b * g].view(b, g, -1), "target": student[b * g :].view(b, t, -1)}
        if self.teacher is not None:
            with torch.no_grad():
                self._follow()
                (pooled,) = in_chunks(self._teach, batch["crops"], self.chunks)
                teacher = project_over_batch(self.teacher[1], pooled)  # type: ignore[arg-type]
            pred["teacher_base"], pred["teacher_target"] = (
                teacher[: b * g].view(b, g, -1),
                teacher[b * g :].view(b, t, -1),
            )
        return pred

    def _teach(self, crops: Tensor) -> tuple[Tensor]:
        assert self.teacher is not None
        return (pool_features(self.teacher[0].encode(crops)),)  # type: ignore[operator]

    def _follow(self) -> None:
        """Move the teacher towards the student, in training only."""
        if self.training and self.teacher is not None and self.teacher_momentum is not None:
            for teacher, student in zip(self.teacher, (self.backbone, self.projection), strict=True):
                follow(teacher, student, self.teacher_momentum)


def project_over_batch(head: ProjectionHead, x: Tensor) -> Tensor:
    """Project features with norms over the crops of all processes in place of the head's own, in validation as well.

    Args:
        head: whose layers are used.
        x: ``(n, C)``, of this process.

    Returns:
        ``(n, E)``.
    """
    for layer in (head.hidden1, head.hidden2):
        x = layer(x).float()
        everyone = gather(x)
        x = F.relu((x - everyone.mean(0)) * (everyone.var(0, correction=0) + 1e-5).rsqrt())
    return head.output(x)  # type: ignore[no-any-return]


class VoCoLoss(nn.Module):
    """Distance of predicted from true overlaps, and similarity of different grid crops.

    Attributes:
        terms: the two parts of the last call, detached.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, Tensor] = {}

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Compare ``pred`` of :class:`VoCo` with ``batch["overlap"] (B, T, G)``."""
        overlap = batch["overlap"].float()
        base, target = (F.normalize(pred[name].float(), dim=-1) for name in ("base", "target"))
        if "teacher_base" in pred:
            teacher_base, teacher_target = (
                F.normalize(pred[name].float(), dim=-1) for name in ("teacher_base", "teacher_target")
            )
            predicted = (F.relu(target @ teacher_base.mT) + F.relu(teacher_target @ base.mT)) / 2
        else:
            predicted = F.relu(target @ base.detach().mT)  # (B, T, G)
        # overlapping pairs weigh as much as they overlap; the others should not be alike
        near = weighted_mean(-overlap * torch.log(1 - (overlap - predicted).abs() + 1e-6), overlap)
        apart = (overlap == 0).float()
        far = weighted_mean(predicted.square() * apart, apart + 1e-6)
        g = base.shape[1]
        likeness = F.relu(base @ base.mT)  # (B, G, G)
        regularization = likeness.triu(diagonal=1).sum((1, 2)).mean() * 2 / (g * (g - 1))
        self.terms = {"prediction": (near + far).detach(), "regularization": regularization.detach()}
        return near + far + regularization
