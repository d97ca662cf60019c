# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a labelled data set looks like, and the preprocessing that follows from it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose
from tqdm import tqdm

from ...errors import DataError, SettingsError
from ...files import write_json
from ...paths import as_path
from ...terminal import progress_bar
from ...transforms.preprocessing import cropped_volumes
from ...weights.transfer import origin_receipt
from ..cases import LABEL, Case, images_of
from ..checking.checks import check_channels, check_grid, explain

__all__ = ["check_spacing", "fingerprint", "preprocessing_settings", "target_spacing"]

_SAMPLES = 10_000  # foreground intensities of a case
_SCHEMES = ("zscore", "zscore_nonzero", "ct", "none")


def target_spacing(spacings_mm: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> list[float]:
    """Return the spacing that nnU-Net resamples a data set to.

    The median along each axis; but where one axis is more than three times as coarse as the others and has less than a
    third of their voxels, the tenth percentile along it, not below the others.

    Args:
        spacings_mm: of each case, along (slice, row, column).
        shapes: of each case after cropping, in voxels.

    Example:
        >>> target_spacing([[1.0, 1.0, 1.0], [1.2, 0.8, 0.8], [1.0, 0.9, 0.9]], [[100, 100, 100]] * 3)
        [1.0, 0.9, 0.9]
        >>> target_spacing([[6.0, 0.5, 0.5], [4.0, 0.5, 0.5]], [[20, 300, 300]] * 2)
        [4.2, 0.5, 0.5]
    """
    target = np.median(np.asarray(spacings_mm, dtype=float), axis=0)
    size = np.median(np.asarray(shapes, dtype=float), axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    if target[worst] > 3 * target[others].max() and size[worst] * 3 < size[others].min():
        fine = float(np.percentile(np.asarray(spacings_mm, dtype=float)[:, worst], 10))
        coarsest = float(target[others].max())
        target[worst] = fine if fine >= coarsest else max(coarsest, fine) + 1e-5
    return [round(float(value), 6) for value in target]


def fingerprint(
    cases: Sequence[Case],
    *,
    channels: int = 1,
    reorient: bool = True,
    ignore_label: int | None = None,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Read every training case once and gather spacings, sizes and foreground intensities.

    Args:
        cases: with ``image`` and ``label``.
        channels: of an image.
        reorient: as in the preprocessing, whose axes the figures are for.
        ignore_label: value of voxels without a verdict, which are no foreground.
        cache_dir: where the result is kept, to be read again for the same files.

    Returns:
        ``spacings_mm`` and ``shapes`` (after cropping to non-zero) of the usable cases, and ``ct``: for each channel
        the 0.5 and 99.5 percentile, mean and standard deviation of foreground intensities over all cases.

    Raises:
        DataError: if no case can be read.
    """
    identity: list[object] = [channels, reorient, ignore_label]
    for case in cases:
        for file in (*images_of(case), case[LABEL]):
            if Path(file).is_file():
                status = Path(file).stat()
                identity += [str(Path(file).resolve()), status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    kept = as_path(cache_dir or tempfile.gettempdir()) / f"fingerprint-{digest}.json"
    if cache_dir and kept.is_file():
        return dict(json.loads(kept.read_text("utf-8")))
    chain = Compose(cropped_volumes(["image", LABEL], reorient=reorient, channels=channels))
    spacings, shapes = [], []
    samples: list[list[np.ndarray]] = [[] for _ in range(channels)]
    problems: list[DataError] = []
    rng = np.random.default_rng(1234)
    for case in progress_bar(cases, desc="looking at the data", unit="case"):
        try:
            check_channels(case, channels)
            check_grid(images_of(case)[0], case[LABEL])
            data = chain({"image": case["image"], LABEL: case[LABEL]})
        except DataError as error:
            problems.append(error)
            continue
        except Exception as error:
            problems.append(explain(images_of(case)[0], error))
            continue
        image = data["image"]
        spacings.append([float(value) for value in image.pixdim])
        shapes.append([int(side) for side in image.shape[1:]])
        labels = data[LABEL].as_tensor()[0].numpy()
        inside = np.flatnonzero((labels > 0) & (labels != ignore_label))
        if len(inside):
            chosen = rng.choice(inside, _SAMPLES)  # with replacement, as nnU-Net
            for channel, values in zip(samples, image.as_tensor().float().numpy(), strict=True):
                channel.append(values.reshape(-1)[chosen])
    if not spacings:
        raise DataError(f"no case can be read: {problems[0] if problems else 'the list is empty'}")
    found = {"spacings_mm": spacings, "shapes": shapes, "ct": [_figures(channel) for channel in samples]}
    if cache_dir:
        write_json(found, kept)
    return found


def _figures(samples: Sequence[np.ndarray]) -> list[float] | None:
    if not samples:
        return None
    values = np.concatenate(samples).astype(np.float64)
    low, high = np.percentile(values, [0.5, 99.5])
    return [round(float(value), 6) for value in (low, high, values.mean(), values.std())]


def check_spacing(spacing_mm: object) -> None:
    """Refuse what is no spacing to train at.

    Raises:
        SettingsError: if it is not one or three positive numbers, ``median``, ``pretrained`` or None.
    """
    sides = list(spacing_mm) if isinstance(spacing_mm, Sequence) and not isinstance(spacing_mm, str) else [spacing_mm]
    numbers = [side for side in sides if isinstance(side, (int, float)) and not isinstance(side, bool)]
    usable = len(numbers) == len(sides) in (1, 3) and all(0 < side < float("inf") for side in numbers)
    if not usable and spacing_mm not in (None, "median", "pretrained"):
        raise SettingsError(
            f"spacing_mm is {spacing_mm!r}; it must be a number, three of them, median, pretrained or null"
        )


def preprocessing_settings(
    cases: Sequence[Case],
    *,
    spacing_mm: float | Sequence[float] | str | None = 1.0,
    normalization: str | Sequence[str] = "zscore",
    channels: int = 1,
    reorient: bool = True,
    ignore_label: int | None = None,
    pretrained: str = "",
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Turn what a user asks for into the numbers that training and inference share.

    Args:
        cases: training cases, read only if something depends on them.
        spacing_mm: one or three (slice, row, column) values; ``median`` for nnU-Net's rule on these cases;
            ``pretrained`` for the spacing of the pre-training; None for each file's own.
        normalization: ``zscore``, ``zscore_nonzero``, ``ct`` (Hounsfield units: clip and scale by figures of the
            foreground of these cases) or ``none``; one for all channels or one for each.
        channels: of an image.
        reorient: canonical axes, or each file's own.
        ignore_label: value of voxels without a verdict, whose intensities count for nothing.
        pretrained: file whose spacing ``pretrained`` means.
        cache_dir: where what was found is kept.

    Returns:
        arguments of ``volume_preprocessing``: ``spacing_mm``, ``normalization``, ``channels``, ``reorient``.

    Raises:
        SettingsError: if a value is not one of these.
        DataError: if the cases do not tell.
    """
    schemes = [normalization] if isinstance(normalization, str) else list(normalization)
    if len(schemes) not in (1, channels) or any(scheme not in _SCHEMES for scheme in schemes):
        raise SettingsError(
            f"normalization is {normalization!r}; it must be one of {', '.join(_SCHEMES)}, or a list of {channels}"
        )
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise SettingsError(f"channels is {channels!r}; it must be the number of images of a case")
    check_spacing(spacing_mm)
    looked: dict[str, Any] = {}
    if spacing_mm == "median" or "ct" in schemes:
        looked = fingerprint(
            cases, channels=channels, reorient=reorient, ignore_label=ignore_label, cache_dir=cache_dir
        )
    resolved: list[Any] = list(schemes)
    if "ct" in schemes:
        resolved = [*schemes] * (channels if len(schemes) == 1 else 1)
        for place, scheme in enumerate(resolved):
            if scheme == "ct":
                if looked["ct"][place] is None:
                    raise DataError("normalization ct needs foreground voxels, and no training label marks any")
                resolved[place] = {"ct": looked["ct"][place]}
    spacing: Any = spacing_mm
    if spacing_mm == "median":
        spacing = target_spacing(looked["spacings_mm"], looked["shapes"])
        tqdm.write("the data set's own spacing is " + " x ".join(f"{side:g}" for side in spacing) + " mm")
    elif spacing_mm == "pretrained":
        spacing = _pretraining_spacing(pretrained)
    return {"spacing_mm": spacing, "normalization": resolved, "channels": channels, "reorient": reorient}


def _pretraining_spacing(pretrained: str) -> Any:
    spacing = origin_receipt(pretrained).spacing_mm if as_path(pretrained).is_file() else None
    if spacing is None:
        raise SettingsError(
            f"nothing beside {pretrained} says at what spacing it was made; give --spacing_mm in millimetres"
        )
    return spacing
