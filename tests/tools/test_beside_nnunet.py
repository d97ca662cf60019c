# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The comparison with nnU-Net, of which a stand-in does what it would: plans, trains and predicts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from ignite.engine import Engine, Events

from common.data.listing.descriptions import segmentation_task
from common.errors import DataError, SettingsError, WeightsError
from common.tasks import SegmentationTask
from common.weights import read_configuration
from common.weights.export import resenc_arguments
from tools.commanding.parsing import parse
from tools.comparing import comparison as tool
from tools.comparing import peer, planning, report, running
from tools.comparing.clock import ProcessorClock
from tools.comparing.planning import NnunetFolders, narrowed, run_nnunet, write_raw
from tools.comparing.report import figures, markdown
from tools.comparing.running import Comparison, our_settings
from tools.comparing.settings import BesideNnunet

from ..conftest import blobs, write_cases, write_volume

DATASET = {"channel_names": {"0": "channel 0"}, "labels": {"background": 0, "ball": 1}}


def plans(**changes: Any) -> dict[str, Any]:
    """Return plans as nnU-Net's planner with residual encoders makes them for hippocampi, the slices of no use here."""
    arguments = resenc_arguments([32, 64, 128, 256], [1, 3, 4, 6])
    configuration: dict[str, Any] = {
        "batch_size": 9,
        "patch_size": [40, 56, 40],
        "spacing": [1.0, 1.5, 2.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            "arch_kwargs": json.loads(json.dumps(arguments)),
        },
    }
    return {
        "plans_name": "nnUNetResEncUNetMPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "configurations": {"2d": {}, "3d_fullres": configuration},
        **changes,
    }


class Nnunet:
    """What nnU-Net is asked, and what it leaves behind; it segments by a threshold. ``fails`` says in what it fails."""

    def __init__(self, fails: str = "") -> None:
        self.asked: list[str] = []
        self.fails = fails

    def __call__(self, command: Sequence[str | Path], *, environment: Mapping[str, str], log: Path) -> None:
        name = command[4] if str(command[3]).endswith("peer.py") else Path(command[0]).name
        self.asked.append(str(name))
        if name == self.fails:
            raise SystemExit("Stopped: it failed")
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["nnUNet_n_proc_DA"] == ("0" if name in ("train", "predict") else "1"), "else planning fails"
        if name == "nnUNetv2_plan_experiment":
            file = Path(environment["nnUNet_preprocessed"], "Dataset001_Beside", "nnUNetResEncUNetMPlans.json")
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(plans()))
        elif name in ("train", "predict"):
            getattr(self, name)(json.loads(Path(command[5]).read_text()), environment)

    def train(self, job: dict[str, Any], environment: Mapping[str, str]) -> None:
        model = Path(environment["nnUNet_results"]) / job["trainer"]
        (model / "fold_all").mkdir(parents=True)
        told = {"processor_seconds": [4.0] * job["epochs"], "model": str(model), "parameters": 1000}
        Path(job["report"]).write_text(json.dumps(told))

    def predict(self, job: dict[str, Any], _: Mapping[str, str]) -> None:
        assert (Path(job["model"]) / "fold_all").is_dir()
        Path(job["output"]).mkdir()
        for file in sorted(Path(job["images"]).iterdir()):
            image = nib.load(file)
            found = (np.asarray(image.dataobj) > 145).astype(np.uint8)
            name = file.name.replace("_0000", "")
            nib.save(nib.Nifti1Image(found, image.affine), Path(job["output"]) / name)


@pytest.fixture
def nnunet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Nnunet:
    found = Nnunet()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "nnunet_python", lambda: Path("/nowhere/bin/python"))
    monkeypatch.setattr(report, "nnunet_version", lambda python: "2.8.1 with torch 2.13.0")
    for module in (planning, running):
        monkeypatch.setattr(module, "run_nnunet", found)
    return found


def asked(data: Path, **told: Any) -> BesideNnunet:
    settings: dict[str, Any] = {
        "train": 3,
        "test": 2,
        "seeds": 1,
        "epochs": 2,
        "iterations": 1,
        "batch_size": 1,
        "blocks": 1,
    }
    settings |= {"stages": 2, "features": 4, "patch_size": (16, 16, 16), "labels": ("background", "ball")}
    settings["output"] = data.parent / "beside_nnunet"
    return BesideNnunet(data=data, **{**settings, **told})


def test_both_are_trained_scored_and_put_side_by_side(
    nnunet: Nnunet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first call is cut when nnU-Net predicts; the second goes on from there, and a third has nothing to do."""
    data = write_cases(tmp_path / "labelled", 5)
    page = tmp_path / "page.md"
    page.write_text("# nnU-Net\n\n<!-- figures: nnU-Net -->\nold\n<!-- end of figures: nnU-Net -->\nkept\n")
    nnunet.fails = "predict"
    with pytest.raises(SystemExit, match="it failed"):
        tool.beside_nnunet(asked(data, page=page))
    planned = ["nnUNetv2_extract_fingerprint", "nnUNetv2_plan_experiment", "nnUNetv2_preprocess"]
    assert nnunet.asked == [*planned, "train", "predict"]
    nnunet.asked, nnunet.fails = [], ""
    tool.beside_nnunet(asked(data, page=page))
    assert nnunet.asked == ["predict"], "what is planned and trained stays"
    nnunet.asked = []
    tool.beside_nnunet(asked(data, page=page))
    assert nnunet.asked == []

    found = json.loads((tmp_path / "beside_nnunet" / "comparison.json").read_text())["rows"]
    theirs, ours = found
    assert [theirs["arm"], ours["arm"]] == ["nnUNetTrainer", "ours"]
    assert theirs["dice"] > 0.99, "predictions and references are of the same cases"
    assert ours["difference"] == pytest.approx(ours["dice"] - theirs["dice"])
    assert theirs["seconds"] == 4.0
    assert 0 < ours["seconds"] < 4.0
    assert ours["ratio"] == pytest.approx(ours["seconds"] / 4.0)
    text = page.read_text()
    assert "old" not in text
    assert "One seed each: intervals and p are of cases, not of the luck of a run." in text
    assert text.endswith("kept\n")
    assert "3 cases to learn from, 2 unseen; 1 seed(s); 2 x 1 iterations of 1 patches of 16 x 16 x 16" in text
    assert "| nnUNetTrainer | 100.0" in capsys.readouterr().out

    folder = tmp_path / "beside_nnunet"
    told = json.loads((folder / "runs" / "ours" / "seed_0" / "train.json").read_text())
    narrow = json.loads((folder / "nnunet/preprocessed/Dataset001_Beside/narrowPlans.json").read_text())
    configuration = narrow["configurations"]["3d_fullres"]
    network = configuration["architecture"]["arch_kwargs"]
    assert told["features_per_stage"] == network["features_per_stage"] == [4, 8]
    assert told["blocks_per_stage"] == network["n_blocks_per_stage"] == [1, 1]
    assert told["patch_size"] == configuration["patch_size"]
    assert told["batch_size"] == configuration["batch_size"] == 1
    assert told["spacing_mm"] == configuration["spacing"]
    assert (told["schedule"], told["from_scratch"], told["epochs"], told["iterations_per_epoch"]) == (
        "default",
        True,
        2,
        1,
    )
    lists = json.loads((folder / "runs" / "ours" / "seed_0" / "datalist.json").read_text())
    learnt, unseen = ({Path(case["image"]).name for case in lists[part]} for part in ("training", "test"))
    assert len(learnt) == 3
    assert len(unseen) == 2
    assert not learnt & unseen
    with pytest.raises(SettingsError, match=r"holds a comparison of other epochs; give another --output"):
        tool.beside_nnunet(asked(data, epochs=3))
    write_volume(data / "labels" / "case_0.nii.gz", blobs(7)[1])
    with pytest.raises(SettingsError, match="of other contents"):
        tool.beside_nnunet(asked(data))


def test_what_the_plan_says_is_what_train_yaml_is_told(tmp_path: Path) -> None:
    """Also where nnU-Net exchanges axes: the patch and spacing of ours are in the order of the file."""
    order = [2, 0, 1]
    given = asked(tmp_path, stages=3, features=8, blocks=2, batch_size=2, patch_size=None)
    made = narrowed(plans(transpose_forward=order), given)
    assert list(made["configurations"]) == ["3d_fullres"]
    configuration = made["configurations"]["3d_fullres"]
    assert configuration["batch_dice"] is False
    network = configuration["architecture"]["arch_kwargs"]
    assert (network["n_stages"], network["features_per_stage"]) == (3, [8, 16, 32])
    assert network["n_blocks_per_stage"] == [1, 2, 2], "no more blocks than planned"
    planned = read_configuration(made, DATASET, "3d_fullres", tmp_path)
    more: dict[str, Any] = {"folder": tmp_path, "task": SegmentationTask(["background", "ball"])}
    whole = Comparison(asked=given, training=[], unseen=[], planned=planned, python=tmp_path, **more)
    told = our_settings(whole, {"lr": 0.1})
    assert [told["patch_size"][axis] for axis in order] == configuration["patch_size"] == [40, 56, 40]
    assert [told["spacing_mm"][axis] for axis in order] == [1.0, 1.5, 2.0]
    assert told["features_per_stage"] == network["features_per_stage"]
    assert told["blocks_per_stage"] == network["n_blocks_per_stage"]
    assert (told["batch_size"], told["normalization"], told["reorient"]) == (2, ["zscore"], False)
    assert told["lr"] == 0.1
    assert narrowed(plans(), asked(tmp_path, stages=9, features=64, patch_size=None))["configurations"]["3d_fullres"][
        "architecture"
    ]["arch_kwargs"]["features_per_stage"] == [32, 64, 128, 256], "never wider than planned"
    mine = narrowed(plans(transpose_forward=order), asked(tmp_path, patch_size=(16, 24, 32)))
    assert mine["configurations"]["3d_fullres"]["patch_size"] == [32, 16, 24]


def test_plans_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="a side of the patch is 20, which 4 stages do not halve evenly"):
        narrowed(plans(), asked(tmp_path, stages=4, patch_size=(16, 20, 16)))
    flat = plans()
    flat["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"][1] = [1, 2, 2]
    made = narrowed(flat, asked(tmp_path))
    with pytest.raises(WeightsError, match="strides"):
        read_configuration(made, DATASET, "3d_fullres", tmp_path)


def results(
    ours: float, *, seconds: float = 0.2, seeds: int = 3, cases: int = 20
) -> dict[tuple[str, int], dict[str, Any]]:
    """Two classes; cases differ far more than the arms."""
    rng = np.random.default_rng(0)
    level = rng.uniform(0.5, 0.8, cases)
    found = {}
    for arm, gain, spent in (("nnUNetTrainer", 0.0, 0.4), ("ours", ours, seconds)):
        for seed in range(seeds):
            scores = {
                f"case_{i}": {"scores": {n: {"dice": level[i] + gain + more, "nsd": 1.0} for n, more in CLASSES}}
                for i in range(cases)
            }
            found[arm, seed] = {"cases": scores, "processor_seconds": [spent * 5, spent * 5, 9.0], "parameters": 7}
    return found


CLASSES = (("head", 0.1), ("tail", 0.0))


@pytest.mark.parametrize("gain", [0.03, -0.03])
def test_differences_are_paired_and_seconds_are_of_an_iteration(gain: float, tmp_path: Path) -> None:
    made = results(gain)
    whole: Any = type("Whole", (), {"folder": tmp_path, "arms": ["nnUNetTrainer", "ours"]})
    rows = figures(report.block_of(whole, made), made, iterations=5)
    theirs, ours = rows
    assert "difference" not in theirs
    assert ours["difference"] == pytest.approx(gain)
    assert (ours["low"], ours["high"]) == pytest.approx((gain, gain)), "cases that differ alike leave no doubt"
    assert ours["p"] < 0.001
    assert ours["classes"]["head"] == pytest.approx(ours["classes"]["tail"] + 0.1)
    assert ours["dice"] == pytest.approx(np.mean(list(ours["classes"].values())))
    assert ours["seeds"] == pytest.approx([ours["dice"]] * 3)
    assert (theirs["seconds"], ours["seconds"], ours["ratio"]) == pytest.approx((0.4, 0.2, 0.5)), "not the slow epoch"
    text = markdown(rows, "about").pop(-2)
    assert text.startswith(f"| ours | {100 * ours['dice']:.1f} [")
    assert f"| **{100 * gain:+.2f}** [" in text
    assert text.endswith("| 0.200 | **0.50** |")


def test_the_clock_counts_iterations_alone(tmp_path: Path) -> None:
    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    engine = Engine(lambda *_: work(0.02))
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: work(0.1))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: work(0.1))
    ProcessorClock(str(tmp_path / "clock.json")).attach(engine)
    engine.run(range(3), max_epochs=2)
    spent = json.loads((tmp_path / "clock.json").read_text())
    assert len(spent) == 2
    assert all(0.06 <= one < 0.1 for one in spent)


def test_a_trainer_of_nnunet_keeps_its_name_and_is_timed() -> None:
    class nnUNetTrainerOther:  # noqa: N801 (nnU-Net's)
        def __init__(self) -> None:
            self.told: list[Any] = []

        def on_train_epoch_start(self) -> None:
            self.told.append("start")

        def on_train_epoch_end(self, outputs: Any) -> None:
            self.told.append(outputs)

    trainer = peer.timed(nnUNetTrainerOther)()
    assert type(trainer).__name__ == "nnUNetTrainerOther", "its folder, and what predicts finds its network by"
    for epoch in range(2):
        trainer.on_train_epoch_start()
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        trainer.on_train_epoch_end([epoch])
    assert trainer.told == ["start", [0], "start", [1]]
    assert len(trainer.processor_seconds) == 2
    assert all(0.02 <= one < 0.05 for one in trainer.processor_seconds)
    assert not any(name in vars(peer) for name in ("torch", "numpy", "common")), "it runs in another environment"


def test_files_are_given_to_nnunet_under_numbers(tmp_path: Path) -> None:
    image, mask = blobs(0)
    cases = []
    for name in ("a.nii.gz", "b.nii"):
        case = {"image": str(write_volume(tmp_path / "images" / name, image))}
        cases.append(case | {"label": str(write_volume(tmp_path / "labels" / name, mask))})
    folders = NnunetFolders(tmp_path / "nnunet")
    task = SegmentationTask(["bg", "ball"])
    write_raw(folders, task, cases, cases[1:])
    assert sorted(path.name for path in (folders.raw / "imagesTr").iterdir()) == [
        f"case_{number:03d}_0000.nii.gz" for number in range(2)
    ]
    assert [path.name for path in folders.unseen.iterdir()] == ["case_000_0000.nii.gz"]
    written = nib.load(folders.raw / "labelsTr" / "case_001.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), mask)
    content = json.loads(folders.dataset.read_text())
    assert content["labels"] == {"background": 0, "ball": 1}, "nnU-Net knows one name of the background"
    assert content["numTraining"] == 2
    (tmp_path / "images" / "c.nrrd").write_text("NRRD0004")
    with pytest.raises(DataError, match=r"c\.nrrd is no NIfTI"):
        write_raw(folders, task, [{**cases[0], "image": str(tmp_path / "images" / "c.nrrd")}], cases)
    for wrong in (
        segmentation_task({"background": 0, "ball": 4}),
        SegmentationTask(["background", "ball"], ignore_label=2),
        SegmentationTask(["background", "a", "b"], regions={"both": [1, 2], "b": [2]}),
    ):
        with pytest.raises(SettingsError, match="values 0, 1, 2"):
            write_raw(folders, wrong, cases, cases)


def test_what_nnunet_says_when_it_fails_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    run_nnunet([sys.executable, "-c", "print('before')"], environment={}, log=log)
    with pytest.raises(SystemExit, match=r"nnU-Net failed, see .*log\.txt: told why$"):
        run_nnunet([sys.executable, "-c", "import sys; sys.exit('told why')"], environment={}, log=log)
    assert log.read_text().split("\n")[:2] == ["before", "told why"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--bundle mae_primus_m", "nnU-Net plans residual U-Nets"),
        ("--patch_size 16,16", "must be three sides"),
        ("--trainers a,a", "'a' is named twice"),
        ("--variants {'ours':{}}", "'ours' is named twice"),
        ("--train 1", "--train is '1'; it must be a whole number from 2"),
        ("--lrr 0.1", r"unknown setting --lrr \(did you mean --lr"),
        ("--variants {'x':{'lrr':1}}", "unknown setting --lrr"),
        ("--variants {'x':{'from_scratch':False}}", "--from_scratch is decided by the comparison"),
        ("--variants {'Ours!':{}}", "would share the folder ours"),
        ("--train 4", "has 5 labelled cases, fewer than --train 4 and --test 2"),
        ("--labels lesion,ball", "labels is"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(
    nnunet: Nnunet, labelled: Path, tmp_path: Path, line: str, told: str
) -> None:
    usual = {"--train": "3", "--test": "2", "--labels": "background,ball"}
    words = line.split()
    given = [word for pair in ({**usual} | dict(zip(words[::2], words[1::2], strict=True))).items() for word in pair]
    with pytest.raises(SettingsError, match=told):
        tool.beside_nnunet(parse("beside_nnunet", BesideNnunet, [str(labelled), *given]))
    assert nnunet.asked == []
    assert not (tmp_path / "beside_nnunet").exists()


def test_labels_are_those_of_the_folder_unless_given(nnunet: Nnunet, labelled: Path) -> None:
    with pytest.raises(SettingsError, match="name the classes"):
        tool.beside_nnunet(asked(labelled, labels=None))
    (labelled / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "other": 1, "ball": 2}}))
    with pytest.raises(SettingsError, match="ball"):
        tool.beside_nnunet(asked(labelled))


def test_an_arm_keeps_its_settings(tmp_path: Path) -> None:
    planned = read_configuration(narrowed(plans(), asked(tmp_path)), DATASET, "3d_fullres", tmp_path)

    def whole(**variants: Any) -> Comparison:
        task = SegmentationTask(["background", "ball"])
        told = asked(tmp_path, variants=variants)
        return Comparison(tmp_path, told, task, [], [], planned, tmp_path)

    running.check_arms(whole(slow={"lr": 0.1}))
    running.check_arms(whole(slow={"lr": 0.1}, fast={"lr": 1.0}))
    with pytest.raises(SettingsError, match="was run with other settings of 'slow'"):
        running.check_arms(whole(slow={"lr": 0.2}))
