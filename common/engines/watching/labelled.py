# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What frozen features tell of labelled cases while they are learned: kNN and a linear probe on unseen cases.

===============  ====================================================================================================
label maps       a crop around a labelled voxel of each case; voxels of every class, as many of each; features of all
                 maps of the encoder there, interpolated and joined; balanced accuracy, and AUROC of the linear probe
a class          the middle of each scan; the coarsest map, pooled; balanced accuracy, and AUROC of the linear probe
a number         the same; R2, and mean absolute error of the linear probe
===============  ====================================================================================================

Half of the cases are the reference that probes are fitted on, the other half, of other groups, are unseen. Cases,
voxels and split are drawn once, and the settings of the probes are fixed, so that what changes is the features.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error, r2_score, roc_auc_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ...data import SegmentationTask, StoredVolume, labelled_lists, segmentation_task, split_cases
from ...data.cases import LABEL, Case, case_name
from ...data.listing.classified import classified_cases
from ...errors import DataError, SettingsError
from ..features import VolumeEmbedder, draw_voxels
from ..probing import REGRESSION, Target, outer_folds, probes, read_target
from .crops import crop_box, read_crop
from .source import ProbeSource

__all__ = ["CaseTask", "Labelled", "VoxelTask", "labelled_task", "unseen_scores"]

_FIXED = {"n_neighbors": 5, "C": 0.01, "alpha": 100.0}  # in the middle of what a cross-validation would choose from
_VOXELS, _FEWEST_VOXELS, _MOST_VOXELS = 48, 4, 4000  # of each kind in a case; of all kinds in all cases
_MOST_VALUES = 32  # of label maps without names
_MAPS, _ROWS, _FEWEST_ROWS = 16, 64, 8  # cases


class Labelled(Protocol):
    """Cases to try features on.

    Attributes:
        asked: what of, in words.
        score: what is measured, in words.
        chance: the score of somebody who knows nothing.
        parts: names of the reference and of the unseen cases.
        notes: what the user should know.
    """

    asked: str
    score: str
    chance: float
    parts: dict[str, list[str]]
    notes: list[str]

    def scores(self, backbone: nn.Module) -> dict[str, float]:
        """Return ``knn``, ``linear`` and more scores on the unseen cases, by name."""


def labelled_task(source: ProbeSource, sides: Sequence[int]) -> Labelled:
    """Read what a source names.

    Args:
        source: of the labelled cases.
        sides: of a crop.

    Raises:
        DataError: if there is nothing to try features on.
    """
    return CaseTask(source, sides) if source.target is not None else VoxelTask(source, sides)


def unseen_scores(
    reference: tuple[np.ndarray, np.ndarray], unseen: tuple[np.ndarray, np.ndarray], *, task: str
) -> dict[str, float]:
    """Fit the probes on features and targets of reference cases, and score them on those of unseen ones.

    Args:
        reference: ``(n, E)`` and ``(n,)``.
        unseen: the same of other cases; of classes, the same classes.
        task: classification or regression.
    """
    found: dict[str, float] = {}
    (x, y), (new, truth) = reference, unseen
    for probe in probes(task):
        name = "linear" if probe.name == "linear" else "knn"
        (setting,) = probe.choices
        value = min(_FIXED[setting], len(x)) if setting == "n_neighbors" else _FIXED[setting]
        model = Pipeline([("scale", StandardScaler()), ("probe", probe.model)])
        model.set_params(**{f"probe__{setting}": value})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
            decisions = model.fit(x, y).predict(new)
            score = r2_score if task == REGRESSION else balanced_accuracy_score
            found[name] = float(score(truth, decisions))
        if name == "linear" and task == REGRESSION:
            found["linear_mae"] = float(mean_absolute_error(truth, decisions))
        elif name == "linear" and np.array_equal(np.unique(truth), model.classes_):
            likely = model.predict_proba(new)
            likely = likely[:, 1] if likely.shape[1] == 2 else likely
            found["linear_auroc"] = float(roc_auc_score(truth, likely, multi_class="ovr"))
    return found


@dataclass
class _Crop:
    """A crop of a labelled case, and the voxels of it that are looked at."""

    image: Tensor  # (C, d, h, w)
    points: np.ndarray  # (P, 3)
    labels: np.ndarray  # (P,)


class VoxelTask:
    """Classes of label maps, at voxels of unseen cases.

    Args:
        source: of the labelled cases.
        sides: of a crop.

    Raises:
        DataError: if there are too few cases, or their maps mark nothing that could be told apart.
        SettingsError: if the names of the classes make no sense.
    """

    def __init__(self, source: ProbeSource, sides: Sequence[int]) -> None:
        listed = labelled_lists(source.folder, source.datalist, fold="all", groups=source.table, group=source.group)
        chosen = _drawn(listed["training"], source.cases or _MAPS, source.seed)
        if len(chosen) < 2:
            raise DataError(f"{source.data} holds {len(chosen)} labelled case; a probe needs two, one of them unseen")
        pairs = source.prepared(chosen, maps=True)
        volumes = {case_name(case): volume for case, volume in pairs}
        split = split_cases([case for case, _ in pairs], group=source.group, validation_share=0.5, seed=source.seed)
        self.parts = {"reference": _names(split["training"]), "unseen": _names(split["validation"])}
        if {*self.parts["reference"]} & {*self.parts["unseen"]}:
            one = source.group or "case"
            raise DataError(f"the {len(pairs)} usable case(s) of {source.data} are of one {one}; add cases of another")
        task = _task(source, [volume for _, volume in pairs])
        self.sides = list(sides)
        count = min(max(_MOST_VOXELS // (len(pairs) * (len(task.labels) + 1)), _FEWEST_VOXELS), _VOXELS)
        rng = np.random.default_rng(source.seed)
        self._crops = {
            part: [_labelled_crop(volumes[name], task, sides, count=count, rng=rng) for name in names]
            for part, names in self.parts.items()
        }
        held = [{*np.concatenate([crop.labels for crop in crops]).tolist()} for crops in self._crops.values()]
        self.classes = sorted(held[0] & held[1])
        names = [str(task.labels[index]) for index in self.classes]
        if len(names) < 2:
            raise DataError(
                f"the label maps of {source.data} show nothing but {', '.join(names) or 'other classes'} in both "
                f"halves of {len(pairs)} cases: there is nothing to tell apart; look at them, or at --probe_labels"
            )
        lost = [str(task.labels[index]) for index in sorted(held[0] ^ held[1])]
        self.notes = [f"only one half of the cases shows {', '.join(lost)}: left out of the probe"] if lost else []
        unknown = sorted({value for _, volume in pairs for value in volume.values} - {*task.known})
        self.notes += [f"--probe_labels names no class {', '.join(map(str, unknown))}: left out"] if unknown else []
        self.asked, self.score = f"voxels of {', '.join(names)}", "balanced accuracy"
        self.chance = 1 / len(names)

    def scores(self, backbone: nn.Module) -> dict[str, float]:
        """Return balanced accuracies and the AUROC at voxels of unseen cases.

        Raises:
            DataError: if features are not finite.
        """
        stages = range(len(backbone.feature_strides))  # type: ignore[arg-type]
        embedder = VolumeEmbedder(backbone, patch_size=self.sides, stages=list(stages), device=_device(backbone))
        both = []
        for crops in self._crops.values():
            labels = np.concatenate([crop.labels for crop in crops])
            features = np.concatenate([embedder.at(crop.image, crop.points) for crop in crops])
            kept = np.isin(labels, self.classes)
            both.append((features[kept], labels[kept]))
        return unseen_scores(both[0], both[1], task="classification")


class CaseTask:
    """A class or a number of whole scans, told of unseen ones.

    Args:
        source: of the labelled cases, with a table and a target.
        sides: of a crop.

    Raises:
        DataError: if the table leaves too few cases, or nothing to tell apart.
    """

    def __init__(self, source: ProbeSource, sides: Sequence[int]) -> None:
        assert source.table is not None
        assert source.target is not None
        lists = classified_cases(source.folder, source.datalist, table=source.table)
        cases = {str(case["case"]): case for part in lists.values() for case in part}
        target = read_target(source.table, [*cases], target=source.target, group=source.group)
        target = _some(target, source.cases or _ROWS, source.seed)
        pairs = source.prepared([cases[name] for name in target.cases], maps=False)
        usable = {str(case["case"]): volume for case, volume in pairs}
        target = _kept(target, [index for index, name in enumerate(target.cases) if name in usable])
        if len(target.cases) < _FEWEST_ROWS:
            raise DataError(
                f"{source.table} tells the {target.name} of {len(target.cases)} usable case(s); a probe needs at least "
                f"{_FEWEST_ROWS}, half of them unseen"
            )
        folds, _ = outer_folds(target, folds=2, seed=source.seed)
        self._rows = dict(zip(("reference", "unseen"), folds[0], strict=True))
        self.parts = {part: [target.cases[row] for row in rows] for part, rows in self._rows.items()}
        self.sides, self.target, self.notes = list(sides), target, list(target.notes)
        self._crops = [read_crop(usable[name], *crop_box(usable[name].shape, sides)) for name in target.cases]
        numbers = target.task == REGRESSION
        self.asked, self.score = f"{target.name} of scans", "R2" if numbers else "balanced accuracy"
        self.chance = 0.0 if numbers else 1 / len(target.classes)

    def scores(self, backbone: nn.Module) -> dict[str, float]:
        """Return balanced accuracies and the AUROC, or R2 and the mean absolute error, of unseen scans.

        Raises:
            DataError: if features are not finite.
        """
        embedder = VolumeEmbedder(backbone, patch_size=self.sides, device=_device(backbone))
        features = np.stack([embedder(crop).vector for crop in self._crops])
        both = [(features[rows], self.target.values[rows]) for rows in self._rows.values()]
        return unseen_scores(both[0], both[1], task=self.target.task)


def _device(backbone: nn.Module) -> torch.device:
    return next(backbone.parameters()).device


def _names(cases: Sequence[Case]) -> list[str]:
    return [case_name(case) for case in cases]


def _drawn(cases: Sequence[Case], most: int, seed: int) -> list[Case]:
    ordered = sorted(cases, key=case_name)
    return ordered if len(ordered) <= most else random.Random(seed).sample(ordered, most)


def _task(source: ProbeSource, volumes: Sequence[StoredVolume]) -> SegmentationTask:
    """Return the classes that the user names, or one for each value that the maps hold."""
    if source.labels is not None:
        return segmentation_task(source.labels)
    values = sorted({value for volume in volumes for value in volume.values} - {0})
    if not values:
        raise DataError(f"the label maps of {source.data} mark nothing; look at them, or give other --probe_data")
    if len(values) > _MOST_VALUES:
        raise SettingsError(
            f"the label maps of {source.data} hold {len(values)} values; say with --probe_labels which are classes"
        )
    return SegmentationTask({"background": 0, **{f"value {value}": value for value in values}})  # type: ignore[arg-type]


def _labelled_crop(
    volume: StoredVolume, task: SegmentationTask, sides: Sequence[int], *, count: int, rng: np.random.Generator
) -> _Crop:
    """Return a crop around a labelled voxel, or the middle of a volume without any, with ``count`` voxels of a kind."""
    start, stop = crop_box(volume.shape, sides, volume.voxel(task.label_values[1:], rng))
    labels = task.class_map(volume.read(start, stop, mask=LABEL))
    points, values, _ = draw_voxels(labels, task, count=count, rng=rng)
    return _Crop(read_crop(volume, start, stop), points, values)


def _some(target: Target, most: int, seed: int) -> Target:
    """Return at most so many cases, of every class in turn."""
    order = np.random.default_rng([seed, 2]).permutation(len(target.cases))
    if target.classes:
        seen: dict[int, int] = {}
        turn = []
        for row in order:
            turn.append(seen.setdefault(int(target.values[row]), 0))
            seen[int(target.values[row])] += 1
        order = order[np.argsort(turn, kind="stable")]
    return _kept(target, sorted(order[:most].tolist()))


def _kept(target: Target, rows: Sequence[int]) -> Target:
    chosen = list(rows)
    return replace(
        target,
        cases=[target.cases[row] for row in chosen],
        rows=target.rows[chosen],
        values=target.values[chosen],
        groups=None if target.groups is None else target.groups[chosen],
    )
