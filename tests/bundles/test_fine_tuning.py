# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Fine-tuning as a whole, from the bundles' own configs, run in this process: phases, resuming, data of all kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle
from torch import Tensor

from common.bundles import read_config
from common.errors import SettingsError
from common.handlers import FineTuningCheckpoint, FineTuningPhases
from common.weights import read_checkpoint, write_checkpoint

from ..conftest import NETWORK, ROOT, WHOLE_CHAIN, blobs, write_volume
from .conftest import Killed

RESENC, PRIMUS = "mae_resenc_l", "mae_primus_m"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    return


def narrow(bundle: str) -> dict[str, Any]:
    names = [name.removeprefix("--") for name in NETWORK[bundle][::2]]
    return dict(zip(names, map(json.loads, NETWORK[bundle][1::2]), strict=True))


def encoder(bundle: str, folder: Path, **settings: Any) -> Path:
    """Write a pre-trained encoder, of random weights."""
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/pretrain.yaml"))
    parser.update({**narrow(bundle), "patch_size": [16, 16, 16], **settings})
    torch.manual_seed(3)
    write_checkpoint(parser.get_parsed_content("backbone").state_dict(), folder / "pretrained_encoder.pt")
    return folder / "pretrained_encoder.pt"


def train(bundle: str, data: Path, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Fine-tune, tiny, and return the final weights."""
    arguments = {
        **narrow(bundle),
        "dataset_dir": str(data),
        "labels": ["background", "ball"],
        "pretrained": str(folder.parent / "pretrained_encoder.pt"),
        "store_dir": str(data / "store"),
        "output_dir": str(folder / "out"),
        "ckpt_dir": str(folder / "models"),
        "patch_size": [16, 16, 16],
        "epochs": 6,
        "iterations_per_epoch": 2,
        "val_iterations": 1,
        "num_workers": 0,
        "picture_interval": 0,
        "warmup_epochs": 1,
        "decoder_epochs": 2,
        **settings,
    }
    root = f"bundles/{bundle}"
    run_bundle(config_file=f"{root}/configs/train.yaml", bundle_root=root, logging_file=None, **arguments)
    return read_checkpoint(folder / "models" / "model_final.pt")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("bundle", "settings"),
    [
        (RESENC, {"schedule": "sawtooth"}),
        (RESENC, {"schedule": "valley", "tuning": "norm"}),
        (PRIMUS, {"schedule": "sawtooth", "tuning": "lora", "lora_rank": 2}),
        (PRIMUS, {"schedule": "warmup", "drop_path": 0.3}),
        (PRIMUS, {"schedule": "warmup", "amp": True}),
    ],
)
def test_a_run_that_is_cut_in_any_phase_resumes_exactly(
    bundle: str, settings: dict[str, Any], labelled: Path, tmp_path: Path, killed: Killed
) -> None:
    encoder(bundle, tmp_path)
    whole = train(bundle, labelled, tmp_path / "whole", **settings)
    history = json.loads((tmp_path / "whole" / "out" / "history.json").read_text())
    assert not (tmp_path / "whole" / "models" / "finetuning_state.pt").exists(), "a complete run needs no state"
    again = train(bundle, labelled, tmp_path / "again", **settings)
    assert_same(whole, again)
    for last in (1, 2, 3, 4) if settings["schedule"] == "sawtooth" else (2,):
        folder = tmp_path / f"cut_{last}"
        with killed(FineTuningCheckpoint, last):
            train(bundle, labelled, folder, **settings)
        assert read_checkpoint(folder / "models" / "finetuning_state.pt")["epoch"] == last
        assert_same(whole, train(bundle, labelled, folder, **settings))
        resumed = json.loads((folder / "out" / "history.json").read_text())
        assert [r["val_dice"] for r in resumed] == [r["val_dice"] for r in history]


def test_the_encoder_is_truly_frozen_and_then_is_not(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two epochs of the decoder alone the encoder is what was pre-trained, bit by bit; in the end it is not."""
    file = encoder(RESENC, tmp_path)
    start = {name: value for name, value in read_checkpoint(file).items() if name.startswith("encoder.")}
    seen: dict[int, dict[str, Any]] = {}
    save = FineTuningCheckpoint._save

    def look(self: FineTuningCheckpoint, engine: Any) -> None:
        save(self, engine)
        network = self.module
        seen[engine.state.epoch] = {
            "same": all(torch.equal(network.state_dict()[name], value) for name, value in start.items()),
            "moved": not torch.equal(network.state_dict()["head.weight"], first_head),
            "states": len(self.optimizer.state),
            "gradients": sum(p.grad is not None for n, p in network.named_parameters() if n.startswith("encoder.")),
            "parameters": len(list(network.parameters())),
            "encoder": len(list(network.encoder.parameters())),
        }

    first_head = torch.zeros(())
    monkeypatch.setattr(FineTuningCheckpoint, "_save", look)
    train(RESENC, labelled, tmp_path / "run", schedule="sawtooth", epochs=5)
    for epoch in (1, 2):
        assert seen[epoch]["same"]
        assert seen[epoch]["moved"]
        assert seen[epoch]["gradients"] == 0
        assert seen[epoch]["states"] == seen[epoch]["parameters"] - seen[epoch]["encoder"], "no memory either"
    assert not seen[3]["same"]
    assert seen[3]["gradients"] == seen[3]["encoder"]
    assert seen[3]["states"] == seen[3]["parameters"]


def test_a_frozen_encoder_has_no_share_in_the_clip_and_an_adapted_input_learns() -> None:
    """The in-projection that was adapted to more channels belongs to the decoder's phase."""
    from ignite.engine import Engine

    from common.networks import ResEncUNet
    from common.optimizers import FineTuningSchedule

    for channels in (1, 2):
        network = ResEncUNet(channels, 2, features_per_stage=[4, 8], blocks_per_stage=[1, 1])
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
        schedule = FineTuningSchedule("sawtooth", lr=0.5, epochs=10, decoder_epochs=2, warmup_epochs=2)
        phases = FineTuningPhases(network, optimizer, schedule, adapted_input=channels > 1)
        engine = Engine(lambda *_: None)
        network(torch.randn(1, channels, 8, 8, 8)).mean().backward()
        engine.state.epoch = 1
        phases(engine)
        assert optimizer.param_groups[0]["lr"] == 0.5
        network(torch.randn(1, channels, 8, 8, 8)).mean().backward()
        with_gradient = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
        stem = [p.grad is not None for p in network.encoder.stem.conv.parameters()]
        assert all(stem) == (channels > 1)
        assert ("encoder" in with_gradient) == (channels > 1)
        assert "decoder" in with_gradient
        optimizer.step()
        engine.state.epoch = 3
        phases(engine)
        assert len(optimizer.state) == 0, "momentum of the decoder's phase is forgotten"
        assert all(p.requires_grad for p in network.parameters())


def test_another_run_in_the_same_folder_overwrites_nothing(
    labelled: Path, tmp_path: Path, killed: Killed, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder(RESENC, tmp_path)
    folder, models = tmp_path / "run", tmp_path / "run" / "models"
    one = train(RESENC, labelled, folder)
    train(RESENC, labelled, folder, seed=1)
    best = read_checkpoint(models / "model_previous.pt")
    assert best.keys() == one.keys()
    with killed(FineTuningCheckpoint):
        train(RESENC, labelled, folder, seed=2)
    refused(r"other settings \(seed 2 -> 3\)", RESENC, labelled, folder, seed=3)
    capsys.readouterr()
    train(RESENC, labelled, folder, seed=3, resume=False)
    assert "is of another run (--resume false), this one starts afresh" in capsys.readouterr().out
    assert (models / "finetuning_state_previous.pt").exists()
    assert not (models / "finetuning_state.pt").exists()
    assert len(list(models.glob("model_previous*.pt"))) == 3


def refused(why: str, bundle: str, data: Path, folder: Path, **settings: Any) -> None:
    with pytest.raises(SettingsError) as raised:
        train(bundle, data, folder, **settings)
    told = str(raised.value)
    assert re.search(why, told), told
    assert "continue it with those, or start again with --resume false, which keeps it aside" in told


def test_whatever_changes_the_mathematics_is_another_run(labelled: Path, tmp_path: Path, killed: Killed) -> None:
    """A cut run goes on with its own encoder and recipe only, wherever in the config a change is made."""
    file = encoder(RESENC, tmp_path)
    folder = tmp_path / "run"
    with killed(FineTuningCheckpoint):
        train(RESENC, labelled, folder)
    state = (folder / "models" / "finetuning_state.pt").read_bytes()
    for name, value, where in (
        ("weight_decay", 0.5, r"optimizer\.weight_decay 3e-05 -> 0\.5"),
        ("momentum", 0.1, r"optimizer\.momentum 0\.99 -> 0\.1"),
        ("optimizer#nesterov", False, r"optimizer\.nesterov True -> False"),
        ("foreground", 1.0, r"foreground 0\.33 -> 1\.0"),
        ("augmentation#noise_probability", 0.9, r"augmentation\.noise_probability 0\.1 -> 0\.9"),
        ("rotation_probability", 0.0, r"spatial\.rotation_probability 0\.2 -> 0\.0"),
        ("dropout", 0.5, r"dropout 0\.0 -> 0\.5"),
        ("initialization", "nnunet", r"initialization 'he' -> 'nnunet'"),
        ("warmup_epochs", 2, r"learning_rate\.warmup_epochs 1 -> 2"),
        ("clip_norm", 1.0, r"clip_norm 12\.0 -> 1\.0"),
        ("batch_size", 4, r"batch_size 2 -> 4"),
    ):
        refused(where, RESENC, labelled, folder, **{name: value})
    weights = read_checkpoint(file)
    file.with_suffix(".json").unlink(missing_ok=True)  # which says what the file was
    write_checkpoint({name: value + 1 for name, value in weights.items()}, file)  # the same path, another encoder
    refused("another encoder", RESENC, labelled, folder)
    assert (folder / "models" / "finetuning_state.pt").read_bytes() == state
    file.with_suffix(".json").unlink(missing_ok=True)
    write_checkpoint(weights, file)
    train(RESENC, labelled, folder, num_workers=1, save_interval=2, val_interval=2)  # none of these changes it
    history = json.loads((folder / "out" / "history.json").read_text())
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    train(RESENC, labelled, folder)  # a finished run is repeated, and what it wrote stays
    assert json.loads((folder / "out" / "earlier" / "history.json").read_text()) == history
    assert len(list((folder / "out" / "earlier").glob("events.out.*"))) >= 1
    assert not {path.name for path in (folder / "out").glob("events.out.*")} & {
        path.name for path in (folder / "out" / "earlier").iterdir()
    }


@pytest.mark.parametrize("how", ["all", "one group", "one case", "unseen"])
def test_validation_on_training_cases_is_called_so(
    how: str, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever reads the scores learns that they are of cases that were trained on."""
    settings: dict[str, Any] = {"from_scratch": True, "epochs": 2, "warmup_epochs": 0, "picture_interval": 1}
    if how == "all":
        settings["fold"] = "all"
    elif how == "one group":
        rows = [f"case_{index},a" for index in range(5)]
        (tmp_path / "groups.csv").write_text("\n".join(["case,patient", *rows]))
        settings |= {"groups": str(tmp_path / "groups.csv"), "group": "patient"}
    elif how == "one case":
        for index in range(1, 5):
            for part in ("images", "labels"):
                (labelled / part / f"case_{index}.nii.gz").unlink()
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set", lambda self, **given: titles.append(str(given.get("title"))))
    train(RESENC, labelled, tmp_path / "run", **settings)
    on_training = how != "unseen"
    history = json.loads((tmp_path / "run" / "out" / "history.json").read_text())
    assert ["validation_on_training_cases" in record for record in history] == [on_training] * 2
    for name in ("model", "model_final"):
        about = json.loads((tmp_path / "run" / "models" / f"{name}.json").read_text())
        assert about["validation_on_training_cases"] is on_training
    assert ("note: validation on training cases" in capsys.readouterr().out) is on_training
    assert {title for title in titles if title.startswith("validation")} == {
        "validation on training cases" if on_training else "validation"
    }


def test_what_inference_must_know_is_beside_the_model(labelled: Path, tmp_path: Path) -> None:
    encoder(PRIMUS, tmp_path)
    train(PRIMUS, labelled, tmp_path / "run", spacing_mm="median", normalization="ct", fold=1, epochs=2)
    about = json.loads((tmp_path / "run" / "models" / "model.json").read_text())
    settings = about["settings"]
    assert settings["spacing_mm"] == [1.0, 1.0, 1.0]
    assert len(settings["normalization"][0]["ct"]) == 4
    assert {"labels", "regions", "ignore_label", "channels", "reorient", "patch_size", "embed_dim", "depth"} <= {
        *settings
    }
    assert about["epoch"] in (1, 2)
    assert 0 <= about["val_dice_average"] <= 1
    history = json.loads((tmp_path / "run" / "out" / "history.json").read_text())
    assert {"val_dice", "val_dice_ball", "train_cross_entropy", "train_dice", "gradient_norm"} <= history[-1].keys()


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_the_best_model_is_that_of_the_moving_average(
    bundle: str, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.handlers import PooledDice

    scores = iter([0.5, 0.9, 0.2, 0.6])
    monkeypatch.setattr(PooledDice, "compute", lambda self: next(scores))
    train(bundle, labelled, tmp_path / "run", from_scratch=True, epochs=4, decoder_epochs=0)
    about = json.loads((tmp_path / "run" / "models" / "model.json").read_text())
    assert about["epoch"] == 2
    assert about["val_dice_average"] == pytest.approx(0.9 * 0.5 + 0.1 * 0.9)
    final = json.loads((tmp_path / "run" / "models" / "model_final.json").read_text())
    assert final["epoch"] == 4


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
@pytest.mark.parametrize("kind", ["one case", "absent class", "two channels", "thick slices", "small", "regions"])
def test_data_of_every_kind_trains_and_is_predicted(kind: str, bundle: str, labelled: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "decoder_epochs": 0, "from_scratch": True}
    images, labels = labelled / "images", labelled / "labels"
    names = ["background", "ball"]
    if kind == "one case":
        settings |= {"token_size": 4} if bundle == PRIMUS else {}  # inference must find it beside the model
        for index in range(1, 5):
            (images / f"case_{index}.nii.gz").unlink()
            (labels / f"case_{index}.nii.gz").unlink()
    elif kind == "absent class":
        names = ["background", "$1/0 #1", "@never"]  # names that somebody's file gives are no commands
        (labelled / "dataset.json").write_text(json.dumps({"labels": {name: i for i, name in enumerate(names)}}))
        settings["labels"] = str(labelled / "dataset.json")
    elif kind == "two channels":
        settings["channels"] = 2
        for index in range(5):
            image = blobs(index)[0]
            write_volume(images / f"case_{index}.nii.gz", np.stack([image, -image], axis=-1))
    elif kind == "thick slices":
        settings["spacing_mm"] = "median"
        for index in range(5):
            image, mask = blobs(index, (40, 42, 18))
            for folder, values in ((images, image), (labels, mask)):
                path = write_volume(folder / f"case_{index}.nii.gz", values)
                nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 6.0, 1.0])), path)
    elif kind == "small":
        settings["patch_size"] = [48, 48, 48]
        if bundle == RESENC:  # whose further outputs are of training alone
            settings |= {"features_per_stage": [4, 4, 8, 8], "blocks_per_stage": [1, 1, 1, 1], "deep_supervision": True}
    else:
        names = ["background", "shell", "core"]
        settings |= {"labels": names, "regions": {"ball": [1, 2], "core": [2]}}
        for index in range(5):
            mask = blobs(index)[1]
            core = mask * (np.roll(mask, 3, 0) & np.roll(mask, -3, 0))
            write_volume(labels / f"case_{index}.nii.gz", mask + core)
    train(bundle, labelled, tmp_path / "run", **settings)
    record = json.loads((tmp_path / "run" / "out" / "history.json").read_text())[-1]
    assert np.isfinite(record["train_loss"])
    model = read_checkpoint(tmp_path / "run" / "models" / "model.pt")
    assert all(torch.isfinite(value).all() for value in model.values())
    assert not any("deep" in name for name in model)
    if kind == "absent class":
        each = [record[f"val_dice_{name}"] for name in names[1:]]
        assert record["val_dice"] == pytest.approx(np.nanmean(each))
        about = json.loads((tmp_path / "run" / "models" / "model.json").read_text())
        assert about["settings"]["labels"] == names
    root = f"bundles/{bundle}"
    places = {"ckpt_dir": str(tmp_path / "run" / "models"), "output_dir": str(tmp_path / "predictions")}
    run_bundle(
        config_file=f"{root}/configs/inference.yaml",
        bundle_root=root,
        logging_file=None,
        dataset_dir=str(images),
        num_workers=0,
        strict=True,
        pictures=1,
        **places,
    )
    for path in sorted(images.iterdir()):
        source, predicted = nib.load(path), nib.load(tmp_path / "predictions" / path.name)
        assert predicted.shape == source.shape[:3]
        np.testing.assert_array_equal(predicted.affine, source.affine)
        assert set(np.unique(predicted.dataobj)) <= set(range(len(names)))


def test_pictures_and_curves_are_drawn(labelled: Path, tmp_path: Path) -> None:
    train(RESENC, labelled, tmp_path / "run", from_scratch=True, epochs=3, picture_interval=2, schedule="default")
    out = tmp_path / "run" / "out"
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["epoch_2.png", "epoch_3.png"]
    assert (out / "curves.png").stat().st_size > 10_000
    page = (out / "progress.html").read_text("utf-8")
    assert "Epoch 3 of 3 is done" in page
    assert "Dice of each class in validation" in page
    assert list(out.glob("events.out.tfevents.*"))


def test_settings_that_make_no_sense_end_in_a_sentence(labelled: Path, tmp_path: Path) -> None:
    for settings, words in (
        ({"tuning": "lora"}, "has none"),
        ({"tuning": "norm", "from_scratch": True}, "mean nothing yet"),
        ({"schedule": "cosine"}, "must be one of"),
        ({"labels": "lesion"}, "background first"),
    ):
        encoder(RESENC, tmp_path)
        with pytest.raises(SettingsError, match=words):
            train(RESENC, labelled, tmp_path / "run", **settings)
