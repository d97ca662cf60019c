# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The whole chain on small volumes: pre-train, fine-tune with and without, predict, compare, report."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.bundles import check_links
from common.data import labelled_lists, pretraining_lists, segmentation_task, usable_cases
from common.data.cases import Case, images_of, masks_of
from common.data.identity import Origins, identity_of, same_images
from common.errors import DataError, SettingsError
from common.files import read_content
from common.terminal import duration, near, over_bars
from common.transforms import read_header, read_volume

from ..commanding.ending import command_line, config_command, end
from ..commanding.environment import ROOT
from ..preparing.template import LABELS, NOTICE, write_template_data
from .report import RUNS, Start, run_folder, write_report
from .settings import Quickstart

__all__ = ["quickstart"]

_LIST = "datalist.json"  # in the folder of a quick start
_BACKBONES: dict[str, dict[str, str]] = {
    "resenc": {
        "network": "--features_per_stage [8,16,32,64,80] --blocks_per_stage [1,1,1,1,1]",
        "pretrain": "--momentum 0.9 --lr 0.1 --epochs 10 --iterations_per_epoch 25",
        "train": "--momentum 0.9 --lr 0.05 --epochs 10 --iterations_per_epoch 12",
    },
    "primus": {
        "network": "--embed_dim 96 --depth 4 --num_heads 4",
        "pretrain": "--lr 0.002 --warmup_epochs 1 --epochs 10 --iterations_per_epoch 100",
        "train": "--lr 0.002 --warmup_epochs 1 --epochs 10 --iterations_per_epoch 50",
    },
}
_DINO = "--crop_size 32 --local_size 16 --batch_size 4 --prototypes 256 --teacher_momentum [0.99,1.0]"
_JEPA = "--batch_size 4 --predictor_dim 96 --predictor_depth 2 --predictor_heads 4 --teacher_momentum [0.99,1.0]"
# what a method needs besides, by the beginning of the bundle's name; crops of crops are a multiple of 16
_METHODS: dict[str, str] = {
    **dict.fromkeys(("mae_resenc", "simmim_resenc", "spark3d_resenc"), "--block_size 8"),
    "voco_resenc": "--patch_size [64,64,16] --crop_size 16 --lr 0.01 --momentum 0.99",  # a larger rate collapses
    "voco": "--patch_size [64,64,16] --crop_size 16",
    "simclr": "--patch_size [64,64,32] --crop_size 32 --batch_size 8",
    "dino_resenc": f"{_DINO} --lr 0.002 --warmup_epochs 1 --block_size 8",
    "dino": f"{_DINO} --lr 0.001",
    "jepa_resenc": f"{_JEPA} --lr 0.002 --warmup_epochs 1 --block_size 8",
    "jepa": f"{_JEPA} --lr 0.001",
}
# by the median side of the volumes in mm: voxels in mm, side of a crop in voxels, factor on the steps
_SIZES = {64: (1.0, 32, 2.4), 128: (1.0, 48, 1.0), 10_000: (2.0, 48, 1.0)}


@dataclass
class Chain:
    """The commands of one quick start, and what they took."""

    bundle: str
    folder: Path
    commands: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: float = 0.0

    def run(self, title: str, config: str, *arguments: str) -> None:
        """Run one config of the bundle in a process of its own; its whole output also goes to a log file."""
        root = f"bundles/{self.bundle}"
        command = ["-m", "monai.bundle", "run", "--config_file", f"{root}/configs/{config}.yaml", "--bundle_root", root]
        command += [part for argument in arguments for part in shlex.split(argument)]
        self.commands.append(command_line(["python", *command]))
        print(f"\n== {title}\n{self.commands[-1]}", flush=True)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace"
        )
        assert process.stdout is not None
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                if line.strip() and " - INFO - " not in line:
                    over_bars(line)
        if process.wait():
            raise SystemExit(
                f"Stopped: '{title}' failed, see above and {near(self.folder / 'log.txt')}; start again to go on"
            )
        self.seconds[title] = time.monotonic() - began
        if os.name == "posix":
            import resource

            self.peak_mib = max(self.peak_mib, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def _sizes(folder: Path) -> tuple[float, int, float]:
    """Return the entry of ``_SIZES`` for these volumes, whose crops then show much of them; reads headers only."""
    lists = read_content(folder / _LIST)
    sides = []
    for case in lists["training"][:20]:
        try:
            header = read_header(folder / case["image"])
        except DataError:
            continue  # the run itself names it
        spacing_mm = np.linalg.norm(header.affine[:3, :3], axis=0)
        sides.append(np.median(np.multiply(header.shape[:3], spacing_mm)))
    side = np.median(sides) if sides else 0
    return next(sizes for limit, sizes in _SIZES.items() if side <= limit or limit == max(_SIZES))


def _own_data(settings: Quickstart, data: Path, folder: Path) -> tuple[dict[str, str], Any]:
    """Write a datalist of the user's folder; return what each part is, and the labels if it is labelled.

    Raises:
        DataError: if labels are named and there are none, or too few cases.
    """
    try:
        cases = [case for part in labelled_lists(str(data)).values() for case in part]
        cases = list({case["image"]: case for case in cases}.values())
    except DataError:
        if settings.labels is not None:
            raise
        lists = pretraining_lists(str(data))
        _same_data(lists, folder)
        (folder / _LIST).write_text(json.dumps(lists, indent=1), "utf-8")
        return {"learn": f"{len(lists['training'])} volumes of {data}, {len(lists['validation'])} to validate on"}, None
    labels: Any = list(settings.labels) if isinstance(settings.labels, tuple) else settings.labels
    if labels is None:
        files = [case["label"] for case in cases if Path(case["label"]).is_file()]
        top = max((int(read_volume(file)[0].max()) for file in files), default=0)
        labels = ["background", *(f"class {value}" for value in range(1, top + 1))]
    cases = usable_cases(cases, task=segmentation_task(labels))
    random.Random(settings.seed).shuffle(cases)
    if len(cases) < 3:
        raise DataError(f"{data} has {len(cases)} usable labelled case(s); 3 are needed to train, validate and test")
    _same_data({"all": cases}, folder)
    fifth = max(1, len(cases) // 5)
    lists = {"training": cases[2 * fifth :], "validation": cases[:fifth], "test": cases[fifth : 2 * fifth]}
    (folder / _LIST).write_text(json.dumps(lists, indent=1), "utf-8")
    sizes = {name: len(part) for name, part in lists.items()}
    return {
        "learn": f"{sizes['training']} cases of {data} to train on and {sizes['validation']} to validate on",
        "test": f"{sizes['test']} other cases of that folder",
    }, labels


def _same_data(lists: Mapping[str, Sequence[Case]], folder: Path) -> None:
    """Note which files a folder is made of, or refuse it if it was made of others.

    Args:
        lists: of the cases.
        folder: of this quick start.

    Raises:
        SettingsError: naming a file that is new, gone or another one under the same name.
    """
    cases = [case for part in lists.values() for case in part]
    files = {os.path.abspath(f) for case in cases for f in (*images_of(case), *(case[m] for m in masks_of(case)))}
    origins, whole = Origins(folder), {"image": sorted(files)}
    noted = origins.read().get(_LIST, {"images": None})["images"]
    if noted is None:
        origins.note([_LIST], identity_of(whole), {})
        return
    known, seen = {entry["path"]: entry for entry in noted}, dict[str, str]()
    changed = [file for file in sorted(files & known.keys()) if not same_images([known[file]], {"image": file}, seen)]
    told = {"was changed": changed, "is new": sorted(files - known.keys()), "is gone": sorted(known.keys() - files)}
    if named := [f"{found[0]} {what} ({len(found)} file(s))" for what, found in told.items() if found]:
        raise SettingsError(
            f"{folder} is of these data as they were before: {', '.join(named)}; empty it or give another --output"
        )


def _merge(settings: str, own: str) -> str:
    """Join two command lines of ``--name value`` pairs; the second replaces what both name."""
    words = [*settings.split(), *own.split()]
    return " ".join(f"{name} {value}" for name, value in dict(zip(words[::2], words[1::2], strict=True)).items())


def quickstart(settings: Quickstart) -> None:
    """Run the chain and write the report."""
    check_links(ROOT / "bundles" / settings.bundle)
    folder = settings.output.absolute() if settings.output else ROOT / "quickstart" / settings.bundle
    _claim(folder, settings)
    began = time.monotonic()
    parts, labels = _data(settings, folder)
    recipe = _recipe(settings, folder)
    chain = Chain(settings.bundle, folder)
    chain.run(
        "pre-training without labels",
        "pretrain",
        *(
            _place(folder, "datalist", _LIST),
            recipe.common,
            recipe.pretraining,
            f"--val_iterations 4 --seed {settings.seed}",
        ),
        *(_place(folder, "output_dir", "pretraining"), _place(folder, "ckpt_dir", "models")),
        _place(folder, "store_dir", "store"),
    )
    if labels:
        held_out = read_content(folder / _LIST)["test"]
        (folder / "test.json").write_text(json.dumps({"validation": held_out}), "utf-8")
        for repeat in range(1, settings.repeats + 1):
            for name in RUNS:
                _fine_tune(chain, name, repeat, labels, recipe, settings.seed + repeat - 1)
    path = write_report(
        folder,
        Start(
            settings.bundle,
            labels,
            parts,
            notice=NOTICE if settings.data is None else "your own data",
            data=settings.data,
            sizes=recipe.sizes,
            repeats=settings.repeats,
            commands=chain.commands,
            seconds={**chain.seconds, "everything": time.monotonic() - began},
            peak_mib=chain.peak_mib,
        ),
    )
    took = duration(time.monotonic() - began)
    print(f"\nEverything took {took} and at most {chain.peak_mib:.0f} MiB in one process.")
    print(f"Open {near(path)} in a browser.")
    data = "FOLDER" if settings.data is None else settings.data
    end(folder, look=path, following=config_command(settings.bundle, "pretrain", data, "--preset", "small"))


def _claim(folder: Path, settings: Quickstart) -> None:
    """Refuse a folder that holds something else, and write down what this one is for."""
    data = settings.data and str(settings.data)
    asked: dict[str, Any] = {"bundle": settings.bundle, "data": data, "seed": settings.seed, "scale": settings.scale}
    asked["repeats"] = settings.repeats
    if settings.labels is not None:
        asked["labels"] = list(settings.labels) if isinstance(settings.labels, tuple) else settings.labels
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "settings.json"
    if any(folder.iterdir()) and (not marker.exists() or read_content(marker) != asked):
        raise SettingsError(f"{folder} holds something else already; empty it or give another --output")
    marker.write_text(json.dumps(asked))


def _data(settings: Quickstart, folder: Path) -> tuple[dict[str, str], Any]:
    """Write or find the data; return what each part is, and the labels if it is labelled."""
    if settings.data is not None:
        return _own_data(settings, settings.data, folder)
    print("simulated scans of the MNI152 template", flush=True)
    described = folder / "parts.json"
    if not described.exists():
        described.write_text(json.dumps(write_template_data(folder, seed=settings.seed)), "utf-8")
    return read_content(described), LABELS


@dataclass(frozen=True)
class Recipe:
    """What is set on the command lines of one quick start.

    Attributes:
        common: to all runs.
        pretraining: to pre-training besides.
        crop: to all later runs.
        training: to fine-tuning besides.
        sizes: of voxels and crops, in words.
    """

    common: str
    pretraining: str
    crop: str
    training: str
    sizes: str


def _recipe(settings: Quickstart, folder: Path) -> Recipe:
    """Return the settings that suit the bundle and the volumes."""
    spacing, patch, more_steps = _sizes(folder)
    recipe = _BACKBONES["primus" if "primus" in settings.bundle else "resenc"]

    def longer(text: str) -> str:
        words = text.split()
        index = words.index("--iterations_per_epoch") + 1
        words[index] = str(max(1, round(int(words[index]) * settings.scale * more_steps)))
        return " ".join(words)

    crop = f"--patch_size [{patch},{patch},{patch}]"
    own = next((text for name, text in _METHODS.items() if settings.bundle.startswith(name)), "")
    return Recipe(
        common=f"--spacing_mm {spacing} {recipe['network']} --num_workers 0",
        pretraining=_merge(f"{crop} --batch_size 2 {longer(recipe['pretrain'])}", own),
        crop=crop,
        training=longer(recipe["train"]),
        sizes=f"{spacing:g} mm voxels, {patch}-voxel crops",
    )


def _place(folder: Path, key: str, path: str) -> str:
    return f"--{key} {shlex.quote(str(folder / path))}"


def _fine_tune(chain: Chain, name: str, repeat: int, labels: Any, recipe: Recipe, seed: int) -> None:
    """Fine-tune one way, predict the unseen part and score it, unless that is done."""
    folder, own = chain.folder, run_folder(chain.folder, name, repeat)
    where, title = own.relative_to(folder), f"{name}, repeat {repeat}"
    if (own / "finished").exists():
        print(f"\n== fine-tuning {title}: done before")
        return
    own.mkdir(parents=True, exist_ok=True)
    common, names = f"{recipe.common} {recipe.crop}", f"--labels {shlex.quote(str(labels))}"
    datalist, models = _place(folder, "datalist", _LIST), _place(folder, "ckpt_dir", f"{where}/models")
    chain.run(
        f"fine-tuning, {title}",
        "train",
        *(datalist, common, recipe.training, names, f"--seed {seed} --val_interval 2 --val_iterations 4"),
        *(_place(folder, "pretrained", "models/pretrained_encoder.pt"), f"--from_scratch {name != RUNS[0]}".lower()),
        *(_place(folder, "output_dir", str(where)), models, _place(folder, "store_dir", "store")),
    )
    chain.run(
        f"predicting the unseen part, {title}",
        "inference",
        *(datalist, common, names, models, "--overwrite true --pictures 0"),
        _place(folder, "output_dir", f"{where}/predictions"),
    )
    chain.run(
        f"scoring, {title}",
        "evaluate",
        *(_place(folder, "datalist", "test.json"), "--split validation --report false", names),
        *(_place(folder, "predictions", f"{where}/predictions"), _place(folder, "output_dir", str(where))),
    )
    (own / "finished").touch()
