# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What every site of a federation runs, with NVFLARE: rounds of MONAI's own client on a bundle that is at the site.

tools/federated.py puts it into the job, beside <site>.json, which says what is done with which settings, and where
bundle and data are; names of folders may hold environment variables of the site, such as $DATA. In the output folder it
writes what a plain run does, and at the end the federation's model: models/pretrained_encoder.pt or models/model.pt.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import nvflare.client as flare
import torch
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject

__all__ = ["main"]

# of each workflow: the file that the federation's model goes to, and the one whose JSON says what it was made for
FILES = {
    "pretrain": ("pretrained_encoder.pt", "pretrained_encoder.json"),
    "train": ("model.pt", "model_final.json"),
}


def _folder(name: str) -> Path:
    return Path(os.path.expandvars(name)).expanduser().absolute()


def keep(weights: dict[str, Any], metrics: dict[str, float], folder: Path, workflow: str, rounds: int) -> None:
    """Write the federation's model where a plain run writes its own, with a JSON that says so."""
    checkpoints: Any = import_module("scripts.weights.files")  # of the bundle
    files: Any = import_module("scripts.files")
    name, about = FILES[workflow]
    if workflow == "pretrain":  # the rest of a method is thrown away
        weights = {
            key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")
        }
    checkpoints.write_checkpoint({key: torch.as_tensor(value).clone() for key, value in weights.items()}, folder / name)
    facts = files.read_record(folder / about)
    kept = {key: facts[key] for key in ("epoch", "epochs", "settings", "versions") if key in facts}
    made = {"made_by": "a federation of sites with this collection", "rounds": rounds, "at_this_site": metrics}
    made |= {"sha256": files.sha256(folder / name), "licence": "that of the sites: trained on their data"}
    files.write_record(kept | made, (folder / name).with_suffix(".json"))


def main() -> None:
    """Take part until the server ends the job."""
    flare.init()
    site = flare.get_site_name()
    told = json.loads(Path(__file__).with_name(f"{site}.json").read_text("utf-8"))
    workflow, bundle = told["workflow"], str(_folder(told["bundle"]))
    sys.path.insert(0, bundle)
    output = _folder(told["output"]) / site
    places = {"output_dir": output / "output", "ckpt_dir": output / "models", "store_dir": output / "store"}
    places["dataset_dir"] = _folder(told["data"])
    as_data = import_module("scripts.literals").as_data
    settings = told["settings"] | {name: as_data(str(path)) for name, path in places.items()}
    config = f"configs/{workflow}.json"
    algo = MonaiAlgo(
        bundle,
        local_epochs=told["local_epochs"],
        send_weight_diff=False,
        config_train_filename=config,
        config_evaluate_filename=config,
        train_kwargs=dict(settings),
        eval_kwargs=dict(settings),
    )
    algo.initialize(extra={ExtraItems.CLIENT_NAME: site})
    volumes = len(algo.train_workflow.train_dataset_data)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        weights = ExchangeObject(weights=received.params)
        metrics = {name: float(value) for name, value in algo.evaluate(weights).metrics.items()}
        if flare.is_evaluate():  # the end: the server sends what the last round gave
            keep(received.params, metrics, output / "models", workflow, told["rounds"])
            flare.send(flare.FLModel(metrics=metrics))
            continue
        algo.train(weights)
        # what NVFLARE weighs sites by; here it is volumes, since an epoch has as many steps at every site
        share = {"NUM_STEPS_CURRENT_ROUND": volumes}
        flare.send(flare.FLModel(params=algo.get_weights().weights, metrics=metrics, meta=share))
    algo.finalize()


if __name__ == "__main__":
    main()
