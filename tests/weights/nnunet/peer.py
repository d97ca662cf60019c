# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What nnU-Net makes of the samples: run by the Python of its own environment, with nothing of this project.

python peer.py FOLDER                     # all that is to do there
python peer.py MODEL IMAGES OUTPUT        # predict one folder; what is mirrored, the model says
"""

import functools
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("nnunetv2", "dynamic-network-architectures", "timm", "torch")


def features(folder: Path) -> list[Any]:
    """Return the features of an exported encoder, in a network that was filled by nnU-Net's own loader."""
    import numpy as np
    import torch
    from dynamic_network_architectures.architectures.primus import Primus
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plan = json.loads((folder / "adaptation_plan.json").read_text())["architecture_plans"]
    image = torch.from_numpy(np.load(folder / "image.npy"))
    if plan["arch_class_name"] == "Primus":
        fixed = {"patch_embed_size": (8, 8, 8), "init_values": 0.1, "scale_attn_inner": True}
        network = Primus(input_channels=1, num_classes=1, input_shape=image.shape[2:], **fixed, **plan["arch_kwargs"])
    else:
        path = f"dynamic_network_architectures.architectures.unet.{plan['arch_class_name']}"
        imported = plan["arch_kwargs_requiring_import"]
        network = get_network_from_plans(path, plan["arch_kwargs"], imported, 1, 1, deep_supervision=False)
    load_pretrained_weights(network, str(folder / "checkpoint_final.pth"))
    network.eval()
    with torch.no_grad():
        if plan["arch_class_name"] != "Primus":
            return [stage.numpy() for stage in network.encoder(image)]
        grid = network.down_projection(image)
        tokens, _ = network.eva(grid.flatten(2).transpose(1, 2))
        return [tokens.transpose(1, 2).reshape(grid.shape).numpy()]


def predict(model: Path, images: Path, output: Path, *, single: bool = False) -> None:
    """Predict a folder of images with a folder of models, as nnUNetv2_predict_from_modelfolder does.

    Args:
        model: folder.
        images: folder.
        output: folder to write to.
        single: sum in float32, to tell what its float16 does.
    """
    import torch
    from nnunetv2.inference import predict_from_raw_data as inference

    predictor = inference.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
    output.mkdir(parents=True)
    half, gaussian = torch.half, inference.compute_gaussian
    if single:
        torch.half = torch.float32
        inference.compute_gaussian = functools.partial(gaussian, dtype=torch.float32)
        inference.compute_gaussian.cache_clear = gaussian.cache_clear
    try:
        predictor.predict_from_files_sequential(str(images), str(output))
    finally:
        torch.half, inference.compute_gaussian = half, gaussian


def main(folder: Path) -> None:
    """Write what nnU-Net makes of all that ``todo.json`` in a folder names."""
    import numpy as np

    todo = json.loads((folder / "todo.json").read_text())
    for name in todo["encoders"]:
        np.savez(folder / "encoders" / name / "features.npz", *features(folder / "encoders" / name))
    for name, image in todo["segmentations"].items():
        for sums in ("float16", "float32"):
            output = folder / "theirs" / sums / name
            predict(folder / "nnunet" / name, folder / "images" / image, output, single=sums == "float32")
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in _PACKAGES}
    (folder / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    if sys.argv[2:]:
        predict(*map(Path, sys.argv[1:]))
    else:
        main(Path(sys.argv[1]))
