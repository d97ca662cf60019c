# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Numbers recorded from the reference implementation, and how a cell of this project is compared with them.

  python -m tests.parity.golden tests/parity/*.json        # one line per recording, exit status 1 if one is missed

A recording holds the names and shapes of a checkpoint, the rule by which its weights and inputs are drawn, and what the
reference computed from them. Here the checkpoint is drawn, read by the importer, and run through the cell's own method
and loss; so a comparison covers names, token order and mathematics at once.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.losses import MaskedMSELoss
from common.methods import mae, models_genesis, simclr, simmim, spark3d, swinunetr, voco, volumefusion
from common.networks import Primus, ResEncUNet, primus_m, resenc_l
from common.weights.published import import_network_weights, load_imported, published_name

__all__ = ["compare", "draw", "read", "synthetic_weights"]

LOSS, OUTPUT, GRADIENT = 1e-4, 1e-3, 1e-2
GRADIENT_OF_HEADS_ON_SINGLE_VOXELS = 5e-2  # swinunetr_resenc_l reads two voxels of a 2x2x2 map behind a norm
HERE = Path(__file__).parent


def read(cell: str) -> dict[str, Any]:
    """Return the recorded numbers of one cell."""
    return json.loads((HERE / f"{cell}.json").read_text())


def draw(salt: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw the input that the numbers were recorded with."""
    rng = np.random.RandomState(zlib.crc32(f"{salt}:{name}".encode()))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def synthetic_weights(golden: dict[str, Any]) -> dict[str, Tensor]:
    """Fill every tensor of the published manifest by the rule that the reference was filled with."""
    weights: dict[str, Tensor] = {}
    manifest = golden["published_manifest"] | golden.get("published_spark_manifest", {})
    seconds = [key for key in manifest if published_name(key)[0] in ("unused", "alias")]
    first = {key: golden["aliases"].get(key, key) for key in manifest}
    for key, (shape, _) in manifest.items():
        if key in seconds:
            weights[key] = torch.zeros(1)  # not read where it is no alias: the importer has to leave it
            continue
        small = golden["small_manifest_differs"].get(key, shape)
        z = draw(golden["salt"], first[key], tuple(small))
        if len(small) >= 2 and not (key.endswith("pos_embed") or "mask_token" in key):
            weights[key] = z / float(np.sqrt(np.prod(small[1:])))
        elif len(small) == 1 and key.endswith("weight"):
            weights[key] = 1 + 0.1 * z
        else:
            weights[key] = 0.1 * z
    shared = {first[key]: value for key, value in weights.items() if key not in seconds}
    return weights | {key: shared[first[key]] for key in seconds if first[key] in shared}


def _hidden(golden: dict[str, Any]) -> Tensor:
    """Return the recorded grid of hidden blocks ``(B, d, h, w)``."""
    recorded = golden["input"]
    if "keep_token_indices" in recorded:  # with the first two axes exchanged
        grid = [side // 8 for side in recorded["spatial"]]
        visible = torch.zeros(recorded["batch"], math.prod(grid), dtype=torch.bool)
        for row, tokens in zip(visible, recorded["keep_token_indices"], strict=True):
            row[tokens] = True
        return ~visible.view(-1, grid[1], grid[0], grid[2]).transpose(1, 2)
    grid = [side // recorded["block_size"] for side in recorded["spatial"]]
    hidden = torch.zeros(recorded["batch"], math.prod(grid), dtype=torch.bool)
    for row, blocks in zip(hidden, recorded["masked_block_indices"], strict=True):
        row[blocks] = True
    return hidden.view(-1, *grid)


def _batch(golden: dict[str, Any]) -> dict[str, Any]:
    """Return the views that the numbers were recorded with."""
    name, salt, recorded = golden["cell"], golden["salt"], golden["input"]
    n, size = recorded["batch"], tuple(recorded["spatial"])
    x = (n, 1, *size)
    if name.startswith(("mae", "simmim", "spark3d")):
        return {"image": draw(salt, "x", x), "hidden": _hidden(golden)}
    if name.startswith("models_genesis"):
        return {"image": draw(salt, "x", x), "target": draw(salt, "target", x)}
    if name.startswith("volumefusion"):
        labels = np.random.RandomState(zlib.crc32(f"{salt}:target".encode())).randint(0, 5, x)
        return {"image": draw(salt, "x", x), "share": torch.from_numpy(labels).long().squeeze(1)}
    if name.startswith("voco"):
        crops = n * (recorded["n_base"] + recorded["n_target"])
        return {
            "crops": draw(salt, "crops", (crops, 1, *size)),
            "overlap": torch.tensor(recorded["overlaps"], dtype=torch.float32),
        }
    if name.startswith("simclr"):
        return {"crops": draw(salt, "crops", (2 * recorded["n_pairs"], 1, *size))}
    return {
        "image": draw(salt, "cutout", (2 * n, 1, *size)),
        "target": draw(salt, "rotated", (2 * n, 1, *size)),
        "rotation": torch.tensor(recorded["rotations"]),
    }


Method = Callable[..., nn.Module]
_METHODS: dict[str, tuple[Method, Callable[[], nn.Module], dict[str, Any]]] = {
    "mae_resenc_l": (mae.UNetMAE, MaskedMSELoss, {}),
    "mae_primus_m": (mae.TransformerMAE, MaskedMSELoss, {}),
    "simmim": (simmim.SimMIM, MaskedMSELoss, {}),
    "spark3d": (spark3d.Spark3D, MaskedMSELoss, {}),
    "models_genesis": (models_genesis.RestorationNetwork, models_genesis.RestorationLoss, {}),
    "volumefusion": (volumefusion.VolumeFusion, volumefusion.FusionLoss, {"out_channels": 5}),
    "voco": (voco.VoCo, voco.VoCoLoss, {"with_decoder": False}),
    "simclr": (simclr.SimCLR, simclr.SimCLRLoss, {"with_decoder": False}),
    "swinunetr": (swinunetr.SwinUNETRPretraining, swinunetr.SwinUNETRLoss, {"with_decoder": False}),
}
_OUTPUTS = {"rotation_logits": "rotation", "contrast": "embedding"}
_TERMS = {
    "prediction_loss": "prediction",
    "regularization_loss": "regularization",
    "reconstruction_loss": "reconstruction",
    "contrast_loss": "contrast",
    "rotation_loss": "rotation",
}


def _expected(golden: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that a correct implementation meets: of the right mask, and of hidden input."""
    expected = golden["expected"]
    suffixes = ("_with_mask_at_true_positions", "_with_hidden_input")
    corrected = {key.removesuffix(end): value for key, value in expected.items() for end in suffixes if end in key}
    return {key: value for key, value in expected.items() if not key.endswith(suffixes)} | corrected


def compare(
    golden: dict[str, Any], *, token_order: str | None = None, gradients: bool = True
) -> dict[str, tuple[float, float]]:
    """Run a cell on what was recorded.

    Args:
        golden: a recording.
        token_order: how to read Primus' tokens; that of the published cell unless given.
        gradients: whether to compare these too, which take most of the time.

    Returns:
        for each recorded number its error, relative as the tolerances are, and the tolerance.
    """
    cell = golden["cell"]
    build, loss_class, settings = _METHODS[cell] if cell in _METHODS else _METHODS[cell.rsplit("_", 2)[0]]
    backbone: Primus | ResEncUNet = (
        resenc_l(**settings)
        if cell.endswith("resenc_l")
        else primus_m(input_size=golden["input"]["spatial"], **settings)
    )
    of_method = {"block_size": golden["input"]["block_size"]} if cell.startswith("spark3d") else {}
    method, loss_function = build(backbone, **of_method), loss_class()
    order = token_order or ("straight" if cell.startswith("simmim") else "swapped")
    grid = [side // 8 for side in golden["input"]["spatial"]]
    load_imported(method, import_network_weights(synthetic_weights(golden), token_order=order, grid=grid))
    batch = _batch(golden)
    with torch.set_grad_enabled(gradients):
        pred = method.eval()(batch)
        loss = loss_function(pred, batch)
    expected = _expected(golden)
    errors = {"loss": (abs(float(loss.detach()) / expected["loss"] - 1), LOSS)}
    for key, name in _TERMS.items():
        if key in expected:
            value = float(loss_function.terms[name])  # type: ignore[index]
            errors[key] = (abs(value / expected[key] - 1), LOSS)
    for key, recorded in expected.items():
        if isinstance(recorded, dict) and "samples" in recorded:
            if key == "embeddings" and "base" in pred:
                output = torch.cat([pred["base"].flatten(0, 1), pred["target"].flatten(0, 1)])
            else:
                output = pred[{"embeddings": "embedding"}.get(key, _OUTPUTS.get(key, key))]
            errors[key] = (_output_error(output, recorded), OUTPUT)
    if not gradients:
        return errors
    loss.backward()
    tolerance = GRADIENT_OF_HEADS_ON_SINGLE_VOXELS if cell == "swinunetr_resenc_l" else GRADIENT
    norms = {name: parameter.grad.norm() for name, parameter in method.named_parameters() if parameter.grad is not None}
    total = float(torch.stack(list(norms.values())).norm())
    errors["grad_norm_total"] = (abs(total / expected["grad_norm_total"] - 1), tolerance)
    for key, recorded in expected["grad_norms"].items():
        # a bias in front of a norm has no true gradient: what is recorded there is rounding, far below the total
        rounding = 1e-5 * expected["grad_norm_total"]
        part, name = published_name(key)
        if part == "alias":
            part, name = published_name(key.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1."))
        name = f"backbone.{name}" if part == "backbone" else name
        if name not in norms and recorded == 0:  # a mask token of a map that hides nothing, which is not built here
            continue
        difference = abs(float(norms[name]) - recorded)
        errors[f"gradient of {key}"] = (max(difference - rounding, 0) / max(recorded, rounding), tolerance)
    return errors


def _output_error(output: Tensor, recorded: dict[str, Any]) -> float:
    flat = output.detach().flatten().numpy()
    if flat.size != recorded["shape_numel"]:
        return math.inf
    samples = flat[np.random.RandomState(7).randint(0, flat.size, 64)]
    figures = np.array([flat.mean(), flat.std(ddof=1), np.abs(flat).max()])
    difference = np.abs(samples - recorded["samples"]).max()
    difference = max(difference, np.abs(figures - [recorded[key] for key in ("mean", "std", "absmax")]).max())
    return float(difference / recorded["absmax"])


def main(files: list[str]) -> bool:
    """Compare recordings and print a line for each; return whether all are met."""
    good = True
    for file in files:
        golden = json.loads(Path(file).read_text())
        errors = compare(golden)
        worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
        error, tolerance = errors[worst]
        met = error <= tolerance
        good &= met
        print(
            f"{golden['cell']:24} {'ok  ' if met else 'MISS'} {len(errors)} numbers, "
            f"largest error {error:.1e} of {tolerance:.0e} allowed ({worst})",
            flush=True,
        )
    return good


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    raise SystemExit(0 if main(sys.argv[1:]) else 1)
