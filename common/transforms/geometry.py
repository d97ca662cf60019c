# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Invertible geometry of the reference's preprocessing that MONAI has no transform for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform
from monai.transforms.utils import scale_affine
from monai.utils import TraceKeys
from skimage.transform import resize
from torch import Tensor

from .grids import AxesTurn, same_grid
from .votes import nearest_voxels, resample_label, voxel_places

__all__ = [
    "OnImageGridd",
    "ResampleToSpacingd",
    "ResizeTod",
    "SliceAxisFirstd",
    "resample_linear",
    "resampled_shape",
    "slice_axis",
    "slices_between",
]

_COLUMNS = 32  # that are resampled at once
_ANISOTROPY = 3.0  # coarser than this against the finest axis, and slices are resampled one by one


def resampled_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]) -> list[int]:
    """Return the voxels that cover the same extent at another spacing, at least 1.

    Example:
        >>> resampled_shape((100, 50, 31), (1.0, 2.0, 0.5), (1.0, 1.0, 1.0))
        [100, 100, 16]
    """
    return [max(1, round(n * a / b)) for n, a, b in zip(shape, spacing_mm, target_mm, strict=True)]


def slice_axis(spacing_mm: Sequence[float], target_mm: Sequence[float]) -> int | None:
    """Return the axis to resample slice by slice: the coarse one of an anisotropic volume, if there is exactly one.

    Example:
        >>> slice_axis((5.0, 1.0, 1.0), (1.0, 1.0, 1.0)), slice_axis((2.0, 1.0, 1.0), (1.0, 1.0, 1.0))
        (0, None)
    """
    for candidate in (spacing_mm, target_mm):
        if max(candidate) / min(candidate) > _ANISOTROPY:
            coarse = [axis for axis, value in enumerate(candidate) if value == max(candidate)]
            return coarse[0] if len(coarse) == 1 else None
    return None


def _resample_image(volume: Tensor, shape: Sequence[int], axis: int | None) -> Tensor:
    """Resample ``(C, D, H, W)`` by cubic splines; with ``axis``, in its planes only and by nearest neighbour along it.

    What a spline overshoots is cut off at the ends of the channel, or of the plane. The numbers are those of
    scikit-image's ``resize`` of order 3, which nnU-Net calls: one axis after the other in float64, by products with a
    small matrix, in pieces, so that nothing larger than the volume in float32 is made.
    """
    kept = [0, 1, 2] if axis is None else [n for n in range(3) if n != axis]
    between = [shape[n] if n in kept else volume.shape[n + 1] for n in range(3)]
    weights = [
        _cubic_weights(old, new) if old != new else None for old, new in zip(volume.shape[1:], between, strict=True)
    ]
    out = volume.new_empty([len(volume), *between])
    for channel, result in zip(volume, out, strict=True):
        for start in range(0, between[2], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            result[..., columns] = _columns(channel, weights, columns)
    edges = [n + 1 for n in kept]
    torch.clamp(out, volume.amin(edges, keepdim=True), volume.amax(edges, keepdim=True), out=out)
    if axis is None or between[axis] == shape[axis]:
        return out
    return out.index_select(axis + 1, nearest_voxels(between[axis], shape[axis]))


def _columns(channel: Tensor, weights: Sequence[Tensor | None], columns: slice) -> Tensor:
    """Return some columns of a resampled ``(D, H, W)``: ``(d, h, w or less)``, float64."""
    across = weights[2]
    if across is None:
        piece = channel[..., columns].double()
    else:
        piece = torch.stack([plane.double() @ across[columns].T for plane in channel])
    if weights[0] is not None:
        piece = (weights[0] @ piece.flatten(1)).view(-1, *piece.shape[1:])
    return piece if weights[1] is None else weights[1] @ piece


def _cubic_weights(old: int, new: int) -> Tensor:
    """Return what each voxel of an axis has of each of the resampled one, ``(new, old)``, float64."""
    alike = resize(np.eye(old), (old, new), order=3, mode="edge", anti_aliasing=False, clip=False)
    return torch.from_numpy(np.ascontiguousarray(alike.T))


def resample_linear(
    volume: Tensor,
    shape: Sequence[int],
    axis: int | None,
    *,
    slices: slice = slice(None),
    depth: int | None = None,
    first: int = 0,
) -> Tensor:
    """Resample ``(C, D, H, W)`` trilinearly; with ``axis``, by nearest neighbour along it.

    Args:
        volume: to resample, or those slices of it that :func:`slices_between` names.
        shape: ``(d, h, w)`` of the result.
        axis: that is not interpolated.
        slices: of the result along its first axis that are wanted; the same voxels whichever they are asked for with.
        depth: slices of the whole volume, if these are not all.
        first: the first of those that are there.

    Returns:
        ``(C, d or less, h, w)``, float32.
    """
    depth = volume.shape[1] if depth is None else depth
    low, high, share = (one[slices] for one in slices_between(depth, shape[0], axis))
    planes = volume[:, int(low[0]) - first : int(high[-1]) + 1 - first].float()
    if axis == 0:
        return _resample_planes(planes[:, (low - low[0]).to(planes.device)], shape[1:], None)
    planes = _resample_planes(planes, shape[1:], None if axis is None else axis - 1)
    if depth == shape[0]:
        return planes
    below, above = (planes[:, (side - low[0]).to(planes.device)] for side in (low, high))
    return torch.lerp(below, above, share.float().to(planes.device)[:, None, None])


def slices_between(depth: int, new: int, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return between which of ``depth`` slices each of ``new`` resampled ones lies, and the share of the upper.

    Args:
        depth: slices of a volume along its first axis.
        new: those of the result.
        axis: that is not interpolated; with 0 each lies on one.

    Returns:
        three of ``(new,)``: lower, upper, and a share from 0 to below 1, 0 throughout where nothing is interpolated.

    Example:
        >>> slices_between(4, 2, None)
        (tensor([0, 2]), tensor([1, 3]), tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    if axis == 0 or depth == new:
        chosen = nearest_voxels(depth, new)
        return chosen, chosen, torch.zeros(new, dtype=torch.float64)
    at = voxel_places(depth, new).clamp_(0, depth - 1)
    low = at.long()
    return low, (low + 1).clamp_(max=depth - 1), at - low


def _resample_planes(planes: Tensor, shape: Sequence[int], axis: int | None) -> Tensor:
    """Resample each plane of ``(C, D, H, W)`` bilinearly; with ``axis``, by nearest neighbour along it."""
    between = list(shape)
    if axis is not None:
        between[axis] = planes.shape[2 + axis]
    if list(planes.shape[2:]) != between:
        each = planes.flatten(0, 1)[:, None]  # PyTorch rounds otherwise for many channels
        each = F.interpolate(each, size=between, mode="bilinear", align_corners=False)
        planes = each.view(*planes.shape[:2], *between)
    if axis is not None and between[axis] != shape[axis]:
        planes = planes.index_select(2 + axis, nearest_voxels(between[axis], shape[axis]).to(planes.device))
    return planes


class OnImageGridd(MapTransform):
    """Turn the axes of maps onto those of their image, so that all that follows is the same for both.

    A map on the same places in another order of axes, such as LAS beside RAS, becomes the image's; then it has the
    image's affine to the last bit, and nothing that depends on an affine can decide differently for the two.

    Args:
        keys: maps to turn.
        image: key of their image.

    Raises:
        DataError: if a map is on another grid.
    """

    def __init__(self, keys: KeysCollection, *, image: str = "image") -> None:
        super().__init__(keys)
        self.image = image

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Turn every key, a MetaTensor ``(C, X, Y, Z)``."""
        out = dict(data)
        image = out[self.image]
        for key in self.key_iterator(out):
            own = out[key]
            turn = same_grid(
                str(own.meta.get("filename_or_obj", key)),
                own.shape[1:],
                own.affine.cpu().numpy(),
                onto=str(image.meta.get("filename_or_obj", self.image)),
                onto_shape=image.shape[1:],
                onto_affine=image.affine.cpu().numpy(),
                remedy="resample the map onto the image",
            )
            out[key] = MetaTensor(turn.tensor(own.as_tensor())).copy_meta_from(own)
            out[key].affine = image.affine.clone()
        return out


class SliceAxisFirstd(MapTransform, InvertibleTransform):
    """Put the axes in the order (slice, row, column) that the published networks saw.

    Args:
        keys: what to turn.
        reorient: true: canonical RAS+ transposed to (S, A, R), whatever the file's axes; false: the file's own axes in
            reversed order, as the reference does.
        allow_missing_keys: skip keys that are not there.
    """

    def __init__(self, keys: KeysCollection, *, reorient: bool = True, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reorient = reorient

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Turn every key, a MetaTensor ``(C, X, Y, Z)``."""
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key]
            turn = AxesTurn.to_slices(image.affine.cpu().numpy(), reorient=self.reorient)
            image = _turned(image, turn)
            # the turn itself: where axes lie between two directions, letters of them may be read in two ways
            self.push_transform(image, extra_info={"order": list(turn.order), "flips": list(turn.flips)})
            out[key] = image
        return out

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Turn every key back to its file's axes."""
        out = dict(data)
        for key in self.key_iterator(out):
            done = self.pop_transform(out[key])[TraceKeys.EXTRA_INFO]
            out[key] = _turned(out[key], AxesTurn(tuple(done["order"]), tuple(done["flips"])).inverse())
        return out


def _turned(image: MetaTensor, turn: AxesTurn) -> MetaTensor:
    """Return an image ``(C, X, Y, Z)`` with turned axes, with the affine of these."""
    turned = MetaTensor(turn.tensor(image.as_tensor()).contiguous()).copy_meta_from(image)
    turned.affine = torch.from_numpy(turn.affine(image.affine.cpu().numpy(), image.shape[1:]))
    return turned


class ResampleToSpacingd(MapTransform, InvertibleTransform):
    """Resample to a voxel spacing by the rules of nnU-Net and nnssl, and logits back.

    The new shape is ``round(shape * spacing / target)``. Images go by cubic splines, label maps by the largest of the
    labels' linear shares, so that no voxel is left without one; a volume whose coarsest axis is more than three times
    its finest is resampled slice by slice and by nearest neighbour across. The inverse is linear and runs on the
    tensor's device.

    Axes are resampled as they are. Where they are not at right angles, voxels stay at their places in space and become
    as long as asked for along their own axes, so that the network sees the volume slanted, as nnU-Net shows it.

    Args:
        keys: what to resample; every key but ``image`` is treated as an integer map.
        spacing_mm: target in millimetres, one or three (slice, row, column); None leaves the volume as it is.
        allow_missing_keys: skip keys that are not there.
    """

    def __init__(
        self, keys: KeysCollection, *, spacing_mm: float | Sequence[float] | None, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if isinstance(spacing_mm, (int, float)):
            spacing_mm = [spacing_mm] * 3
        if spacing_mm is not None and (len(spacing_mm) != 3 or min(spacing_mm) <= 0):
            raise ValueError(f"spacing_mm {spacing_mm} must be one or three positive millimetres")
        self.spacing_mm = None if spacing_mm is None else [float(value) for value in spacing_mm]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample every key, a MetaTensor ``(C, D, H, W)``."""
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key]
            spacing = [float(value) for value in image.pixdim]
            target = self.spacing_mm or spacing
            old = list(image.shape[1:])
            new, axis = resampled_shape(old, spacing, target), slice_axis(spacing, target)
            meta, affine = image, image.affine
            if new != old:
                if key != "image":
                    values = resample_label(image.as_tensor(), new, axis)
                else:
                    values = _resample_image(image.as_tensor().float(), new, axis)
                image = MetaTensor(values).copy_meta_from(meta)
                scale = torch.as_tensor(scale_affine(old, new), dtype=affine.dtype)
                image.affine = affine @ scale
            info = {"slice_axis": -1 if axis is None else axis, "affine": affine.tolist()}
            self.push_transform(image, orig_size=old, extra_info=info)
            out[key] = image
        return out

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample every key, logits or probabilities ``(C, D, H, W)``, linearly to the shape it had before."""
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key]
            info = self.pop_transform(image)
            size = list(info[TraceKeys.ORIG_SIZE])
            axis = int(info[TraceKeys.EXTRA_INFO]["slice_axis"])
            if list(image.shape[1:]) != size:
                values = resample_linear(image.as_tensor(), size, None if axis < 0 else axis)
                image = MetaTensor(values).copy_meta_from(image)
            image.affine = torch.as_tensor(info[TraceKeys.EXTRA_INFO]["affine"], dtype=torch.float64)
            out[key] = image
        return out


class ResizeTod(MapTransform):
    """Resize images to a fixed number of voxels by cubic splines, whatever spacing that gives along each axis.

    How the published classification sees a whole volume. It has no inverse: a class has no grid to go back to.

    Args:
        keys: what to resize, images only.
        size: voxels along (slice, row, column).

    Raises:
        ValueError: if ``size`` is not three positive numbers.

    Example:
        >>> image = MetaTensor(torch.arange(8.0).view(1, 2, 2, 2), affine=torch.eye(4))
        >>> small = ResizeTod("image", size=[4, 2, 1])({"image": image})["image"]
        >>> small.shape, [round(side, 2) for side in small.pixdim.tolist()]
        (torch.Size([1, 4, 2, 1]), [0.5, 1.0, 2.0])
    """

    def __init__(self, keys: KeysCollection, *, size: Sequence[int]) -> None:
        super().__init__(keys)
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"size {list(size)} must be three positive numbers of voxels")
        self.size = [int(side) for side in size]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize every key, a MetaTensor ``(C, D, H, W)``."""
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key]
            old = list(image.shape[1:])
            if old == self.size:
                continue
            resized = MetaTensor(_resample_image(image.as_tensor().float(), self.size, None)).copy_meta_from(image)
            resized.affine = image.affine @ torch.as_tensor(scale_affine(old, self.size), dtype=image.affine.dtype)
            out[key] = resized
        return out
