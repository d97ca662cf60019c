# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Exported bundles with narrow networks, written once, and their code in this process, one bundle's at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from common.bundles import read_config
from common.files import sha256, write_json
from common.weights import write_checkpoint
from tools.exporting.distribution import Carried, write_bundle

from ..conftest import NETWORK, ROOT, small_settings

collect_ignore = ["torchvision_standin"]  # a package of another environment
PATCH = 16  # sides of the patches of these bundles, in voxels


def narrow_settings(bundle: str) -> dict[str, Any]:
    """Return the settings with which a bundle is exported for tests."""
    names = [name.removeprefix("--") for name in NETWORK[bundle][::2]]
    sizes = dict(zip(names, map(json.loads, NETWORK[bundle][1::2]), strict=True))
    blocks = {name: value for name, value in small_settings(bundle).items() if name == "block_size"}
    return sizes | blocks | {"patch_size": [PATCH] * 3, "num_workers": 0}


def write_encoder(bundle: str, path: Path, settings: dict[str, Any]) -> Path:
    """Write the backbone that a bundle's own pre-training would begin with, as pre-training writes it."""
    parser = ConfigParser(read_config(ROOT / "bundles" / bundle / "configs" / "pretrain.yaml"))
    parser.update(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        write_checkpoint(parser.get_parsed_content("backbone").state_dict(), path)
    about = {"settings": {"bundle": bundle, "spacing_mm": 1.0}, "licence": "yours: trained on your data"}
    write_json(about | {"sha256": sha256(path)}, path.with_suffix(".json"))
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of an exported bundle, not to be written to."""
    folder = tmp_path_factory.mktemp("exported")

    def export(bundle: str) -> Path:
        target = folder / bundle
        if not target.exists():
            encoder = write_encoder(bundle, folder / f"{bundle}_encoder.pt", small_settings(bundle))
            write_bundle(bundle, target, settings=narrow_settings(bundle), carried=Carried(encoder=encoder))
        return target

    return export


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]


@contextmanager
def code_of(folder: Path) -> Iterator[Path]:
    """Let this process find the package ``scripts`` of one bundle, as PYTHONPATH does."""
    _forget()
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        _forget()
