# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the command that trains over several sites."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from common.errors import SettingsError

from ..commanding.settings import From, Reads, RefusalError, Rests, settings

__all__ = ["Federated"]

_OWN = {"epochs", "resume", "bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "store_dir"}


def _sites(value: Any) -> dict[str, str]:
    """Return the folder of each site, as it is written."""
    if isinstance(value, dict):
        return value
    pairs = [part.strip().partition("=") for part in str(value).split(",")]
    found = {name: folder for name, _, folder in pairs}
    if not all(name and folder for name, folder in found.items()) or len(found) < len(pairs):
        raise RefusalError(f"sites is {value!r}; name each once, with its folder: --sites A=/data/a,B=/data/b")
    return found


@settings
class Federated:
    """What ``federated`` is told; folders may hold environment variables, of the sites where a job is written."""

    bundle: str
    """Folder of an exported bundle, the same version at every site."""
    workflow: Literal["pretrain", "train"]
    """What to do."""
    sites: Annotated[dict[str, str], Reads(_sites, "NAME=FOLDER with commas between")]
    """Name and folder of data of each."""
    rounds: Annotated[int, From(1)] = 10
    """How often weights are averaged."""
    local_epochs: Annotated[int, From(1)] = 1
    """Of each site in a round; the schedule runs over rounds x local_epochs."""
    output: str = "federated"
    """Folder below which every site writes into a folder of its own name."""
    job: str | None = None
    """Write a job for NVFLARE into this folder instead of simulating."""
    site_bundle: str | None = None
    """With a job, where the same bundle is at every site."""
    gpus: tuple[str, ...] = ()
    """Of this machine for the simulated sites, with commas between: "0,1"."""
    settings: Rests = field(default_factory=dict)
    """Of the config, the same for all sites (--batch_size, --iterations_per_epoch, ...)."""

    def __post_init__(self) -> None:
        if fixed := self.settings.keys() & _OWN:
            raise SettingsError(
                f"a federation sets {', '.join(sorted(fixed))} itself, from --rounds, --local_epochs, --sites and "
                "--output"
            )
        if self.job and not self.site_bundle:
            raise SettingsError("a job needs to know where the bundle is at the sites; add --site_bundle FOLDER")
