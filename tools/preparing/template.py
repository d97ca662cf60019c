# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Real volumes without a download: the MNI152 template that nilearn ships, seen through simulated scanners.

The template is the average of many heads, brain only; it is nobody's scan. It is nearly mirror-symmetric, so its parts
are split from back to front with a gap, never left from right. Each simulated scan has a smooth receive field, its own
contrast, and Rician noise inside and outside the brain, so that intensities alone do not tell tissues apart.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import nibabel as nib
import numpy as np
from filelock import FileLock
from scipy.ndimage import zoom

from common.data.cases import case_name
from common.files import write_json

__all__ = ["LABELS", "NOTICE", "simulate_scan", "template", "write_template_data", "write_template_task"]

LABELS = ["background", "gray matter", "white matter"]
NOTICE = (
    "MNI152 (ICBM 2009a) group-average template, copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging "
    "Centre, "
    "Montreal Neurological Institute, McGill University; as shipped by the nilearn package."
)
_GAP_MM = 10


def template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the template's T1 in [0, 1], its label map of :data:`LABELS`, and its affine; 1 mm, axes RAS."""
    folder = files("nilearn") / "datasets" / "data"
    t1, gray, white = (
        nib.load(str(folder / f"mni_icbm152_{k}_tal_nlin_sym_09a_converted.nii.gz")) for k in ("t1", "gm", "wm")
    )
    image = t1.get_fdata(dtype=np.float32)
    g, w = gray.get_fdata(dtype=np.float32), white.get_fdata(dtype=np.float32)
    g, w = g / g.max(), w / w.max()
    labels = np.zeros(image.shape, np.uint8)
    labels[(g >= 0.5) & (g >= w)] = 1
    labels[(w >= 0.5) & (w > g)] = 2
    return image / image.max(), labels, t1.affine


def simulate_scan(
    image: np.ndarray, rng: np.random.Generator, *, field: float = 0.6, noise: float = 0.04
) -> np.ndarray:
    """Return how one scanner might see ``image``.

    Args:
        image: intensities in [0, 1], 0 outside the brain.
        rng: draws contrast, field and noise.
        field: strength of the receive field; its logarithm spans plus or minus this.
        noise: standard deviation of the noise in each of the two receive channels.
    """
    coarse = rng.standard_normal((4, 4, 4))
    smooth = zoom(coarse, [n / 4 for n in image.shape], order=3, grid_mode=True, mode="nearest")
    smooth -= smooth.mean()
    seen = image ** rng.uniform(0.8, 1.25) * np.exp(field * smooth / np.abs(smooth).max())
    real = seen + noise * rng.standard_normal(image.shape)
    return (1000 * np.hypot(real, noise * rng.standard_normal(image.shape))).astype(np.float32)


def write_template_data(
    folder: Path, *, seed: int = 0, train: int = 4, validation: int = 1, test: int = 2
) -> dict[str, str]:
    """Write simulated scans and labels of the template's back (to learn from) and front (to test on).

    Args:
        folder: gets ``images``, ``labels`` and ``datalist.json`` with training, validation and test entries.
        seed: of the simulated scanners.
        train: scans of the back part to train on.
        validation: further scans of the back part.
        test: scans of the front part.

    Returns:
        what each part is, in words.
    """
    image, labels, affine = template()
    inside = np.flatnonzero((image > 0).any(axis=(0, 2)))
    back, front = int(inside[0]), int(inside[-1]) + 1
    cut = back + round(0.6 * (front - back))
    parts = {"learn": slice(back, cut), "test": slice(cut + _GAP_MM, front)}
    rng = np.random.default_rng(seed)
    entries: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    plan = [("training", "learn", train), ("validation", "learn", validation), ("test", "test", test)]
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, part, count in plan:
        where = parts[part]
        part_affine = affine.copy()
        part_affine[:3, 3] = (affine @ [0, where.start, 0, 1])[:3]
        for index in range(count):
            file = f"{split}_{index + 1}.nii.gz"
            scan = simulate_scan(image[:, where], rng)
            nib.save(nib.Nifti1Image(scan, part_affine), folder / "images" / file)
            nib.save(nib.Nifti1Image(labels[:, where], part_affine), folder / "labels" / file)
            entries[split].append({"image": f"images/{file}", "label": f"labels/{file}"})
    (folder / "datalist.json").write_text(json.dumps(entries, indent=1), "utf-8")
    return {
        "learn": (
            f"the back {cut - back} mm of the brain, {train} simulated scans to train on and {validation} to "
            "validate on"
        ),
        "test": (
            f"the front {front - cut - _GAP_MM} mm, {test} simulated scans of other scanners, after a gap of "
            f"{_GAP_MM} mm"
        ),
    }


def write_template_task(place: Path, *, back: int, front: int) -> tuple[str, str]:
    """Write scans of both parts of the brain once, each tested on in one of two folds; the front is, in the first.

    Args:
        place: gets ``scans``, ``datalist.json`` and ``splits.json``.
        back: scans of the back part.
        front: scans of the front part.

    Returns:
        datalist and splits.
    """
    datalist, splits = place / "datalist.json", place / "splits.json"
    if splits.exists():
        return str(datalist), str(splits)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # of several runs that begin at once one writes it
        if not splits.exists():
            write_template_data(place / "scans", train=back, validation=0, test=front)
            lists = json.loads((place / "scans" / "datalist.json").read_text("utf-8"))
            parts = [
                [{key: f"scans/{file}" for key, file in case.items()} for case in lists[part]]
                for part in ("training", "test")
            ]
            write_json({"training": [*parts[0], *parts[1]]}, datalist)
            names = [[case_name(case) for case in part] for part in parts]
            write_json([{"train": names[0], "val": names[1]}, {"train": names[1], "val": names[0]}], splits)
    return str(datalist), str(splits)
