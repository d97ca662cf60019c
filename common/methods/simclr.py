# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""SimCLR: recognise two overlapping, differently augmented crops of one place among all others (Chen et al.,
arXiv:2002.05709).

=========  ========================  ==================================================================
views      ``crops``                 ``(2 N, 1, d, h, w)`` N reference crops (two of each image), then their N partners
           ``overlap``               ``(N, N)`` share of a reference that lies in a partner, for pictures
method     ``embedding``             ``(2, N, 2048)`` projected features of references and partners
loss       scalar                    normalised-temperature cross-entropy over all 2 N crops (``NTXentLoss``)
kept       ``backbone``              the encoder; the projection is thrown away, a decoder is not built
=========  ========================  ==================================================================

A partner lies at most half a crop from its reference along each axis, so that they share half of every side. The
projection reads the averages of all feature maps. Published for OpenMind (arXiv:2412.17041) with two pairs of 64^3
crops of each 192 x 192 x 64 region, 32 images a step.

Departures, on purpose: negatives come from the whole global batch, gathered over processes with gradients, and with
gradient accumulation from a two-pass cache of embeddings, so that one GPU and four train the same method. The reference
contrasts within each GPU: ``negatives: local`` reproduces that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..losses import NTXentLoss
from ..networks import Primus, ProjectionHead, ResEncUNet, in_chunks, pool_features
from ..views import CropAugmentation, SampleKey, SpatialCrop, view_stream

__all__ = ["SimCLR", "SimCLRLoss", "SimCLRViews"]


class SimCLRViews:
    """Cut pairs of overlapping crops from each region and augment every crop on its own.

    Args:
        spatial: how regions are cut.
        crop_size: side of the crops in voxels.
        pairs: pairs of crops from each region.
        max_shift: largest distance between partners along an axis, in voxels; half a crop unless given.
        augmentation: of each crop; None leaves them as they are, for validation.

    Raises:
        ValueError: if a crop does not fit into the region, or partners need not overlap.
    """

    def __init__(
        self,
        spatial: SpatialCrop,
        *,
        crop_size: int = 64,
        pairs: int = 2,
        max_shift: int | None = None,
        augmentation: CropAugmentation | None = None,
    ) -> None:
        self.max_shift = crop_size // 2 if max_shift is None else max_shift
        if min(spatial.patch_size) < crop_size:
            raise ValueError(f"crop_size {crop_size} does not fit into patch_size {list(spatial.patch_size)}")
        if not 0 <= self.max_shift < crop_size:
            raise ValueError(f"max_shift {self.max_shift} must be less than crop_size {crop_size}")
        self.spatial, self.crop_size, self.pairs, self.augmentation = spatial, crop_size, pairs, augmentation

    def draw(self, key: SampleKey) -> tuple[Tensor, list[torch.Generator]]:
        """Place the crops of one sample.

        Returns:
            lower corners in the region ``(2, pairs, 3)``, references and partners, and a stream for each crop.
        """
        generator = view_stream(key)
        most = torch.tensor([side - self.crop_size for side in self.spatial.patch_size])
        reference = (torch.rand(self.pairs, 3, generator=generator) * (most + 1)).long()
        shift = torch.randint(-self.max_shift, self.max_shift + 1, (self.pairs, 3), generator=generator)
        partner = (reference + shift).clamp(min=0).minimum(most)
        seeds = torch.randint(2**62, (2 * self.pairs,), generator=generator).tolist()
        return torch.stack([reference, partner]), [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map a batch of regions, spatial draws and sample keys on the device to ``crops`` and ``overlap``."""
        regions = self.spatial(batch)  # (B, 1, D, H, W)
        draws = [self.draw(key) for key in batch["key"]]
        side = self.crop_size
        crops, streams = [], []
        for view in range(2):
            for region, (corners, generators) in zip(regions, draws, strict=True):
                crops += [region[:, z : z + side, y : y + side, x : x + side] for z, y, x in corners[view].tolist()]
                streams += generators[view * self.pairs : (view + 1) * self.pairs]
        stacked = torch.stack(crops)  # (2 N, 1, d, h, w)
        if self.augmentation is not None:
            stacked = self.augmentation(stacked, streams)
        distance = [(reference[:, None] - partner[None]).abs() for (reference, partner), _ in draws]
        shared = [((side - d).clamp(min=0) / side).prod(-1) for d in distance]  # (pairs, pairs) of each image
        overlap = torch.block_diag(*shared)  # type: ignore[no-untyped-call]
        return {"crops": stacked, "overlap": overlap.to(stacked.device, non_blocking=True)}


class SimCLR(nn.Module):
    """Encode every crop and project its pooled features.

    Args:
        backbone: either of the two; its decoder is not used.
        hidden_features: width of the projection's hidden layers.
        embedding_features: width of the embedding.
        chunks: parts in which a batch is computed, for less memory.
    """

    def __init__(
        self,
        backbone: Primus | ResEncUNet,
        *,
        hidden_features: int = 2048,
        embedding_features: int = 2048,
        chunks: int = 1,
    ) -> None:
        super().__init__()
        self.backbone, self.chunks = backbone, chunks
        self.projection = ProjectionHead(
            sum(backbone.feature_channels), hidden_features=hidden_features, out_features=embedding_features
        )

    def embed(self, crops: Tensor) -> tuple[Tensor]:
        """Map crops ``(n, 1, d, h, w)`` to embeddings ``(n, E)``."""
        return (self.projection(pool_features(self.backbone.encode(crops))),)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``{"embedding": (2, N, E)}``."""
        (embedding,) = in_chunks(self.embed, batch["crops"], self.chunks, self.parameters())
        return {"embedding": embedding.view(2, -1, embedding.shape[-1])}


class SimCLRLoss(nn.Module):
    """Contrast references and partners.

    Args:
        temperature: divides the cosine similarities.
        negatives: ``global`` or ``local``, see :class:`~..losses.NTXentLoss`.
    """

    def __init__(self, *, temperature: float = 0.5, negatives: str = "global") -> None:
        super().__init__()
        self.contrast = NTXentLoss(temperature=temperature, negatives=negatives)

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Return the loss of ``pred["embedding"] (2, N, E)``."""
        return self.contrast(pred["embedding"])  # type: ignore[no-any-return]
