# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One embedding per volume with a frozen encoder.

=========  ==============================================================================================
goes in    a preprocessed volume ``(C, D, H, W)`` of any size
between    overlapping tiles of ``patch_size``; the feature maps of each, ``(C_s, d, h, w)``, weighted
comes out  one vector ``(E,)``: every chosen stage pooled over the volume, joined
           optionally the map of the coarsest chosen stage, ``(C_s, ...)``, with its affine
=========  ==============================================================================================

Every voxel of the volume counts once, however many tiles cover it, and padding counts nowhere: a position of a map
weighs as much as it holds voxels of the volume, shared among the tiles there by a Gaussian as in inference. Only one
tile's maps are held at a time.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import itertools
import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.checks import check_case, explain, settle
from ..data.datalists import Case, case_name, images_of
from ..errors import DataError, SettingsError, WeightsError
from ..weights.files import replace_file, sha256, write_json
from ..weights.missing import encoder_remedy
from ..weights.receipt import CAVEAT
from ..weights.transfer import fine_tuning_network

__all__ = [
    "FROZEN_CAVEAT",
    "Embedding",
    "FeatureFolder",
    "VolumeEmbedder",
    "embed_files",
    "extract_features",
    "frozen_encoder",
    "read_features",
]

FROZEN_CAVEAT = (
    "Frozen features are weak for segmentation: 55 against 76 Dice in the study's comparison of schedules. Judge what "
    "they tell about your own question with tools/probe.py."
)
TABLE, ABOUT = "features.csv", "features.json"
_POOLINGS = ("mean", "std", "max")
_FEW_POSITIONS = 27  # of a map; over fewer, an instance norm leaves next to nothing to average
_SIGMA = 0.125  # of a tile's side, as in inference


@dataclass
class Embedding:
    """What the encoder says of one volume.

    Attributes:
        stages: pooled features ``(E_s,)`` of each chosen stage, by its index.
        positions: voxels of the coarsest chosen map.
        dense: that map ``(C_s, d, h, w)`` in float16, if asked for.
        affine: from indices of that map to millimetres, ``(4, 4)``.
    """

    stages: dict[int, np.ndarray]
    positions: int
    dense: np.ndarray | None = None
    affine: np.ndarray | None = None

    @property
    def vector(self) -> np.ndarray:
        """All stages joined, ``(E,)`` float32."""
        return np.concatenate(list(self.stages.values()))


def tile_origins(size: int, *, tile: int, stride: int, overlap: float) -> list[int]:
    """Return where tiles begin along one axis: multiples of the stride, evenly spread, the last one flush.

    Args:
        size: of the axis, a multiple of ``stride``, at least ``tile``.
        tile: side of a tile, a multiple of ``stride``.
        stride: of the coarsest map, on whose grid all tiles must lie.
        overlap: share of a tile that its neighbour covers at least.

    Example:
        >>> tile_origins(224, tile=160, stride=32, overlap=0.5), tile_origins(160, tile=160, stride=32, overlap=0.5)
        ([0, 64], [0])
    """
    step = max(stride, int(tile * (1 - overlap)) // stride * stride)
    count = math.ceil((size - tile) / step) + 1
    span = (size - tile) // stride
    return [round(index * span / max(count - 1, 1)) * stride for index in range(count)]


def tile_shares(origins: Sequence[int], *, size: int, tile: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of each position belongs to each tile along one axis.

    Shares of an axis multiply to those in space, since tiles are a grid and a Gaussian is a product over the axes.

    Args:
        origins: of the tiles in voxels, multiples of ``stride``.
        size: voxels of the volume, without padding.
        tile: side of a tile in voxels.
        stride: voxels along a side of a position.

    Returns:
        shares ``(tiles, tile / stride)``, which sum to 1 over the tiles at every position; and the share of each
        position that is inside the volume, of the same shape.

    Example:
        >>> shares, inside = tile_shares([0, 2], size=5, tile=4, stride=2)
        >>> shares.round(2).tolist(), inside.tolist()
        ([[1.0, 0.5], [0.5, 1.0]], [[1.0, 1.0], [1.0, 0.5]])
    """
    cells = tile // stride
    gaussian = np.exp(-0.5 * ((np.arange(cells) - (cells - 1) / 2) / (_SIGMA * cells)) ** 2)
    total = np.zeros(max(origins) // stride + cells)
    for origin in origins:
        total[origin // stride : origin // stride + cells] += gaussian
    places = np.array([np.arange(cells) + origin // stride for origin in origins])  # (tiles, cells)
    inside = np.clip(size - places * stride, 0, stride) / stride
    return gaussian / total[places], inside


@dataclass
class _Pool:
    """Sums of one stage over the tiles so far."""

    total: Tensor
    squares: Tensor
    highest: Tensor


class VolumeEmbedder:
    """Encode a volume tile by tile and pool what the chosen stages say over it.

    Args:
        network: with ``encode``, ``feature_channels`` and ``feature_strides``; put into evaluation mode.
        patch_size: sides of a tile in voxels, multiples of the network's coarsest stride.
        overlap: share of a tile that its neighbour covers at least.
        stages: which feature maps, fine to coarse from 0; negative ones count from the coarsest.
        pooling: ``mean``, ``std`` and ``max`` over the volume, joined with ``+``.
        small_volumes: what is done where a volume is smaller than a tile. ``shrink``: the tile is cut to the volume,
            up to the stride. ``hide``: the tile stays as it is, and the network is told which blocks are padding, so
            that a transformer drops these tokens and keeps its positions.
        dense: also return the map of the coarsest chosen stage.
        device: where to compute.
        amp: compute in mixed precision.

    Raises:
        SettingsError: if a tile, a stage or the pooling does not fit.

    Example:
        >>> from common.networks import ResEncUNet
        >>> network = ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1, 1], with_decoder=False)
        >>> VolumeEmbedder(network, patch_size=[8, 8, 8])(torch.rand(1, 9, 12, 7)).vector.shape
        (8,)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        patch_size: Sequence[int],
        overlap: float = 0.5,
        stages: Sequence[int] = (-1,),
        pooling: str = "mean",
        small_volumes: str = "shrink",
        dense: bool = False,
        device: torch.device | str = "cpu",
        amp: bool = False,
    ) -> None:
        self.device = torch.device(device)
        backbone: Any = network.to(self.device).eval().requires_grad_(False)
        self.network = backbone
        self.strides: list[int] = list(backbone.feature_strides)
        self.patch_size = [patch_size] * 3 if isinstance(patch_size, int) else list(patch_size)
        coarsest = self.strides[-1]
        if len(self.patch_size) != 3 or any(side < 1 or side % coarsest for side in self.patch_size):
            raise SettingsError(
                f"patch_size {self.patch_size} must be three multiples of {coarsest}, the stride of this encoder"
            )
        if not 0 <= overlap < 1:
            raise SettingsError(f"overlap is {overlap}; it must be at least 0 and less than 1")
        count = len(self.strides)
        chosen = [stages] if isinstance(stages, int) else list(stages)
        if not chosen or any(not isinstance(one, int) or not -count <= one < count for one in chosen):
            raise SettingsError(f"stages is {stages}; this encoder has the stages 0 to {count - 1}, fine to coarse")
        if small_volumes not in ("shrink", "hide"):
            raise SettingsError(f"small_volumes is {small_volumes!r}; it must be shrink or hide")
        self.pooling = pooling.split("+") if isinstance(pooling, str) else list(pooling)
        if any(name not in _POOLINGS for name in self.pooling) or len(set(self.pooling)) < len(self.pooling):
            raise SettingsError(f"pooling is {pooling!r}; it must be of {', '.join(_POOLINGS)}, joined with +")
        self.overlap = overlap
        self.stages = sorted({one % count for one in chosen})
        self.small_volumes = small_volumes
        self.dense = dense
        self.amp = amp

    @property
    def columns(self) -> list[dict[str, Any]]:
        """Say for each number of the vector which stage, pooling and channel it is."""
        return [
            {"stage": stage, "stride": self.strides[stage], "pooling": pooling, "channel": channel}
            for stage in self.stages
            for pooling in self.pooling
            for channel in range(self.network.feature_channels[stage])
        ]

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Embedding:
        """Embed a volume.

        Args:
            image: ``(C, D, H, W)``; the affine of a MONAI ``MetaTensor`` gives that of the dense map.

        Raises:
            DataError: if the result is not finite.
        """
        size = list(image.shape[1:])
        affine = np.asarray(getattr(image, "affine", np.eye(4)), dtype=float)
        values = image.as_tensor() if hasattr(image, "as_tensor") else image
        tile, origins = self._tiles(size)
        plans = {
            stage: [
                tile_shares(starts, size=n, tile=t, stride=self.strides[stage])
                for starts, n, t in zip(origins, size, tile, strict=True)
            ]
            for stage in self.stages
        }
        last = self.stages[-1]
        grid = [math.ceil(n / self.strides[last]) for n in size]
        pools: dict[int, _Pool] = {}
        dense: Tensor | None = None
        for place in itertools.product(*(range(len(starts)) for starts in origins)):
            corner = [starts[index] for starts, index in zip(origins, place, strict=True)]
            for stage, features in self._encode(values, corner, tile).items():
                weights = [
                    (torch.from_numpy(shares[index]).to(features), torch.from_numpy(inside[index]).to(features))
                    for (shares, inside), index in zip(plans[stage], place, strict=True)
                ]
                _add(pools, stage, features, weights)
                if self.dense and stage == last:
                    if dense is None:
                        dense = features.new_zeros((features.shape[0], *grid))
                    _blend(dense, features, [shares for shares, _ in weights], corner, self.strides[last])
        voxels = {stage: math.prod(n / self.strides[stage] for n in size) for stage in self.stages}
        found = Embedding({stage: self._pooled(pools[stage], voxels[stage]) for stage in self.stages}, math.prod(grid))
        if not np.isfinite(found.vector).all():
            raise DataError("its features are NaN or infinite; compute without mixed precision, with --amp false")
        if dense is not None:
            found.dense = dense.cpu().numpy().astype(np.float16)
            found.affine = affine @ _to_positions(self.strides[last])
        return found

    @torch.inference_mode()
    def at(self, image: Tensor, points: np.ndarray) -> np.ndarray:
        """Return the features of some voxels: of every chosen stage, interpolated between its positions, and joined.

        Where tiles overlap, each tells as much as the voxel is near its middle, by the Gaussian of inference.

        Args:
            image: ``(C, D, H, W)``.
            points: indices of voxels ``(P, 3)``.

        Returns:
            ``(P, E)`` float32, stages in the order of ``stages``.

        Raises:
            DataError: if the result is not finite.

        Example:
            >>> from common.networks import ResEncUNet
            >>> network = ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1, 1], with_decoder=False)
            >>> embedder = VolumeEmbedder(network, patch_size=[8, 8, 8], stages=[0, 1])
            >>> embedder.at(torch.rand(1, 9, 12, 7), np.array([[0, 0, 0], [8, 11, 6]])).shape
            (2, 12)
        """
        size = list(image.shape[1:])
        values = image.as_tensor() if hasattr(image, "as_tensor") else image
        tile, origins = self._tiles(size)
        wanted = torch.from_numpy(np.asarray(points)).to(self.device, torch.float32)  # (P, 3)
        sides = torch.tensor(tile, device=self.device)
        total = torch.zeros(len(wanted), sum(self.network.feature_channels[stage] for stage in self.stages))
        weight = torch.zeros(len(wanted), 1)
        for corner in itertools.product(*origins):
            place = wanted - torch.tensor(corner, device=self.device)
            inside = ((place >= 0) & (place < sides)).all(1)
            if not inside.any():
                continue
            place = place[inside]
            found = []
            for stage, features in self._encode(values, corner, tile).items():
                stride = self.strides[stage]
                held = [
                    min(n, math.ceil((whole - start) / stride))
                    for n, whole, start in zip(features.shape[1:], size, corner, strict=True)
                ]  # positions beyond the end of the volume tell nothing
                found.append(_interpolate(features[:, : held[0], : held[1], : held[2]], (place + 0.5) / stride - 0.5))
            share = torch.exp(-0.5 * (((place + 0.5) / sides - 0.5) / _SIGMA).square().sum(1, keepdim=True)).cpu()
            chosen = inside.cpu()
            total[chosen] += torch.cat(found, 1).cpu() * share
            weight[chosen] += share
        features_there = (total / weight).numpy()
        if not np.isfinite(features_there).all():
            raise DataError("its features are NaN or infinite; compute without mixed precision, with --amp false")
        return features_there

    def _tiles(self, size: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """Return the sides of a tile of a volume of this size, and where tiles begin along each axis."""
        coarsest = self.strides[-1]
        padded = [math.ceil(n / coarsest) * coarsest for n in size]
        tile = [
            min(p, n) if self.small_volumes == "shrink" else p for p, n in zip(self.patch_size, padded, strict=True)
        ]
        origins = [
            tile_origins(max(n, t), tile=t, stride=coarsest, overlap=self.overlap)
            for n, t in zip(padded, tile, strict=True)
        ]
        return tile, origins

    def _encode(self, values: Tensor, corner: Sequence[int], tile: Sequence[int]) -> dict[int, Tensor]:
        """Return the chosen maps ``(C_s, d, h, w)`` of one tile in float32, zeros put where the volume has ended."""
        window = values[(slice(None), *(slice(c, c + t) for c, t in zip(corner, tile, strict=True)))]
        there = list(window.shape[1:])
        lacking = [(0, t - n) for t, n in zip(tile, there, strict=True)]
        window = F.pad(window.to(self.device, torch.float32), [n for pair in reversed(lacking) for n in pair])
        visible = None
        if self.small_volumes == "hide":
            block = self.strides[-1]
            visible = torch.zeros([1, *(t // block for t in tile)], dtype=torch.bool, device=self.device)
            visible[(slice(None), *(slice(0, math.ceil(n / block)) for n in there))] = True
            visible = None if bool(visible.all()) else visible
        with torch.autocast(self.device.type, enabled=self.amp):
            maps = self.network.encode(window[None], visible=visible, sparse=visible is not None)
        return {stage: maps[stage][0].float() for stage in self.stages}

    def _pooled(self, pool: _Pool, voxels: float) -> np.ndarray:
        mean = pool.total / voxels
        parts = {"mean": mean, "std": (pool.squares / voxels - mean**2).clamp(min=0).sqrt(), "max": pool.highest}
        return torch.cat([parts[name] for name in self.pooling]).float().cpu().numpy()


def _add(pools: dict[int, _Pool], stage: int, features: Tensor, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add one tile's map ``(C_s, d, h, w)`` to the sums of its stage."""
    d, h, w = ((shares * inside) for shares, inside in weights)
    total, squares = (((values @ w) @ h) @ d for values in (features, features**2))  # (C_s,)
    held = [int((inside > 0).sum()) for _, inside in weights]
    highest = features[:, : held[0], : held[1], : held[2]].amax((1, 2, 3)).double()
    pool = pools.get(stage)
    if pool is None:
        pools[stage] = _Pool(total.double(), squares.double(), highest)
    else:
        pool.total += total
        pool.squares += squares
        pool.highest = torch.maximum(pool.highest, highest)


def _blend(dense: Tensor, features: Tensor, shares: Sequence[Tensor], corner: Sequence[int], stride: int) -> None:
    """Add one tile's map to the map of the whole volume, leaving out positions beyond its end."""
    d, h, w = shares
    starts = [c // stride for c in corner]
    held = [min(n, whole - start) for n, whole, start in zip(features.shape[1:], dense.shape[1:], starts, strict=True)]
    weighted = features * d[:, None, None] * h[:, None] * w
    target = tuple(slice(start, start + n) for start, n in zip(starts, held, strict=True))
    dense[(slice(None), *target)] += weighted[:, : held[0], : held[1], : held[2]]


def _interpolate(features: Tensor, places: Tensor) -> Tensor:
    """Return a map ``(C, d, h, w)`` at places ``(P, 3)``, in its positions, as ``(P, C)``; flat beyond its ends."""
    sides = torch.tensor(features.shape[1:], device=places.device, dtype=places.dtype)
    grid = (2 * places / (sides - 1).clamp(min=1) - 1).flip(1)  # grid_sample counts the last axis first
    found = F.grid_sample(features[None], grid[None, None, None], padding_mode="border", align_corners=True)
    return found[0, :, 0, 0].T  # (1, C, 1, 1, P) -> (P, C)


def _to_positions(stride: int) -> np.ndarray:
    """Return the matrix from indices of a map to indices of the image: the middle of the voxels it stands for."""
    matrix = np.diag([stride, stride, stride, 1.0])
    matrix[:3, 3] = (stride - 1) / 2
    return matrix


def frozen_encoder(
    network: nn.Module,
    *,
    pretrained: str,
    settings: Mapping[str, Any],
    from_scratch: bool = False,
    receipt_file: str | None = None,
) -> nn.Module:
    """Return ``network`` with the whole pre-trained encoder in it, or as it is for a control; print the receipt.

    Args:
        network: to load into; needs no decoder.
        pretrained: flat state dict of a backbone.
        settings: of this run, compared with the JSON beside ``pretrained``.
        from_scratch: load nothing.
        receipt_file: JSON to write.

    Raises:
        WeightsError: if the file is missing, damaged or of another network.
    """
    if from_scratch:
        tqdm.write("a random encoder, as a control: no weights loaded")
        return network
    return fine_tuning_network(network, pretrained=pretrained, settings=settings, receipt_file=receipt_file)


@dataclass
class _Item:
    """One case as the loader hands it over: its volume, or why there is none."""

    case: Case
    image: Any = None
    stamp: list[list[int]] = field(default_factory=list)
    problem: DataError | None = None


class _Volumes(Dataset[_Item]):
    """Preprocessed volumes; a case that cannot be used comes as the sentence that says why."""

    def __init__(self, cases: Sequence[Case], preprocessing: Callable[[Any], Any], channels: int) -> None:
        self.cases = list(cases)
        self.preprocessing = preprocessing
        self.channels = channels

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> _Item:
        case = self.cases[index]
        try:
            check_case(case, channels=self.channels)
            stamp = _stamp(case)
            return _Item(case, self.preprocessing({"image": case["image"]})["image"], stamp)
        except DataError as error:
            return _Item(case, problem=error)
        except (OSError, RuntimeError, ValueError) as error:
            chain: BaseException | None = error
            while chain is not None and not isinstance(chain, (DataError, SettingsError)):
                chain = chain.__cause__ or chain.__context__
            if isinstance(chain, SettingsError):  # the same for every case
                raise chain from error
            return _Item(case, problem=chain or explain(images_of(case)[0], error))


def _stamp(case: Case) -> list[list[int]]:
    """Return size and time of each file of a case, by which a changed file is told."""
    stats = [Path(file).stat() for file in images_of(case)]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


class FeatureFolder:
    """The features of one encoder in one folder: which are there, which are to be made, and their table.

    ``<case>.npz`` holds ``embedding`` (float32), ``stage_<index>`` where several stages are joined, ``dense`` (float16)
    and ``affine`` where asked for, and ``provenance`` (JSON); all load with ``allow_pickle=False``. Features of other
    weights or settings are never mixed with these.

    Args:
        cases: to embed.
        output_dir: the folder.
        pretrained: weights of the encoder.
        from_scratch: it has none.
        settings: that decide what the features are.
        overwrite: make everything anew.

    Attributes:
        pending: cases that are not there yet.
        kept: how many are.

    Raises:
        DataError: if two cases have one name, or there is a case of the same name from another file.
        SettingsError: if the folder holds features of other weights or settings.
        WeightsError: if there are no weights.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        output_dir: str,
        pretrained: str,
        from_scratch: bool = False,
        settings: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        if not from_scratch and not Path(pretrained).is_file():
            raise WeightsError(
                f"there is no pre-trained encoder {pretrained}; {encoder_remedy(pretrained)}, or look at a random "
                "encoder with --from_scratch true"
            )
        twice = [name for name, count in Counter(map(case_name, cases)).items() if count > 1]
        if twice:
            raise DataError(f"several images are called {twice[0]}, and their features would replace each other")
        self.folder = Path(output_dir)
        self.identity: dict[str, Any] = json.loads(
            json.dumps({"weights_sha256": None if from_scratch else sha256(pretrained), "settings": dict(settings)})
        )
        self.weights = None if from_scratch else str(Path(pretrained).absolute())
        self.pending: list[Case] = []
        self.strangers: list[str] = []
        there = {path.stem: _provenance(path) for path in sorted(self.folder.glob("*.npz"))}
        listed = {case_name(case): case for case in cases}
        for name, about in there.items():
            other = about is not None and self._differs(about)
            if other and overwrite and name not in listed:
                self.strangers.append(name)
            elif other and not overwrite:
                raise SettingsError(
                    f"{self.folder / name}.npz was made with {other}; give another --output_dir, or redo everything "
                    "there with --overwrite true"
                )
        for name, case in listed.items():
            about = None if overwrite else there.get(name)
            if about is not None and about["source"] != images_of(case):
                raise DataError(
                    f"{self.folder / name}.npz was made of {about['source'][0]}, not of {images_of(case)[0]}; rename "
                    "one, give another --output_dir, or redo it with --overwrite true"
                )
            if about is None or (Path(images_of(case)[0]).exists() and about["source_stamp"] != _stamp(case)):
                self.pending.append(case)
        self.kept = len(listed) - len(self.pending)
        if self.kept:
            tqdm.write(
                f"{self.kept} of {len(listed)} embeddings are in {self.folder} already and are kept; "
                "--overwrite true redoes them"
            )

    def _differs(self, about: Mapping[str, Any]) -> str:
        """Return in words how features differ from those of this run, empty if they do not."""
        theirs, ours = about["settings"], self.identity["settings"]
        wrong = [
            f"{name} {theirs.get(name)}, here {ours.get(name)}"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]
        if about["weights_sha256"] != self.identity["weights_sha256"]:
            told = (
                str(value)[:12] if value else "none"
                for value in (about["weights_sha256"], self.identity["weights_sha256"])
            )
            wrong.insert(0, "other weights (sha256 {}, here {})".format(*told))
        return "; ".join(wrong[:3])

    def write(self, item: _Item, embedding: Embedding) -> None:
        """Write the file of one case, whole or not at all."""
        arrays: dict[str, np.ndarray] = {"embedding": embedding.vector}
        if len(embedding.stages) > 1:
            arrays |= {f"stage_{stage}": values for stage, values in embedding.stages.items()}
        if embedding.dense is not None and embedding.affine is not None:
            arrays |= {"dense": embedding.dense, "affine": embedding.affine}
        about = {
            "case": case_name(item.case),
            "source": images_of(item.case),
            "source_stamp": item.stamp,
            "weights": self.weights,
            **self.identity,
            "versions": _versions(),
        }
        arrays["provenance"] = np.array(json.dumps(about))

        def write(temporary: str) -> None:
            with open(temporary, "wb") as stream:
                np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]

        replace_file(self.folder / f"{case_name(item.case)}.npz", write)

    def finish(self, *, columns: Sequence[Mapping[str, Any]], problems: Mapping[str, str]) -> int:
        """Write the table of everything in the folder, and where it comes from.

        Args:
            columns: what each number is.
            problems: of cases that were skipped, by name.

        Returns:
            how many rows it has.
        """
        rows, vectors = [], []
        for path in sorted(self.folder.glob("*.npz")):
            about = _provenance(path)
            if about is None or path.stem in self.strangers or path.stem in problems:
                continue
            with np.load(path, allow_pickle=False) as content:
                vectors.append(content["embedding"])
            rows.append([path.stem, ";".join(about["source"])])
        digits = max(3, len(str(len(columns) - 1)))
        names = [f"f{index:0{digits}d}" for index in range(len(columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "source", *names])
        for row, vector in zip(rows, vectors, strict=True):
            writer.writerow([*row, *(str(value) for value in vector)])  # the shortest text that reads back as float32
        replace_file(self.folder / TABLE, lambda temporary: Path(temporary).write_text(text.getvalue(), "utf-8"))
        receipt = self.folder / "weights_receipt.json"
        write_json(
            {
                "weights": self.weights,
                **self.identity,
                "receipt": json.loads(receipt.read_text("utf-8")) if self.weights and receipt.is_file() else None,
                "versions": _versions(),
                "cases": len(rows),
                "skipped": dict(problems),
                "columns": {name: dict(column) for name, column in zip(names, columns, strict=True)},
                "caveat": [CAVEAT, FROZEN_CAVEAT],
            },
            self.folder / ABOUT,
        )
        if self.strangers:
            tqdm.write(
                f"{len(self.strangers)} file(s) there, such as {self.strangers[0]}.npz, are of other weights or "
                "settings and are not in the table; remove them"
            )
        if len(vectors) > 1 and not np.ptp(np.stack(vectors), axis=0).any():
            tqdm.write("warning: all embeddings are the same; choose finer --stages, or check the weights")
        return len(rows)


def _provenance(path: Path) -> dict[str, Any] | None:
    """Return where the features of one file come from, None if it is damaged or of something else."""
    try:
        with np.load(path, allow_pickle=False) as content:
            about = json.loads(str(content["provenance"]))
            content["embedding"]
    except Exception:
        return None
    wanted = {"source", "source_stamp", "weights_sha256", "settings"}
    return about if isinstance(about, dict) and wanted <= about.keys() else None


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "monai", "numpy")}
    return {"python": platform.python_version(), **packages}


def extract_features(
    folder: FeatureFolder,
    *,
    embedder: VolumeEmbedder,
    preprocessing: Callable[[Any], Any],
    channels: int = 1,
    num_workers: int = 0,
    strict: bool = False,
) -> dict[str, str]:
    """Embed all pending cases of a folder, write its table, and say what was done.

    Args:
        folder: which cases, and where to.
        embedder: computes the embeddings.
        preprocessing: maps ``{"image": file or files}`` to ``{"image": (C, D, H, W)}``.
        channels: of a volume.
        num_workers: processes that read and preprocess.
        strict: stop at the first case that cannot be used.

    Returns:
        what is wrong with each skipped case.

    Raises:
        DataError: with ``strict``, or if no case can be used.
    """
    problems: dict[str, DataError] = {}
    small: list[str] = []
    for item in tqdm(
        _loaded(folder.pending, preprocessing, channels, num_workers),
        total=len(folder.pending),
        desc="embedding",
        unit="case",
        disable=not folder.pending,
    ):
        name = case_name(item.case)
        try:
            if item.problem is not None:
                raise item.problem
            found = embedder(item.image)
            folder.write(item, found)
            small += [name] if found.positions < _FEW_POSITIONS else []
        except DataError as error:
            file = images_of(item.case)[0]
            problems[name] = error if file in str(error) else DataError(f"{file}: {error}")
            if strict:
                raise problems[name] from error
    settle(list(problems.values()), folder.kept + len(folder.pending) - len(problems), strict=False)
    if small:
        tqdm.write(
            f"warning: {len(small)} volume(s), such as {small[0]}, have fewer than {_FEW_POSITIONS} positions in the "
            f"coarsest chosen map (stride {embedder.strides[embedder.stages[-1]]}), too few to say much; choose finer "
            "--stages, or a smaller --spacing_mm"
        )
    skipped = {name: str(error) for name, error in problems.items()}
    rows = folder.finish(columns=embedder.columns, problems=skipped)
    done = len(folder.pending) - len(problems)
    tqdm.write(
        f"features: {done} volume(s) embedded, {folder.kept} kept, {len(problems)} skipped; {rows} x "
        f"{len(embedder.columns)} numbers in {folder.folder / TABLE}\n{CAVEAT}\n{FROZEN_CAVEAT}"
    )
    return skipped


def embed_files(
    files: Sequence[str], *, embedder: VolumeEmbedder, preprocessing: Callable[[Any], Any], channels: int = 1
) -> Iterator[np.ndarray | DataError]:
    """Yield for each file its embedding ``(E,)``, or what is wrong with it; nothing is written.

    Args:
        files: of one volume each.
        embedder: computes the embeddings.
        preprocessing: maps ``{"image": file}`` to ``{"image": (C, D, H, W)}``.
        channels: of a volume.
    """
    for item in _loaded([{"image": file} for file in files], preprocessing, channels, 0):
        try:
            if item.problem is not None:
                raise item.problem
            yield embedder(item.image).vector
        except DataError as error:
            yield error


def _loaded(
    cases: Sequence[Case], preprocessing: Callable[[Any], Any], channels: int, num_workers: int
) -> Iterator[_Item]:
    loader: DataLoader[_Item] = DataLoader(
        _Volumes(cases, preprocessing, channels), batch_size=None, num_workers=min(num_workers, len(cases))
    )
    yield from loader


def read_features(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Read a table of features.

    Args:
        path: of ``features.csv``, or of the folder that holds it.

    Returns:
        names of the cases, and their features ``(cases, E)`` float32.

    Raises:
        DataError: if it is missing, damaged, or holds something else.
    """
    table = Path(path).expanduser()
    table = table / TABLE if table.is_dir() else table
    if not table.is_file():
        raise DataError(f"there is no table of features {table}; make one with a bundle's features config")
    with open(table, newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.reader(stream))
    if len(rows) < 2 or rows[0][:2] != ["case", "source"] or len(rows[0]) < 3:
        raise DataError(f"{table} is no table of features: it needs the columns case, source, f000, ... and a case")
    try:
        values = np.array([[float(text) for text in row[2:]] for row in rows[1:]], dtype=np.float32)
    except ValueError as error:
        raise DataError(
            f"{table} has rows of other lengths or texts among its numbers ({error}); make it anew"
        ) from error
    if values.shape[1] != len(rows[0]) - 2:
        raise DataError(f"{table} has {values.shape[1]} numbers under {len(rows[0]) - 2} names; make it anew")
    names = [row[0] for row in rows[1:]]
    bad = [name for name, row in zip(names, values, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise DataError(f"{table} holds NaN or infinite features of {bad[0]}; make it anew")
    if len(set(names)) < len(names):
        raise DataError(f"{table} has several rows of {Counter(names).most_common(1)[0][0]}; make it anew")
    return names, values
