# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What training and prediction of a classifier, or of a regression, share: batches, settings that go with a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import SettingsError, WeightsError
from ..files import read_record
from ..paths import as_path
from ..tasks import ClassificationTask, RegressionTask
from ..terminal import speaks

__all__ = [
    "ClassificationBatch",
    "check_new_file",
    "classifier_settings",
    "read_classifier_settings",
    "target_task",
    "tell_resized",
]


class ClassificationBatch:
    """``prepare_batch`` of MONAI's engines for whole volumes: image ``(B, C, D, H, W)`` and targets of a batch.

    Args:
        views: callable on a batch whose regions are on the device; returns ``image``.
        task: that says how targets are written.
    """

    def __init__(
        self, views: Callable[[dict[str, Any]], dict[str, Tensor]], *, task: ClassificationTask | RegressionTask
    ) -> None:
        self.views, self.task = views, task

    def __call__(
        self, batch: dict[str, Any], device: torch.device | str, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return image and target; no target if any case of the batch has none."""
        regions = [region.to(device, non_blocking=non_blocking, **kwargs) for region in batch["region"]]
        with torch.no_grad():
            image = self.views({**batch, "region": regions})["image"]
        if any(target is None for target in batch["target"]):
            return image, None
        return image, self.task.encode(batch["target"]).to(device, non_blocking=True)


def classifier_settings(
    task: ClassificationTask | RegressionTask,
    *,
    target: str | Sequence[str],
    data: Mapping[str, Any],
    network: Mapping[str, Any],
    **others: Any,
) -> dict[str, Any]:
    """Gather what a model was made for and how, in plain values: classes or number, preprocessing, network, others."""
    if isinstance(task, RegressionTask):
        asked: dict[str, Any] = {"regression": {"mean": task.mean, "std": task.std, "units": task.units}}
    else:
        asked = {"classes": list(task.names), "multilabel": task.multilabel}
    return {
        **asked,
        "target": target if isinstance(target, str) else list(target),
        "data": dict(data),
        "network": dict(network),
        **others,
    }


def read_classifier_settings(path: str) -> dict[str, Any]:
    """Return the settings in the JSON beside a classifier, so that prediction need not be told them again.

    Raises:
        WeightsError: if there is no such model, or the JSON beside it is missing or of something else.
    """
    model = as_path(path)
    sidecar = model.with_suffix(".json")
    if not model.is_file():
        raise WeightsError(
            f"there is no classifier {path}; train one with this bundle's train_classification config, or name it with "
            "--model"
        )
    try:
        settings: dict[str, Any] = read_record(sidecar, error=WeightsError)["settings"]
        if not {"target", "data", "network", "input_size"} <= settings.keys():
            raise KeyError("target")
        target_task(settings)
    except WeightsError:
        raise
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{sidecar} does not say what the classifier beside it was trained for ({error!r}); keep both files "
            "together, as training wrote them"
        ) from error
    return settings


def target_task(settings: Mapping[str, Any]) -> ClassificationTask | RegressionTask:
    """Return what a model was made for, from the settings beside it.

    Raises:
        KeyError: if they do not say it.

    Example:
        >>> target_task({"target": "age", "regression": {"mean": 60.5, "std": 9.0, "units": "years"}})
        RegressionTask(name='age', mean=60.5, std=9.0, units='years')
    """
    if "regression" in settings:
        about = settings["regression"]
        return RegressionTask(settings["target"], about["mean"], about["std"], about["units"])
    return ClassificationTask(tuple(settings["classes"]), settings["multilabel"])


def tell_resized(task: ClassificationTask | RegressionTask, *, fit: str, zoom_probability: float) -> None:
    """Say so if the network cannot see how large things are, while a number is to be predicted.

    Args:
        task: of the network.
        fit: resize or crop.
        zoom_probability: of the augmentation.
    """
    ways = ["--fit resize shows every volume at one size"] if fit == "resize" else []
    ways += [f"--zoom_probability {zoom_probability:g} shows some larger or smaller"] if zoom_probability else []
    if isinstance(task, RegressionTask) and ways and speaks():
        tqdm.write(
            f"note: {' and '.join(ways)}; if {task.name} depends on size, as a volume or a thickness does, add --fit "
            "crop --zoom_probability 0"
        )


def check_new_file(path: str, *, overwrite: bool = False) -> None:
    """Refuse to write over a file of an earlier run.

    Raises:
        SettingsError: if it exists and ``overwrite`` is off.
    """
    if as_path(path).exists() and not overwrite:
        raise SettingsError(f"{path} exists; give another --output_dir, or replace it with --overwrite true")
