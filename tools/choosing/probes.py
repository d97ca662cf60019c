# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a frozen encoder knows of a segmentation task: a linear probe of its maps at labelled voxels.

=========  ==============================================================================================
goes in    labelled cases; an encoder, pre-trained or as it was drawn (the baseline)
between    voxels of each case, as many of every class, ``(P, 3)``; their features ``(P, E)``: all maps of
           the encoder, fine to coarse, interpolated to the voxel and joined
comes out  average precision of every class in every case, by a probe that was fitted without that case
=========  ==============================================================================================

The probe is logistic regression on standardised features; how strongly it is regularised is chosen by a
cross-validation within the training cases. A linear layer on interpolated maps is the interpolated map of a linear
layer, so that an encoder of one coarse map is asked the same question as one of many.

Scores are average precision, not Dice: where a probe that saw as many voxels of every class should put its threshold
is not known, and the Dice of a small structure would measure that above all. Voxels count as often as the volume has
voxels of their kind, so that the score is that of the whole volume. A class that a case does not hold has none there.

Every encoder is asked at the same voxels in the same folds, so that differences are paired.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from common.bundles import read_config
from common.data import SegmentationTask
from common.data.cases import Case, case_name, images_of
from common.data.checking.checks import read_image, tell_nearly_zero, tell_outside
from common.data.identity import stamp_of
from common.engines.features import FeatureFolder, VolumeEmbedder, draw_voxels, extract_features, read_features
from common.engines.probing import ProbeResult, Target, probe_features, read_target
from common.errors import DataError, SettingsError, WeightsError
from common.files import read_record, replace_file, sha256, write_record
from common.literals import as_data
from common.metrics.statistics import bootstrap_interval, known_mean
from common.paths import output_file
from common.tables import write_table
from common.terminal import progress_bar
from common.transforms import OUTSIDE, volume_preprocessing, whole_numbers
from common.weights.transfer import origin_receipt

from ..commanding.environment import ROOT
from ..studies.definition import bundle_config
from ..studies.execution import logged

__all__ = [
    "NETWORK_SETTINGS",
    "Encoder",
    "Kept",
    "Rules",
    "VoxelProbe",
    "Voxels",
    "check_classes",
    "collect_voxels",
    "mean_score",
    "paired_difference",
    "probe_cases",
    "probe_encoder",
    "probe_mean",
    "probe_voxels",
    "score_interval",
]

# what the JSON beside weights says of the size of their network
NETWORK_SETTINGS = ("features_per_stage", "blocks_per_stage", "embed_dim", "depth", "num_heads", "token_size")
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the regularisation, the most cautious first
FEW_CASES = 6  # below, not even the same sign in all cases would be beyond chance at 5 %: 2 / 2^5
_ROWS = 6000  # to fit on


@dataclass
class Voxels:
    """Some voxels of one case.

    Attributes:
        case: its name.
        features: of the encoder there, ``(P, E)``.
        labels: index of the class, ``(P,)``.
        weights: of how many voxels of the volume each is one, ``(P,)``.
    """

    case: str
    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


@dataclass
class VoxelProbe:
    """What the probe of one encoder told.

    Attributes:
        cases: their names.
        classes: names of the foreground classes or regions.
        scores: average precision ``(cases, classes)``, NaN where a case does not hold a class.
        estimate: mean over classes of the mean over cases.
        interval: 95 % of a bootstrap over cases, or over groups; None with a single one.
        fold: which fold tested a case.
        chosen: strength of the regularisation in each fold.
        notes: what the user should know.
    """

    cases: list[str]
    classes: list[str]
    scores: np.ndarray
    estimate: float
    interval: list[float] | None
    fold: list[int]
    chosen: list[float]
    notes: list[str] = field(default_factory=list)

    def as_plain(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return {
            "estimate": self.estimate,
            "interval": self.interval,
            "cases": {
                case: {
                    name: None if np.isnan(value) else float(value)
                    for name, value in zip(self.classes, row, strict=True)
                }
                for case, row in zip(self.cases, self.scores, strict=True)
            },
            "fold": self.fold,
            "chosen": self.chosen,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: which bundle's network, and what is in it.

    Attributes:
        bundle: name.
        weights: file of the encoder; None for one as it was drawn.
        seed: of that draw.
        settings: of the bundle's features config that differ, such as the size of the network or the spacing.
    """

    bundle: str
    weights: str | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """Return all settings of the features config that the command line may change.

        The size of the network and the spacing are those that the JSON beside the weights says, unless told otherwise.

        Raises:
            SettingsError: if there is no such bundle.
            WeightsError: if the file is missing.
        """
        file = ROOT / "bundles" / self.bundle / "configs" / "features.yaml"
        if not file.is_file():
            bundles = sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/features.yaml"))
            raise SettingsError(f"there is no bundle {self.bundle!r}; choose one of {', '.join(bundles)}")
        known = bundle_config(self.bundle, "features")
        found: dict[str, Any] = {}
        if self.weights is not None:
            if not Path(self.weights).is_file():
                raise WeightsError(f"there is no pre-trained encoder {self.weights}; correct the path in --weights")
            receipt = origin_receipt(self.weights)
            recorded = receipt.provenance.get("settings", {})
            found = {name: recorded[name] for name in NETWORK_SETTINGS if name in recorded}
            if receipt.spacing_mm is not None:
                found["spacing_mm"] = receipt.spacing_mm
        found |= self.settings
        return {name: value for name, value in found.items() if name in known}

    def parser(self, folder: Path, **settings: Any) -> ConfigParser:
        """Return the bundle's features config with what this encoder says.

        Args:
            folder: where the receipt goes, and features if they are written.
            settings: further ones.
        """
        path = ROOT / "bundles" / self.bundle / "configs" / "features.yaml"
        parser = ConfigParser(read_config(path))
        told = {
            **self.resolved(),  # also what is written beside the weights
            "bundle_root": str(path.parent.parent),
            "output_dir": str(folder),
            "pretrained": self.weights or "",
            "from_scratch": self.weights is None,
            "seed": self.seed,
            **settings,
        }
        parser.update({name: as_data(value) for name, value in told.items()})
        return parser

    def load(self, folder: Path, *, stages: Sequence[int] | None = None) -> tuple[VolumeEmbedder, dict[str, Any]]:
        """Build the network with the bundle's features config, and load the weights with their receipt.

        Args:
            folder: where the receipt goes.
            stages: which maps; None for all.

        Returns:
            the embedder, and the arguments of ``volume_preprocessing``.

        Raises:
            WeightsError: if the weights are damaged or of another network.
        """
        parser = self.parser(folder)
        torch.manual_seed(self.seed)
        with logged(folder / "log.txt"):
            network = parser.get_parsed_content("network")
        given = {
            name: parser.get_parsed_content(name)
            for name in ("patch_size", "overlap", "small_volumes", "device", "amp")
        }
        chosen = range(len(network.feature_strides)) if stages is None else stages
        names = ("spacing_mm", "reorient", "normalization", "channels")
        return (
            VolumeEmbedder(network, stages=list(chosen), **given),
            {name: parser.get_parsed_content(name) for name in names},
        )


@dataclass(frozen=True)
class Kept:
    """Where features of finished cases are kept, so that a cut run goes on.

    Attributes:
        folder: with a file for each.
        digest: of everything that the features depend on; what is kept under another one is made anew.
    """

    folder: Path
    digest: str


def collect_voxels(
    embedder: VolumeEmbedder,
    cases: Sequence[Case],
    *,
    task: SegmentationTask,
    preprocessing: Mapping[str, Any],
    count: int = 256,
    seed: int = 0,
    keep: Kept | None = None,
    name: str = "features",
) -> list[Voxels]:
    """Encode labelled cases and return their features at some voxels.

    Args:
        embedder: with the encoder and its chosen maps.
        cases: with ``image`` and ``label``.
        task: whose classes these are.
        preprocessing: arguments of ``volume_preprocessing``.
        count: voxels of each kind and case.
        seed: of the draw; the same for every encoder draws the same voxels.
        keep: where finished cases are kept.
        name: to show.

    Raises:
        DataError: naming the file, if a case cannot be used.
    """
    chain = volume_preprocessing(["image", "label"], **preprocessing)
    found = []
    lost: dict[str, Mapping[int, int]] = {}
    near: dict[str, float] = {}
    for number, case in enumerate(progress_bar(cases, desc=name, unit="case", leave=False)):
        kept = output_file(keep.folder, case_name(case), ".npz") if keep else None
        before = _read_voxels(kept, case_name(case), keep.digest) if keep and kept else None
        if before is not None:
            found.append(before)
            continue
        data = chain({"image": case["image"], "label": case["label"]})
        labels = task.class_map(data["label"].as_tensor()[0].numpy())
        lost[case_name(case)] = data["label"].meta[OUTSIDE]
        near[images_of(case)[0]] = data["image"].meta["nearly_zero"]
        points, values, weights = draw_voxels(labels, task, count=count, rng=np.random.default_rng([seed, number]))
        try:
            features = embedder.at(data["image"], points)
        except DataError as error:
            raise DataError(f"{images_of(case)[0]}: {error}") from error
        one = Voxels(case_name(case), features.astype(np.float16).astype(np.float32), values, weights)
        found.append(one)
        if keep and kept:
            _write_voxels(one, kept, keep.digest)
    tell_outside(lost, task)
    tell_nearly_zero(near, total=len(near))
    return found


def _write_voxels(voxels: Voxels, path: Path, digest: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "wb") as stream:
            np.savez(
                stream,
                features=voxels.features.astype(np.float16),
                labels=voxels.labels,
                weights=voxels.weights,
                digest=np.array(digest),
            )

    replace_file(path, write)


def _read_voxels(path: Path, case: str, digest: str) -> Voxels | None:
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content["digest"]) != digest:
                return None
            return Voxels(case, content["features"].astype(np.float32), content["labels"], content["weights"])
    except Exception:  # missing, cut or of something else: it is made anew
        return None


def probe_voxels(
    voxels: Sequence[Voxels],
    task: SegmentationTask,
    *,
    folds: int = 5,
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    name: str = "probe",
) -> VoxelProbe:
    """Fit and judge the probe, cases left out in turn.

    Args:
        voxels: of every case.
        task: whose classes these are.
        folds: wanted; fewer where there are fewer cases or groups.
        groups: what each case belongs to, such as the patient; never torn apart.
        resamples: of the bootstrap.
        seed: of the folds and the bootstrap.
        name: to show.

    Raises:
        DataError: if there are fewer than two cases or groups, or a fold whose training cases hold no two classes.
        SettingsError: if fewer than two folds are asked for.
    """
    held = [set(np.unique(one.labels[one.weights > 0]).tolist()) for one in voxels]
    units = np.array([one.case for one in voxels] if groups is None else list(groups))
    parts = _split(held, units, task, folds=folds, seed=seed, grouped=groups is not None)
    notes = []
    if (count := len(set(units.tolist()))) < FEW_CASES:
        notes.append(f"{count} cases: fewer than {FEW_CASES} cannot show a difference beyond chance")
    scores = np.full((len(voxels), len(task.names)), np.nan)
    fold = np.zeros(len(voxels), dtype=int)
    chosen: list[float] = []
    for number, (train, test) in enumerate(progress_bar(parts, desc=name, unit="fold", leave=False)):
        model, strength = _fit([voxels[index] for index in train], units[train], task)
        chosen.append(strength)
        for index in test:
            fold[index] = number
            scores[index] = _judge(model, voxels[index], task)
    lacking = [name for name, column in zip(task.names, scores.T, strict=True) if np.isnan(column).all()]
    if lacking:
        notes.append(f"no case holds {', '.join(lacking)}: left out of the mean")
    interval = score_interval(scores, groups=None if groups is None else units.tolist(), resamples=resamples, seed=seed)
    cases = [one.case for one in voxels]
    return VoxelProbe(cases, task.names, scores, mean_score(scores), interval, fold.tolist(), chosen, notes)


def check_classes(
    cases: Sequence[Case], task: SegmentationTask, *, group: str | None = None, folds: int = 5, seed: int = 0
) -> None:
    """Look at the label maps and refuse what no probe could be fitted on, before any encoder is asked.

    Args:
        cases: with ``label``.
        task: whose classes these are.
        group: key of the cases that is never torn apart.
        folds: of the cross-validation over cases.
        seed: of the folds.

    Raises:
        DataError: as :func:`probe_voxels` does.
    """
    held = []
    for case in cases:
        file = str(case["label"])
        values = task.class_map(whole_numbers(read_image(file)[0], file))
        values = values[values < len(task.labels)]
        held.append({int(values.min()), int(values.max())} if values.size else set())  # enough to tell one from several
    units = np.array([str(case[group]) for case in cases] if group else [case_name(case) for case in cases])
    _split(held, units, task, folds=folds, seed=seed, grouped=group is not None)


def _split(
    held: Sequence[set[int]], units: np.ndarray, task: SegmentationTask, *, folds: int, seed: int, grouped: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the cases to fit on and to judge in every fold, if there is something to tell apart in all of them.

    Args:
        held: classes of each case.
        units: what each case belongs to; never torn apart.
        task: whose classes these are.
        folds: wanted; fewer where there are fewer units.
        seed: of the draw.
        grouped: whether units are groups of cases.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise SettingsError(f"folds is {folds!r}; at least 2 are needed")
    count = len(set(units.tolist()))
    if count < 2:
        what = "group of labelled cases" if grouped else "labelled case"
        raise DataError(
            f"there is {count} {what}, and what is fitted on it cannot be judged on it; give at least 2, better "
            f"{FEW_CASES} or more"
        )
    holders = [index for index, values in enumerate(held) if values - {0}]
    if not holders:
        raise DataError("no label map marks any class; there is nothing to tell apart")
    splits = min(folds, count)
    splitter = GroupKFold(n_splits=splits, shuffle=True, random_state=seed)
    parts = list(splitter.split(np.zeros(len(held)), groups=units))
    for train, _ in parts:
        found = set().union(*(held[index] for index in train))
        if not found - {0}:
            more = f", or more --folds than {splits}" if len(set(units[holders].tolist())) > 1 else ""
            raise DataError(
                f"only {len(holders)} of {len(held)} cases hold any class, and the training cases of a fold hold none; "
                f"give more cases that hold one{more}"
            )
        if len(found) < 2:
            only = task.labels[found.pop()]
            raise DataError(
                f"the training cases of a fold hold nothing but {only}; give more cases that hold something else too"
            )
    return parts


def _fit(voxels: Sequence[Voxels], units: np.ndarray, task: SegmentationTask) -> tuple[Any, float]:
    """Choose the regularisation within these cases, and fit on them; standardisation included."""
    values = range(len(task.labels))
    quota = max(8, _ROWS // (len(voxels) * len(task.labels)))  # of each class and case
    rows = [np.concatenate([_first(np.flatnonzero(one.labels == value), quota) for value in values]) for one in voxels]
    x = np.concatenate([one.features[chosen] for one, chosen in zip(voxels, rows, strict=True)])
    y = np.concatenate([one.labels[chosen] for one, chosen in zip(voxels, rows, strict=True)])
    member = np.repeat(units, [len(chosen) for chosen in rows])
    model = Pipeline(
        [("scale", StandardScaler()), ("probe", LogisticRegression(class_weight="balanced", max_iter=300, tol=1e-3))]
    )
    splits = min(3, len(set(units.tolist())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        parts = list(GroupKFold(n_splits=splits).split(x, y, member)) if splits > 1 else []
        parts = [(train, test) for train, test in parts if len(np.unique(y[train])) > 1]
        if not parts:
            return model.set_params(probe__C=STRENGTHS[0]).fit(x, y), STRENGTHS[0]
        search = GridSearchCV(
            model, {"probe__C": list(STRENGTHS)}, cv=parts, scoring=_likelihood, error_score="raise"
        ).fit(x, y)
    return search.best_estimator_, float(search.best_params_["probe__C"])


def _first(rows: np.ndarray, quota: int) -> np.ndarray:
    """Return some rows, evenly spread over what comes in the order of drawing: near and far background alike."""
    return rows[np.linspace(0, len(rows) - 1, min(quota, len(rows))).round().astype(int)]


def _likelihood(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean over classes of the logarithm of the probability that a voxel's own class gets."""
    likely = np.log(np.clip(_probabilities(model, x, int(max(y.max(), model.classes_.max())) + 1), 1e-6, 1))
    own = likely[np.arange(len(y)), y]
    return float(np.mean([own[y == value].mean() for value in np.unique(y)]))


def _probabilities(model: Any, x: np.ndarray, count: int) -> np.ndarray:
    """Return probabilities ``(P, count)`` of classes; 0 of those that the training cases do not hold."""
    found = np.zeros((len(x), count))
    found[:, model.classes_] = model.predict_proba(x)
    return found


def _judge(model: Any, voxels: Voxels, task: SegmentationTask) -> np.ndarray:
    """Return the average precision of every class in one case, NaN of those that it does not hold."""
    likely = _probabilities(model, voxels.features, len(task.labels))
    found = []
    for values in task.members:
        truth = np.isin(voxels.labels, values)
        score = likely[:, list(values)].sum(1)
        known = truth.any()
        found.append(average_precision_score(truth, score, sample_weight=voxels.weights) if known else np.nan)
    return np.array(found)


def mean_score(scores: np.ndarray) -> float:
    """Return the mean over classes of the mean over cases of ``(cases, classes)``; NaN is left out.

    Example:
        >>> mean_score(np.array([[1.0, 0.5], [0.0, np.nan]]))
        0.5
    """
    return float(known_mean(known_mean(scores, axis=0)))


def score_interval(
    scores: np.ndarray, *, groups: Sequence[str] | None = None, resamples: int = 2000, seed: int = 0
) -> list[float] | None:
    """Return the 95 % interval of :func:`mean_score` of a bootstrap over cases, or over groups."""
    found = bootstrap_interval(mean_score, scores, groups=groups, resamples=resamples, seed=seed)
    return None if found is None or np.isnan(found).any() else [float(bound) for bound in found]


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return how much better one is than another in the same cases, with the 95 % interval of a paired bootstrap.

    Args:
        first: scores ``(cases, classes)``.
        second: of the same cases and classes.
        groups: what each case belongs to.
        resamples: of the bootstrap.
        seed: of it.

    Returns:
        ``estimate``, ``interval`` and ``units``, how many cases or groups were drawn from.

    Example:
        >>> a = np.linspace(0.5, 0.9, 8)[:, None]
        >>> found = paired_difference(a + 0.05, a)
        >>> round(found["estimate"], 3), [round(bound, 3) for bound in found["interval"]], found["units"]
        (0.05, [0.05, 0.05], 8)
    """
    both = ~np.isnan(first) & ~np.isnan(second)
    difference = np.where(both, first - second, np.nan)
    kept = both.any(1)
    members = None if groups is None else [group for group, keep in zip(groups, kept, strict=True) if keep]
    difference = difference[kept]
    return {
        "estimate": mean_score(difference),
        "interval": score_interval(difference, groups=members, resamples=resamples, seed=seed),
        "units": len(difference) if members is None else len(set(members)),
    }


@dataclass(frozen=True)
class Rules:
    """How encoders are probed.

    Attributes:
        group: key of the cases that is never torn apart.
        folds: of the cross-validation over cases.
        repeats: of it, where whole cases are told.
        count: voxels of each kind and case.
        resamples: of the bootstrap.
        seed: of voxels, folds and bootstrap.
    """

    group: str | None = None
    folds: int = 5
    repeats: int = 3
    count: int = 256
    resamples: int = 2000
    seed: int = 0


def probe_encoder(
    encoder: Encoder,
    cases: Sequence[Case],
    *,
    task: SegmentationTask,
    folder: Path,
    rules: Rules | None = None,
    name: str | None = None,
    tell: Callable[[str], None] = tqdm.write,
) -> dict[str, Any]:
    """Probe one encoder, and leave the result in ``folder/probe.json``; what is there already is kept.

    Args:
        encoder: which.
        cases: labelled.
        task: whose classes these are.
        folder: of this encoder.
        rules: how it is probed.
        name: to show.
        tell: what to do with a sentence.

    Returns:
        what ``probe.json`` holds.
    """
    shown, rules = name or encoder.bundle, rules or Rules()
    settings = encoder.resolved()
    groups = [str(case[rules.group]) for case in cases] if rules.group else None
    asked = {
        "bundle": encoder.bundle,
        "weights_sha256": None if encoder.weights is None else sha256(encoder.weights),
        "seed": encoder.seed if encoder.weights is None else None,
        "settings": settings,
        "cases": [[str(file), *stamp_of(file)] for case in cases for file in (*images_of(case), str(case["label"]))],
        "groups": groups,
        "task": [task.plain_labels, task.regions, task.ignore_label],
        "voxels": rules.count,
        "folds": rules.folds,
        "resamples": rules.resamples,
        "draw": rules.seed,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    file = folder / "probe.json"
    if file.is_file():
        found = read_record(file)
        if found.get("digest") == digest:
            tell(f"{shown}: kept, probed before")
            return found
    embedder, preprocessing = encoder.load(folder)
    voxels = collect_voxels(
        embedder,
        cases,
        task=task,
        preprocessing=preprocessing,
        count=rules.count,
        seed=rules.seed,
        keep=Kept(folder / "voxels", digest),
        name=f"{shown}: encoding",
    )
    how = {"folds": rules.folds, "resamples": rules.resamples, "seed": rules.seed}
    result = probe_voxels(voxels, task, groups=groups, name=f"{shown}: probing", **how)
    content = {
        "digest": digest,
        "bundle": encoder.bundle,
        "weights": encoder.weights,
        "settings": {**settings, **{key: value for key, value in preprocessing.items() if key != "channels"}},
        "features": int(voxels[0].features.shape[1]),
        **result.as_plain(),
    }
    write_record(content, file)
    shutil.rmtree(folder / "voxels", ignore_errors=True)
    return content


def probe_cases(
    encoder: Encoder,
    cases: Sequence[Case],
    *,
    target: str,
    task: str,
    folder: Path,
    rules: Rules,
) -> ProbeResult:
    """Probe what one encoder tells of whole cases, as tools/probe.py does; embeddings that are there already are kept.

    Args:
        encoder: which.
        cases: with ``image`` and the columns ``target`` and ``group``.
        target: column to tell.
        task: classification or regression.
        folder: of this encoder.
        rules: how it is probed.
    """
    group = rules.group
    with logged(folder / "log.txt"):
        parser = encoder.parser(folder / "features", overwrite=False)
        torch.manual_seed(encoder.seed)
        embeddings = FeatureFolder(
            cases,
            output_dir=str(folder / "features"),
            pretrained=encoder.weights or "",
            from_scratch=encoder.weights is None,
            settings=parser.get_parsed_content("feature_settings"),
        )
        embedder, preprocessing = encoder.load(folder, stages=parser.get_parsed_content("stages"))
        embedder.pooling = str(parser.get_parsed_content("pooling")).split("+")
        workers = parser.get_parsed_content("num_workers")
        extract_features(
            embeddings,
            embedder=embedder,
            preprocessing=volume_preprocessing("image", **preprocessing),
            channels=preprocessing["channels"],
            num_workers=int(workers),
        )
    names, values = read_features(folder / "features")
    table = folder / "targets.csv"
    columns = [target, *([group] if group else [])]
    write_table(table, ["case", *columns], ([case_name(case), *map(case.get, columns)] for case in cases))
    wanted = read_target(table, names, target=target, group=group, task=task)
    how = {name: getattr(rules, name) for name in ("folds", "repeats", "resamples", "seed")}
    return probe_features(values, wanted, **how)


def probe_mean(target: Target, rules: Rules) -> ProbeResult:
    """Tell of every case the mean of the cases to train on, in the folds of the probes: what features of zero tell.

    Args:
        target: of a probe, a number.
        rules: how encoders are probed.
    """
    how = {name: getattr(rules, name) for name in ("folds", "repeats", "resamples", "seed")}
    return probe_features(np.zeros((int(target.rows.max()) + 1, 1)), target, **how)
