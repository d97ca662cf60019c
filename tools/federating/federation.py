# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pre-train or fine-tune over several sites with NVFLARE, whose scans stay where they are; only weights travel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from common.errors import DataError, SettingsError
from common.files import read_content
from common.literals import as_data
from common.settings import meant_values, unknown_settings
from common.weights import write_checkpoint

from ..commanding.ending import end
from .settings import Federated

__all__ = ["federated"]

WORKFLOWS = {"pretrain": "method", "train": "local_network"}  # and what of their configs is averaged
CLIENT, START = "federated_client.py", "start.pt"


def federated(settings: Federated) -> None:
    """Run or write a federation."""
    try:
        from nvflare.recipe import SimEnv
    except ImportError as error:
        raise SettingsError(f"{error}; a federation needs NVFLARE: pip install nvflare==2.9.0") from error
    here, results, rounds = _path(settings.bundle), _path(settings.output), settings.rounds
    config = _config(here, settings)
    used = [str(results / site) for site in settings.sites if (results / site / "models").exists()]
    if used and not settings.job:
        raise SettingsError(f"{', '.join(used)} hold another run already; give this one another --output")
    given = _texts(meant_values(settings.settings)) | {"epochs": rounds * settings.local_epochs, "resume": "rounds"}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        _write_start(here, config | given, WORKFLOWS[settings.workflow])
        recipe = _recipe(settings, given)
        if settings.job is not None:
            target = _path(settings.job)
            recipe.export(str(target))
            job = target / recipe.name
            end(str(job), following=f"nvflare job submit -j {shlex.quote(str(job))}")
            return
        place = {"workspace_root": str(results / "nvflare"), "log_config": "concise"}
        logs = results / "nvflare" / recipe.name
        try:
            devices = ",".join(settings.gpus) or None
            recipe.execute(SimEnv(clients=list(settings.sites), gpu_config=devices, **place))
        except RuntimeError as error:
            told = "; ".join(f"{site}: {line}" for site in settings.sites for line in _errors(logs / site / "log.txt"))
            raise SettingsError(f"{told or error}; the logs are in {logs}") from error
    _report(results, logs / "server" / "simulate_job", rounds)


def _texts(given: dict[str, Any]) -> dict[str, Any]:
    """Return what a config must hold for settings with a ``#``, of which MONAI would make ``::``."""
    plain = {name: value for name, value in given.items() if "#" in str(value) and str(value)[0] not in "$@%"}
    return given | {name: as_data(value) for name, value in plain.items()}


def _config(bundle: Path, settings: Federated) -> dict[str, Any]:
    """Return the config of the workflow.

    Raises:
        DataError: if the folder has none.
        SettingsError: if it has no such settings, or they cannot be averaged.
    """
    file = bundle / "configs" / f"{settings.workflow}.json"
    if not file.is_file():
        raise DataError(f"there is no {file}; give the folder of a bundle that tools/export_bundle.py wrote")
    config: dict[str, Any] = read_content(file)
    if told := unknown_settings(settings.settings, config):
        raise SettingsError(told)
    if (config | settings.settings).get("tuning") == "lora":
        raise SettingsError("adapters of --tuning lora are not averaged; use full or norm")
    return config


def _recipe(settings: Federated, given: dict[str, Any]) -> Any:
    """Return NVFLARE's recipe of the federation, with what every site is told, in the working directory."""
    from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import add_final_global_evaluation, set_per_site_config

    here = _path(settings.bundle)
    told: dict[str, Any] = {name: getattr(settings, name) for name in ("workflow", "rounds", "local_epochs")}
    told["settings"] = given
    if settings.job:
        told |= {"bundle": settings.site_bundle, "output": settings.output}
    else:
        told |= {"bundle": str(here), "output": str(_path(settings.output))}
    shutil.copyfile(Path(__file__).with_name(CLIENT), CLIENT)
    recipe = FedAvgRecipe(
        name=f"{here.name}_{settings.workflow}",
        min_clients=len(settings.sites),
        num_rounds=settings.rounds,
        train_script=CLIENT,
        model_persistor=PTFileModelPersistor(source_ckpt_file_full_name=START),
        key_metric="none",  # the last model is the result, not the one that was best at some site
    )
    set_per_site_config(recipe, {site: {} for site in settings.sites})
    recipe.add_server_file(START)
    for site, folder in settings.sites.items():
        data = folder if settings.job else str(_path(folder))
        Path(f"{site}.json").write_text(json.dumps(told | {"data": data}), "utf-8")
        recipe.add_client_file(f"{site}.json", clients=[site])
    add_final_global_evaluation(recipe)
    return recipe


def _path(name: str) -> Path:
    return Path(os.path.expandvars(name)).expanduser().absolute()


def _write_start(bundle: Path, config: dict[str, Any], network: str) -> None:
    """Write the weights that the first round starts with: those with which a plain run of this bundle would."""
    config["bundle_root"] = as_data(str(bundle))
    if network == "local_network":  # without what it compares with the data, which are elsewhere
        config[network] |= {"settings": {}, "receipt_file": None}
    sys.path.insert(0, str(bundle))
    import_module("scripts.errors").end_in_a_sentence()  # the errors of the bundle's own code too
    torch.manual_seed(config["seed"])
    write_checkpoint(ConfigParser(config).get_parsed_content(network).state_dict(), START)


def _errors(log: Path) -> list[str]:
    """Return the sentence that ended a site's part, if one did."""
    text = log.read_text("utf-8") if log.is_file() else ""
    return re.findall(r"^scripts\.errors\.\w+: (.*)", text, re.MULTILINE)[:1]


def _report(results: Path, server: Path, rounds: int) -> None:
    """Print what the rounds led to at the sites, and where the models are."""
    scores: dict[int, dict[str, dict[str, float]]] = {}
    for line in (server / "metrics" / "round_metrics.jsonl").read_text("utf-8").splitlines():
        told = json.loads(line)  # each site scores what a round begins with
        scores[told["round"]] = {
            site["name"]: {one["name"]: one["value"] for one in site["metrics"]} for site in told["sites"]
        }
    final = json.loads((server / "cross_site_val" / "cross_val_results.json").read_text("utf-8"))
    scores[rounds] = {site: next(iter(models.values())) for site, models in final.items()}
    for number, sites in scores.items():
        shown = (
            f"{site} " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            for site, values in sorted(sites.items())
        )
        print(f"after {number} rounds: {'; '.join(shown)}")
    print("the model is the same at every site")
    end(results / sorted(final)[0] / "models", look=results / sorted(final)[0])
