# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A backbone's encoder with a linear head, for classes of whole volumes.

========  =====================================================================
goes in   image ``(B, in_channels, D, H, W)``, sides a multiple of the stride
between   coarsest features ``(B, C, d, h, w)``, their mean over space ``(B, C)``
comes out logits ``(B, outputs)``
========  =====================================================================

Wald et al., arXiv:2412.17041: dropout 0.2 and one linear layer, no hidden layer and no norm. The encoder is the one
that was pre-trained, of either backbone, so that all of its weights are taken and the mean is over all tokens. (The
reference builds a Primus without its layer scale and its norm in the attention, drops these 64 tensors of the
checkpoint without a word, leaves the first token out of the mean, and of images that are no cubes mixes up the
positions.)
"""

from __future__ import annotations

from typing import List

from torch import Tensor, nn

from .heads import pool_features
from .nets.plain_unet import PlainUNet
from .nets.primus import Primus
from .nets.resenc_unet import ResEncUNet

__all__ = ["ClassificationNet"]


class ClassificationNet(nn.Module):
    """Mean of the encoder's coarsest features over space, dropout, one linear layer.

    Tensors are named ``encoder.*``, as in the backbone's files, and ``head.*``.

    Args:
        backbone: whose encoder is taken as it is; build it without a decoder.
        outputs: number of classes or labels.
        dropout: on the pooled features.
        input_size: sides of the images to come, checked against the stride.

    Raises:
        ValueError: if a side, here or in ``forward``, is not a multiple of the encoder's stride.

    Example:
        >>> import torch
        >>> backbone = Primus(input_size=16, embed_dim=12, depth=1, num_heads=2, with_decoder=False)
        >>> ClassificationNet(backbone, outputs=3)(torch.zeros(2, 1, 16, 16, 16)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        backbone: ResEncUNet | Primus | PlainUNet,
        *,
        outputs: int,
        dropout: float = 0.2,
        input_size: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.stride = backbone.stride
        self.encoder = backbone.encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(backbone.feature_channels[-1], outputs)
        self._check(input_size or [])

    def _check(self, sides: List[int]) -> None:
        for side in sides:
            if side % self.stride != 0:
                raise ValueError(
                    f"input_size {sides} must be multiples of {self.stride}, the total stride of this encoder; "
                    f"the next one of {side} is {side + self.stride - side % self.stride}"
                )

    def features(self, image: Tensor) -> Tensor:
        """Return the pooled features ``(B, C)``, float32."""
        self._check(list(image.shape[2:]))
        encoded = self.encoder(image)
        coarsest = encoded if isinstance(encoded, Tensor) else encoded[-1]  # (B, C, d, h, w)
        return pool_features([coarsest])

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(B, in_channels, D, H, W)`` to logits ``(B, outputs)``."""
        return self.head(self.dropout(self.features(image)))  # type: ignore[no-any-return]
