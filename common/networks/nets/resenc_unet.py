# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Residual-encoder U-Net, the CNN backbone of OpenMind.

========  =====================================================================
goes in   image ``(B, in_channels, D, H, W)``, sides a multiple of the total stride
between   feature maps, fine to coarse, ``(B, features[s], D/stride_s, ...)``
comes out ``(B, out_channels, D, H, W)``
========  =====================================================================

Named size ``resenc_l``: six stages, 102.3 million parameters (Isensee et al., arXiv:2404.09556; Wald et al.,
arXiv:2412.17041). The deep-supervision heads that the published files carry beside the last one are never used there;
here they are built if asked for, to train from scratch as nnU-Net does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, List, Optional

import torch
from torch import Tensor, nn

from ...views.blocks import VisibleBlocks
from ..blocks.block_sparse import BlockMap, recall_unit, run_stage, run_unit
from ..blocks.convolution import ConvBlock, Convolution, ResidualBlock, Stage, Upsampling
from ..blocks.recompute import Again, convolve_joined, mode_of, recalled, selects
from ..blocks.sparse import MaskedMap, mask_at
from ..untrained import watch_untrained

__all__ = ["ResEncUNet", "initialize_he", "resenc_l"]

_MOST_VISIBLE = 0.7  # of all blocks; beyond it the dense computation is the faster one


def initialize_he(module: nn.Module) -> None:
    """Draw convolution weights as nnU-Net does for training from scratch: He-normal, slope 0.01, biases zero."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            nn.init.kaiming_normal_(layer.weight, a=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def begin_as_shortcuts(module: nn.Module) -> None:
    """Set the last norm of every residual block to zero, so that the block begins as its shortcut, as nnU-Net does."""
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            nn.init.zeros_(block.conv2.norm.weight)
            nn.init.zeros_(block.conv2.norm.bias)


def masked(x: Tensor, seen: Optional[Tensor], mask_token: Optional[Tensor]) -> Tensor:
    """Put a token in the place of hidden features of the stem."""
    if mask_token is None or seen is None:
        return x
    return torch.where(seen > 0, x, mask_token.to(x.dtype))


class ResidualEncoder(nn.Module):
    """Stem and residual stages; returns every stage's output, fine to coarse."""

    def __init__(
        self,
        in_channels: int,
        *,
        features_per_stage: Sequence[int],
        blocks_per_stage: Sequence[int],
        dropout: float,
        checkpointing: str,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = ConvBlock(in_channels, features_per_stage[0], dropout=dropout)
        stages = []
        channels = features_per_stage[0]
        for index, (features, blocks) in enumerate(zip(features_per_stage, blocks_per_stage, strict=True)):
            how: dict[str, Any] = {"dropout": dropout, "checkpointing": checkpointing}
            first = ResidualBlock(channels, features, stride=1 if index == 0 else 2, **how)
            rest = [ResidualBlock(features, features, **how) for _ in range(blocks - 1)]
            stages.append(Stage(first, *rest))
            channels = features
        self.stages = nn.ModuleList(stages)

    def forward(
        self, image: Tensor, visible: Optional[Tensor] = None, mask_token: Optional[Tensor] = None, sparse: bool = False
    ) -> List[Tensor]:
        """Map ``(B, C, D, H, W)`` to one map per stage; how blocks are hidden is told in :meth:`ResEncUNet.encode`."""
        seen = mask_at(visible, list(image.shape[2:]), 1)
        if seen is not None:
            image = image * seen
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if selects(self):
                return self._recalling(image, seen, mask_token, visible if sparse else None)
        x = masked(self.stem(image, seen if sparse else None), seen, mask_token)
        features: List[Tensor] = []
        for index, stage in enumerate(self.stages):
            seen = mask_at(visible if sparse else None, list(image.shape[2:]), 1 << index)
            x = stage(x, seen)
            features.append(x)
        return features

    def _recalling(
        self, image: Tensor, seen: Optional[Tensor], mask_token: Optional[Tensor], hidden: Optional[Tensor]
    ) -> List[Tensor]:
        """Do the same with the image kept instead of what the stem makes of it."""
        x, again = self.stem.recalled_whole(image, None if hidden is None else seen)
        x, again = recalled(lambda x: masked(x, seen, mask_token), x, source=again)
        features: List[Tensor] = []
        for index, stage in enumerate(self.stages):
            shown = mask_at(hidden, list(image.shape[2:]), 1 << index)
            with again.instead_of(x) if index == 0 else nullcontext():
                x = stage(x, shown)
            features.append(x)
        return features

    def forward_visible(self, image: Tensor, visible: Tensor, blocks: VisibleBlocks) -> list[BlockMap | MaskedMap]:
        """Map ``(B, C, D, H, W)`` to one map per stage, of visible voxels: in whole blocks, then dense."""
        stages, size = self._stages_in_blocks(image, blocks), list(image.shape[2:])
        if stages == 0:
            maps = enumerate(self.forward(image, visible, None, True))
            return [MaskedMap(values, mask_at(visible, size, 1 << index)) for index, values in maps]
        x: BlockMap | MaskedMap
        again: Again | None = None
        if selects(self):
            x, again = recall_unit(self.stem, BlockMap.of(image, blocks))
        else:
            x = run_unit(self.stem, BlockMap.of(image, blocks))
        features: list[BlockMap | MaskedMap] = []
        for index, stage in enumerate(self.stages):
            if isinstance(x, BlockMap) and index < stages:
                with again.instead_of(x.values) if again is not None and index == 0 else nullcontext():
                    x = run_stage(stage, x)  # type: ignore[arg-type]
            else:
                seen = mask_at(visible, size, 1 << index)
                x = MaskedMap(stage(x.dense(), seen), seen)
            features.append(x)
        return features

    def _stages_in_blocks(self, image: Tensor, blocks: VisibleBlocks) -> int:
        """Count the first stages that divide every block into whole voxels; none, if blocks save nothing."""
        cells = blocks.grid[0] * blocks.grid[1] * blocks.grid[2] * len(image)
        if not 0 < len(blocks) <= _MOST_VISIBLE * cells or (self.stem.dropout.p > 0 and self.training):
            return 0
        whole = [
            all(side % (count << index) == 0 for side, count in zip(image.shape[2:], blocks.grid, strict=True))
            for index in range(len(self.stages))
        ]
        return whole.index(False) if False in whole else len(whole)


class UNetDecoder(nn.Module):
    """One up-sampling and one convolution per level, from the coarsest map to full resolution."""

    def __init__(self, *, features_per_stage: Sequence[int], dropout: float, checkpointing: str) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        coarse_to_fine = list(features_per_stage)[::-1]
        self.upsamplings = nn.ModuleList(Upsampling(below, skip) for below, skip in pairwise(coarse_to_fine))
        self.stages = nn.ModuleList(ConvBlock(2 * skip, skip, dropout=dropout) for skip in coarse_to_fine[1:])

    def forward(self, features: List[Tensor]) -> Tensor:
        """Merge the maps of the encoder into one ``(B, features[0], D, H, W)``.

        They are taken out of the list, so that a map that nobody else holds is let go of when it is merged.
        """
        x = features.pop()
        for upsampling, stage in zip(self.upsamplings, self.stages):  # noqa: B905 (TorchScript)
            x = stage(torch.cat([upsampling(x), features.pop()], dim=1))  # (B, 2 C_skip, ...)
        return x

    def recalled(self, features: List[Tensor]) -> Iterator[tuple[Tensor, Again]]:
        """Do the same with the outputs of the convolutions kept; yield the map of each level, coarse to fine, and how
        it is computed again.
        """
        x, again = features[-1], None
        for upsampling, stage, skip in zip(self.upsamplings, self.stages, features[-2::-1], strict=True):
            assert isinstance(stage, ConvBlock)
            up, up_again = recalled(upsampling, x, source=again)
            x, again = stage.activated(stage.dropout(convolve_joined(stage.conv, up, skip, up_again)), None)
            yield x, again

    def levels(self, features: List[Tensor]) -> Iterator[tuple[Tensor, AbstractContextManager[None]]]:
        """Yield the map of each level, coarse to fine, and the context in which what reads it keeps what it needs."""
        if selects(self):
            yield from ((x, again.instead_of(x)) for x, again in self.recalled(features))
            return
        x = features[-1]
        for upsampling, stage, skip in zip(self.upsamplings, self.stages, features[-2::-1], strict=True):
            x = stage(torch.cat([upsampling(x), skip], dim=1))
            yield x, nullcontext()


class ResEncUNet(nn.Module):
    """U-Net with a residual encoder, instance norm and LeakyReLU.

    Hidden places: with ``visible`` the image is set to 0, its mean after z-scoring, inside hidden blocks. Then

    * by itself the encoder runs densely, as the published MAE does;
    * with ``mask_token`` the features of the stem inside hidden blocks are replaced by it;
    * with ``sparse`` every convolution and norm of the encoder sees visible voxels only, and hidden ones stay 0 on all
      maps that are not coarser than the grid of blocks.

    Args:
        in_channels: image channels.
        out_channels: channels of the output map; 1 for reconstruction, the number of classes for segmentation.
        features_per_stage: channels of each stage, fine to coarse. Every stage but the first halves the resolution.
        blocks_per_stage: residual blocks of each stage.
        dropout: probability of dropping a channel after the first convolution of each block; 0 as published.
        initialization: ``"pytorch"`` (the published pre-training runs), ``"he"`` (the published fine-tuning from
            scratch) or ``"nnunet"`` (besides, residual blocks begin as their shortcuts).
        checkpointing: what is computed again in the backward pass instead of kept: ``none``, ``selective`` or ``full``
            (also false and true), see :mod:`.blocks.recompute`.
        with_decoder: build the decoder and head; without them only :meth:`encode` works.
        deep_supervision: in training return a list of outputs, at full resolution and at each coarser level of the
            decoder but the coarsest, for :class:`~common.losses.DeepSupervision`. What is saved of a trained network
            leaves these further heads out.

    Attributes:
        feature_channels: channels of the maps of :meth:`encode`.
        feature_strides: image voxels along a side of a voxel of these maps.

    Raises:
        ValueError: if the stage lists differ in length or are too short, or an input side is not a multiple of the
            total stride.

    Example:
        >>> net = ResEncUNet(1, 2, features_per_stage=[4, 8, 8], blocks_per_stage=[1, 1, 1])
        >>> net(torch.zeros(1, 1, 8, 12, 16)).shape
        torch.Size([1, 2, 8, 12, 16])
        >>> [tuple(f.shape[1:]) for f in net.encode(torch.zeros(1, 1, 8, 8, 8))]
        [(4, 8, 8, 8), (8, 4, 4, 4), (8, 2, 2, 2)]
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        features_per_stage: Sequence[int] = (32, 64, 128, 256, 320, 320),
        blocks_per_stage: Sequence[int] = (1, 3, 4, 6, 6, 6),
        dropout: float = 0.0,
        initialization: str = "pytorch",
        checkpointing: bool | str = "none",
        with_decoder: bool = True,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        watch_untrained(self)
        if len(features_per_stage) != len(blocks_per_stage) or len(features_per_stage) < 2:
            raise ValueError(
                f"features_per_stage {list(features_per_stage)} and blocks_per_stage {list(blocks_per_stage)} "
                "must have the same length, at least 2"
            )
        if initialization not in ("pytorch", "he", "nnunet"):
            raise ValueError(f"initialization is {initialization!r}; it must be 'pytorch', 'he' or 'nnunet'")
        if deep_supervision and (len(features_per_stage) < 4 or not with_decoder):
            raise ValueError(
                f"deep_supervision needs a decoder and at least 4 stages, and features_per_stage is "
                f"{list(features_per_stage)}: there is no coarser level to supervise; switch it off"
            )
        self.checkpointing = checkpointing = mode_of(checkpointing)
        self.stride = 2 ** (len(features_per_stage) - 1)
        self.feature_channels = list(features_per_stage)
        self.feature_strides = [2**index for index in range(len(features_per_stage))]
        self.encoder = ResidualEncoder(
            in_channels,
            features_per_stage=features_per_stage,
            blocks_per_stage=blocks_per_stage,
            dropout=dropout,
            checkpointing=checkpointing,
        )
        self.decoder: Optional[UNetDecoder] = None
        self.head: Optional[nn.Conv3d] = None
        if with_decoder:
            self.decoder = UNetDecoder(
                features_per_stage=features_per_stage, dropout=dropout, checkpointing=checkpointing
            )
            self.head = Convolution(features_per_stage[0], out_channels, kernel_size=1)
        self.deep_heads = nn.ModuleList()
        if deep_supervision:
            self.deep_heads.extend(
                Convolution(features, out_channels, kernel_size=1) for features in features_per_stage[-3:0:-1]
            )
        if initialization != "pytorch":
            initialize_he(self)
        if initialization == "nnunet":
            begin_as_shortcuts(self)

    def encode(
        self,
        image: Tensor,
        visible: Optional[Tensor] = None,
        mask_token: Optional[Tensor] = None,
        sparse: bool = False,
        visible_count: Optional[int] = None,
    ) -> List[Tensor]:
        """Return the feature maps of all stages, fine to coarse.

        Args:
            image: ``(B, C, D, H, W)``.
            visible: ``(B, d, h, w)`` boolean grid of blocks, each ``D/d x H/h x W/w`` voxels; hidden ones are zeroed.
            mask_token: ``(1, features_per_stage[0], 1, 1, 1)``, put in the place of the stem's features of hidden
                blocks.
            sparse: compute visible voxels only; as :meth:`encode_visible`, with zeros at hidden ones.
            visible_count: blocks that every sample shows; not needed here.
        """
        if not torch.jit.is_scripting() and sparse and visible is not None:
            if mask_token is not None:
                raise ValueError("hidden blocks are either left out (sparse) or replaced by mask_token, not both")
            return [found.dense() for found in self.encode_visible(image, visible)]
        self._check_sides(image)
        return self.encoder(image, visible, mask_token)

    def encode_visible(
        self,
        image: Tensor,
        visible: Tensor,
        *,
        blocks: VisibleBlocks | None = None,
        visible_count: int | None = None,
    ) -> list[BlockMap | MaskedMap]:
        """Return the maps of all stages, computed where blocks are visible and nowhere else.

        Args:
            image: ``(B, C, D, H, W)``.
            visible: as in :meth:`encode`.
            blocks: the same as the views have made it on the host; finding it here makes a GPU wait.
            visible_count: blocks that every sample shows; not needed here.
        """
        self._check_sides(image)
        found = VisibleBlocks.of(visible) if blocks is None else blocks
        return self.encoder.forward_visible(image, visible, found.to(image.device))

    def _check_sides(self, image: Tensor) -> None:
        for side in image.shape[2:]:
            if side % self.stride != 0:
                raise ValueError(
                    f"input sides {list(image.shape[2:])} must be multiples of {self.stride}, "
                    f"the total stride of this network; pad or crop the image"
                )

    def decode(self, features: List[Tensor]) -> Tensor:
        """Map the feature maps of :meth:`encode` to ``(B, out_channels, D, H, W)``."""
        return self._decoded(features[:])

    def _decoded(self, features: List[Tensor]) -> Tensor:
        """Do so, and take the maps out of the list."""
        assert self.decoder is not None, "this network was built without a decoder"
        assert self.head is not None
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if selects(self.decoder):
                for x, again in self.decoder.recalled(features):  # noqa: B007 (the last)
                    pass
                with again.instead_of(x):
                    return self.head(x)
        return self.head(self.decoder(features))

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(B, in_channels, D, H, W)`` to ``(B, out_channels, D, H, W)``.

        Under deep supervision, in training alone: to a list of them, at full, half, quarter, ... of the resolution.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript)
            if self.training and len(self.deep_heads) > 0:
                return self._outputs(image)  # type: ignore[return-value]
        return self._decoded(self.encode(image))

    def _outputs(self, image: Tensor) -> list[Tensor]:
        assert self.decoder is not None
        outputs, levels = [], self.decoder.levels(self.encode(image))
        for head, (x, keeping) in zip([None, *self.deep_heads, self.head], levels, strict=True):
            if head is not None:
                with keeping:
                    outputs.append(head(x))
        return outputs[::-1]


def resenc_l(in_channels: int = 1, out_channels: int = 1, **kwargs: Any) -> ResEncUNet:
    """Build the ResEnc-L size: 90,296,576 parameters in the encoder, 102,348,193 in all with one output channel."""
    return ResEncUNet(in_channels, out_channels, **kwargs)
