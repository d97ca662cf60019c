# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Interpolation of label maps by the largest vote: every place gets one of the labels around it, and none is left out.

Each label is interpolated linearly on its own, and the one with the largest share wins. Only the eight labels at the
corners of the cell that a place lies in have a share, so neither the number of labels nor their values cost anything.
(With a threshold of one half for each label, as nnU-Net has it, a place between three labels can belong to none.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["largest_share", "mixed_cells", "nearest_voxels", "resample_label", "voxel_places"]

_CORNERS = tuple((i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1))  # of the cell that a place lies in
_AT_ONCE = 2**20  # places that are voted on at a time


def mixed_cells(labels: Tensor) -> Tensor:
    """Return whether the eight labels of the cell above each voxel differ; False at the upper ends."""
    low = high = labels
    for axis in range(3):
        length = labels.shape[axis] - 1
        low = torch.minimum(low.narrow(axis, 0, length), low.narrow(axis, 1, length))
        high = torch.maximum(high.narrow(axis, 0, length), high.narrow(axis, 1, length))
    return F.pad(low != high, (0, 1) * 3)


def largest_share(
    labels: Tensor, cell: Tensor, shares: Sequence[Tensor], steps: Sequence[int], *, ties: str = "smallest"
) -> Tensor:
    """Return the label with the largest trilinear share of each place.

    Args:
        labels: flattened label map.
        cell: ``(n,)``, index of the lower corner of the cell that each place lies in.
        shares: three of ``(n,)``, of the upper corners along each axis.
        steps: from one voxel to the next along each axis.
        ties: which of equal shares wins, the ``smallest`` label or the ``largest``.
    """
    pairs = [(1 - share, share) for share in shares]
    found = [labels.take(cell + (i * steps[0] + j * steps[1] + k * steps[2])) for i, j, k in _CORNERS]
    weights = [pairs[0][i] * pairs[1][j] * pairs[2][k] for i, j, k in _CORNERS]
    totals = [weight.clone() for weight in weights]  # of each corner's label
    for one in range(8):
        for other in range(one):
            same = found[one] == found[other]
            totals[one].addcmul_(weights[other], same)
            totals[other].addcmul_(weights[one], same)
    best, most = found[0], totals[0]
    for label, total in zip(found[1:], totals[1:], strict=True):
        wins = label < best if ties == "smallest" else label > best
        better = (total > most) | ((total == most) & wins)
        best, most = torch.where(better, label, best), torch.maximum(total, most)
    return best


def resample_label(volume: Tensor, shape: Sequence[int], axis: int | None = None) -> Tensor:
    """Bring a label map to another number of voxels over the same extent, by the largest vote; a tie is the larger's.

    Args:
        volume: ``(C, D, H, W)`` of any integer type.
        shape: voxels of the result along ``(D, H, W)``.
        axis: where the nearest slice is taken and nothing is voted on.

    Returns:
        ``(C, *shape)`` of the same type, each value one of the up to eight around its place.

    Example:
        >>> three = torch.tensor([[1, 2], [3, 3]]).view(1, 1, 2, 2)
        >>> resample_label(three, (1, 1, 1)), resample_label(three, (1, 2, 1)).flatten()  # 1 and 2 are equal above
        (tensor([[[[3]]]]), tensor([2, 3]))
    """
    if axis is not None and volume.shape[1 + axis] != shape[axis]:
        slices = nearest_voxels(volume.shape[1 + axis], shape[axis])
        volume = volume.index_select(1 + axis, slices.to(volume.device))
    return torch.stack([_voted(channel, shape) for channel in volume])


def nearest_voxels(old: int, new: int) -> Tensor:
    """Return for each of ``new`` positions the index of the old voxel that it falls in; of two, the upper one."""
    return (voxel_places(old, new) + 0.5).floor().long().clamp_(0, old - 1)


def voxel_places(old: int, new: int) -> Tensor:
    """Return where the centres of ``new`` voxels lie among those of ``old`` ones over the same extent."""
    return (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5


def _voted(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample ``(D, H, W)`` along every axis."""
    if list(labels.shape) == list(shape):
        return labels
    padded = _closed(labels)
    corners, shares = [], []
    for old, new in zip(labels.shape, shape, strict=True):
        places = voxel_places(old, new).clamp_(0, old - 1)
        corners.append(places.floor())
        shares.append((places - corners[-1]).float().to(labels.device))
    steps = padded.stride()
    d, h, w = ((corner * step).long().to(labels.device) for corner, step in zip(corners, steps, strict=True))
    flat, mixed = padded.flatten(), mixed_cells(padded).flatten()
    plane = h[:, None] + w
    out = []
    slab = max(1, _AT_ONCE // plane.numel())
    for first in range(0, shape[0], slab):
        cell = (d[first : first + slab, None, None] + plane).flatten()
        part = flat.take(cell)
        meet = mixed.take(cell).nonzero().squeeze(1)
        z, y, x = torch.unravel_index(meet, (min(slab, shape[0] - first), shape[1], shape[2]))
        own = [shares[0][first + z], shares[1][y], shares[2][x]]
        part[meet] = largest_share(flat, cell[meet], own, steps, ties="largest")
        out.append(part.view(-1, shape[1], shape[2]))
    return torch.cat(out)


def _closed(labels: Tensor) -> Tensor:
    """Return the map with its last slices repeated, so that every voxel is the lower corner of a cell."""
    for axis in range(3):
        labels = torch.cat([labels, labels.narrow(axis, labels.shape[axis] - 1, 1)], dim=axis)
    return labels
