# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The quick start's report: one HTML file with its pictures inside."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from common.data import segmentation_task
from common.document import Heading, Part, Picture, Table, Text, write_html
from common.drawing import canonical_voxels, draw_planes
from common.engines.pages import volume_part
from common.figures import Figure, subplots
from common.files import read_content
from common.transforms import without_ending
from common.weights.cells import paper_of

__all__ = ["RUNS", "Start", "run_folder", "threshold_baseline", "write_report"]

_OWN = """\
# pre-train on any folder of NIfTI, with the published recipe (needs a GPU)
python -m monai.bundle run --config_file bundles/{bundle}/configs/pretrain.yaml --bundle_root bundles/{bundle} \
--dataset_dir {folder}
# fine-tune on {labelled}/images and {labelled}/labels (files of the same name)
python -m monai.bundle run --config_file bundles/{bundle}/configs/train.yaml --bundle_root bundles/{bundle} \
--dataset_dir {labelled} --labels {labels}
# segment new volumes
python -m monai.bundle run --config_file bundles/{bundle}/configs/inference.yaml --bundle_root bundles/{bundle} \
--dataset_dir NEW_FOLDER
# this quick tour on {whose}, four times as long
python tools/quickstart.py --bundle {bundle} --data {folder}{named} --scale 4 --output {output}"""
RUNS = ("pre-trained", "from scratch")
_TOLD = (
    "Means over the repeats, which have the same steps and cases and differ in their seed. The interval holds the luck "
    "of a fine-tuning, not that of the one pre-training nor that of these cases. So few steps of pre-training change "
    "the first layers of the U-Net and hardly the deep ones (docs/study.md, Why pre-training does not always help). "
    "They say nothing about the published weights."
)


def run_folder(folder: Path, name: str, repeat: int) -> Path:
    """Return where a fine-tuning is: one of :data:`RUNS`, repeats counted from 1."""
    return folder / name.replace(" ", "_") / f"repeat_{repeat}"


def _picture(name: str, figure: Figure, alt: str) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Picture(name, buffer.getvalue(), alt)


def _history(folder: Path) -> list[dict[str, float]]:
    path = folder / "history.json"
    return read_content(path) if path.exists() else []


def _curves(folder: Path, repeats: int, error: str) -> Picture:
    """Draw the loss of pre-training, and loss and Dice of every fine-tuning; ``repeats`` is 0 without."""
    figure, axes = subplots(1, 3 if repeats else 1, figsize=(10 if repeats else 5, 3.1), squeeze=False)
    first = axes[0, 0]
    history = _history(folder / "pretraining")
    epochs = [record["epoch"] for record in history]
    first.plot(epochs, [record["train_loss"] for record in history], label="training")
    checked = [record for record in history if "val_loss" in record]
    first.plot([r["epoch"] for r in checked], [r["val_loss"] for r in checked], label="validation")
    first.set_title(textwrap.fill(f"pre-training: {error}", 40), fontsize=10)
    if repeats:
        for (index, name), repeat in product(enumerate(RUNS), range(1, repeats + 1)):
            history = _history(run_folder(folder, name, repeat))
            line: dict[str, Any] = {"color": f"C{index}", "label": name if repeat == 1 else None}
            axes[0, 1].plot([r["epoch"] for r in history], [r["train_loss"] for r in history], **line)
            checked = [r for r in history if "val_dice" in r]
            axes[0, 2].plot([r["epoch"] for r in checked], [r["val_dice"] for r in checked], "o-", **line)
        axes[0, 1].set_title("fine-tuning: training loss", fontsize=10)
        axes[0, 2].set_title("fine-tuning: validation Dice", fontsize=10)
    for axis in axes[0]:
        axis.set_xlabel("epoch")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return _picture("curves.png", figure, "loss and Dice curves")


def _files(image: str, folder: Path) -> dict[str, Path]:
    """Return the first predictions of an image, by run."""
    name = f"{without_ending(Path(image).name)}.nii.gz"
    return {run: run_folder(folder, run, 1) / "predictions" / name for run in RUNS}


def _overlays(case: Mapping[str, str], folder: Path, names: Mapping[int, str]) -> Picture:
    figure = draw_planes(case["image"], {"label": case["label"], **_files(case["image"], folder)}, labels=names)
    return _picture("predictions.png", figure, "predictions on the unseen part in three planes")


def _volumes(cases: Sequence[Mapping[str, str]], folder: Path, names: Mapping[int, str]) -> list[Part]:
    """Return the best and the worst test case of the pre-trained network to look through."""
    content = read_content(run_folder(folder, RUNS[0], 1) / "scores.json")
    scored = {Path(case["reference"]).resolve(): case for case in content["cases"]}
    means = []
    for case in cases:
        if (found := scored.get(Path(case["label"]).resolve())) is not None:
            dice = [scores["dice"] for scores in found["scores"].values() if scores["dice"] is not None]
            means.append((float(np.mean(dice)) if dice else 0.0, case))
    means.sort(key=lambda one: one[0], reverse=True)
    shown = (
        {"best case": means[0], "worst case": means[-1]}
        if len(means) > 1
        else dict(zip(["the case"], means, strict=False))
    )
    return [
        volume_part(
            case["image"],
            {"label": case["label"], **_files(case["image"], folder)},
            labels=names,
            title=f"{what}: {without_ending(Path(case['image']).name)}, mean Dice {mean:.3f} pre-trained",
        )
        for what, (mean, case) in shown.items()
    ]


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


def _scores(folder: Path) -> dict[str, float]:
    """Return the Dice of each class, and their mean, of one fine-tuning."""
    summary = read_content(folder / "scores.json")["summary"]["all"]
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
        labels: as in training, None without.
        parts: what the data to learn from and to test on are.
        notice: whose data they are.
        data: folder of the user's; None of the template.
        sizes: of voxels and crops, in words.
        repeats: fine-tunings of each kind.
        commands: that were run.
        seconds: of each part.
        peak_mib: most memory of one process.
    """

    bundle: str
    labels: Any
    parts: Mapping[str, str]
    notice: str
    data: Path | None
    sizes: str
    repeats: int
    commands: Sequence[str]
    seconds: Mapping[str, float]
    peak_mib: float


def write_report(folder: Path, start: Start) -> Path:
    """Write ``report.html`` into the quick start's folder and print its table; return its path."""
    paper = paper_of(start.bundle)
    assert paper is not None
    verdict, parts = _of_labels(folder, start) if start.labels else (_fell(folder, paper.error), [])
    parts = [Text(verdict, "lead"), *_about_data(start), *parts]
    pictures = sorted((folder / "pretraining" / "pictures").glob("*.png"), key=lambda path: path.stat().st_mtime)
    if pictures:
        last = _history(folder / "pretraining")[-1]
        told = f"{paper.picture} The validation loss is {last.get('val_loss', last['train_loss']):.3f}."
        alt = "what the network sees and what it makes of it"
        parts += [Heading("What pre-training learned", short="Pre-training"), Text(told)]
        parts.append(Picture("pretraining.png", pictures[-1].read_bytes(), alt, large=False))
    parts += [Heading("Curves"), _curves(folder, start.repeats if start.labels else 0, paper.error)]
    parts += [Heading("Go on with your own data", short="Go on"), Text(_commands(folder, start), "code")]
    ran = "\n".join(start.commands) or "all parts were done before"
    parts += [Heading("What was run", short="Commands"), Text(ran, "code")]
    parts.append(Table(["part", "time"], [[name, f"{value:.0f} s"] for name, value in start.seconds.items()]))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("monai", "torch", "pytorch-ignite"))
    made = f"{platform.machine()}, Python {platform.python_version()}, {versions}; largest process"
    parts.append(Text(f"{made} {start.peak_mib:.0f} MiB. {start.notice}", "note"))
    write_html(f"Quick start of {start.bundle}", parts, folder / "report.html")
    return folder / "report.html"


def _commands(folder: Path, start: Start) -> str:
    """Return commands to go on, with the user's own folder and labels where they are known."""
    own = "FOLDER" if start.data is None else shlex.quote(str(start.data))
    told = shlex.quote(str(start.labels)) if start.data is not None and start.labels else None
    return _OWN.format(
        bundle=start.bundle,
        folder=own,
        labelled=own if told else "FOLDER",
        labels=told or "\"['background','lesion']\"",
        named=f" --labels {told}" if told else "",
        whose="your own data" if start.data is None else "these data",
        output=shlex.quote(str(folder.with_name(f"{folder.name}_longer"))),
    )


def _fell(folder: Path, error: str) -> str:
    """Return the verdict on a pre-training alone."""
    history = _history(folder / "pretraining")
    key = "val_loss" if all("val_loss" in record for record in (history[0], history[-1])) else "train_loss"
    first, last = history[0][key], history[-1][key]
    how = f"fell from {first:.3f} to {last:.3f}" if last < first else f"did not fall ({first:.3f}, then {last:.3f})"
    return f"Pre-training works on this machine: in {len(history)} epochs the {error} {how}."


def _about_data(start: Start) -> list[Part]:
    """Return paragraphs on the data and on what such a run can show."""
    if start.data is None:
        data = (
            "Data: simulated scans of the MNI152 group-average template, which is the average of many "
            "heads and nobody's scan. Each scan has its own receive field, contrast and noise. Networks learn from "
            f"{start.parts['learn']}; they are tested on {start.parts['test']}. The template is nearly "
            "mirror-symmetric, so it is split from back to front, never left from right."
        )
    else:
        data = f"Data: {'; tested on '.join(start.parts.values())}."
    return [
        Text(data),
        Text(
            f"A narrow network, {start.sizes} and a few hundred steps, so that it fits into minutes on two CPU cores. "
            "It shows that the chain works on your machine, not how good it is.",
            "note",
        ),
    ]


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Return Student's interval of 95 % of the mean of a few values; a bootstrap of three would be far too narrow."""
    reach = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def _verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Say what the Dice of fine-tunings, pre-trained and from scratch, show; one each for the same seeds."""
    differences: np.ndarray = np.subtract(ours, theirs)
    told = (
        f"On the unseen part, mean Dice is {np.mean(ours):.3f} pre-trained and {np.mean(theirs):.3f} from scratch: "
        f"{differences.mean():+.3f}"
    )
    if np.isnan(differences).any():
        return f"{told}; not every repeat could be scored."
    if len(differences) == 1:
        return f"{told}, which one short run each cannot tell from chance."
    low, high = _interval(differences)
    shown = "pre-training helped" if low > 0 else "pre-training hurt" if high < 0 else "no difference is shown"
    return f"{told} [{low:+.3f}, {high:+.3f}] over {len(differences)} repeats: {shown}."


def _of_labels(folder: Path, start: Start) -> tuple[str, list[Part]]:
    """Return the verdict, cases to look through, and the table of scores, which is printed too."""
    lists, task = read_content(folder / "datalist.json"), segmentation_task(start.labels)
    classes = list(task.names)
    train, test = (
        [{key: str(folder / path) for key, path in case.items()} for case in lists[part]]
        for part in ("training", "test")
    )
    rows: dict[str, list[float]] = {}
    if start.data is None:
        rows["intensity thresholds (no network)"] = threshold_baseline(train, test, len(classes))
    means: dict[str, list[float]] = {}
    for name in RUNS:
        scores = [_scores(run_folder(folder, name, repeat)) for repeat in range(1, start.repeats + 1)]
        rows[f"network, {name}"] = [float(np.mean([one[label] for one in scores])) for label in classes]
        means[name] = [float(np.nanmean([one[label] for label in classes])) for one in scores]
    shown = {name: [*values, float(np.nanmean(values))] for name, values in rows.items()}
    print("\nDice on the unseen part")
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{name:>13}" for name in [*classes, "mean"]))
    for name, values in shown.items():
        print(f"{name:<{width}}", *(f"{value:13.3f}" for value in values))
    verdict = _verdict(*means.values())
    print(verdict)
    return f"The chain works on this machine. {verdict}", [
        Heading("Predictions to look through", short="Predictions"),
        *_volumes(test, folder, task.by_value),
        Heading("Dice on the unseen part", short="Dice"),
        Table(["", *classes, "mean"], [[name, *(f"{value:.3f}" for value in own)] for name, own in shown.items()]),
        Text(_TOLD, "note"),
        _overlays(test[0], folder, task.by_value),
    ]
