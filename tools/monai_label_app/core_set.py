# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which scan to label next: the one least like those that are labelled, as the bundle's pre-trained encoder sees them.

Farthest-first traversal (k-center greedy), the core-set selection of Sener and Savarese, arXiv:1708.00489: of the scans
without a label, the one whose embedding is farthest from its nearest labelled one; while none is labelled, the most
central of all. An uncertainty says nothing before a model is trained; this needs no model, only the encoder.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from monai.bundle import ConfigParser

__all__ = ["ScanEmbeddings", "farthest_first"]


def farthest_first(embeddings: Mapping[str, np.ndarray], labelled: Sequence[str]) -> tuple[str, float] | None:
    """Return the scan to label next and its distance, None if all are labelled.

    Args:
        embeddings: of every scan, ``(E,)``.
        labelled: those of them that have a label.

    Returns:
        its name, and its Euclidean distance to the nearest labelled scan; while none is labelled, its mean distance to
        the others. Of equal ones the first by name.

    Example:
        >>> scans = {name: np.array([float(place)]) for name, place in {"a": 0, "b": 1, "c": 2, "d": 9}.items()}
        >>> farthest_first(scans, []), farthest_first(scans, ["b"]), farthest_first(scans, ["b", "d"])
        (('b', 3.3333333333333335), ('d', 8.0), ('a', 1.0))
    """
    names = sorted(name for name in embeddings if name not in set(labelled))
    if not names:
        return None
    known = [name for name in labelled if name in embeddings]
    others = np.stack([embeddings[name] for name in known or names]).astype(np.float64)
    distances = [np.linalg.norm(others - embeddings[name], axis=1) for name in names]
    if known:
        nearest = [float(row.min()) for row in distances]
        best = int(np.argmax(nearest))
        return names[best], nearest[best]
    means = [float(row.sum()) / max(len(names) - 1, 1) for row in distances]
    best = int(np.argmin(means))
    return names[best], means[best]


class ScanEmbeddings:
    """Embeddings of scans by a bundle's features workflow, computed once for each file.

    They are kept in a folder as they are made, under the digests of the encoder, of the workflow's settings and of the
    scan's file, so that neither a renamed nor a changed scan, nor another encoder, gets those of something else.

    Args:
        bundle: folder of an exported bundle with ``models/pretrained_encoder.pt``.
        cache: folder to keep them in.
        device: where to compute; that of the bundle's own config unless given.

    Attributes:
        problems: what is wrong with each scan that cannot be embedded, by its name.
    """

    def __init__(self, bundle: str | Path, cache: str | Path, *, device: str | None = None) -> None:
        self.bundle, self.device = Path(bundle).absolute(), device
        self.encoder = self.bundle / "models" / "pretrained_encoder.pt"
        self.config = self.bundle / "configs" / "features.json"
        self.root = Path(cache)
        self.problems: dict[str, str] = {}
        self._digests: dict[tuple[str, int, int], str] = {}
        self._unusable: dict[str, str] = {}  # by digest, so that they are not read again at each request

    def __call__(self, scans: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Return the embeddings ``(E,)`` of those scans that can be read.

        Args:
            scans: files by their names.

        Raises:
            FileNotFoundError: if the bundle has no pre-trained encoder.
        """
        if not self.encoder.is_file():
            raise FileNotFoundError(f"{self.encoder} is missing; choosing scans by their embeddings needs it")
        made_by = (self._digest(file)[:12] for file in (self.encoder, self.config))
        folder = self.root / "-".join([self.bundle.name, *made_by])
        found: dict[str, np.ndarray] = {}
        missing: dict[str, str] = {}
        digests: dict[str, str] = {}
        self.problems = {}
        for name, file in scans.items():
            try:
                digests[name] = self._digest(Path(file))
            except OSError as error:
                self.problems[name] = f"{file} cannot be read ({error.strerror})"
                continue
            kept = _read(folder / f"{digests[name]}.npy")
            if kept is not None:
                found[name] = kept
            elif digests[name] in self._unusable:
                self.problems[name] = self._unusable[digests[name]]
            else:
                missing[name] = file
        for name, vector in zip(missing, self._embed(list(missing.values()), folder), strict=True):
            if isinstance(vector, np.ndarray):
                found[name] = vector
                _write(vector, folder / f"{digests[name]}.npy")
            else:
                self.problems[name] = self._unusable[digests[name]] = str(vector)
        return found

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._digests:
            with path.open("rb") as stream:
                self._digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._digests[key]

    def _embed(self, files: Sequence[str], folder: Path) -> Iterator[np.ndarray | Exception]:
        """Yield the embedding of each file, or what is wrong with it, by the bundle's own code."""
        if not files:
            return
        for module in [name for name in sys.modules if name == "scripts" or name.startswith("scripts.")]:
            del sys.modules[module]  # of another bundle
        sys.path.insert(0, str(self.bundle))
        try:
            parser = ConfigParser()
            parser.read_config(str(self.config))
            as_data = importlib.import_module("scripts.literals").as_data
            parser["bundle_root"], parser["output_dir"] = as_data(str(self.bundle)), as_data(str(folder))
            if self.device:
                parser["device"] = self.device
            settings = {name: parser.get_parsed_content(name) for name in ("embedder", "preprocessing", "channels")}
            yield from importlib.import_module("scripts.engines").embed_files(list(files), **settings)
        finally:
            sys.path.remove(str(self.bundle))


def _read(path: Path) -> np.ndarray | None:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError):  # not there, or cut short by a full disk
        return None


def _write(vector: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with temporary.open("wb") as stream:
        np.save(stream, vector)
    temporary.replace(path)
