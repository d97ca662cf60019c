# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A smooth brightening and darkening across a crop, as the coils of an MRI scanner leave it.

The field is the exponential of a polynomial in three dimensions (Van Leemput et al., doi:10.1109/42.811270; as an
augmentation Sudre et al., doi:10.1007/978-3-319-67389-9_4). Crops here are z-scored, so that their darkest voxel, air,
stands for an intensity of 0: the field multiplies the distance to it, and the crop then gets its old mean and standard
deviation, as a z-score of the distorted crop would have given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BiasField"]

_VOXELS = (1, 2, 3, 4)


class BiasField:
    """Draw and apply bias fields.

    Args:
        probability: share of crops with a field.
        strength: each coefficient of the polynomial is uniform in plus or minus this.
        order: of the polynomial; 3 as Sudre et al.

    Raises:
        ValueError: if one of them is impossible.

    Example:
        >>> bias = BiasField(probability=1.0, strength=0.3)
        >>> field = bias.field(bias.draw(torch.Generator().manual_seed(0)), [8, 8, 8])
        >>> field.shape, bool((field > 0).all())
        (torch.Size([8, 8, 8]), True)
    """

    def __init__(self, *, probability: float = 0.5, strength: float = 0.3, order: int = 3) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability {probability} must lie within 0 and 1")
        if strength < 0 or order < 1:
            raise ValueError(f"strength {strength} must be at least 0, and order {order} at least 1")
        self.probability, self.strength, self.order = probability, strength, order

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """Draw for one crop, always the same count of numbers.

        Returns:
            coefficients ``(order + 1,) * 3`` of the powers along each axis, 0 above the order and for the constant;
            None for no field.
        """
        side = self.order + 1
        fires = float(torch.rand((), generator=generator)) < self.probability
        drawn = (2 * torch.rand(side, side, side, generator=generator) - 1) * self.strength
        power = torch.arange(side)
        degree = power[:, None, None] + power[:, None] + power
        return drawn * ((degree <= self.order) & (degree > 0)) if fires else None

    def field(self, coefficients: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the factor of each voxel of a crop, ``shape``; deterministic.

        Args:
            coefficients: as :meth:`draw` returns them, on any device.
            shape: sides of the crop, which go from -1 to 1.
        """
        powers = torch.arange(self.order + 1, device=coefficients.device)
        places = [torch.linspace(-1, 1, side, device=coefficients.device) for side in shape]
        z, y, x = (place[:, None] ** powers for place in places)  # (side, order + 1)
        return torch.einsum("ijk,zi,yj,xk->zyx", coefficients, z, y, x).exp()

    def apply(self, crops: Tensor, draws: Sequence[Tensor | None]) -> Tensor:
        """Distort crops as drawn; deterministic, and without waiting for the device.

        Args:
            crops: ``(N, 1, d, h, w)``; left as they are.
            draws: one for each.

        Returns:
            ``(N, 1, d, h, w)``, float32.
        """
        with torch.autocast(crops.device.type, enabled=False):
            crops = crops.float()
            parts = []
            for crop, drawn in zip(crops[:, None], draws, strict=True):  # (1, 1, d, h, w)
                if drawn is None:
                    parts.append(crop)
                    continue
                host = drawn.pin_memory() if crops.device.type == "cuda" else drawn
                field = self.field(host.to(crops.device, non_blocking=True), crop.shape[2:])
                low = crop.amin(_VOXELS, keepdim=True)
                bent = (crop - low) * field
                mean, std = crop.mean(_VOXELS, keepdim=True), crop.std(_VOXELS, keepdim=True)
                bent_std = bent.std(_VOXELS, keepdim=True)
                parts.append((bent - bent.mean(_VOXELS, keepdim=True)) * (std / (bent_std + 1e-8)) + mean)
            return torch.cat(parts)

    def __call__(self, crops: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw for each crop from its own generator, then apply."""
        return self.apply(crops, [self.draw(generator) for generator in generators])
