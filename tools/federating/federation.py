# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pre-train or fine-tune over several sites with NVFLARE, whose scans stay where they are; only weights travel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["federated"]

WORKFLOWS = {"pretrain": "method", "train": "local_network"}  # and what of their configs is averaged
CLIENT, START = "federated_client.py", "start.pt"


def federated(
    bundle: str,
    workflow: str,
    sites: str,
    rounds: int = 10,
    local_epochs: int = 1,
    output: str = "federated",
    job: str | None = None,
    site_bundle: str | None = None,
    gpus: Any = None,
    **settings: Any,
) -> None:
    """Run or write a federation.

    Args:
        bundle: folder of an exported bundle, the same version at every site.
        workflow: pretrain or train.
        sites: name and folder of data of each, as NAME=FOLDER with commas between.
        rounds: how often weights are averaged.
        local_epochs: of each site in a round; the schedule runs over rounds x local_epochs.
        output: folder below which every site writes into a folder of its own name.
        job: write a job for NVFLARE into this folder instead of simulating.
        site_bundle: with a job, where the same bundle is at every site.
        gpus: of this machine for the simulated sites, with commas between: "0,1".
        settings: of the config, the same for all sites (--batch_size, --iterations_per_epoch, ...).
    """
    from common.errors import end_in_a_sentence
    from common.settings import meant_values, unknown_settings

    end_in_a_sentence()
    try:
        from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
        from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
        from nvflare.recipe import SimEnv, add_final_global_evaluation, set_per_site_config
    except ImportError as error:
        raise SystemExit(f"Stopped: {error}; a federation needs NVFLARE: pip install nvflare==2.9.0") from error
    here = _path(bundle)
    file = here / "configs" / f"{workflow}.json"
    if workflow not in WORKFLOWS or not file.is_file():
        raise SystemExit(
            f"Stopped: there is no {file}; give the folder of a bundle that tools/export_bundle.py wrote, and "
            f"{' or '.join(WORKFLOWS)}"
        )
    config = json.loads(file.read_text("utf-8"))
    if told := unknown_settings(settings, config):
        raise SystemExit(f"Stopped: {told}")
    if fixed := settings.keys() & {
        "epochs",
        "resume",
        "bundle_root",
        "dataset_dir",
        "output_dir",
        "ckpt_dir",
        "store_dir",
    }:
        raise SystemExit(
            f"Stopped: a federation sets {', '.join(sorted(fixed))} itself, from --rounds, --local_epochs, --sites and "
            "--output"
        )
    if (config | settings).get("tuning") == "lora":
        raise SystemExit("Stopped: adapters of --tuning lora are not averaged; use full or norm")
    if rounds < 1 or local_epochs < 1:
        raise SystemExit(f"Stopped: rounds {rounds} and local_epochs {local_epochs} must be at least 1")
    if job and not site_bundle:
        raise SystemExit("Stopped: a job needs to know where the bundle is at the sites; add --site_bundle FOLDER")
    folders, target, results = _sites(sites), _path(job) if job else None, _path(output)
    paths = {site: str(_path(folder)) for site, folder in folders.items()}
    used = [str(results / site) for site in folders if (results / site / "models").exists()]
    if used and not job:
        raise SystemExit(f"Stopped: {', '.join(used)} hold another run already; give this one another --output")
    settings = meant_values(settings) | {"epochs": rounds * local_epochs, "resume": "rounds"}
    shared = {"workflow": workflow, "rounds": rounds, "local_epochs": local_epochs, "settings": settings}
    shared |= {"bundle": site_bundle, "output": output} if job else {"bundle": str(here), "output": str(results)}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        _write_start(here, config | settings, WORKFLOWS[workflow])
        shutil.copyfile(Path(__file__).with_name(CLIENT), CLIENT)
        recipe = FedAvgRecipe(
            name=f"{here.name}_{workflow}",
            min_clients=len(folders),
            num_rounds=rounds,
            train_script=CLIENT,
            model_persistor=PTFileModelPersistor(source_ckpt_file_full_name=START),
            key_metric="none",  # the last model is the result, not the one that was best at some site
        )
        set_per_site_config(recipe, {site: {} for site in folders})
        recipe.add_server_file(START)
        for site, folder in folders.items():
            Path(f"{site}.json").write_text(json.dumps(shared | {"data": folder if job else paths[site]}), "utf-8")
            recipe.add_client_file(f"{site}.json", clients=[site])
        add_final_global_evaluation(recipe)
        if target is not None:
            recipe.export(str(target))
            print(f"written: {target / recipe.name}; submit it with: nvflare job submit -j {target / recipe.name}")
            return
        devices = ",".join(map(str, gpus)) if isinstance(gpus, (tuple, list)) else gpus and str(gpus)
        place = {"workspace_root": str(results / "nvflare"), "log_config": "concise"}
        logs = results / "nvflare" / recipe.name
        try:
            recipe.execute(SimEnv(clients=list(folders), gpu_config=devices, **place))
        except RuntimeError as error:
            told = "; ".join(f"{site}: {line}" for site in folders for line in _errors(logs / site / "log.txt"))
            raise SystemExit(f"Stopped: {told or error}; the logs are in {logs}") from error
    _report(results, logs / "server" / "simulate_job", rounds)


def _path(name: str) -> Path:
    return Path(os.path.expandvars(name)).expanduser().absolute()


def _sites(given: str) -> dict[str, str]:
    """Return the folder of each site.

    Raises:
        SystemExit: if it is not NAME=FOLDER with commas between.
    """
    pairs = [part.strip().partition("=") for part in given.split(",")]
    found = {name: folder for name, _, folder in pairs}
    if not all(name and folder for name, folder in found.items()) or len(found) < len(pairs):
        raise SystemExit(f"Stopped: sites is {given!r}; name each once, with its folder: --sites A=/data/a,B=/data/b")
    return found


def _write_start(bundle: Path, config: dict[str, Any], network: str) -> None:
    """Write the weights that the first round starts with: those with which a plain run of this bundle would."""
    import torch
    from monai.bundle import ConfigParser

    from common.weights import write_checkpoint

    config["bundle_root"] = str(bundle)
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
    print(f"the federation's model: {results / sorted(final)[0] / 'models'}, the same at every site")
