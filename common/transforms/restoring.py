# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""From logits on the network's grid to a label map on the file's own.

========  ==========================================================================================
goes in   logits ``(outputs, D, H, W)``; the image they were predicted from, with what was done to it
between   a few slices of the grid before resampling, one output after the other, the winner kept: ``(1, n, h, w)``
comes out label map ``(1, X, Y, Z)`` in the axes, shape and affine of the file
========  ==========================================================================================

Nothing of the size of an output is ever made: interpolation takes some slices of one output at a time, and undoing crop
and axes, which changes no value, comes after the decision. The labels are bit for bit those of MONAI's ``Invertd``
followed by an argmax.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, MapTransform, allow_missing_keys_mode
from monai.transforms.utils import get_largest_connected_component_mask
from monai.utils import TraceKeys
from torch import Tensor

from ..errors import SettingsError
from ..memory import comfortable_bytes
from ..paths import as_path, file_name, output_file
from .geometry import ResampleToSpacingd, resample_linear, slices_between
from .reading import without_ending
from .writing import write_channels

if TYPE_CHECKING:
    from ..tasks import SegmentationTask

__all__ = ["CASE", "SOURCE", "Decision", "KeepLargestComponentd", "RestoreSegmentationd", "SaveProbabilitiesd"]

CASE = "case"  # key of a case's name, under which its prediction is written
SOURCE = "source_file"  # metadata of a prediction: the image whose geometry it has
_SLICES = 16  # that are decided at once
_BYTES_PER_VOXEL = 20  # an output interpolated, the best so far, where it wins, and what interpolation itself needs


class _Restoration:
    """What was done to one image, and how to undo it for maps predicted from it.

    Args:
        image: preprocessed, with the trace of its transforms.
        preprocessing: chain that made it; its last step is the resampling.
    """

    def __init__(self, image: MetaTensor, preprocessing: Compose) -> None:
        steps = list(preprocessing.transforms)
        last_step = type(steps[-1]).__name__  # MONAI Label imports this module anew between preprocessing and this
        if not isinstance(image, MetaTensor) or last_step != ResampleToSpacingd.__name__:
            raise TypeError("predictions are restored from a MetaTensor whose last transform is ResampleToSpacingd")
        self.image, self.before = image, Compose(steps[:-1])
        *self.trace, last = image.applied_operations
        if last[TraceKeys.CLASS_NAME] != ResampleToSpacingd.__name__:
            raise TypeError(f"the image was changed by {last[TraceKeys.CLASS_NAME]} after it was resampled")
        self.shape = [int(n) for n in last[TraceKeys.ORIG_SIZE]]
        axis = int(last[TraceKeys.EXTRA_INFO]["slice_axis"])
        self.axis = None if axis < 0 else axis
        self.affine = torch.as_tensor(last[TraceKeys.EXTRA_INFO]["affine"], dtype=torch.float64)

    def device(self, slices: slice) -> torch.device:
        """Return where to interpolate: where the image was predicted, if there is room."""
        needed = _BYTES_PER_VOXEL * len(range(self.shape[0])[slices]) * math.prod(self.shape[1:])
        fits = self.image.device.type == "cpu" or needed <= comfortable_bytes(self.image.device)
        return self.image.device if fits else torch.device("cpu")

    def outputs(self, logits: Tensor, slices: slice = slice(None)) -> Iterator[Tensor]:
        """Yield each output ``(1, d or less, h, w)`` on the grid before resampling."""
        for output in logits:
            yield self.piece(output, slices)

    def between(self, depth: int) -> tuple[Tensor, Tensor]:
        """Return the first and the last of ``depth`` slices of logits that each slice before resampling needs."""
        return slices_between(depth, self.shape[0], self.axis)[:2]

    def piece(self, output: Tensor, slices: slice, *, depth: int | None = None, first: int = 0) -> Tensor:
        """Return some slices ``(1, d or less, h, w)`` of an output ``(D, H, W)``, or of those from ``first`` on."""
        here = output[None].to(self.device(slices))
        return resample_linear(here, self.shape, self.axis, slices=slices, depth=depth, first=first)

    def to_file(self, values: Tensor) -> MetaTensor:
        """Undo crop and axes of ``(1, d, h, w)``; what was cropped away is 0."""
        restored = MetaTensor(values.cpu()).copy_meta_from(self.image, copy_attr=False)
        restored.affine, restored.applied_operations = self.affine, deepcopy(self.trace)
        with allow_missing_keys_mode(self.before):
            restored = self.before.inverse({"image": restored})["image"]
        restored.affine = torch.as_tensor(self.image.meta["original_affine"], dtype=torch.float64)
        return restored


def _name(data: Mapping[Hashable, Any], image: MetaTensor) -> str:
    """Return the name of a case, else its image file's."""
    return str(data.get(CASE) or without_ending(Path(_file(image)).name))


def _file(image: MetaTensor) -> str:
    """Return the file of an image; MONAI Deploy has read a DICOM series and names none."""
    return str(image.meta.get("filename_or_obj", "image"))


class Decision:
    """Labels before resampling, decided while logits come slice by slice, so that no more than a few are ever there.

    Args:
        image: that is predicted, preprocessed.
        transform: its preprocessing.
        task: how outputs become labels.
    """

    def __init__(self, image: MetaTensor, *, transform: Compose, task: SegmentationTask) -> None:
        self.restoration, self.task, self.depth = _Restoration(image, transform), task, int(image.shape[1])
        self.low, self.high = self.restoration.between(self.depth)
        self.kept = torch.empty(0)  # (outputs, n, H, W): slices from ``first`` on that are needed once more
        self.first = self.decided = 0
        self.parts: list[Tensor] = []

    def take(self, logits: Tensor) -> None:
        """Take the next slices ``(outputs, n, H, W)`` and decide what can be decided; they are not kept."""
        kept = self.kept if len(self.kept) else logits[:, :0]
        start = self.first + kept.shape[1]  # of what is new
        ready = int((self.high < start + logits.shape[1]).sum())
        on_cpu = self.restoration.image.device.type == "cpu"
        step = _SLICES if on_cpu else max(ready, 1)  # a GPU, to which logits may have to go, takes all
        for begin in range(self.decided, ready, step):
            part = slice(begin, min(begin + step, ready))
            low, end = int(self.low[begin]), int(self.high[part.stop - 1]) + 1
            pieces = (
                torch.cat([old[low - self.first :], new[max(low - start, 0) : end - start]])
                for old, new in zip(kept, logits, strict=True)
            )
            outputs = (self.restoration.piece(piece, part, depth=self.depth, first=low) for piece in pieces)
            self.parts.append(self.task.decode_outputs(outputs).cpu())
        self.decided = max(ready, self.decided)
        needed = int(self.low[self.decided]) if self.decided < len(self.low) else self.depth
        self.kept = torch.cat([kept[:, max(needed - self.first, 0) :], logits[:, max(needed - start, 0) :]], 1)
        self.first = min(needed, start + logits.shape[1])

    def labels(self) -> Tensor:
        """Return the label map ``(1, d, h, w)`` once all slices have been taken."""
        return torch.cat(self.parts, 1)


class RestoreSegmentationd(MapTransform):
    """Turn logits into a label map in the geometry of the file.

    Args:
        keys: logits ``(outputs, D, H, W)``, or what a :class:`Decision` made of them.
        transform: preprocessing of the image.
        task: how outputs become labels.
        orig_keys: key of the preprocessed image.
    """

    def __init__(
        self, keys: KeysCollection, *, transform: Compose, task: SegmentationTask, orig_keys: str = "image"
    ) -> None:
        super().__init__(keys)
        self.transform, self.task, self.orig_key = transform, task, orig_keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace every key."""
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[self.orig_key]
            restoration = _Restoration(image, self.transform)
            decided = _plain(out[key])
            if decided.is_floating_point():
                decision = Decision(image, transform=self.transform, task=self.task)
                decision.take(decided)
                decided = decision.labels()
            labels = restoration.to_file(decided)
            labels.meta[SOURCE] = _file(image)
            labels.meta["filename_or_obj"] = f"{file_name(_name(out, image))}.nii.gz"
            out[key] = labels
        return out


class SaveProbabilitiesd(MapTransform):
    """Write the probability of every output, on the file's own grid, to ``<case>_probabilities.nii.gz``.

    A four-dimensional NIfTI of float32, one volume for each class or region. Outside the part that is not zero, where
    nothing is predicted, the background has probability 1. Written output by output; the logits are left as they are.

    Args:
        keys: logits ``(outputs, D, H, W)``.
        transform: preprocessing of the image.
        task: how outputs become probabilities.
        output_dir: folder to write to.
        orig_keys: key of the preprocessed image.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        transform: Compose,
        task: SegmentationTask,
        output_dir: str,
        orig_keys: str = "image",
    ) -> None:
        super().__init__(keys)
        self.transform, self.task, self.orig_key, self.folder = transform, task, orig_keys, as_path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write every key, return the data as it is."""
        for key in self.key_iterator(data):
            image, logits = data[self.orig_key], _plain(data[key])
            path = output_file(self.folder, _name(data, image), "_probabilities.nii.gz")
            volumes = self._volumes(_Restoration(image, self.transform), logits)
            write_channels(volumes, len(logits), path, like=str(image.meta["filename_or_obj"]))
        return dict(data)

    def _volumes(self, restoration: _Restoration, logits: Tensor) -> Iterator[Tensor]:
        """Yield the probabilities ``(X, Y, Z)`` of one output after the other."""
        exclusive = self.task.regions is None
        total: Tensor | None = None  # log of the sum of the exponentials
        if exclusive:
            for output in restoration.outputs(logits):
                total = output.clone() if total is None else torch.logaddexp(total, output)
        for index, output in enumerate(restoration.outputs(logits)):
            inside = torch.sigmoid(output) if total is None else (output - total).exp()
            volume = restoration.to_file(inside).as_tensor()[0]
            if exclusive and index == 0:
                predicted = restoration.to_file(torch.ones_like(inside, dtype=torch.uint8)).as_tensor()[0]
                volume = torch.where(predicted > 0, volume, 1.0)
            yield volume


class KeepLargestComponentd(MapTransform):
    """Keep the largest connected part of each class or region, or of the whole foreground; the rest is background.

    Voxels that touch by a face, an edge or a corner are connected, as in nnU-Net.

    Args:
        keys: label maps.
        task: whose names and values are meant.
        which: true for each class or region by itself, ``foreground`` for all of them together, or a list of names.

    Raises:
        SettingsError: if a name is not known.
    """

    def __init__(self, keys: KeysCollection, *, task: SegmentationTask, which: bool | str | list[str] = True) -> None:
        super().__init__(keys)
        values = dict(zip(task.names, task.values, strict=True))
        together = {"foreground": task.label_values[1:]}
        names = task.names if which is True else [which] if isinstance(which, str) else list(which or ())
        unknown = [name for name in names if name not in (values | together)]
        if unknown:
            raise SettingsError(
                f"largest_component names {unknown[0]!r}; it is true for every class, foreground for all of them "
                f"together, or a list of {', '.join(task.names)}"
            )
        self.values = [(together | values)[name] for name in names]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Filter every key, ``(1, X, Y, Z)``."""
        out = dict(data)
        for key in self.key_iterator(out):
            labels = out[key].clone()
            for values in self.values:
                inside = torch.isin(_plain(labels), torch.tensor(values, device=labels.device))
                if inside.any():
                    labels[inside & ~get_largest_connected_component_mask(inside[0])[None]] = 0
            out[key] = labels
        return out


# Tools that want the network's own outputs leave out what is an Invertd, such as MONAI Label's scoring by uncertainty.
for _restoring in (RestoreSegmentationd, KeepLargestComponentd):
    Invertd.register(_restoring)


def _plain(logits: Tensor) -> Tensor:
    return logits.as_tensor() if isinstance(logits, MetaTensor) else logits
