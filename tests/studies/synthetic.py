# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Folders of studies with results that were made up, so that what is true of them is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

ARMS = {
    "mae_resenc_l": {"weights": "mae.pt", "backbone": "resenc_l", "method": "mae"},
    "simclr_resenc_l": {"weights": "simclr.pt", "backbone": "resenc_l", "method": "simclr"},
    "scratch_resenc_l": {"weights": "scratch", "backbone": "resenc_l", "method": "mae"},
    "mae_primus_m": {"weights": "mae_p.pt", "backbone": "primus_m", "method": "mae"},
    "scratch_primus_m": {"weights": "scratch", "backbone": "primus_m", "method": "mae"},
    "frozen_random_resenc_l": {"weights": "frozen_random", "backbone": "resenc_l", "method": ""},
    "plain_cnn": {"weights": "plain", "backbone": "plain", "method": ""},
}


def write_study(
    folder: Path,
    *,
    gains: Mapping[str, float],
    data_sets: Mapping[str, Mapping[str, Any]],
    budgets: Sequence[str] = ("all",),
    folds: int = 2,
    seeds: int = 2,
    cases: int = 24,
    draw: int = 0,
    noise: float = 0.01,
    luck: float = 0.0,
    skip: Callable[[Mapping[str, Any]], str | None] = lambda run: None,
    change: Callable[[Mapping[str, Any], dict[str, Any]], object] = lambda run, result: None,
    pictures: bool = False,
) -> Path:
    """Write a study whose arms differ by ``gains``; ``skip`` says "missing" or "failed" of a run.

    A data set is its card; ``task``, ``classes`` and ``groups`` of it are used here too. Another ``draw`` gives other
    random numbers.
    """
    about: dict[str, Any] = {
        "name": "made up",
        "source": "made_up.yaml",
        "arms": {
            name: {"bundle": f"{arm['method']}_{arm['backbone']}", "schedule": None, "epochs": 3, "spacing": None} | arm
            for name, arm in ARMS.items()
            if name in gains
        },
        "data_sets": {
            name: {"card": dict(card), "labels": ["background", *card.get("classes", ["left", "right"])]}
            for name, card in data_sets.items()
        },
        "budgets": list(budgets),
        "folds": list(range(folds)),
        "seeds": list(range(seeds)),
        "settings": {"epochs": 3},
        "runs": [],
    }
    for place, (data_set, card) in enumerate(data_sets.items()):
        level = np.random.default_rng(place).uniform(0.3, 0.8, (cases, 2))
        truth = np.random.default_rng(100 + place).integers(0, 2, cases)
        for budget in budgets:
            for arm, gain in gains.items():
                for fold in range(folds):
                    for seed in range(seeds):
                        run = {"arm": arm, "data_set": data_set, "budget": budget, "fold": fold, "seed": seed}
                        name = f"{data_set}/{arm}/budget_{budget}/fold_{fold}/seed_{seed}"
                        run |= {"name": name, "cases": 12 if budget == "all" else int(budget)}
                        about["runs"].append(run)
                        outcome = skip(run)
                        if outcome == "missing":
                            continue
                        target = folder / "runs" / name
                        (target / "train").mkdir(parents=True, exist_ok=True)
                        if outcome == "failed":
                            why = {"why": "the disk was full <while> writing | a file", "when": "2026-01-01T00:00:00"}
                            (target / "failed.json").write_text(json.dumps(why))
                            continue
                        rng = np.random.default_rng([draw, place, list(gains).index(arm), fold, seed, len(str(budget))])
                        part = 0.0 if budget == "all" else -0.05
                        own = [i for i in range(cases) if i % folds == fold]
                        extra = gain + part + luck * rng.standard_normal()
                        result = {"run": {**run, "task": card.get("task", "segmentation")}}
                        result |= _result(card, own, level, truth, extra, noise, rng, folder / "data" / data_set)
                        result |= {
                            "seconds": {"training": 60.0, "inference": 5.0, "evaluation": 1.0},
                            "peak_gib": 1.5,
                            "machine": {"device": "cpu", "cpu": "a processor", "torch": "2.0", "when": "today"},
                        }
                        change(run, result)
                        (target / "result.json").write_text(json.dumps(result))
                        (target / "run.json").write_text(json.dumps({**run, "settings": {"epochs": 3, "lr": 0.1}}))
                        history = [
                            {
                                "epoch": e,
                                "train_loss": 1 / (e + 1 + 5 * gain) + 0.02 * seed,
                                "val_dice": 0.5 + gain + e / 10,
                            }
                            for e in range(4)
                        ]
                        (target / "train" / "history.json").write_text(json.dumps(history))
                        receipt = {"source": ARMS[arm]["weights"], "sha256": "ab" * 32, "encoder_share": 1.0}
                        if ARMS[arm]["weights"].endswith(".pt"):
                            (target / "train" / "weights_receipt.json").write_text(json.dumps(receipt))
                        if pictures and "kept" in result:
                            for case in result["kept"].values():
                                _picture(
                                    result["cases"][case], target / "predictions" / f"{case}.nii.gz", int(10 * gain)
                                )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(about))
    return folder


def _result(
    card: Mapping[str, Any],
    own: Sequence[int],
    level: np.ndarray,
    truth: np.ndarray,
    extra: float,
    noise: float,
    rng: np.random.Generator,
    data: Path,
) -> dict[str, Any]:
    groups = card.get("groups", [None])
    if card.get("task") == "classification":
        cases = {}
        for i in own:
            sure = float(1 / (1 + np.exp(-(2 * truth[i] - 1) * (0.2 + 10 * extra) - 6 * (level[i, 0] - 0.55))))
            cases[f"case_{i}"] = {
                "group": groups[i % len(groups)],
                "truth": int(truth[i]),
                "probabilities": [1 - sure, sure],
            }
        return {"cases": cases, "classes": ["healthy", "ill"], "target": "diagnosis"}
    if card.get("task") == "regression":
        cases = {}
        for i in own:
            age = 40 + 60 * level[i, 0]
            told = age + (10 - 100 * extra) * rng.standard_normal()
            cases[f"case_{i}"] = {"group": groups[i % len(groups)], "truth": age, "predicted": [told]}
        return {"cases": cases, "classes": ["age"], "target": "age", "units": "years"}
    cases = {}
    for i in own:
        scores = {}
        for place, name in enumerate(card.get("classes", ["left", "right"])):
            dice = float(np.clip(level[i, place] + extra + noise * rng.standard_normal(), 0, 1))
            scores[name] = {"dice": dice, "nsd": dice * 0.9, "hd95_mm": 3.0}
        cases[f"case_{i}"] = {
            "group": groups[i % len(groups)],
            "image": [str(data / "images" / f"case_{i}.nii.gz")],
            "label": str(data / "labels" / f"case_{i}.nii.gz"),
            "scores": scores,
        }
    order = sorted(cases, key=lambda case: np.mean([s["dice"] for s in cases[case]["scores"].values()]))
    kept = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    return {"cases": cases, "kept": kept, "tolerance_mm": 1.0}


def _picture(case: Mapping[str, Any], prediction: Path, shift: int) -> None:
    """Write a scan with two balls, its label, and a prediction that is off by some voxels."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (28, 32, 24)), indexing="ij"))
    balls = [((grid - np.array(at)[:, None, None, None]) ** 2).sum(0) < 25 for at in ((9, 12, 12), (19, 20, 12))]
    label = (balls[0] + 2 * balls[1]).astype(np.uint8)
    image = label * 50.0 + np.random.default_rng(0).normal(100, 10, label.shape)
    moved = np.roll(label, 1 + shift, axis=0)
    for path, values in (
        (Path(case["image"][0]), image.astype(np.float32)),
        (Path(case["label"]), label),
        (prediction, moved),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, np.diag([1, 1, 1.5, 1])), path)
