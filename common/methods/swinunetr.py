# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""SwinUNETR pre-training: rebuild what was cut out, tell how the crop was turned, recognise its other view (Tang et
al., arXiv:2111.14791).

=========  ========================  ==================================================================
views      ``image``                 ``(2 B, 1, D, H, W)`` first views of all crops, then second views: turned, cut
           ``target``                ``(2 B, 1, D, H, W)`` the same before boxes were cut out
           ``rotation``              ``(2 B,)`` quarter turns in the plane of the last two axes
method     ``reconstruction``        ``(2 B, 1, D, H, W)`` from the coarsest features alone
           ``rotation``              ``(2 B, 4)`` logits
           ``embedding``             ``(2, B, 512)``
loss       scalar                    L1 over all voxels + cross-entropy of the turn + ``NTXentLoss``
kept       ``backbone``              the encoder; the three heads are thrown away, a decoder is not built
=========  ========================  ==================================================================

Boxes with random noise cover up to 30 % of each view, then boxes copied from another crop of the batch as much again.
The name is that of the method; the networks are ResEnc-L and Primus (published, arXiv:2412.17041).

As in the original code, the turn is read from the first voxel of the coarsest map and the embedding from the second.

Departures, on purpose: negatives come from the whole global batch, see SimCLR; ``negatives: local`` reproduces the
reference. Boxes are copied from the other crop before its own boxes are cut, so that the order of samples has no
influence; that other crop is one of the same process, as in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import NTXentLoss
from ..networks import Convolution, Primus, ResEncUNet, in_chunks, recalled, selects
from ..views import SampleKey, SpatialCrop, view_stream

__all__ = ["SwinUNETRLoss", "SwinUNETRPretraining", "SwinUNETRViews", "ViewDraw"]


@dataclass(frozen=True)
class ViewDraw:
    """How one view of a crop is made.

    Attributes:
        rotation: quarter turns.
        noise_boxes: ``(n, 6)`` lower and upper corners of boxes that are filled with noise.
        copy_boxes: the same for boxes that are copied.
        other: a number in [0, 1) that chooses the crop to copy from.
        noise_seed: of the stream on the device that the noise comes from.
    """

    rotation: int
    noise_boxes: list[list[int]]
    copy_boxes: list[list[int]]
    other: float
    noise_seed: int


class SwinUNETRViews:
    """Make two views of each crop.

    Args:
        spatial: how crops are cut; their last two sides must be equal.
        cut_share: largest share of a view's voxels that boxes of one kind cover, overlaps counted twice.
        smallest_box: shortest side of a box as a part of the crop's; 1/20 is 8 of 160 voxels.
        largest_box: longest side, exclusive; 1/4 is 40 of 160 voxels.

    Raises:
        ValueError: if the crop cannot be turned, or is too small for the boxes.
    """

    def __init__(
        self, spatial: SpatialCrop, *, cut_share: float = 0.3, smallest_box: float = 1 / 20, largest_box: float = 1 / 4
    ) -> None:
        size = spatial.patch_size
        if size[1] != size[2]:
            raise ValueError(f"patch_size {list(size)} cannot be turned: its last two sides must be equal")
        if min(size) < 8:
            raise ValueError(f"patch_size {list(size)} is too small to cut boxes from; its sides must be at least 8")
        self.spatial, self.cut_share = spatial, cut_share
        self.smallest = torch.tensor([max(1, int(side * smallest_box)) for side in size])
        self.largest = torch.tensor([int(side * largest_box) for side in size])

    def draw(self, key: SampleKey) -> list[ViewDraw]:
        """Draw the two views of one sample."""
        generator = view_stream(key)
        return [
            ViewDraw(
                rotation=int(torch.randint(4, (), generator=generator)),
                noise_boxes=self._boxes(generator),
                copy_boxes=self._boxes(generator),
                other=float(torch.rand((), generator=generator)),
                noise_seed=int(torch.randint(2**62, (), generator=generator)),
            )
            for _ in range(2)
        ]

    def _boxes(self, generator: torch.Generator) -> list[list[int]]:
        """Draw boxes until their volumes add up to a random share of the crop."""
        size = torch.tensor(self.spatial.patch_size)
        budget = float(torch.rand((), generator=generator)) * self.cut_share * float(size.prod())
        covered, boxes = 0.0, []
        while covered < budget:
            low = (torch.rand(3, generator=generator) * (size - self.smallest)).long()
            sides = self.smallest + (torch.rand(3, generator=generator) * (self.largest - self.smallest)).long()
            high = (low + sides).minimum(size)
            covered += float((high - low).prod())
            boxes.append([*low.tolist(), *high.tolist()])
        return boxes

    def cut(self, view: Tensor, other: Tensor | None, draw: ViewDraw) -> Tensor:
        """Cut the drawn boxes out of one turned crop.

        Args:
            view: ``(D, H, W)``, not changed.
            other: ``(D, H, W)`` to copy from, None to leave out the copied boxes.
            draw: what :meth:`draw` returned.
        """
        cut = view.clone()
        noise = torch.Generator(view.device).manual_seed(draw.noise_seed)
        for z0, y0, x0, z1, y1, x1 in draw.noise_boxes:
            box = torch.randn(z1 - z0, y1 - y0, x1 - x0, generator=noise, device=view.device)
            low, high = box.aminmax()
            cut[z0:z1, y0:y1, x0:x1] = (box - low) / (high - low).clamp(min=1e-8)
        if other is not None:
            for z0, y0, x0, z1, y1, x1 in draw.copy_boxes:
                cut[z0:z1, y0:y1, x0:x1] = other[z0:z1, y0:y1, x0:x1]
        return cut

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map a batch of regions, spatial draws and sample keys on the device to the views."""
        crops = self.spatial(batch).squeeze(1)  # (B, D, H, W)
        draws = [self.draw(key) for key in batch["key"]]
        images, targets, rotations = [], [], []
        for view in range(2):
            turned = [crop.rot90(draw[view].rotation, dims=(1, 2)) for crop, draw in zip(crops, draws, strict=True)]
            for index, draw in enumerate(draws):
                other = int(draw[view].other * len(turned))
                images.append(self.cut(turned[index], None if other == index else turned[other], draw[view]))
                rotations.append(draw[view].rotation)
            targets += turned
        return {
            "image": torch.stack(images).unsqueeze(1),
            "target": torch.stack(targets).unsqueeze(1),
            "rotation": torch.tensor(rotations).to(crops.device, non_blocking=True),
        }


class ReconstructionHead(nn.Module):
    """Convolutions and trilinear up-sampling from the coarsest map to the image.

    Args:
        widths: channels of each resolution, coarse to fine.
        checkpointing: ``selective`` keeps the outputs of the convolutions only.
    """

    def __init__(self, widths: list[int], *, checkpointing: str = "none") -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.convolutions = nn.ModuleList(
            Convolution(before, after, kernel_size=3, padding=1) for before, after in pairwise([*widths, 1])
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, widths[0], d, h, w)`` to ``(B, 1, D, H, W)``."""
        if selects(self):
            return self._recalling(x)
        for convolution in self.convolutions[:-1]:
            x = _doubled(_normalised(convolution(x)))
        return self.convolutions[-1](x)  # type: ignore[no-any-return]

    def _recalling(self, x: Tensor) -> Tensor:
        """Keep the outputs of the convolutions; the last step, at full resolution, is taken sample by sample."""
        x = self.convolutions[0](x)
        for convolution in self.convolutions[1:-1]:
            x, again = recalled(_normalised, x)
            x, again = recalled(_doubled, x, source=again)
            with again.instead_of(x):
                x = convolution(x)
        (x,) = in_chunks(lambda x: (self.convolutions[-1](_doubled(_normalised(x))),), x, len(x))
        return x


def _normalised(x: Tensor) -> Tensor:
    return torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, True)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(F.leaky_relu(x, 0.01), scale_factor=2, mode="trilinear")


class SwinUNETRPretraining(nn.Module):
    """The encoder with three heads on its coarsest map.

    Args:
        backbone: either of the two; its decoder is not used.
        embedding_features: width of the embedding.
        chunks: parts in which a batch is computed, for less memory.
    """

    def __init__(self, backbone: Primus | ResEncUNet, *, embedding_features: int = 512, chunks: int = 1) -> None:
        super().__init__()
        self.backbone, self.chunks = backbone, chunks
        channels, steps = backbone.feature_channels, backbone.feature_strides[-1].bit_length() - 1
        # as wide as the encoder's own maps where it has one for each resolution, halving otherwise
        widths = channels[::-1] if len(channels) == steps + 1 else [channels[-1] // 2**i for i in range(steps + 1)]
        self.rotation_head = nn.Linear(channels[-1], 4)
        self.contrast_head = nn.Linear(channels[-1], embedding_features)
        self.reconstruction_head = ReconstructionHead(widths, checkpointing=backbone.checkpointing)

    def predict(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``(n, 1, D, H, W)`` to reconstruction, rotation logits and embedding."""
        coarsest = self.backbone.encode(image)[-1]  # (n, C, d, h, w)
        tokens = coarsest.flatten(2)  # (n, C, N)
        if tokens.shape[2] < 2:
            raise ValueError(f"patch_size {list(image.shape[2:])} leaves one voxel on the coarsest map; two are read")
        return (
            self.reconstruction_head(coarsest),
            self.rotation_head(tokens[..., 0]),
            self.contrast_head(tokens[..., 1]),
        )

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Map the views to ``reconstruction``, ``rotation`` and ``embedding``."""
        reconstruction, rotation, embedding = in_chunks(self.predict, batch["image"], self.chunks, self.parameters())
        embedding = embedding.view(2, -1, embedding.shape[-1])
        return {"reconstruction": reconstruction, "rotation": rotation, "embedding": embedding}


class SwinUNETRLoss(nn.Module):
    """Sum of the three losses, equally weighted.

    Args:
        temperature: divides the cosine similarities.
        negatives: ``global`` or ``local``, see :class:`~..losses.NTXentLoss`.

    Attributes:
        terms: the three parts of the last call, detached.
    """

    def __init__(self, *, temperature: float = 0.5, negatives: str = "global") -> None:
        super().__init__()
        self.contrast = NTXentLoss(temperature=temperature, negatives=negatives)
        self.terms: dict[str, Tensor] = {}

    def forward(self, pred: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Compare ``pred`` of :class:`SwinUNETRPretraining` with the views."""
        terms = {
            "reconstruction": F.l1_loss(pred["reconstruction"].float(), batch["target"].float()),
            "contrast": self.contrast(pred["embedding"]),
            "rotation": F.cross_entropy(pred["rotation"].float(), batch["rotation"]),
        }
        self.terms = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()
