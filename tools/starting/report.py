# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The quick start's report: one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.drawing import canonical_voxels, draw_planes
from common.figures import Figure, plt
from common.files import read_content
from common.transforms import without_ending

__all__ = ["Start", "threshold_baseline", "write_report"]

# what the picture of pre-training shows, by the beginning of the bundle's name
_MASKED = (
    "A validation crop: the network saw only what is not blue. The loss is the mean squared error on hidden blocks; 1 "
    "is the variance of the whole z-scored scan."
)
_PICTURES = {
    **dict.fromkeys(("mae", "simmim", "spark3d"), _MASKED),
    "models_genesis": "A validation crop as it was spoiled, as the network restored it, and as it was.",
    "swinunetr": "A validation crop with boxes cut out, as the network rebuilt it, and as it was.",
    "volumefusion": "Two volumes blended, the share of the first in each place, and the share that the network tells.",
    "voco": "Crops of validation scans: how alike the network finds them, and how much they truly overlap.",
    "simclr": "Crops of validation scans: how alike the network finds them, and how much they truly overlap.",
}
_OWN = """\
# pre-train on any folder of NIfTI, with the published recipe (needs a GPU)
python -m monai.bundle run --config_file bundles/{bundle}/configs/pretrain.yaml --bundle_root bundles/{bundle} \
--dataset_dir FOLDER
# fine-tune on FOLDER/images and FOLDER/labels (files of the same name)
python -m monai.bundle run --config_file bundles/{bundle}/configs/train.yaml --bundle_root bundles/{bundle} \
--dataset_dir FOLDER --labels "['background','lesion']"
# segment new volumes
python -m monai.bundle run --config_file bundles/{bundle}/configs/inference.yaml --bundle_root bundles/{bundle} \
--dataset_dir FOLDER --labels "['background','lesion']"
# this quick tour on your own data
python tools/quickstart.py --bundle {bundle} --data FOLDER"""
_RUNS = {"pre-trained": "pre-trained", "from scratch": "from_scratch"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d0d7de }
table { border-collapse: collapse } th, td { padding: .3rem .9rem; border-bottom: 1px solid #d0d7de; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100% }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap }
.note { color: #57606a; font-size: .92rem }
"""


def _picture(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return _image(buffer.getvalue(), alt)


def _image(content: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _history(folder: Path) -> list[dict[str, float]]:
    path = folder / "history.json"
    return read_content(path) if path.exists() else []


def _curves(folder: Path, labelled: bool) -> str:
    figure, axes = plt.subplots(
        1, 3 if labelled else 1, figsize=(10 if labelled else 5, 3.1), layout="constrained", squeeze=False
    )
    first = axes[0, 0]
    history = _history(folder / "pretraining")
    epochs = [record["epoch"] for record in history]
    first.plot(epochs, [record["train_loss"] for record in history], label="training")
    checked = [record for record in history if "val_loss" in record]
    first.plot([r["epoch"] for r in checked], [r["val_loss"] for r in checked], label="validation")
    first.set_title("pre-training: error on hidden blocks", fontsize=10)
    if labelled:
        for name, where in _RUNS.items():
            history = _history(folder / where)
            axes[0, 1].plot([r["epoch"] for r in history], [r["train_loss"] for r in history], label=name)
            checked = [r for r in history if "val_dice" in r]
            axes[0, 2].plot([r["epoch"] for r in checked], [r["val_dice"] for r in checked], "o-", label=name)
        axes[0, 1].set_title("fine-tuning: training loss", fontsize=10)
        axes[0, 2].set_title("fine-tuning: validation Dice", fontsize=10)
    for axis in axes[0]:
        axis.set_xlabel("epoch")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return _picture(figure, "loss and Dice curves")


def _overlays(case: Mapping[str, str], folder: Path, labels: Sequence[str]) -> str:
    name = f"{without_ending(Path(case['image']).name)}.nii.gz"
    predictions = {run: folder / where / "predictions" / name for run, where in _RUNS.items()}
    figure = draw_planes(case["image"], {"label": case["label"], **predictions}, labels=labels)
    return _picture(figure, "predictions on the unseen part in three planes")


def _scaled(case: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a scan over its 98th percentile, and its label, as rows of voxels."""
    image, maps, _ = canonical_voxels(case["image"], {"label": case["label"]})
    return (image / np.percentile(image, 98)).ravel(), maps["label"].ravel()


def _dice(predicted: np.ndarray, truth: np.ndarray, value: int) -> float:
    p, t = predicted == value, truth == value
    return 2 * float((p & t).sum()) / max(float(p.sum() + t.sum()), 1.0)


def threshold_baseline(
    train: Sequence[Mapping[str, str]], test: Sequence[Mapping[str, str]], classes: int
) -> list[float]:
    """Return the test Dice of each class from plain intensity thresholds, the best ones on the training scans.

    Class k lies between threshold k and k + 1; scans are scaled by their 98th percentile; the thresholds are found by a
    grid search, then one at a time on a finer grid.

    Args:
        train: cases to find the thresholds on.
        test: cases to score.
        classes: foreground classes, brighter ones later.
    """
    seen = [(image[::11], label[::11]) for image, label in map(_scaled, train)]

    def score(thresholds: Sequence[float], pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[float]:
        maps = [(np.searchsorted(np.sort(thresholds), image), label) for image, label in pairs]
        return [float(np.mean([_dice(p, t, value) for p, t in maps])) for value in range(1, classes + 1)]

    thresholds = list(np.linspace(0.4, 0.8, classes))
    for step in (0.1, 0.05, 0.02, 0.01):
        for _ in range(3):
            for index in range(classes):
                around = thresholds[index] + step * np.arange(-4, 5)
                trials = [[*thresholds[:index], value, *thresholds[index + 1 :]] for value in around]
                thresholds = max(trials, key=lambda trial: np.mean(score(trial, seen)))
    return score(thresholds, [_scaled(case) for case in test])


def _scores(folder: Path, where: str) -> dict[str, float]:
    summary = read_content(folder / where / "scores.json")["summary"]["all"]
    scored = {**summary["classes"], "mean": summary["mean"]}
    return {
        name: float("nan" if scores["dice"]["mean"] is None else scores["dice"]["mean"])
        for name, scores in scored.items()
    }


@dataclass(frozen=True)
class Start:
    """What a quick start did.

    Attributes:
        bundle: name.
        labels: class names, background first; none without labels.
        parts: what the data to learn from and to test on are.
        notice: whose data they are.
        template: whether they are of the template.
        sizes: of voxels and crops, in words.
        commands: that were run.
        seconds: of each part.
        peak_mib: most memory of one process.
    """

    bundle: str
    labels: Sequence[str]
    parts: Mapping[str, str]
    notice: str
    template: bool
    sizes: str
    commands: Sequence[str]
    seconds: Mapping[str, float]
    peak_mib: float


def write_report(folder: Path, start: Start) -> Path:
    """Write ``report.html`` into the quick start's folder and print its table; return its path."""
    bundle = start.bundle
    body = [f"<h1>Quick start of {html.escape(bundle)}</h1>", *_about_data(start)]
    if start.labels:
        body += _of_labels(folder, start)
    pictures = sorted((folder / "pretraining" / "pictures").glob("*.png"), key=lambda path: path.stat().st_mtime)
    if pictures:
        last = _history(folder / "pretraining")[-1]
        told = next(text for name, text in _PICTURES.items() if bundle.startswith(name))
        body.append(
            f"<h2>What pre-training learned</h2><p>{told} The validation loss is "
            f"{last.get('val_loss', last['train_loss']):.3f}.</p>"
            + _image(pictures[-1].read_bytes(), "what the network sees and what it makes of it")
        )
    body.append(f"<h2>Curves</h2>{_curves(folder, bool(start.labels))}")
    body.append(f"<h2>Go on with your own data</h2><pre>{html.escape(_OWN.format(bundle=bundle))}</pre>")
    ran = html.escape("\n".join(start.commands)) or "all parts were done before"
    body.append(f"<h2>What was run</h2><pre>{ran}</pre>")
    rows = (f"<tr><td>{html.escape(name)}</td><td>{value:.0f} s</td></tr>" for name, value in start.seconds.items())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("monai", "torch", "pytorch-ignite"))
    body.append(
        f"<table>{''.join(rows)}</table><p class=note>{html.escape(platform.machine())}, Python "
        f"{platform.python_version()}, {versions}; largest process {start.peak_mib:.0f} MiB. "
        f"{html.escape(start.notice)}</p>"
    )
    path = folder / "report.html"
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Quick start of {bundle}</title>"
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n",
        "utf-8",
    )
    return path


def _about_data(start: Start) -> list[str]:
    """Return paragraphs on the data and on what such a run can show."""
    if start.template:
        data = (
            "<p>Data: simulated scans of the <b>MNI152 group-average template</b>, which is the average of many "
            "heads and nobody's scan. Each scan has its own receive field, contrast and noise. Networks learn from "
            f"{start.parts['learn']}; they are tested on {start.parts['test']}. The template is nearly "
            "mirror-symmetric, so it is split from back to front, never left from right.</p>"
        )
    else:
        data = f"<p>Data: {html.escape('; tested on '.join(start.parts.values()))}.</p>"
    return [
        data,
        f"<p class=note>A narrow network, {start.sizes} and a few hundred steps, so that it "
        "fits into minutes on two CPU cores. It shows that the chain works on your machine, not how good it is.</p>",
    ]


def _of_labels(folder: Path, start: Start) -> list[str]:
    """Return the table of scores, which is printed too, and predictions to look at."""
    lists = read_content(folder / "datalist.json")
    classes = list(start.labels[1:])
    rows: dict[str, list[float]] = {}
    if start.template:
        train, test = (
            [{key: str(folder / path) for key, path in case.items()} for case in lists[part]]
            for part in ("training", "test")
        )
        rows["intensity thresholds (no network)"] = threshold_baseline(train, test, len(classes))
    for name, where in _RUNS.items():
        scores = _scores(folder, where)
        rows[f"network, {name}"] = [scores[label] for label in classes]
    shown = {name: [*values, float(np.mean(values))] for name, values in rows.items()}
    table = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td>{value:.3f}</td>" for value in values) + "</tr>"
        for name, values in shown.items()
    )
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in [*classes, "mean"])
    difference = shown["network, pre-trained"][-1] - shown["network, from scratch"][-1]
    print("\nDice on the unseen part")
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{name:>13}" for name in [*classes, "mean"]))
    for name, values in shown.items():
        print(f"{name:<{width}}", *(f"{value:13.3f}" for value in values))
    case = {k: str(folder / v) for k, v in lists["test"][0].items()}
    return [
        f"<h2>Dice on the unseen part</h2><table><tr><th></th>{heads}</tr>{table}</table>",
        f"<p class=note>Pre-trained minus from scratch: {difference:+.3f}, same steps, same seed, one run "
        "each. So short a pre-training on so little data says nothing about the published weights.</p>",
        f"<h2>Predictions on the unseen part</h2>{_overlays(case, folder, start.labels)}",
    ]
