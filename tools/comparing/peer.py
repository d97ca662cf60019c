# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What nnU-Net does in the comparison: run by the Python of its own environment, with nothing of this project.

python peer.py train JOB.json
python peer.py predict JOB.json

The class that trains is nnU-Net's own. Told are how long, from which seed and how fast it learns, and its iterations
are timed; it keeps its name, so that nnU-Net builds the network again when it predicts.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any


def timed(base: Any) -> Any:
    """Return a trainer with the processor seconds of the training iterations of each epoch, ``processor_seconds``."""

    class Timed(base):  # type: ignore[misc]
        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            self.began = time.process_time()

        def on_train_epoch_end(self, outputs: Any) -> None:
            self.processor_seconds = [*getattr(self, "processor_seconds", ()), time.process_time() - self.began]
            super().on_train_epoch_end(outputs)

    Timed.__name__ = base.__name__
    return Timed


def train(job: dict[str, Any]) -> None:
    """Train on all cases, as ``nnUNetv2_train DATASET 3d_fullres all -tr TRAINER`` does, without its validation."""
    import numpy as np
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    random.seed(job["seed"])
    np.random.seed(job["seed"])  # noqa: NPY002 (which nnU-Net draws from)
    torch.manual_seed(job["seed"])
    told = (job["dataset"], job["configuration"], "all", job["trainer"], job["plans"])
    trainer = get_trainer_from_args(*told, device=torch.device("cpu"))
    trainer.__class__ = timed(type(trainer))
    trainer.num_epochs, trainer.num_iterations_per_epoch = job["epochs"], job["iterations"]
    trainer.num_val_iterations_per_epoch = 1  # it cannot do without
    if job["lr"] is not None:
        trainer.initial_lr = job["lr"]
    trainer.initialize()
    if job["momentum"] is not None:
        for group in trainer.optimizer.param_groups:
            group["momentum"] = job["momentum"]
    trainer.run_training()
    parameters = sum(weight.numel() for weight in trainer.network.parameters())
    report = {"processor_seconds": trainer.processor_seconds, "model": trainer.output_folder_base}
    Path(job["report"]).write_text(json.dumps(report | {"parameters": parameters}), "utf-8")


def predict(job: dict[str, Any]) -> None:
    """Predict a folder of images, as ``nnUNetv2_predict -f all`` does, ``--disable_tta`` unless mirrored."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=job["mirror"], device=torch.device("cpu"), allow_tqdm=False)
    Path(job["output"]).mkdir()
    predictor.initialize_from_trained_model_folder(job["model"], use_folds=("all",))
    predictor.predict_from_files_sequential(job["images"], job["output"])


def main(what: str, job: dict[str, Any]) -> None:
    """Do a job on one thread."""
    import torch

    torch.set_num_threads(1)
    {"train": train, "predict": predict}[what](job)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8")))
