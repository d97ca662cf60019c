# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Samples of every bundle: reads of the store, views, and augmentation against that of other packages."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import CropDataset, StoreSettings, VolumeStore
from common.engines import ViewsBatch
from common.methods.models_genesis import GenesisDraw, GenesisViews
from common.views import (
    CropAugmentation,
    SegmentationViews,
    SpatialCrop,
    SpatialDraw,
    reading_stream,
    view_stream,
)

from ..preparing.template import simulate_scan, template
from . import plain
from .settings import PUBLISHED, Benchmark
from .steps import bundle_config, clock, prepare_process

__all__ = ["measure_samples"]


def _in_turn(functions: dict[str, Callable[[int], object]], repeats: int, options: Benchmark) -> dict[str, list[float]]:
    """Run the functions in turn and return the seconds of every call."""
    now = clock(options)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(repeats):
        for name, function in functions.items():
            began = now()
            function(index)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(now() - began)
    return seconds


def measure_samples(options: Benchmark) -> dict[str, Any]:
    """Time store reads and views of every bundle on one thread, samples in turn."""
    prepare_process(options)

    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    image, _, affine = template()
    result: dict[str, Any] = {"rows": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nib.save(nib.Nifti1Image(simulate_scan(image, np.random.default_rng(0)), affine), folder / "scan.nii.gz")
        stored = {
            dtype: VolumeStore(folder / dtype, StoreSettings(dtype=dtype)).prepare(
                [{"image": str(folder / "scan.nii.gz")}]
            )[0][0]
            for dtype in ("float16", "float32")
        }
        whole = stored["float32"].read((0, 0, 0), stored["float32"].shape)
        torch.save(torch.from_numpy(whole), folder / "cached.pt")
        result["volume"] = " x ".join(map(str, whole.shape))
        result["bytes"] = {dtype: os.path.getsize(volume.path) / whole.nbytes for dtype, volume in stored.items()}

        read: dict[str, Callable[[int], object]] = {
            "cached": lambda index: torch.load(folder / "cached.pt", weights_only=True)
        }
        make: dict[str, Callable[[int], object]] = {}
        items: dict[str, list[dict[str, Any]]] = {}
        samples = 2  # one crop is made from another in some methods
        for cell in options.cells:
            config = bundle_config(cell, options, options.views_size)
            dataset = CropDataset(
                [stored[config.get_parsed_content("store_dtype")]],
                spatial=config.get_parsed_content("spatial"),
                seed=0,
                volumes_per_sample=config.get_parsed_content("volumes_per_sample"),
            )
            prepare = ViewsBatch(config.get_parsed_content("views"))

            def load(index: int, dataset: CropDataset = dataset, cell: str = cell) -> None:
                pair = [dataset[1, samples * index + i] for i in range(samples)]
                items.setdefault(cell, []).append({key: [v for item in pair for v in item[key]] for key in pair[0]})

            def view(index: int, prepare: ViewsBatch = prepare, cell: str = cell) -> object:
                return prepare(items[cell][index], options.device)

            read[cell], make[cell] = load, view
            result["rows"][cell] = {"region": " x ".join(map(str, config.get_parsed_content("patch_size")))}
        rounds = 4 * options.repeats
        reading = _in_turn(read, rounds, options)
        viewing = _in_turn(make, rounds, options) if "views" in options.parts else {}
        for cell, row in result["rows"].items():
            row["reads"] = samples / statistics.mean(reading[cell])
            row["read_ratio"] = statistics.mean(reading["cached"]) / statistics.mean(reading[cell]) * samples
            if viewing:
                row["views"] = samples / statistics.mean(viewing[cell])
    if "views" in options.parts:
        result["yardsticks"] = [
            *_spatial_yardstick(options),
            *_genesis_yardstick(options),
            *_crop_yardsticks(options),
            *_fine_tuning_yardsticks(options),
        ]
    return result


def _spatial_yardstick(options: Benchmark) -> list[dict[str, Any]]:
    """Rotate, zoom and crop 257^3 to 160^3: the expected time at the real probabilities."""
    side = options.views_size
    size = (side, side, side)
    volume = np.random.default_rng(0).standard_normal([side * 257 // PUBLISHED] * 3, dtype=np.float32)
    seconds: dict[str, float] = {}
    angle = (-np.pi / 6, np.pi / 6)
    for rotates, zooms in ((0, 0), (0, 1), (1, 0), (1, 1)):
        crop = SpatialCrop(side, rotation_probability=rotates, zoom_probability=zooms)
        draws = [crop.draw(np.random.default_rng(index), volume.shape) for index in range(max(3, options.repeats))]

        def ours(index: int, crop: SpatialCrop = crop, draws: list[SpatialDraw] = draws) -> Tensor:
            where = tuple(slice(a, b) for a, b in zip(draws[index].start, draws[index].stop, strict=True))
            return crop.apply(torch.from_numpy(volume[where]), draws[index])

        def cubic(index: int, draws: list[SpatialDraw] = draws) -> np.ndarray:
            return plain.resample(volume, draws[index], size)

        np.testing.assert_allclose(ours(0), plain.resample(volume, draws[0], size, order=1), atol=2e-3)
        functions: dict[str, Callable[[int], object]] = {"ours": ours, "SciPy's cubic splines": cubic}
        if options.peers:
            from batchgenerators.transforms.abstract_transforms import Compose
            from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform

            peer = SpatialTransform(
                size,
                patch_center_dist_from_border=side // 2,
                do_elastic_deform=False,
                angle_x=angle,
                angle_y=angle,
                angle_z=angle,
                scale=(0.7, 1.4),
                border_mode_data="constant",
                border_cval_data=0,
                order_data=3,
                random_crop=True,
                p_rot_per_sample=rotates,
                p_scale_per_sample=zooms,
            )
            chain = Compose([peer, MirrorTransform((0, 1, 2))])

            def theirs(index: int, chain: Any = chain) -> object:
                return chain(data=volume[None, None])

            functions["batchgenerators"] = theirs
        share = (0.2 if rotates else 0.8) * (0.2 if zooms else 0.8)
        for name, values in _in_turn(functions, len(draws), options).items():
            seconds[name] = seconds.get(name, 0) + share * statistics.median(values)
    ours_seconds = seconds.pop("ours")
    what = f"rotation, zoom, flips and crop, {volume.shape[0]}^3 to {side}^3, expected mean"
    return [_yardstick(what, name, ours_seconds, value, allowed=0.2) for name, value in seconds.items()]


def _genesis_yardstick(options: Benchmark) -> list[dict[str, Any]]:
    """Spoil crops as Models Genesis does, at the real probabilities."""
    side = options.views_size
    views = GenesisViews(SpatialCrop(side))
    crop = torch.randn(side, side, side, generator=torch.Generator().manual_seed(0))
    draws = [views.draw(view_stream((0, 0, index))) for index in range(8 * options.repeats)]
    nothing = np.zeros((0, 2, 3), np.int64)
    places = torch.arange(side**3, dtype=torch.float64).view(side, side, side)
    for draw in draws[:6]:
        bent: GenesisDraw = dataclasses.replace(draw, shuffled=nothing, inpainted=nothing, kept=nothing)
        difference = np.abs(
            views.apply(crop, bent).numpy() - plain.distort(crop.numpy(), bent, np.random.default_rng())
        )
        assert np.mean(difference > 1e-3) < 1e-3, f"the curve {draw.curve} differs by {difference.max()}"
        if len(draw.shuffled):  # the last box is overwritten by none: it must hold its own voxels, in another order
            low, sides = draw.shuffled[-1]
            box = tuple(slice(a, a + n) for a, n in zip(low, sides, strict=True))
            moved = views.apply(places, dataclasses.replace(bent, shuffled=draw.shuffled, curve=None))[box]
            assert torch.equal(moved.flatten().sort().values, places[box].flatten()), "a box is not permuted"
    rng = np.random.default_rng(0)
    seconds = _in_turn(
        {
            "ours": lambda i: views.apply(crop, views.draw(view_stream((0, 0, i)))),
            "plain": lambda i: plain.distort(crop.numpy(), draws[i], rng),
        },
        len(draws),
        options,
    )
    ours, theirs = (statistics.mean(values) for values in seconds.values())
    return [_yardstick(f"Models Genesis' distortion, {side}^3, mean", "loop of boxes", ours, theirs, allowed=1 / 3)]


def _crop_yardsticks(options: Benchmark) -> list[dict[str, Any]]:
    """Augment crops as VoCo and SimCLR, and as VolumeFusion, against the same chain of batchgenerators."""
    if not options.peers:
        return []
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms.color_transforms import (
        BrightnessMultiplicativeTransform,
        ContrastAugmentationTransform,
        GammaTransform,
    )
    from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
    from batchgenerators.transforms.spatial_transforms import MirrorTransform, Rot90Transform

    rows = []
    for what, side, count, low_resolution, rot90, allowed in (
        ("augmentation of VoCo and SimCLR", 64, 160, 0.1, 0.3, 1.0),
        ("augmentation of VolumeFusion", options.views_size, 10, 0.25, 0.0, None),
    ):
        ours = CropAugmentation(low_resolution_probability=low_resolution, rot90_probability=rot90)
        chain = Compose(
            [
                GaussianNoiseTransform(p_per_sample=0.1),
                GaussianBlurTransform((0.5, 1.0), p_per_sample=0.2, p_per_channel=0.5),
                BrightnessMultiplicativeTransform((0.75, 1.25), p_per_sample=0.15),
                ContrastAugmentationTransform(p_per_sample=0.15),
                SimulateLowResolutionTransform(
                    (0.5, 1),
                    per_channel=True,
                    p_per_channel=0.5,
                    order_downsample=0,
                    order_upsample=3,
                    p_per_sample=low_resolution,
                ),
                GammaTransform((0.7, 1.5), True, True, retain_stats=True, p_per_sample=0.1),
                GammaTransform((0.7, 1.5), False, True, retain_stats=True, p_per_sample=0.3),
                MirrorTransform((0, 1, 2)),
                *([Rot90Transform(axes=(0, 1), p_per_sample=rot90)] if rot90 else []),
            ]
        )
        crops = torch.randn(count, 1, side, side, side, generator=torch.Generator().manual_seed(0))

        def mine(index: int, ours: CropAugmentation = ours, crops: Tensor = crops) -> Tensor:
            return ours(crops, [torch.Generator().manual_seed(1000 * index + i) for i in range(len(crops))])

        def theirs(index: int, chain: Any = chain, crops: Tensor = crops) -> object:
            return chain(data=crops.numpy().copy())

        seconds = _in_turn({"ours": mine, "batchgenerators": theirs}, 2 + options.repeats, options)
        a, b = (statistics.mean(values) / count for values in seconds.values())
        rows.append(_yardstick(f"{what}, {side}^3 crops, mean", "batchgenerators", a, b, allowed=allowed))
    return rows


def _fine_tuning_yardsticks(options: Benchmark) -> list[dict[str, Any]]:
    """Augment two channels and their label map as in fine-tuning: the expected time at the real probabilities.

    Each transform is timed in a chain of its own, fired for certain; what it adds to a plain crop counts as often as it
    fires.
    """
    names = [name for name in vars(CropAugmentation()) if name.endswith("_probability")]
    # how often each fires; mirrors of one axis or three cost the same, and one sample in eight has none
    shares = {
        "rotation": 0.2 * 0.8,
        "zoom": 0.8 * 0.2,
        "rotation and zoom": 0.2 * 0.2,
        "noise": 0.1,
        "blur": 0.2 * 0.5,
        "brightness": 0.15,
        "contrast": 0.15,
        "low_resolution": 0.25 * 0.5,
        "inverted_gamma": 0.1,
        "gamma": 0.3,
        "flip": 1 - 0.5**3,
    }
    rows = []
    for side in sorted({96, options.views_size}):
        generator = torch.Generator().manual_seed(0)
        sides = [side * 257 // PUBLISHED] * 3
        image = torch.randn(2, *sides, generator=generator)
        blocks = torch.randint(4, (1, 1, 8, 8, 8), generator=generator)
        label = F.interpolate(blocks.float(), size=sides)[0, 0].to(torch.uint8)
        chains: dict[str, dict[str, Callable[[int], object]]] = {"ours": {}, "MONAI": _monai_chains(image, label, side)}
        if options.peers:
            chains["batchgeneratorsv2"] = _batchgenerators_chains(image, label, side)
        for name in ("nothing", *shares):
            certain = dict.fromkeys(names, 0.0) | {"channel_probability": 1.0}
            if f"{name}_probability" in certain:
                certain[f"{name}_probability"] = 1.0
            views = SegmentationViews(
                SpatialCrop(
                    side,
                    rotation_probability=float("rotation" in name),
                    zoom_probability=float("zoom" in name),
                    flip_probability=0,
                    uniform_zoom=True,
                ),
                augmentation=CropAugmentation(
                    **certain,  # type: ignore[arg-type]
                    blur_per_axis=True,
                    low_resolution_interpolation="linear",
                ),
            )

            chains["ours"][name] = _fine_tuning_sample(views, image, label)
        expected = {}
        for who, chain in chains.items():
            times = {
                name: statistics.median(values[1:])
                for name, values in _in_turn(chain, 1 + max(3, options.repeats), options).items()
            }
            often = shares | ({"flip": 0.5} if who == "MONAI" else {})  # a transform for each axis, timed together
            added = (share * (times[name] - times["nothing"]) for name, share in often.items())
            expected[who] = times["nothing"] + sum(added)
        mine = expected.pop("ours")
        what = f"augmentation of fine-tuning, 2 channels and labels, {side}^3, expected mean"
        rows += [_yardstick(what, who, mine, seconds, allowed=1.0) for who, seconds in expected.items()]
    return rows


def _fine_tuning_sample(views: SegmentationViews, image: Tensor, label: Tensor) -> Callable[[int], object]:
    """Return what draws, cuts and augments one sample of a volume ``(C, d, h, w)`` and its label map."""

    def sample(index: int) -> object:
        key = (0, 1, index)
        draw = views.spatial.draw(reading_stream(key), label.shape)
        where = [slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True)]
        return views({"region": [image[:, *where]], "label_region": [label[*where]], "spatial": [draw], "key": [key]})

    return sample


def _monai_chains(image: Tensor, label: Tensor, side: int) -> dict[str, Callable[[int], object]]:
    """Return MONAI's transforms of fine-tuning, each fired for certain behind a crop; labels take the nearest voxel."""
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandGaussianSmoothd,
        RandScaleIntensityd,
        RandScaleIntensityFixedMeand,
        RandSimulateLowResolutiond,
        RandSpatialCropd,
    )

    keys = ["image", "label"]
    certain: dict[str, Any] = {"keys": "image", "prob": 1.0}

    def affine(angle: float, zoom: tuple[float, float]) -> Any:
        return RandAffined(
            keys=keys,
            prob=1.0,
            spatial_size=[side] * 3,
            rotate_range=[angle] * 3,
            scale_range=[zoom] * 3,
            mode=["bilinear", "nearest"],
            padding_mode="zeros",
        )

    crop = RandSpatialCropd(keys=keys, roi_size=[side] * 3, random_size=False)
    sigma = (0.5, 1.0)
    gamma = {**certain, "gamma": (0.7, 1.5), "retain_stats": True}
    steps: dict[str, list[Any]] = {
        "nothing": [crop],
        "rotation": [affine(np.pi / 6, (0, 0))],
        "zoom": [affine(0, (-0.3, 0.4))],
        "rotation and zoom": [affine(np.pi / 6, (-0.3, 0.4))],
        "noise": [crop, RandGaussianNoised(**certain, std=0.1)],
        "blur": [crop, RandGaussianSmoothd(**certain, sigma_x=sigma, sigma_y=sigma, sigma_z=sigma)],
        "brightness": [crop, RandScaleIntensityd(**certain, factors=0.25)],
        "contrast": [crop, RandScaleIntensityFixedMeand(**certain, factors=0.25, preserve_range=True)],
        "low_resolution": [crop, RandSimulateLowResolutiond(**certain, zoom_range=(0.5, 1.0))],
        "inverted_gamma": [crop, RandAdjustContrastd(**gamma, invert_image=True)],
        "gamma": [crop, RandAdjustContrastd(**gamma)],
        "flip": [crop, *(RandFlipd(keys=keys, prob=1.0, spatial_axis=axis) for axis in range(3))],
    }
    data = {"image": image, "label": label[None]}
    return {name: _repeat(Compose(chain), data) for name, chain in steps.items()}


def _repeat(chain: Callable[[Any], object], data: dict[str, Tensor]) -> Callable[[int], object]:
    return lambda index: chain(data)


def _batchgenerators_chains(image: Tensor, label: Tensor, side: int) -> dict[str, Callable[[int], object]]:
    """Return the transforms of nnU-Net v2, each fired for certain behind a crop."""
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

    def spatial(rotates: int, zooms: int) -> Any:
        return SpatialTransform(
            (side, side, side),
            patch_center_dist_from_border=0,
            random_crop=False,
            p_rotation=rotates,
            rotation=(-np.pi / 6, np.pi / 6),
            p_scaling=zooms,
            scaling=(0.7, 1.4),
            p_synchronize_scaling_across_axes=1,
        )

    crop = spatial(0, 0)
    each = {"synchronize_channels": False, "p_per_channel": 1}
    factor = BGContrast((0.75, 1.25))
    gamma = {**each, "gamma": BGContrast((0.7, 1.5)), "p_retain_stats": 1}
    steps: dict[str, list[Any]] = {
        "nothing": [crop],
        "rotation": [spatial(1, 0)],
        "zoom": [spatial(0, 1)],
        "rotation and zoom": [spatial(1, 1)],
        "noise": [crop, GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True)],
        "blur": [crop, GaussianBlurTransform((0.5, 1.0), synchronize_axes=False, **each)],
        "brightness": [crop, MultiplicativeBrightnessTransform(factor, **each)],
        "contrast": [crop, ContrastTransform(factor, preserve_range=True, **each)],
        "low_resolution": [
            crop,
            SimulateLowResolutionTransform((0.5, 1), synchronize_axes=True, ignore_axes=None, **each),
        ],
        "inverted_gamma": [crop, GammaTransform(p_invert_image=1, **gamma)],
        "gamma": [crop, GammaTransform(p_invert_image=0, **gamma)],
        "flip": [crop, MirrorTransform((0, 1, 2))],
    }
    # crops are views and transforms change them in place, which does not matter for their time
    data = {"image": image.clone(), "segmentation": label[None].to(torch.int16)}
    return {name: _repeat(ComposeTransforms(chain).apply, data) for name, chain in steps.items()}


def _yardstick(what: str, name: str, ours: float, theirs: float, *, allowed: float | None) -> dict[str, Any]:
    return {"what": what, "yardstick": name, "ours": ours, "theirs": theirs, "allowed": allowed}
