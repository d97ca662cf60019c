# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Embed the cases of a list: load them, encode them, keep or yield what is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...data.cases import Case, case_name, images_of
from ...data.checking.checks import check_case, explain, tell_nearly_zero
from ...data.identity import identity_of
from ...data.problems import settle
from ...errors import DataError, SettingsError
from ...terminal import progress_bar
from ...weights.made import data_made_with, same
from ...weights.receipt import CAVEAT
from ...weights.transfer import fine_tuning_network
from .embedder import VolumeEmbedder
from .folder import FROZEN_CAVEAT, TABLE, FeatureFolder

__all__ = ["embed_files", "extract_features", "frozen_encoder"]

_FEW_POSITIONS = 27  # of a map; over fewer, an instance norm leaves next to nothing to average


def frozen_encoder(
    network: nn.Module,
    *,
    pretrained: str,
    settings: Mapping[str, Any],
    from_scratch: bool = False,
    receipt_file: str | None = None,
    override_input: bool = False,
) -> nn.Module:
    """Return ``network`` with the whole pre-trained encoder in it, or as it is for a control; print the receipt.

    Args:
        network: to load into; needs no decoder.
        pretrained: flat state dict of a backbone.
        settings: of this run, compared with the JSON beside ``pretrained``.
        from_scratch: load nothing.
        receipt_file: JSON to write.
        override_input: take another spacing or other axes than in pre-training.

    Raises:
        WeightsError: if the file is missing, damaged or of another network.
        SettingsError: if it was made at another spacing or with other axes, and nobody insists.
    """
    if from_scratch:
        tqdm.write("a random encoder, as a control: no weights loaded")
        return network
    made = data_made_with(pretrained)
    others = [name for name in made if name in settings and not same(made[name], settings[name])]
    if others and not override_input:
        name = others[0]
        raise SettingsError(
            f"{pretrained} was made with {name} {made[name]}, and here it is {settings[name]}; a frozen encoder knows "
            f"nothing else: leave --{name} out, or insist with --override_input true"
        )
    return fine_tuning_network(network, pretrained=pretrained, settings=settings, receipt_file=receipt_file)


@dataclass
class _Item:
    """One case as the loader hands it over: its volume, or why there is none."""

    case: Case
    image: Any = None
    identity: list[dict[str, Any]] = field(default_factory=list)
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
            identity = identity_of(case)
            return _Item(case, self.preprocessing({"image": case["image"]})["image"], identity)
        except DataError as error:
            return _Item(case, problem=error)
        except (OSError, RuntimeError, ValueError) as error:
            chain: BaseException | None = error
            while chain is not None and not isinstance(chain, (DataError, SettingsError)):
                chain = chain.__cause__ or chain.__context__
            if isinstance(chain, SettingsError):  # the same for every case
                raise chain from error
            return _Item(case, problem=chain or explain(images_of(case)[0], error))


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
    near: dict[str, float] = {}
    for item in progress_bar(
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
            near[images_of(item.case)[0]] = getattr(item.image, "meta", {}).get("nearly_zero", 0.0)
            found = embedder(item.image)
            folder.write(item.case, found, images=item.identity)
            small += [name] if found.positions < _FEW_POSITIONS else []
        except DataError as error:
            file = images_of(item.case)[0]
            problems[name] = error if file in str(error) else DataError(f"{file}: {error}")
            if strict:
                raise problems[name] from error
    settle(list(problems.values()), folder.kept + len(folder.pending) - len(problems), strict=False)
    tell_nearly_zero(near, total=len(folder.pending))
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
