# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a task asks for: of voxels, classes or overlapping regions; of whole volumes, classes, labels or a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .errors import SettingsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TARGET", "ClassificationTask", "RegressionTask", "SegmentationTask"]

BACKGROUND = "background"
# what a list of names may begin with; any other name of the value 0 is to be said with its value
_BACKGROUNDS = {BACKGROUND, *("back ground", "bg", "clear label", "unlabeled", "unlabelled", "outside", "exterior")}
_BACKGROUNDS |= {*("none", "nothing", "other", "others", "rest", "air", "void", "hintergrund", "fond", "fondo", "0")}
TARGET = "target"  # key of a case: index of its class, a list of 0 and 1, or a number


@dataclass(frozen=True)
class SegmentationTask:
    """Classes of a label map, one output of the network for each.

    Without regions the outputs exclude each other (softmax; background is one of them). With regions, sets of label
    values that may overlap, each output is a region of its own (sigmoid; there is no background).

    Args:
        labels: names of the label values 0, 1, 2, ..., background first; or the value of each name, as an atlas numbers
            its classes, of which nothing is kept but these.
        regions: name of each region and its label values, e.g. ``{"whole": [1, 2, 3], "core": [2, 3]}``; painted in
            this order, a later one over an earlier one.
        ignore_label: value of voxels without a verdict, which no loss and no score counts.
        regions_class_order: label value that each region is painted with; unless given, the lowest of the region that
            no later one holds.

    Attributes:
        labels: names of the classes in the order of their values.
        label_values: these values, 0 first.

    Raises:
        SettingsError: saying how to write them.

    Example:
        >>> import torch
        >>> task = SegmentationTask(["background", "edema", "core"], regions={"whole": [1, 2], "core": [2]})
        >>> task.names, task.outputs, task.painted
        (['whole', 'core'], 2, [1, 2])
        >>> task.decode(torch.tensor([[2.0, 2.0, -1.0], [-1.0, 3.0, -1.0]]).view(1, 2, 3, 1, 1)).flatten()
        tensor([1, 2, 0], dtype=torch.uint8)
        >>> atlas = SegmentationTask({"background": 0, "pons": 614454277, "medulla": 354})
        >>> atlas.names, atlas.values, atlas.indices(torch.tensor([614454277, 0, 354]))
        (['medulla', 'pons'], [(354,), (614454277,)], tensor([2, 0, 1]))
    """

    labels: Sequence[str]
    regions: Mapping[str, Sequence[int]] | None = None
    ignore_label: int | None = None
    regions_class_order: Sequence[int] | None = None
    label_values: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        given: Any = self.labels
        if isinstance(given, Mapping) and all(_is_value(value) for value in given.values()):
            order = sorted(given.items(), key=lambda pair: pair[1])
            object.__setattr__(self, "labels", [str(name) for name, _ in order])
            object.__setattr__(self, "label_values", tuple(value for _, value in order))
        else:
            counted = range(len(given)) if isinstance(given, (list, tuple)) else ()
            object.__setattr__(self, "label_values", tuple(counted))
        values = self.label_values
        names = [str(name) for name in self.labels] if values else []
        if len(values) < 2 or values[0] != 0 or len(set(names)) != len(names) or len(set(values)) != len(values):
            raise SettingsError(
                f"labels is {given!r}; list all classes, background first: --labels \"['background','lesion']\", or "
                "say the value of each: --labels \"{'background':0,'lesion':4}\""
            )
        if not isinstance(given, Mapping) and (told := _place_of_background(names)):
            raise SettingsError(f"labels is {given!r}, and {told}")
        ignored = self.ignore_label
        if ignored is not None and (not _is_value(ignored) or ignored in values):
            raise SettingsError(
                f"ignore_label is {ignored!r}; it must be a whole number beyond the classes, which are {self._all}"
            )
        if self.regions is None:
            if self.regions_class_order is not None:
                raise SettingsError(
                    f"regions_class_order is {self.regions_class_order!r}, but there are no regions; leave it out"
                )
            return
        self._check_regions(self.regions)

    def _check_regions(self, regions: Any) -> None:
        if not isinstance(regions, Mapping) or not regions:
            raise SettingsError(f"regions is {regions!r}; write --regions \"{{'whole':[1,2],'core':[2]}}\"")
        for name, own in regions.items():
            if not (isinstance(own, (list, tuple)) and own and all(v in self.label_values[1:] for v in own)):
                raise SettingsError(
                    f"region {name!r} is {own!r}; it must list values of foreground classes, which are {self._all}"
                )
        if self.regions_class_order is not None:
            order = self.regions_class_order
            if not isinstance(order, (list, tuple)) or len(order) != len(regions) or not set(order) <= set(self.known):
                raise SettingsError(
                    f"regions_class_order is {order!r}; it must list a label value for each of {', '.join(regions)}; "
                    f"the classes are {self._all}"
                )
        for index, (name, value) in enumerate(zip(self.names, self.painted, strict=True)):
            if value < 0:
                later = ", ".join(self.names[index + 1 :])
                raise SettingsError(
                    f"region {name!r} holds no label value of its own beside those of {later}; put larger regions "
                    "first, or say with --regions_class_order which value each is painted with"
                )

    @property
    def _all(self) -> str:
        """The values of the classes, to print."""
        values = self.label_values
        if self.counted:
            return f"0 to {len(values) - 1}"
        return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")

    @property
    def counted(self) -> bool:
        """Whether the values of the classes are 0, 1, 2, ... up to the last."""
        return self.label_values[-1] == len(self.label_values) - 1

    @property
    def plain_labels(self) -> list[str] | dict[str, int]:
        """The argument ``labels`` that says the same, as JSON holds it."""
        names = [str(name) for name in self.labels]
        told = self.counted and _is_background(names[0])
        return names if told else dict(zip(names, self.label_values, strict=True))

    @property
    def by_value(self) -> dict[int, str]:
        """Names of the classes by their values."""
        return dict(zip(self.label_values, map(str, self.labels), strict=True))

    @property
    def names(self) -> list[str]:
        """Names of the foreground classes or regions, the ones that are scored."""
        return list(self.regions) if self.regions is not None else [str(name) for name in self.labels[1:]]

    @property
    def outputs(self) -> int:
        """Number of network outputs: classes with background, or regions."""
        return len(self.regions) if self.regions is not None else len(self.labels)

    @property
    def values(self) -> list[tuple[int, ...]]:
        """Label values of each of ``names``."""
        if self.regions is not None:
            return [tuple(sorted(set(values))) for values in self.regions.values()]
        return [(value,) for value in self.label_values[1:]]

    @property
    def painted(self) -> list[int]:
        """Value with which each of ``names`` is painted; -1 if none is said and no own one is left."""
        if self.regions_class_order is not None:
            return list(self.regions_class_order)
        values = self.values
        return [
            min(set(own).difference(*values[index + 1 :]), default=-1) for index, own in enumerate(values)
        ]  # of classes, their own

    @property
    def known(self) -> list[int]:
        """All values that a label map may hold."""
        return [*self.label_values] + ([] if self.ignore_label is None else [self.ignore_label])

    @property
    def dtype(self) -> torch.dtype:
        """Type of predicted label maps, the smallest that holds all values."""
        import torch  # not at the top: listing cases takes no tensors

        limits = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))
        return next((dtype for dtype, limit in limits if self.label_values[-1] < limit), torch.int64)

    def indices(self, labels: Tensor) -> Tensor:
        """Return the index of the class of each value of a label map, int64; of a value that is none, any."""
        if self.counted:
            return labels.long()
        import torch

        values = torch.tensor(self.label_values, device=labels.device)
        return torch.searchsorted(values, labels.long()).clamp_(max=len(values) - 1)

    @property
    def members(self) -> list[tuple[int, ...]]:
        """Indices of the classes of each of ``names``."""
        places = {value: index for index, value in enumerate(self.label_values)}
        return [tuple(places[value] for value in own) for own in self.values]

    def class_map(self, labels: np.ndarray) -> np.ndarray:
        """Return the index of the class of each value of a label map; of a value that is none, such as the ignored one,
        the number of classes.
        """
        found = np.searchsorted(self.label_values, labels)
        return np.where(np.isin(labels, self.label_values), found, len(self.label_values))

    def decode(self, logits: Tensor) -> Tensor:
        """Turn logits ``(B, outputs, ...)`` into a label map ``(B, 1, ...)`` of :attr:`dtype`."""
        if self.regions is None:
            return self._valued(logits.argmax(1, keepdim=True))
        out = logits.new_zeros((len(logits), 1, *logits.shape[2:]), dtype=self.dtype)
        for index, value in enumerate(self.painted):
            out[logits[:, index : index + 1] > 0] = value
        return out

    def decode_outputs(self, outputs: Iterable[Tensor]) -> Tensor:
        """Turn logits into the label map that :meth:`decode` gives, one output at a time.

        Args:
            outputs: each ``(1, ...)``, in the order of the network's.
        """
        paints = self.label_values if self.regions is None else self.painted
        labels: Tensor | None = None
        best: Tensor | None = None
        for index, output in enumerate(outputs):
            if labels is None or best is None:
                labels, best = output.new_zeros(output.shape, dtype=self.dtype), output.clone()
            if self.regions is not None:
                labels[output > 0] = paints[index]
            elif index:
                labels[output > best] = paints[index]  # of equal ones the first, as argmax
                best.clamp_(min=output)
        assert labels is not None, "a task has outputs"
        return labels

    def _valued(self, indices: Tensor) -> Tensor:
        """Return the values of the classes with these indices."""
        if self.counted:
            return indices.to(self.dtype)
        return indices.new_tensor(self.label_values)[indices].to(self.dtype)


def _place_of_background(names: Sequence[str]) -> str | None:
    """Return what is wrong with the place of the background among the names of the values 0, 1, 2, ..."""
    if _is_background(names[0]):
        return None
    behind = next((name for name in names if name.strip().casefold() == BACKGROUND), BACKGROUND)
    right = [behind, *(name for name in names if name != behind)]
    values = {name: value for value, name in enumerate(names)}
    return (
        f"the first name is that of the value 0, the background, so every score would be of another class; write "
        f'--labels "{right!r}", or --labels "{values!r}" if {names[0]!r} is what 0 means'
    )


def _is_background(name: str) -> bool:
    return name.strip().casefold() in _BACKGROUNDS


def _is_value(value: object) -> bool:
    """Return whether something is a value of a label map."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


@dataclass(frozen=True)
class ClassificationTask:
    """Classes that exclude each other (softmax), or labels that may come together (sigmoid).

    Args:
        names: of the classes or labels, in the order of the network's outputs.
        multilabel: whether they are labels.

    Example:
        >>> import torch
        >>> task = ClassificationTask(("AD", "CN"))
        >>> task.decode(torch.tensor([[0.0, 0.0]])), task.decide(torch.tensor([[0.2, 0.8]]))
        (tensor([[0.5000, 0.5000]]), tensor([1]))
    """

    names: tuple[str, ...]
    multilabel: bool = False
    key_score: ClassVar[str] = "ap"  # that decides which model is the best

    @property
    def outputs(self) -> int:
        """Number of network outputs."""
        return len(self.names)

    def decode(self, logits: Tensor) -> Tensor:
        """Turn logits ``(B, outputs)`` into probabilities, float32."""
        return logits.float().sigmoid() if self.multilabel else logits.float().softmax(1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the index of the likeliest class ``(B,)``, or 0 and 1 of each label ``(B, outputs)``."""
        return (probabilities > 0.5).long() if self.multilabel else probabilities.argmax(1)

    def encode(self, targets: Sequence[Any]) -> Tensor:
        """Stack targets of cases: ``(B,)`` integers, or ``(B, outputs)`` float."""
        import torch  # not at the top: listing cases takes no tensors

        return torch.tensor(list(targets), dtype=torch.float32 if self.multilabel else torch.long)

    def stratum(self, case: Mapping[str, Any]) -> str:
        """Return what splits hold in equal shares: the class, or the combination of labels."""
        if not self.multilabel:
            return self.names[case[TARGET]]
        return "+".join(name for name, value in zip(self.names, case[TARGET], strict=True) if value) or "none"

    def counts(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Count the cases of each class or label."""
        if self.multilabel:
            return {name: sum(int(case[TARGET][index]) for case in cases) for index, name in enumerate(self.names)}
        found = Counter(case[TARGET] for case in cases)
        return {name: found[index] for index, name in enumerate(self.names)}


@dataclass(frozen=True)
class RegressionTask:
    """A number for each volume, learned in units of its spread: minus its mean, over its standard deviation.

    Args:
        name: of the number.
        mean: of the training cases, in the number's own units.
        std: standard deviation of the training cases.
        units: in words, None where they are not said.

    Example:
        >>> import torch
        >>> task = RegressionTask("age", mean=60.0, std=10.0, units="years")
        >>> task.encode([75.0, 60.0]).tolist(), task.decode(torch.tensor([[1.5], [0.0]])).tolist()
        ([[1.5], [0.0]], [75.0, 60.0])
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    units: str | None = None
    key_score: ClassVar[str] = "r2"  # that decides which model is the best

    @property
    def outputs(self) -> int:
        """Number of network outputs."""
        return 1

    @property
    def names(self) -> tuple[str, ...]:
        """What the outputs are."""
        return (self.name,)

    def decode(self, outputs: Tensor) -> Tensor:
        """Turn what the network says ``(B, 1)`` into numbers in their own units ``(B,)``, float32."""
        return outputs.float()[:, 0] * self.std + self.mean

    def encode(self, targets: Sequence[float]) -> Tensor:
        """Stack targets of cases, standardised: ``(B, 1)`` float32."""
        import torch  # not at the top: listing cases takes no tensors

        return torch.tensor([[(value - self.mean) / self.std] for value in targets], dtype=torch.float32)
