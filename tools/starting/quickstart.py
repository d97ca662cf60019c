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
from dataclasses import dataclass, field
from pathlib import Path

from common.bundles import check_links

from ..commanding.environment import ROOT

__all__ = ["quickstart"]

_BACKBONES: dict[str, dict[str, str]] = {
    "resenc": {
        "network": "--features_per_stage [8,16,32,64,80] --blocks_per_stage [1,1,1,1,1]",
        "pretrain": "--momentum 0.9 --lr 0.1 --epochs 10 --iterations_per_epoch 25",
        "train": "--momentum 0.9 --lr 0.05 --epochs 10 --iterations_per_epoch 25",
    },
    "primus": {
        "network": "--embed_dim 96 --depth 4 --num_heads 4",
        "pretrain": "--lr 0.002 --warmup_epochs 1 --epochs 10 --iterations_per_epoch 100",
        "train": "--lr 0.002 --warmup_epochs 1 --epochs 10 --iterations_per_epoch 100",
    },
}
# what a method needs besides, by the beginning of the bundle's name; crops of crops are a multiple of 16
_METHODS: dict[str, str] = {
    **dict.fromkeys(("mae_resenc", "simmim_resenc", "spark3d_resenc"), "--block_size 8"),
    "voco_resenc": "--patch_size [64,64,16] --crop_size 16 --lr 0.01 --momentum 0.99",  # a larger rate collapses
    "voco": "--patch_size [64,64,16] --crop_size 16",
    "simclr": "--patch_size [64,64,32] --crop_size 32 --batch_size 8",
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
        self.commands.append(shlex.join(["python", *command]))
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
                    print(line, end="", flush=True)
        if process.wait():
            raise SystemExit(
                f"Stopped: '{title}' failed, see above and {self.folder / 'log.txt'}; start again to go on"
            )
        self.seconds[title] = time.monotonic() - began
        if os.name == "posix":
            import resource

            self.peak_mib = max(self.peak_mib, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def _sizes(folder: Path) -> tuple[float, int, float]:
    """Return the entry of ``_SIZES`` for these volumes, whose crops then show much of them; reads headers only."""
    import numpy as np

    from common.errors import DataError
    from common.transforms import read_header

    lists = json.loads((folder / "datalist.json").read_text("utf-8"))
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


def _own_data(data: Path, folder: Path, seed: int) -> tuple[dict[str, str], list[str]]:
    """Write a datalist of the user's folder; return what each part is, and the class names if it is labelled."""
    from common.data import SegmentationTask, labelled_lists, pretraining_lists, usable_cases
    from common.errors import DataError
    from common.transforms import read_volume

    try:
        cases = [case for part in labelled_lists(str(data)).values() for case in part]
        cases = list({case["image"]: case for case in cases}.values())
    except DataError:
        try:
            lists = pretraining_lists(str(data))
        except DataError as error:
            raise SystemExit(f"Stopped: {error}") from error
        (folder / "datalist.json").write_text(json.dumps(lists, indent=1), "utf-8")
        return {"learn": f"{len(lists['training'])} volumes of {data}, {len(lists['validation'])} to validate on"}, []
    top = 0
    for case in cases:
        if Path(case["label"]).is_file():
            top = max(top, int(read_volume(case["label"])[0].max()))
    labels = ["background", *(f"class {value}" for value in range(1, top + 1))]
    try:
        cases = usable_cases(cases, task=SegmentationTask(labels))
    except DataError as error:
        raise SystemExit(f"Stopped: {error}") from error
    random.Random(seed).shuffle(cases)
    if len(cases) < 3:
        raise SystemExit(
            f"Stopped: {data} has {len(cases)} usable labelled case(s); 3 are needed to train, validate and test"
        )
    fifth = max(1, len(cases) // 5)
    lists = {"training": cases[2 * fifth :], "validation": cases[:fifth], "test": cases[fifth : 2 * fifth]}
    (folder / "datalist.json").write_text(json.dumps(lists, indent=1), "utf-8")
    sizes = {name: len(part) for name, part in lists.items()}
    return {
        "learn": f"{sizes['training']} cases of {data} to train on and {sizes['validation']} to validate on",
        "test": f"{sizes['test']} other cases of that folder",
    }, labels


def _merge(settings: str, own: str) -> str:
    """Join two command lines of ``--name value`` pairs; the second replaces what both name."""
    words = [*settings.split(), *own.split()]
    return " ".join(f"{name} {value}" for name, value in dict(zip(words[::2], words[1::2], strict=True)).items())


def quickstart(
    bundle: str = "mae_resenc_l",
    data: str | None = None,
    output: str | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> None:
    """Run the chain and write the report.

    Args:
        bundle: any of the folders in bundles/.
        data: folder of your own NIfTI; with images/ and labels/ inside, segmentation is learned too.
        output: where everything goes; default quickstart/<bundle>.
        seed: of data, draws and networks.
        scale: factor on the number of training steps.
    """
    known = sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/pretrain.yaml"))
    if bundle not in known:
        raise SystemExit(f"Stopped: there is no bundle {bundle!r}; choose one of {', '.join(known)}")
    check_links(ROOT / "bundles" / bundle)
    if data is not None and not Path(data).is_dir():
        raise SystemExit(f"Stopped: there is no folder {data}; give --data a folder with NIfTI files")
    recipe = _BACKBONES["primus" if "primus" in bundle else "resenc"]
    folder = Path(output).absolute() if output else ROOT / "quickstart" / bundle
    settings = {"bundle": bundle, "data": data and str(Path(data).absolute()), "seed": seed, "scale": scale}
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "settings.json"
    if any(folder.iterdir()) and (not marker.exists() or json.loads(marker.read_text()) != settings):
        raise SystemExit(f"Stopped: {folder} holds something else already; empty it or give another --output")
    marker.write_text(json.dumps(settings))

    from ..preparing.template import LABELS, NOTICE, write_template_data

    began = time.monotonic()
    if data is None:
        print("simulated scans of the MNI152 template", flush=True)
        labels, notice = LABELS, NOTICE
        described = folder / "parts.json"
        if not described.exists():
            described.write_text(json.dumps(write_template_data(folder, seed=seed)), "utf-8")
        parts = json.loads(described.read_text("utf-8"))
    else:
        notice = "your own data"
        parts, labels = _own_data(Path(data), folder, seed)

    spacing, patch, more_steps = _sizes(folder)

    def longer(text: str) -> str:
        words = text.split()
        index = words.index("--iterations_per_epoch") + 1
        words[index] = str(max(1, round(int(words[index]) * scale * more_steps)))
        return " ".join(words)

    chain = Chain(bundle, folder)
    datalist = f"--datalist {shlex.quote(str(folder / 'datalist.json'))}"
    common = f"--spacing_mm {spacing} {recipe['network']} --num_workers 0"
    crop = f"--patch_size [{patch},{patch},{patch}]"
    own = next((text for name, text in _METHODS.items() if bundle.startswith(name)), "")
    pretraining = _merge(f"{crop} --batch_size 2 {longer(recipe['pretrain'])}", own)
    common_later = f"{common} {crop}"
    names = f"--labels {shlex.quote(str(labels))}"

    def place(key: str, path: str) -> str:
        return f"--{key} {shlex.quote(str(folder / path))}"

    chain.run(
        "pre-training without labels",
        "pretrain",
        *(datalist, common, pretraining, f"--val_iterations 4 --seed {seed}"),
        *(place("output_dir", "pretraining"), place("ckpt_dir", "models"), place("store_dir", "store")),
    )
    if labels:
        held_out = json.loads((folder / "datalist.json").read_text("utf-8"))["test"]
        (folder / "test.json").write_text(json.dumps({"validation": held_out}), "utf-8")
        for name, extra in (("pre-trained", ""), ("from scratch", "--from_scratch true")):
            where = name.replace(" ", "_")
            if (folder / where / "finished").exists():
                print(f"\n== fine-tuning {name}: done before")
                continue
            chain.run(
                f"fine-tuning, {name}",
                "train",
                *(datalist, common_later, longer(recipe["train"]), names, f"--seed {seed} --val_interval 2 {extra}"),
                *(place("pretrained", "models/pretrained_encoder.pt"), place("output_dir", where)),
                place("ckpt_dir", f"{where}/models"),
            )
            chain.run(
                f"predicting the unseen part, {name}",
                "inference",
                *(datalist, common_later, names, place("ckpt_dir", f"{where}/models"), "--overwrite true"),
                place("output_dir", f"{where}/predictions"),
            )
            chain.run(
                f"scoring, {name}",
                "evaluate",
                *(f"--datalist {shlex.quote(str(folder / 'test.json'))} --split validation", names),
                *(place("predictions", f"{where}/predictions"), place("output_dir", where)),
            )
            (folder / where / "finished").touch()

    from .report import write_report

    path = write_report(
        folder,
        bundle=bundle,
        labels=labels,
        parts=parts,
        notice=notice,
        template=data is None,
        sizes=f"{spacing:g} mm voxels, {patch}-voxel crops",
        commands=chain.commands,
        seconds={**chain.seconds, "everything": time.monotonic() - began},
        peak_mib=chain.peak_mib,
    )
    print(f"\nEverything took {time.monotonic() - began:.0f} s and at most {chain.peak_mib:.0f} MiB in one process.")
    print(f"Open {path} in a browser.")
