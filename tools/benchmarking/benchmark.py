# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure every bundle: training step, peak memory, views and store reads, each against a yardstick in the same run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..commanding.environment import ROOT
from .data_path import data_tables, measure_data_path

if TYPE_CHECKING:
    import torch
    from monai.bundle import ConfigParser
    from torch import Tensor, nn

    from common.views import SegmentationViews

__all__ = ["benchmark"]

T = TypeVar("T")
PARTS = ("steps", "views", "store", "data")
PEERS = {
    "dynamic-network-architectures": "0.4.4",
    "batchgenerators": "0.25.5",
    "batchgeneratorsv2": "0.3.6",
    "fft-conv-pytorch": "1.2.0",  # which batchgeneratorsv2 needs
}
PEER_FOLDER = ROOT / ".venv-peers"
PUBLISHED = 160
MARKS = ("<!-- figures -->", "<!-- end of figures -->")  # in a page, around what is written anew
DATA_MARKS = ("<!-- data figures -->", "<!-- end of data figures -->")


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for, as handed to the measuring processes."""

    patch_size: int
    views_size: int = PUBLISHED
    batch_size: int = 2
    device: str = "cpu"
    repeats: int = 3
    peers: bool = False
    channels_last: bool = False
    compile: bool = False
    profile: bool = False
    shared: bool = False
    scans: Sequence[str] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


# what is measured


def _config(cell: str, options: Options, size: int) -> ConfigParser:
    """Read a bundle's pretrain.yaml for crops of ``size``; shapes that do not follow from it shrink with it."""
    from monai.bundle import ConfigParser

    from common.bundles import read_config

    content = read_config(ROOT / "bundles" / cell / "configs" / "pretrain.yaml")
    for section in ("train", "validate", "run", "initialize"):  # the trainer around the step
        content.pop(section, None)
    content["batch_size"] = options.batch_size
    content["device"] = f"$torch.device('{options.device}')"
    if "crop_size" not in content:
        content["patch_size"] = [size] * 3
    elif size < PUBLISHED:  # crops as published, but fewer of them
        side = content["crop_size"] = min(content["crop_size"], size)
        if "grid" in content:
            content |= {"grid": [2, 1, 1], "targets": 1, "patch_size": [2 * side, side, side]}
        else:
            content |= {"pairs": 1, "patch_size": [side + side // 2, side + side // 2, side]}
    for name, value in options.settings.items():
        if name in content:
            content[name] = value
    return ConfigParser(content)


def _regions(config: ConfigParser, options: Options) -> dict[str, Any]:
    """Return what the loader would give for one step, cut out of noise."""
    import torch

    from common.views import reading_stream

    spatial = config.get_parsed_content("spatial")
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn([side + 16 for side in spatial.patch_size], generator=generator)
    batch: dict[str, Any] = {"key": [(0, 1, index) for index in range(options.batch_size)], "region": [], "spatial": []}
    for key in batch["key"]:
        rng = reading_stream(key)
        for _ in range(config.get_parsed_content("volumes_per_sample")):
            draw = spatial.draw(rng, volume.shape)
            where = tuple(slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True))
            batch["spatial"].append(draw)
            batch["region"].append(volume[where].to(options.device))
    return batch


class _Step:
    """A training step as the engine does it: zero, forward, loss, backward, clip, update."""

    def __init__(
        self,
        method: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        batch: dict[str, Any],
        clip_norm: float | None,
        options: Options,
    ) -> None:
        import torch

        self.loss, self.optimizer, self.clip_norm, self.device = loss, optimizer, clip_norm, options.device
        self.clock = _clock(options)
        self.parameters = list(method.parameters())
        self.batch = batch
        if options.channels_last:
            layout = torch.channels_last_3d
            method = method.to(memory_format=layout)  # type: ignore[call-overload]
            self.batch = {
                name: value.to(memory_format=layout) if isinstance(value, torch.Tensor) and value.ndim == 5 else value
                for name, value in batch.items()
            }
        self.method: Callable[[Any], Any] = torch.compile(method) if options.compile else method

    def __call__(self, seed: int = 0, *, norm: bool = False) -> tuple[float, float, float]:
        """Return seconds, loss and, if asked for, the gradient's norm."""
        import torch

        torch.manual_seed(seed)
        self._wait()
        began = self.clock()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.loss(self.method(self.batch), self.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        length = 0.0
        if norm:
            length = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self._wait()
        return self.clock() - began, float(loss.detach()), length

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def _peak_gib(device: str) -> float:
    """Return the largest memory that this process has held: of the GPU, or of the process on a CPU."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if os.name == "posix":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    import psutil

    return getattr(psutil.Process().memory_info(), "peak_wset", 0) / 2**30


def _clock(options: Options) -> Callable[[], float]:
    """Return the clock; processor time leaves out what other processes do, if there is one thread."""
    return time.process_time if options.shared else time.perf_counter


def _prepare(options: Options) -> None:
    """Make our packages, and the peers if wanted, importable in a measuring process."""
    if options.peers:
        sys.path.append(str(PEER_FOLDER))  # last: nothing of ours is taken from there
    os.chdir(ROOT)
    if options.shared:
        import torch

        torch.set_num_threads(1)


def _build(cell: str, options: Options) -> tuple[Any, Callable[[str], _Step]]:
    """Return a bundle's method and what makes a step of it (``ours``) or of a yardstick (``plain``, ``dense``)."""
    import torch

    from . import plain

    torch.manual_seed(0)
    config = _config(cell, options, options.patch_size)
    method = config.get_parsed_content("network").train()
    loss, optimizer = config.get_parsed_content("loss"), config.get_parsed_content("optimizer")
    with torch.no_grad():
        batch = config.get_parsed_content("views")(_regions(config, options))
    accepted = set(inspect.signature(type(optimizer)).parameters)
    same = {name: value for name, value in optimizer.defaults.items() if name in accepted}

    def step(kind: str) -> _Step:
        network, score, update = method, loss, optimizer
        if kind != "ours":
            network = plain.plain_method(method, peer=options.peers) if kind == "plain" else plain.DenseUNet(method)
            network = network.to(options.device).train()
            update = type(optimizer)(network.parameters(), **same)
        if kind == "plain":
            formula = plain.LOSSES[type(loss).__name__]

            def score(pred: dict[str, Tensor], views: dict[str, Any]) -> Tensor:
                return formula(loss, pred, views)

        return _Step(
            network, score, update, batch=batch, clip_norm=config.get_parsed_content("clip_norm"), options=options
        )

    return method, step


def _measure_step(cell: str, options: Options) -> dict[str, Any]:
    """Time a bundle's step and its yardsticks in turn."""
    _prepare(options)
    import torch

    method, build = _build(cell, options)
    steps = {"ours": build("ours")}
    first = {"ours": steps["ours"](norm=True)[1:]}
    steps["ours"]()  # with the optimizer's state, which appears at the end of the first step
    peak = _peak_gib(options.device)
    method, build = _build(cell, options)  # the same seed: the weights that the first step began with
    steps["plain"] = build("plain")
    first["plain"] = steps["plain"](norm=True)[1:]
    allowed = (1e-4, 1e-3) if options.device == "cpu" else (2e-2, 1e-1)
    for mine, theirs, limit, what in zip(*first.values(), allowed, ("loss", "gradient"), strict=True):
        if not abs(mine - theirs) <= limit * abs(theirs):
            raise RuntimeError(f"{cell}: the {what} is {mine}, written plainly {theirs}")
    if hasattr(method.backbone, "head") and type(method).__name__ == "Spark3D":
        steps["dense"] = build("dense")
        steps["dense"]()
    del method, build
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.repeats):
        for name in list(steps)[:: 1 if index % 2 else -1]:  # whoever comes first does so in every other round only
            seconds[name].append(steps[name](index)[0])
    result: dict[str, Any] = {
        "cell": cell,
        "input": " x ".join(map(str, next(v for v in steps["ours"].batch.values() if v.ndim == 5).shape)),
        "seconds": statistics.median(seconds["ours"]),
        "peak": peak,
        # neighbours in time are compared, so that a machine that slows down does so for both
        "ratios": {
            name: statistics.median(a / b for a, b in zip(seconds["ours"], other, strict=True))
            for name, other in seconds.items()
            if name != "ours"
        },
    }
    if options.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if options.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        result["profiles"] = {}
        for name, step in steps.items():
            with torch.profiler.profile(activities=activities) as profiler:
                step()
            kind = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
            rows = [(event.key, event.count, getattr(event, kind) / 1000) for event in profiler.key_averages()]
            total = sum(row[2] for row in rows)
            top = sorted(rows, key=lambda row: -row[2])[:8]
            result["profiles"][name] = [[key, count, ms, ms / total] for key, count, ms in top]
    return result


def _measure_plain_memory(cell: str, options: Options) -> float:
    """Return the peak memory of the yardstick, in a process of its own."""
    _prepare(options)
    import torch

    step = _build(cell, options)[1]("plain")  # lets go of our own method
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    return _peak_gib(options.device)


def _in_turn(functions: dict[str, Callable[[int], object]], repeats: int, options: Options) -> dict[str, list[float]]:
    """Run the functions in turn and return the seconds of every call."""
    import torch

    clock = _clock(options)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(repeats):
        for name, function in functions.items():
            began = clock()
            function(index)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return seconds


def _measure_data(cells: Sequence[str], parts: Sequence[str], options: Options) -> dict[str, Any]:
    """Time store reads and views of every bundle on one thread, samples in turn."""
    _prepare(options)
    import blosc2
    import nibabel as nib
    import numpy as np
    import torch

    from common.data import CropDataset, StoreSettings, VolumeStore
    from common.engines import ViewsBatch

    from ..preparing.template import simulate_scan, template

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
        for cell in cells:
            config = _config(cell, options, options.views_size)
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
        viewing = _in_turn(make, rounds, options) if "views" in parts else {}
        for cell, row in result["rows"].items():
            row["reads"] = samples / statistics.mean(reading[cell])
            row["read_ratio"] = statistics.mean(reading["cached"]) / statistics.mean(reading[cell]) * samples
            if viewing:
                row["views"] = samples / statistics.mean(viewing[cell])
    if "views" in parts:
        result["yardsticks"] = [
            *_spatial_yardstick(options),
            *_genesis_yardstick(options),
            *_crop_yardsticks(options),
            *_fine_tuning_yardsticks(options),
        ]
    return result


def _spatial_yardstick(options: Options) -> list[dict[str, Any]]:
    """Rotate, zoom and crop 257^3 to 160^3: the expected time at the real probabilities."""
    import numpy as np
    import torch

    from common.views import SpatialCrop, SpatialDraw

    from . import plain

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


def _genesis_yardstick(options: Options) -> list[dict[str, Any]]:
    """Spoil crops as Models Genesis does, at the real probabilities."""
    import numpy as np
    import torch

    from common.methods.models_genesis import GenesisDraw, GenesisViews
    from common.views import SpatialCrop, view_stream

    from . import plain

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


def _crop_yardsticks(options: Options) -> list[dict[str, Any]]:
    """Augment crops as VoCo and SimCLR, and as VolumeFusion, against the same chain of batchgenerators."""
    if not options.peers:
        return []
    import torch
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms.color_transforms import (
        BrightnessMultiplicativeTransform,
        ContrastAugmentationTransform,
        GammaTransform,
    )
    from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
    from batchgenerators.transforms.spatial_transforms import MirrorTransform, Rot90Transform

    from common.views import CropAugmentation

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


def _fine_tuning_yardsticks(options: Options) -> list[dict[str, Any]]:
    """Augment two channels and their label map as in fine-tuning: the expected time at the real probabilities.

    Each transform is timed in a chain of its own, fired for certain; what it adds to a plain crop counts as often as it
    fires.
    """
    import torch
    import torch.nn.functional as F

    from common.views import CropAugmentation, SegmentationViews, SpatialCrop

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
    from common.views import reading_stream

    def sample(index: int) -> object:
        key = (0, 1, index)
        draw = views.spatial.draw(reading_stream(key), label.shape)
        where = [slice(a, b) for a, b in zip(draw.start, draw.stop, strict=True)]
        return views({"region": [image[:, *where]], "label_region": [label[*where]], "spatial": [draw], "key": [key]})

    return sample


def _monai_chains(image: Tensor, label: Tensor, side: int) -> dict[str, Callable[[int], object]]:
    """Return MONAI's transforms of fine-tuning, each fired for certain behind a crop; labels take the nearest voxel."""
    import numpy as np
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
    import numpy as np
    import torch
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


def _measure_data_path(options: Options) -> dict[str, Any]:
    """Measure the data path on volumes of 256^3 for crops of the published size."""
    _prepare(options)
    with tempfile.TemporaryDirectory() as name:
        return measure_data_path(
            Path(name),
            options.views_size * 256 // PUBLISHED,
            options.views_size,
            max(3, options.repeats),
            options.scans,
        )


# how it is run and told


def _alone(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _hardware(options: Options) -> str:
    """Return one line on machine and versions; needs packages, so it runs in a process of its own."""
    _prepare(options)
    import psutil
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("model name")
        ]
        processor = names[0].split(":")[1].strip() if names else processor
    threads = f"{torch.get_num_threads()} thread(s), {'processor' if options.shared else 'wall'} time"
    memory = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "monai", "blosc2", "numpy", "scipy")]
    versions += [f"{name} {version}" for name, version in PEERS.items()] if options.peers else []
    return (
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores of {processor}, {memory:.0f} GB, {gpu}; "
        f"{threads}; Python {platform.python_version()}, {', '.join(versions)}"
    )


def _install_peers() -> None:
    """Put the peers alone into a folder of their own; what they need of torch and SciPy is ours."""
    installed = {
        path.name.split("-")[0].replace("_", "-"): path.name.split("-")[1] for path in PEER_FOLDER.glob("*.dist-info")
    }
    if all(installed.get(name) == f"{version}.dist" for name, version in PEERS.items()):
        return
    print(f"installing {', '.join(PEERS)} into {PEER_FOLDER.name} (once)", file=sys.stderr, flush=True)
    pins = [f"{name}=={version}" for name, version in PEERS.items()]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--upgrade", "--target", str(PEER_FOLDER), *pins]).returncode:
        raise SystemExit(f"Stopped: pip could not install {', '.join(pins)}; see its message above")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _step_tables(steps: Sequence[dict[str, Any]], options: Options) -> list[str]:
    unet = "dynamic-network-architectures' U-Net" if options.peers else "plain U-Net"
    rows = []
    for step in steps:
        ratios = dict(step["ratios"])
        yardstick = "plain transformer" if "primus" in step["cell"] else unet
        if "dense" in ratios:
            yardstick = f"plain sparse U-Net; dense U-Net: {ratios['dense']:.2f}"
        rows.append(
            [
                step["cell"],
                step["input"],
                f"{step['seconds']:.3g}",
                f"{step['peak']:.2f}",
                f"**{ratios['plain']:.2f}**",
                f"{step['peak'] / step['plain_peak']:.2f}",
                yardstick,
            ]
        )
    precision = "bf16" if options.device == "cuda" else "float32"
    extras = [name for name in ("channels_last", "compile") if getattr(options, name)]
    text = [
        f"Training step, crops of {options.patch_size}^3, batch {options.batch_size}, "
        f"{', '.join([precision, options.device, *extras, *(f'{k} {v}' for k, v in options.settings.items())])}:\n",
        _table(["bundle", "input", "s", "peak GiB", "time / yardstick", "memory / yardstick", "yardstick"], rows),
    ]
    for step in steps:
        for name, profile in step.get("profiles", {}).items():
            lines = [[key, str(count), f"{ms:.0f}", f"{share:.0%}"] for key, count, ms, share in profile]
            text += [f"{step['cell']}, {name}, one step:\n", _table(["operation", "calls", "ms", "share"], lines)]
    return text


def _data_tables(data: dict[str, Any], parts: Sequence[str], options: Options) -> list[str]:
    head, rows = ["bundle", "region"], []
    head += ["store reads / s", "whole cached file = 1"] if "store" in parts else []
    head += ["views / s", "reads / views"] if "views" in parts else []
    for cell, row in data["rows"].items():
        line = [cell, row["region"]]
        if "store" in parts:
            line += [f"{row['reads']:.0f}", f"{row['read_ratio']:.1f}"]
        if "views" in parts:
            line += [f"{row['views']:.1f}", f"{row['reads'] / row['views']:.1f}"]
        rows.append(line)
    text = [f"Samples of {data['volume']} volumes, one thread, views on {options.device}:\n", _table(head, rows)]
    if "store" in parts:
        sizes = ", ".join(f"{dtype} {share:.0%}" for dtype, share in data["bytes"].items())
        text.append(f"Bytes of the stored volume against raw float32: {sizes}.\n")
    if data.get("yardsticks"):
        rows = [
            [
                y["what"],
                y["yardstick"],
                f"{1000 * y['ours']:.1f}",
                f"{1000 * y['theirs']:.1f}",
                f"**{y['ours'] / y['theirs']:.2f}**",
                "" if y["allowed"] is None else f"{y['allowed']:.2f}",
            ]
            for y in data["yardsticks"]
        ]
        text += [
            "One sample on one thread of the CPU:\n",
            _table(["what", "yardstick", "ours, ms", "yardstick, ms", "ratio", "at most"], rows),
        ]
    return text


def _names(chosen: str | Sequence[str], known: Sequence[str], what: str) -> list[str]:
    names = chosen.split(",") if isinstance(chosen, str) else list(chosen)
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"Stopped: there is no {what} {name!r}; choose from {', '.join(known)}")
    return names


def benchmark(
    cells: str | Sequence[str] = "all",
    parts: str | Sequence[str] = "all",
    patch_size: int = 64,
    batch_size: int = 2,
    views_size: int = PUBLISHED,
    device: str = "cpu",
    repeats: int = 3,
    peers: bool = False,
    channels_last: bool = False,
    compile: bool = False,
    profile: bool = False,
    shared: bool = False,
    scans: str | Sequence[str] = "",
    output: str = "",
    **settings: Any,
) -> None:
    """Measure and print Markdown; progress goes to the error stream.

    Args:
        cells: bundles, separated by commas.
        parts: of steps, views, store, data (the data path against MONAI's datasets and .npy; needs 2 GB of disk).
        patch_size: side of the crops of a training step, a multiple of 32 (for the U-Net at least 64). 160 is
            published; below that VoCo and SimCLR get fewer crops of each image.
        batch_size: images of a step.
        views_size: side of the crops of views and store.
        device: cpu (float32) or cuda (bf16 autocast).
        repeats: timed rounds.
        peers: compare also with other packages (dynamic-network-architectures, batchgenerators), installed into
            .venv-peers.
        channels_last: lay out networks and images with channels last.
        compile: torch.compile the networks.
        profile: also print where the time of a step goes.
        shared: for a CPU that others use too: one thread, and processor time instead of wall time.
        scans: files with commas, to measure the data path with instead of simulated scans.
        output: Markdown file to write; in one with the marks of figures, those of data alone for --parts data, only
            what lies between them.
        settings: any top-level setting of pretrain.yaml, such as --checkpointing true.
    """
    from common.bundles import read_config

    known = sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/pretrain.yaml"))
    chosen, wanted = _names(cells, known, "bundle"), _names(parts, PARTS, "part")
    keys: set[str] = set()
    for cell in chosen:
        keys |= set(read_config(ROOT / "bundles" / cell / "configs" / "pretrain.yaml"))
    for name in settings:
        if name not in keys:
            raise SystemExit(f"Stopped: --{name} is neither an option nor a setting of these bundles")
    if peers:
        _install_peers()
    if shared and device != "cpu":
        raise SystemExit("Stopped: --shared counts processor time, which says nothing about a GPU")
    named = scans.split(",") if isinstance(scans, str) else scans
    files = [str(Path(name.strip()).expanduser().absolute()) for name in named if name.strip()]
    if lost := [name for name in files if not Path(name).exists()]:
        raise SystemExit(f"Stopped: --scans names {lost[0]}, which is not there")
    options = Options(
        patch_size,
        views_size,
        batch_size,
        device,
        repeats,
        peers,
        channels_last,
        compile,
        profile,
        shared,
        files,
        settings,
    )
    head = _alone(_hardware, options) + "\n"
    steps: list[dict[str, Any]] = []
    for index, cell in enumerate(chosen if "steps" in wanted else []):
        step = _alone(_measure_step, cell, options)
        step["plain_peak"] = _alone(_measure_plain_memory, cell, options)
        steps.append(step)
        told = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in step["ratios"].items())
        print(f"[{index + 1}/{len(chosen)}] {cell}: {step['seconds']:.2f} s, {told}", file=sys.stderr, flush=True)
        if output:  # what is measured is not lost if a later bundle fails
            _write(Path(output), "\n".join([head, *_step_tables(steps, options)]), MARKS)
    text = [head, *(_step_tables(steps, options) if steps else [])]
    if {"views", "store"} & set(wanted):
        print("views and store", file=sys.stderr, flush=True)
        text += _data_tables(_alone(_measure_data, chosen, wanted, options), wanted, options)
    if "data" in wanted:
        print("data", file=sys.stderr, flush=True)
        text += data_tables(_alone(_measure_data_path, options), _table)
    page = "\n".join(text)
    print(page)
    if output:
        _write(Path(output), page, DATA_MARKS if wanted == ["data"] else MARKS)


def _write(path: Path, page: str, marks: tuple[str, str]) -> None:
    """Write the figures, keeping what people wrote around them."""
    begin, end = marks
    old = path.read_text("utf-8") if path.exists() else ""
    if begin in old and end in old:
        before, rest = old.split(begin, 1)
        page = f"{before}{begin}\n\n{page}\n{end}{rest.split(end, 1)[1]}"
    path.write_text(page, "utf-8")
