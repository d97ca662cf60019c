# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The weights of a bundle as they are distributed: a pre-trained encoder, a model, or a network marked as untrained."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from common.bundles import read_config
from common.errors import WeightsError
from common.files import sha256, write_record
from common.networks import mark_untrained
from common.weights import Receipt, differences, read_checkpoint, transfer_weights, write_checkpoint

from .configs import BUNDLES, with_settings

__all__ = ["ENCODER", "MODEL", "copy_trained", "large_files", "write_weights"]

ENCODER, MODEL = "models/pretrained_encoder.pt", "models/model.pt"


def write_weights(
    bundle: str, target: Path, encoder: Path | None, settings: Mapping[str, Any], data: Mapping[str, Any]
) -> Receipt | None:
    """Write the encoder, fitted to the network of the segmentation, and a model to start from; return its receipt.

    Args:
        bundle: of the collection.
        target: folder to write to.
        encoder: pre-trained; None for a random network.
        settings: as in :func:`with_settings`.
        data: as there.

    Raises:
        WeightsError: if the encoder does not fit; nothing is written then.
    """
    config = read_config(BUNDLES / bundle / "configs" / "train.yaml")
    parser = ConfigParser(with_settings(config, "train", settings, data=data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # equal exports are equal to the bit
        network = parser.get_parsed_content("network_def")
    if encoder is None:
        write_checkpoint(mark_untrained(network.state_dict()), target / MODEL)
        return None
    receipt = transfer_weights(network, encoder)
    heads = {"num_heads": parser.get_parsed_content("num_heads")} if "num_heads" in config else {}
    for theirs, ours in differences(receipt.provenance, heads).values():  # no tensor shows it
        raise WeightsError(f"{encoder} was made with num_heads {theirs}, not {ours}; add --num_heads {theirs}")
    if any(key.endswith("position_embedding") for key in receipt.adapted):
        patch = parser.get_parsed_content("patch_size")
        receipt.fitted_to = [patch] * 3 if isinstance(patch, int) else list(patch)
    weights, found = network.state_dict(), read_checkpoint(encoder)
    decoder = {key: value for key, value in found.items() if key.startswith("decoder.")}
    fits = all(key in weights and weights[key].shape == value.shape for key, value in decoder.items())
    kept = {key: value for key, value in weights.items() if key.startswith("encoder.")} | (decoder if fits else {})
    write_checkpoint(kept, target / ENCODER)
    source = str(receipt.provenance.get("source", encoder))
    address = re.search(r"https?://[^\s)]+", source)
    write_record(
        receipt.provenance
        | {
            "source": address[0] if address else Path(source).name,  # a path would tell of the machine
            "sha256": sha256(target / ENCODER),
            "derived_from": {"file": encoder.name, "sha256": receipt.sha256},
            "licence": receipt.licence,
            "citation": receipt.citation,
            "adapted": receipt.adapted,
        }
        | ({"fitted_to": receipt.fitted_to} if receipt.fitted_to else {}),
        (target / ENCODER).with_suffix(".json"),
    )
    write_checkpoint(mark_untrained(weights), target / MODEL)
    return receipt


def copy_trained(model: Path, target: Path) -> None:
    """Take over a fine-tuned model and what inference must know of it."""
    for source, place in ((model, target / MODEL), (model.with_suffix(".json"), (target / MODEL).with_suffix(".json"))):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


def large_files(folder: Path, address: str) -> list[dict[str, str]]:
    """Return the entries of large_files.yml for the weights in a folder, which are fetched from under ``address``."""
    return [
        {
            "path": file.relative_to(folder).as_posix(),
            "url": f"{address.rstrip('/')}/{file.name}",
            "hash_val": sha256(file),
            "hash_type": "sha256",
        }
        for file in sorted((folder / "models").glob("*.pt"))
    ]
