# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""JEPA: predict what an encoder makes of hidden blocks from what it makes of the visible rest, in features and not in
voxels (Assran et al., I-JEPA, arXiv:2301.08243).

=========  ========================  ==================================================================
views      ``image``                 ``(B, 1, D, H, W)`` augmented crop, z-scored
           ``hidden``                ``(B, d, h, w)`` boolean grid of blocks: boxes, as many blocks in every sample
           ``places``, ``seen``      ``(B, M)``, ``(B, N - M)`` hidden and visible blocks by their number in the grid
           ``progress``              share of the run that is done, for the teacher's momentum
           ``seed``                  a number that each step has for itself, the same in all processes
method     ``prediction``            ``(B, M, C)`` features of the hidden blocks, as predicted
           ``target``                ``(B, M, C)`` the same of the target encoder, which sees the whole crop
           ``context``               ``(B, N - M, C)`` features of the visible blocks
           ``features``              ``(B, C, d, h, w)`` the target encoder's, for pictures
loss       scalar                    mean squared error, and at a weight the distance from isotropy
kept       ``backbone``              the target encoder; the predictor and, with a teacher, the encoder that
                                     learns are thrown away, a decoder is not built
=========  ========================  ==================================================================

The target encoder is a teacher: a moving average of the encoder that learns. Its features of a block are the averages
of all its maps there, each map normalised over its channels, as the paper normalises its targets. The encoder that
learns computes visible blocks only: Primus drops the tokens of hidden ones, the U-Net is sparse as Spark3D's. A narrow
transformer gets its features in visible places and one learned token in hidden ones, and predicts.

With ``isotropy_weight`` the features are drawn towards a normal distribution of equal spread in all directions (SIGReg
of LeJEPA, Balestriero and LeCun, arXiv:2511.08544): along random directions, the distance of their characteristic
function from that of the standard normal distribution. Then ``teacher_momentum: null`` leaves out the teacher: one
encoder learns from both sides, and nothing but isotropy keeps it from one answer for all.

Departures, on purpose: hidden boxes are added until a fixed share of the blocks is hidden, so that all samples show as
many; all hidden blocks are predicted at once, not box by box. A map of the U-Net that is coarser than a block hides
nothing, so the part of a target that it gives also tells of visible neighbours. SIGReg is not multiplied by the number
of rows, which are blocks here and not images; of a batch in parts it is that of each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import gather
from ..networks import Primus, ResEncUNet, Transformer, at_places, block_features, follow, momentum_at, teacher_of
from ..views import SampleKey, SpatialCrop, VisibleBlocks, progress_of, step_stream, view_stream

__all__ = ["JEPA", "JEPALoss", "JEPAViews", "draw_hidden_boxes", "isotropy"]


def draw_hidden_boxes(
    grid: Sequence[int], *, ratio: float, box_share: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Hide boxes of a grid until a share of its blocks is hidden, exactly.

    Args:
        grid: blocks along each axis.
        ratio: share to hide; ``int(ratio * blocks)`` are hidden.
        box_share: a box is of a share of all blocks uniform between these, its sides longer or shorter by a quarter.
        generator: where the draws come from.

    Returns:
        boolean ``grid``, true where hidden. Of the last box only as many blocks as are wanted, in a row.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> int(draw_hidden_boxes([4, 4, 4], ratio=0.6, box_share=[0.1, 0.2], generator=generator).sum())
        38
    """
    hidden = torch.zeros(*grid, dtype=torch.bool)
    left = int(ratio * hidden.numel())
    low, high = box_share
    while left > 0:
        share, *others = torch.rand(7, dtype=torch.float64, generator=generator).tolist()
        side = (low + (high - low) * share) ** (1 / 3)
        where = []
        for blocks, stretch, place in zip(grid, others[:3], others[3:], strict=True):
            length = min(max(round(blocks * side * (0.75 + 0.5 * stretch)), 1), blocks)
            start = int(place * (blocks - length + 1))
            where.append(slice(start, start + length))
        box = torch.zeros_like(hidden)
        box[where[0], where[1], where[2]] = True
        new = (box & ~hidden).flatten().nonzero().squeeze(1)[:left]
        hidden.view(-1)[new] = True
        left -= len(new)
    return hidden


class JEPAViews:
    """Cut the crops and draw which boxes of them are hidden.

    Args:
        spatial: how crops are cut and augmented.
        block_size: side of a block in voxels.
        hidden_ratio: share of blocks to hide.
        box_share: share of all blocks that a box is of, drawn between these.
        batch_size: samples of one optimizer step over all processes, by which samples of one step find each other.
        steps: of the run, and of one of its epochs, for ``progress``; None for views that are at its end, as those of
            validation.
        sparse: also say which blocks are neighbours, for an encoder that computes visible ones only.

    Raises:
        ValueError: if a crop side is not a multiple of the block, the ratio leaves nothing hidden or visible, or a box
            cannot be of such a share.
    """

    def __init__(
        self,
        spatial: SpatialCrop,
        *,
        block_size: int,
        hidden_ratio: float = 0.6,
        box_share: Sequence[float] = (0.1, 0.2),
        batch_size: int = 8,
        steps: Sequence[int] | None = None,
        sparse: bool = False,
    ) -> None:
        if any(side % block_size for side in spatial.patch_size):
            raise ValueError(f"patch_size {list(spatial.patch_size)} is not a multiple of block_size {block_size}")
        self.spatial, self.block_size, self.sparse, self.batch_size = spatial, block_size, sparse, batch_size
        self.grid = [side // block_size for side in spatial.patch_size]
        self.blocks = self.grid[0] * self.grid[1] * self.grid[2]
        self.hidden_ratio, self.box_share = hidden_ratio, [float(share) for share in box_share]
        if not 0 < int(hidden_ratio * self.blocks) < self.blocks:
            raise ValueError(f"hidden_ratio {hidden_ratio} of {self.blocks} blocks must hide at least one and not all")
        if len(self.box_share) != 2 or not 0 < self.box_share[0] <= self.box_share[1] <= 1:
            raise ValueError(f"box_share {list(box_share)} must be two numbers that rise within 0 and 1")
        self._steps = steps  # a run may be made longer, and is the same run

    def draw(self, key: SampleKey) -> Tensor:
        """Say what is hidden of one sample."""
        return draw_hidden_boxes(
            self.grid, ratio=self.hidden_ratio, box_share=self.box_share, generator=view_stream(key)
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Map a batch of regions, spatial draws and sample keys on the device to the views above.

        Returns:
            besides, ``visible_count``, how many blocks every sample shows, and ``blocks`` for a sparse encoder.
        """
        image = self.spatial(batch)  # (B, 1, D, H, W)
        hidden = torch.stack([self.draw(key) for key in batch["key"]])  # (B, d, h, w)
        # a stable sort puts the hidden blocks first, both parts in the order of the grid
        order = torch.argsort(hidden.flatten(1).to(torch.uint8), dim=1, descending=True, stable=True)  # (B, N)
        count = int(self.hidden_ratio * self.blocks)
        seed, epoch, index = batch["key"][0]
        step = index // self.batch_size
        views = {
            "image": image,
            "hidden": hidden.to(image.device, non_blocking=True),
            "places": order[:, :count].to(image.device, non_blocking=True),
            "seen": order[:, count:].to(image.device, non_blocking=True),
            "visible_count": self.blocks - count,
            "progress": progress_of(epoch, step, self._steps),
            "seed": int(step_stream(seed, epoch, step).integers(2**32)),
        }
        if self.sparse:
            views["blocks"] = VisibleBlocks.of(~hidden).to(image.device)
        return views


class JEPA(nn.Module):
    """Encode visible blocks, predict the features of hidden ones, and look them up in the target encoder.

    Args:
        backbone: either of the two; its decoder is not used. With a teacher it becomes that, and a copy of it learns.
        grid: blocks of a crop along each axis, for which the predictor's table of positions is made.
        predictor_dim: channels of the predictor.
        predictor_depth: its blocks.
        predictor_heads: its attention heads; channels of a head are a multiple of 6.
        teacher_momentum: share of its old weights that the teacher keeps in a step, at the start and at the end; None
            for no teacher, which needs isotropy.
    """

    def __init__(
        self,
        backbone: Primus | ResEncUNet,
        *,
        grid: Sequence[int],
        predictor_dim: int = 384,
        predictor_depth: int = 6,
        predictor_heads: int = 8,
        teacher_momentum: Sequence[float] | None = (0.996, 1.0),
    ) -> None:
        super().__init__()
        self.backbone, width = backbone, sum(backbone.feature_channels)
        self.teacher_momentum = None if teacher_momentum is None else list(teacher_momentum)
        self.student: Primus | ResEncUNet | None = None
        if self.teacher_momentum is not None:
            momentum_at(0.0, momentum=self.teacher_momentum)  # in words, before any step
            self.student = teacher_of(backbone).requires_grad_(True)
            backbone.requires_grad_(False)
        self.enter = nn.Linear(width, predictor_dim)
        self.predictor = Transformer(
            predictor_dim,
            depth=predictor_depth,
            num_heads=predictor_heads,
            grid=(grid[0], grid[1], grid[2]),
            checkpointing=backbone.checkpointing,
        )
        self.leave = nn.Linear(predictor_dim, width)
        self.mask_token = nn.Parameter(torch.empty(predictor_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self._followed: int | None = None  # the step in which the teacher moved last

    def train(self, mode: bool = True) -> JEPA:
        """Set the mode of what learns: a teacher never drops anything."""
        super().train(mode)
        if self.student is not None:
            self.backbone.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to predictions, targets and features, see the table above."""
        image, hidden = batch["image"], batch["hidden"]
        grid = hidden.shape[1:]
        if self.training:
            self._follow(batch)
        # the target encoder sees all. A teacher gets no gradient and takes one crop after the other, for less memory;
        # without one both sides learn
        crops = [image] if self.student is None else list(image[:, None])
        with torch.set_grad_enabled(self.student is None and torch.is_grad_enabled()):
            said = [_joined([block_features([x], grid) for x in self.backbone.encode(crop)]) for crop in crops]
        whole = torch.cat(said)  # (B, N, C)
        # what learns sees the visible blocks alone
        encoder = self.backbone if self.student is None else self.student
        maps = encoder.encode_visible(
            image, ~hidden, blocks=batch.get("blocks"), visible_count=batch.get("visible_count")
        )
        visible = _joined([one.described(grid) for one in maps])  # (B, N, C), of no meaning in hidden places
        # the predictor gets them, and one token in every hidden place, which its positions tell apart
        entered = self.enter(visible)  # (B, N, P)
        entered = torch.where(hidden.flatten(1)[:, :, None], self.mask_token.to(entered.dtype), entered)
        places = entered.transpose(1, 2).reshape(len(image), -1, *grid)  # (B, P, d, h, w)
        predicted = self.predictor(places).flatten(2).transpose(1, 2)  # (B, N, P)
        prediction = self.leave(at_places(predicted, batch["places"]))  # (B, M, C)
        return {
            "prediction": prediction,
            "target": at_places(whole, batch["places"]),
            "context": at_places(visible, batch["seen"]),
            "features": whole.detach().transpose(1, 2).reshape(len(image), -1, *grid),
        }

    def _follow(self, batch: dict[str, Any]) -> None:
        """Move the teacher towards what the last step made of the student: once a step, of however many parts."""
        if self.student is None or self.teacher_momentum is None or batch["seed"] == self._followed:
            return
        follow(self.backbone, self.student, momentum_at(batch["progress"], momentum=self.teacher_momentum))
        self._followed = batch["seed"]


def _joined(maps: Sequence[Tensor]) -> Tensor:
    """Return the features of all blocks ``(B, N, C)``, each map ``(B, c, d, h, w)`` normalised over its channels."""
    parts = [x.flatten(2).transpose(1, 2) for x in maps]  # each (B, N, c)
    return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in parts], dim=-1)


def isotropy(features: Tensor, *, seed: int, directions: int = 256, points: int = 9) -> Tensor:
    """Return how far features are from a standard normal distribution, 0 if they have it.

    Along random directions, the squared distance between their empirical characteristic function and ``exp(-t^2 / 2)``,
    weighted by the latter and integrated over t from -5 to 5 (Epps and Pulley, doi:10.1093/biomet/70.3.723); the mean
    over directions. One that is the same for all scores about 1.06.

    Args:
        features: ``(n, C)`` of this process; as many in every other.
        seed: of the directions, the same in all processes.
        directions: how many.
        points: of the trapezoidal rule from 0 to 5; what lies below 0 is the same again.
    """
    drawn = torch.randn(features.shape[1], directions, generator=torch.Generator().manual_seed(seed))
    drawn = F.normalize(drawn, dim=0).to(features.device, non_blocking=True)
    with torch.autocast(features.device.type, enabled=False):
        along = features.float() @ drawn  # (n, directions)
        t = torch.linspace(0, 5, points, device=features.device)
        normal = torch.exp(-t.square() / 2)
        turned = [along * at for at in t.unbind()]
        parts = torch.stack([torch.stack([angle.cos().mean(0), angle.sin().mean(0)]) for angle in turned])
        # real and imaginary part (points, 2, directions), the mean of all processes
        found = gather(parts[None]).mean(0)
        apart = (found[:, 0] - normal[:, None]).square() + found[:, 1].square()  # (points, directions)
        return 2 * torch.trapezoid(apart * normal[:, None], t, dim=0).mean()


class JEPALoss(nn.Module):
    """Mean squared error of the predicted features, and a weight times how far features are from isotropy.

    Args:
        isotropy_weight: 0 leaves it out.
        directions: random ones along which isotropy is looked at.
        with_teacher: targets are a teacher's; without one isotropy is needed, and is that of targets, too.

    Raises:
        ValueError: if there is neither a teacher nor isotropy, or the weight is negative.

    Attributes:
        terms: the two parts of the last call, detached; empty without isotropy.
    """

    def __init__(self, *, isotropy_weight: float = 0.0, directions: int = 256, with_teacher: bool = True) -> None:
        super().__init__()
        if isotropy_weight < 0:
            raise ValueError(f"isotropy_weight {isotropy_weight} must be at least 0")
        if isotropy_weight == 0 and not with_teacher:
            raise ValueError(
                "isotropy_weight 0 and no teacher: one answer for all would be perfect; add --isotropy_weight 1, or "
                "leave --teacher_momentum as it is"
            )
        self.isotropy_weight, self.directions, self.with_teacher = isotropy_weight, directions, with_teacher
        self.terms: dict[str, Tensor] = {}

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Compare ``prediction`` with ``target``; ``batch["seed"]`` draws the directions."""
        error = (pred["prediction"].float() - pred["target"].float()).square().mean()
        if self.isotropy_weight == 0:
            return error
        learned = ["context"] if self.with_teacher else ["context", "target"]
        spread = torch.stack(
            [isotropy(pred[name].flatten(0, 1), seed=batch["seed"], directions=self.directions) for name in learned]
        ).mean()
        self.terms = {"prediction": error.detach(), "isotropy": spread.detach()}
        return error + self.isotropy_weight * spread
