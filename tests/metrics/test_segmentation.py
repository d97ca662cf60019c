# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Scores against shapes whose answers are known, and against an implementation that compares all pairs of points."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.measure import marching_cubes

from common.metrics import METRICS, score_maps, score_masks

SPACINGS = [(1.0, 1.0, 1.0), (1.0, 1.0, 6.0), (6.0, 1.0, 1.0), (0.7, 2.0, 1.3)]


def ball(radius_mm: float, *, spacing: tuple[float, ...] = (1, 1, 1), side_mm: float = 60) -> np.ndarray:
    shape = [round(side_mm / s) for s in spacing]
    axes = [(np.arange(n) + 0.5) * s - side_mm / 2 for n, s in zip(shape, spacing, strict=True)]
    return np.linalg.norm(np.stack(np.meshgrid(*axes, indexing="ij")), axis=0) <= radius_mm


def box(low: int, high: int, *, side: int = 64, shift: int = 0) -> np.ndarray:
    out = np.zeros((side,) * 3, bool)
    out[low + shift : high + shift, low:high, low:high] = True
    return out


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of each point of ``a`` to the nearest of ``b``, all pairs compared."""
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1)


def border_points(mask: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Centres of voxels with a face neighbour outside the mask."""
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(3):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)
    return np.argwhere(padded & ~inside) @ steps.T


def surface_elements(mask: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of voxels that the surface passes, and the area there of scikit-image's marching cubes."""
    padded = np.pad(mask, 1)
    corners = sum(
        padded[x : x - 1 or None, y : y - 1 or None, z : z - 1 or None].astype(int)
        for x in (0, 1)
        for y in (0, 1)
        for z in (0, 1)
    )
    points, faces, _, _ = marching_cubes(padded.astype(float), 0.5, method="lorensen")
    cells = np.floor(points[faces].mean(1)).astype(int)
    triangles = points[faces].astype(float) @ steps.T
    areas = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1) / 2
    total = np.zeros(corners.shape)
    np.add.at(total, tuple(cells.T), areas)
    crossed = (corners > 0) & (corners < 8)
    return (np.argwhere(crossed) + 0.5) @ steps.T, total[crossed]


def yardstick(p: np.ndarray, r: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict[str, float]:
    s = np.diag(spacing) if np.ndim(spacing) == 1 else np.array(spacing)
    (p_at, p_area), (r_at, r_area) = surface_elements(p, s), surface_elements(r, s)
    near = p_area[nearest(p_at, r_at) <= tolerance].sum() + r_area[nearest(r_at, p_at) <= tolerance].sum()
    a, b = border_points(p, s), border_points(r, s)
    p_set, r_set = ({tuple(index) for index in np.argwhere(mask).tolist()} for mask in (p, r))
    return {
        "dice": 2 * len(p_set & r_set) / (len(p_set) + len(r_set)),
        "nsd": near / (p_area.sum() + r_area.sum()),
        "hd95_mm": max(np.percentile(nearest(a, b), 95), np.percentile(nearest(b, a), 95)),
        "volume_error_ml": (len(p_set) - len(r_set)) * abs(np.linalg.det(s)) / 1000,
        "volume_error_percent": 100 * (len(p_set) / len(r_set) - 1),
    }


TILTED = np.array([[1.2, 0, 0], [0, 0.8, 2.5 * np.sin(np.deg2rad(25))], [0, 0, 2.5 * np.cos(np.deg2rad(25))]])
SLANTED = np.array([[0.9, 0.2, -0.4], [-0.1, 1.5, 0.7], [0.3, -0.2, 2.0]])


@pytest.mark.parametrize("spacing", [*SPACINGS, TILTED, SLANTED, SLANTED[:, ::-1]])
@pytest.mark.parametrize("seed", range(3))
def test_random_shapes_score_as_all_pairs_of_points_do(spacing: tuple[float, ...], seed: int) -> None:
    """The shapes touch the edges of the volume."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.standard_normal((14, 12, 13)), 1.5)
    reference = field > np.quantile(field, 0.6)
    field += 0.5 * gaussian_filter(rng.standard_normal(field.shape), 1.5)
    prediction = field > np.quantile(field, 0.65)
    assert reference[0].any()
    for tolerance in (0.5, 1.0, 2.0):
        scores = score_masks(prediction, reference, spacing_mm=spacing, tolerance_mm=tolerance)
        expected = yardstick(prediction, reference, spacing, tolerance)
        # marching cubes may cut a cell whose corners alternate in two ways
        assert scores["nsd"] == pytest.approx(expected.pop("nsd"), abs=0.004)
        assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_tilted_gantry_changes_no_scores() -> None:
    """The same ball sampled on slanted and on upright voxels; a slanted one is smaller by the cosine of the angle."""
    tilt = np.deg2rad(25)
    steps = np.array([[1.0, 0, 0], [0, 1.0, np.sin(tilt)], [0, 0, np.cos(tilt)]])
    places = np.stack(np.meshgrid(*[np.arange(-45, 46)] * 3, indexing="ij"), -1)
    scores = {}
    for name, sides in (("upright", np.eye(3)), ("slanted", steps)):
        at = places @ sides.T
        masks = [np.linalg.norm(at, axis=-1) <= 30, np.linalg.norm(at - [0, 2, 3], axis=-1) <= 28]
        scores[name] = score_masks(masks[0], masks[1], spacing_mm=sides, tolerance_mm=2.0)
        again = score_masks(*masks, spacing_mm=(1, 1, 1), tolerance_mm=2.0)
    upright, slanted = scores["upright"], scores["slanted"]
    assert slanted["predicted_ml"] == pytest.approx(4 / 3 * np.pi * 30**3 / 1000, rel=2e-3)  # 113.1 ml
    assert again["predicted_ml"] == pytest.approx(slanted["predicted_ml"] / np.cos(tilt)), "what sides alone would say"
    for name, off in (("dice", 1e-3), ("nsd", 0.03), ("hd95_mm", 0.2), ("volume_error_ml", 0.1)):
        assert slanted[name] == pytest.approx(upright[name], abs=off), name


def test_rounded_axes_are_at_right_angles() -> None:
    """A header in float32 or to six digits is none of a tilted gantry: it scores to the last digit as without."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    masks = box(20, 40, shift=2), box(20, 40)
    exact = score_masks(*masks, spacing_mm=(1, 1, 1))
    rounded = score_masks(*masks, spacing_mm=np.round(turn, 6))
    assert rounded == pytest.approx(exact, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("spacing", [*SPACINGS[:3], (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("shift", [1, 3])
def test_shifted_cubes(shift: int, spacing: tuple[float, ...]) -> None:
    """A cube of n voxels moved by k shares n - k of n slices; faces across the shift are k away, the others slide."""
    n, step = 20, shift * spacing[0]
    scores = score_masks(box(20, 40, shift=shift), box(20, 40), spacing_mm=spacing, tolerance_mm=0.9 * step)
    assert scores["dice"] == pytest.approx((n - shift) / n)
    assert scores["hd95_mm"] == pytest.approx(step)
    assert scores["volume_error_ml"] == scores["volume_error_percent"] == 0
    assert scores["reference_ml"] == pytest.approx(n**3 * np.prod(spacing) / 1000)
    across = spacing[1] * spacing[2] / (sum(np.prod(spacing) / s for s in spacing))  # share of the faces that moved
    assert 1 - 1.1 * across < scores["nsd"] < 1 - 0.5 * across, "those inside the other cube are near its sides in part"
    further = score_masks(box(20, 40, shift=shift), box(20, 40), spacing_mm=spacing, tolerance_mm=step)
    assert further["nsd"] == 1


def test_nsd_of_shifted_cubes_is_the_share_of_their_faces() -> None:
    n, k, tolerance = 40, 6, 3
    nsd = score_masks(box(10, 50, shift=k), box(10, 50), spacing_mm=(1, 1, 1), tolerance_mm=tolerance)["nsd"]
    t = tolerance + 0.5  # surface elements are a voxel wide and count if their middle is within the tolerance
    sliding = 4 * n * (n - k + t)  # of each cube: what lies along the other's sides, or up to t beyond their end
    rim = n**2 - (n - 2 * t) ** 2  # of the face inside the other cube: what is within t of its sides
    assert nsd == pytest.approx((sliding + rim) / (6 * n**2), abs=0.003)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 2.0)])
def test_balls_within_each_other(spacing: tuple[float, ...]) -> None:
    small, large, apart = 20.0, 25.0, 5.0
    reference, prediction = ball(large, spacing=spacing), ball(small, spacing=spacing)
    coarse = max(spacing)
    scores = score_masks(prediction, reference, spacing_mm=spacing, tolerance_mm=apart - coarse)
    volume = 4 / 3 * np.pi * np.array([small, large]) ** 3 / 1000
    assert scores["volume_error_ml"] == pytest.approx(volume[0] - volume[1], rel=0.02)
    assert scores["volume_error_percent"] == pytest.approx(100 * (small**3 / large**3 - 1), abs=1)
    assert scores["dice"] == pytest.approx(2 * volume[0] / volume.sum(), abs=0.005)
    assert scores["hd95_mm"] == pytest.approx(apart, abs=0.7 * coarse)
    assert scores["nsd"] < 0.1
    assert score_masks(prediction, reference, spacing_mm=spacing, tolerance_mm=apart + coarse)["nsd"] == 1
    # the same shapes on another axis
    turned = score_masks(
        prediction.transpose(2, 0, 1), reference.transpose(2, 0, 1), spacing_mm=(spacing[2], *spacing[:2])
    )
    upright = score_masks(prediction, reference, spacing_mm=spacing)
    assert turned == pytest.approx(upright, rel=1e-5)


def test_the_tolerance_survives_rounded_headers() -> None:
    for spacing in (1.0, 1.00001, 0.99999):
        scores = score_masks(box(20, 40, shift=1), box(20, 40), spacing_mm=(spacing,) * 3, tolerance_mm=1.0)
        assert scores["nsd"] == 1


def everywhere() -> np.ndarray:
    return np.ones((6, 7, 8), bool)


def one_voxel(*at: int) -> np.ndarray:
    out = np.zeros((6, 7, 8), bool)
    out[at] = True
    return out


@pytest.mark.parametrize("mask", [everywhere(), one_voxel(0, 0, 0), one_voxel(5, 6, 7), one_voxel(3, 3, 3)])
def test_identical_masks_are_perfect_even_at_the_edge_of_the_volume(mask: np.ndarray) -> None:
    scores = score_masks(mask, mask, spacing_mm=(1, 2, 6), tolerance_mm=0.0)
    assert [scores[name] for name in METRICS] == [1, 1, 0, 0, 0]


def test_single_voxels() -> None:
    scores = score_masks(one_voxel(5, 6, 7), one_voxel(5, 6, 6), spacing_mm=(1, 1, 6), tolerance_mm=5.9)
    assert scores["dice"] == 0
    assert scores["hd95_mm"] == pytest.approx(6)
    assert 0 < scores["nsd"] < 1, "the two share a face"
    assert score_masks(one_voxel(0, 0, 0), one_voxel(5, 0, 0), spacing_mm=(1, 1, 6))["nsd"] == 0
    assert score_masks(one_voxel(0, 0, 0), one_voxel(5, 0, 0), spacing_mm=(1, 1, 6))["hd95_mm"] == pytest.approx(5)


def test_empty_masks() -> None:
    empty, some = np.zeros((6, 7, 8), bool), one_voxel(1, 2, 3)
    both = score_masks(empty, empty, spacing_mm=(1, 1, 6))
    assert all(np.isnan(both[name]) for name in ("dice", "nsd", "hd95_mm", "volume_error_percent"))
    assert both["volume_error_ml"] == both["reference_ml"] == both["predicted_ml"] == 0
    for predicted, reference in ((some, empty), (empty, some)):
        scores = score_masks(predicted, reference, spacing_mm=(1, 1, 6))
        assert [scores[name] for name in ("dice", "nsd", "hd95_mm")] == [0, 0, np.inf]
        assert scores["volume_error_ml"] == pytest.approx(0.006 * (int(predicted.sum()) - int(reference.sum())))
    assert score_masks(empty, some, spacing_mm=(1, 1, 6))["volume_error_percent"] == -100
    assert np.isnan(score_masks(some, empty, spacing_mm=(1, 1, 6))["volume_error_percent"])


def test_classes_and_regions_are_masks_of_their_own() -> None:
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 4, (2, 9, 8, 7)).astype(np.uint8)
    structures = {"one": [1], "far": [3], "one and three": [1, 3], "nowhere": [9]}
    scores = score_maps(prediction, reference, structures=structures, spacing_mm=(1, 2, 3))
    for name, values in structures.items():
        masks = [np.isin(labels, values) for labels in (prediction, reference)]
        alone = score_masks(*masks, spacing_mm=(1, 2, 3))
        assert scores[name] == pytest.approx(alone, rel=1e-5, nan_ok=True), name
    assert np.isnan(scores["nowhere"]["dice"])


def test_labels_may_be_any_numbers() -> None:
    """Those of an atlas reach 614,454,277; what is kept for each must not grow with them."""
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 3, (2, 9, 8, 7)).astype(np.int64)
    small = score_maps(prediction, reference, structures={"a": [1], "b": [2], "ab": [1, 2]}, spacing_mm=(1, 2, 3))
    values = np.array([0, 315, 2**40 + 614_454_277])
    tracemalloc.start()
    large = score_maps(
        *(values[each] for each in (prediction, reference)),
        structures={"a": [315], "b": [int(values[2])], "ab": [315, int(values[2])]},
        spacing_mm=(1, 2, 3),
    )
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert large == small


def test_ignored_voxels_count_in_neither_map() -> None:
    reference = np.zeros((12, 12, 12), np.uint8)
    reference[2:8, 2:8, 2:8] = 1
    prediction = reference.copy()
    prediction[:, 6:] = 1  # wrong in half of the volume
    reference[:, 6:] = 255
    for ignored, dice in ((255, 1.0), (None, 0.0)):
        scores = score_maps(prediction, reference, structures={"a": [1]}, spacing_mm=(1, 1, 1), ignore_label=ignored)[
            "a"
        ]
        assert (scores["dice"] == 1.0) == (dice == 1.0)
        assert (scores["nsd"] == 1.0) == (dice == 1.0)
        assert (scores["volume_error_ml"] == 0.0) == (dice == 1.0)
    half = score_maps(prediction, reference, structures={"a": [1]}, spacing_mm=(1, 1, 1), ignore_label=255)["a"]
    assert half["reference_ml"] == pytest.approx(6 * 4 * 6 / 1000)
