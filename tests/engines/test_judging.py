# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings are judged before any work, and a caller in Python gets the sentence itself."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.bundle import run as run_bundle

from common.bundles import read_config
from common.engines.judging import judge
from common.errors import DataError, SettingsError
from tools.studies.reading import read_study

from ..conftest import ROOT

NUMBER = "it must be a whole number from"
REFUSED = [
    ({"epochs": 2.5}, f"--epochs is 2.5; {NUMBER} 1"),
    ({"epochs": 0}, f"--epochs is 0; {NUMBER} 1"),
    ({"epochs": "ten"}, f"--epochs is 'ten'; {NUMBER} 1"),
    ({"batch_size": True}, f"--batch_size is True; {NUMBER} 1"),
    ({"num_workers": -1}, f"--num_workers is -1; {NUMBER} 0"),
    ({"train#trainer#max_epochs": 2.5}, f"--train#trainer#max_epochs is 2.5; {NUMBER} 1"),
    ({"device": "gpu"}, "--device is 'gpu'; it must be cpu, cuda, cuda:0, mps or the like"),
    ({"device": "cuda:99"}, "--device is cuda:99, and PyTorch finds "),
    ({"batch_size": 6, "accumulation_steps": 4}, "batch_size 6 does not split over 1 process(es) x 4 accumulation"),
]
NO_BATCHES = {"inference", "evaluate", "features"}


@pytest.mark.parametrize("kind", ["pretrain", "train", "train_classification", "inference", "evaluate", "features"])
@pytest.mark.parametrize("bundle", ["mae_resenc_l", "simmim_primus_m"])
def test_every_workflow_is_judged_before_any_work(bundle: str, kind: str, tmp_path: Path) -> None:
    """The data are not there, which is said if the settings are right: nobody looked for them before."""
    root = ROOT / "bundles" / bundle
    config = read_config(root / "configs" / f"{kind}.yaml")
    count = 0
    for settings, words in REFUSED:
        if {name.split("#")[0] for name in settings} <= config.keys() and (
            kind not in NO_BATCHES or len(settings) == 1
        ):
            with pytest.raises(SettingsError) as refused:
                run_bundle(
                    config_file=str(root / "configs" / f"{kind}.yaml"),
                    logging_file=False,
                    bundle_root=str(tmp_path),
                    **settings,
                )
            assert str(refused.value).startswith(words)
            assert "\n" not in str(refused.value)
            assert (
                refused.value.__cause__ is None
                or "torch" in type(refused.value.__cause__).__module__
                or settings.get("device")
            )
            count += 1
    assert count >= {"evaluate": 1, "inference": 3, "features": 3}.get(kind, 8)
    assert not list(tmp_path.iterdir())


def test_names_in_another_order_than_the_data_say_are_refused(labelled: Path, tmp_path: Path) -> None:
    (labelled / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball": 1, "core": 2}}))
    for kind in ("train", "evaluate"):
        where = {"config_file": str(ROOT / f"bundles/mae_resenc_l/configs/{kind}.yaml"), "bundle_root": str(tmp_path)}
        with pytest.raises(SettingsError, match=r"labels calls the value 1 'core', and .*dataset\.json calls 2 so"):
            run_bundle(**where, logging_file=False, dataset_dir=str(labelled), labels=["background", "core", "ball"])
    assert not list(tmp_path.glob("models"))


def workflow(tmp_path: Path, *entries: str, **settings: Any) -> ConfigWorkflow:
    config = {"imports": ["$from common.errors import DataError"], "epochs": 1, "own": {"_target_": "builtins.dict"}}
    config["settings_check"] = {"_target_": "common.engines.check_settings"}
    config["run"] = ["@settings_check", *entries]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ConfigWorkflow(str(tmp_path / "config.json"), meta_file=None, logging_file=False, **settings)


def test_what_fails_later_says_itself_why(tmp_path: Path) -> None:
    raises = "$(_ for _ in ()).throw({})"
    for error, kind, words in (
        ("DataError('a.nii is empty')", DataError, "^a.nii is empty$"),
        ("OSError(28, 'No space left on device', '/out/x')", SettingsError, "^the disk is full while writing /out/x"),
        ("KeyError('x')", RuntimeError, "Failed to evaluate"),
    ):
        with pytest.raises(kind, match=words):
            workflow(tmp_path, raises.format(error)).run()


def test_nothing_of_a_run_is_kept_when_it_has_ended(tmp_path: Path) -> None:
    """Several runs of one process would hold the memory of all."""
    one = workflow(tmp_path, "$print(@epochs)")
    one.run()
    held = weakref.ref(one.parser)
    del one
    gc.collect()
    assert held() is None


def test_who_mends_a_setting_may_run_again(tmp_path: Path) -> None:
    one = workflow(tmp_path, "$print(@epochs)", epochs=2.5)
    with pytest.raises(SettingsError, match=r"epochs is 2\.5"):
        one.run()
    one.parser["epochs"] = 3
    one.parser.parse(reset=True)
    one.run()


def test_an_entry_that_is_the_last_one_raises_at_once(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Failed to instantiate"):
        workflow(tmp_path, epochs=2.5).run()


def test_judged_values_may_be_expressions(tmp_path: Path) -> None:
    parser = workflow(tmp_path, epochs="$2 + 1", device="$torch.device('cpu')", imports=["$import torch"]).parser
    judge(parser)
    parser["device"] = torch.device("cpu")
    judge(parser)
    parser["epochs"] = "$5 / 2"
    parser.parse(reset=True)
    with pytest.raises(SettingsError, match=r"--epochs is 2\.5"):
        judge(parser)


def test_files_that_cannot_be_read_say_where(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("arms:\n\tmae_resenc_l:\n")
    with pytest.raises(
        SettingsError, match=r"study\.yaml cannot be read: line 2 begins with a tab.*indent with spaces$"
    ):
        read_study(file)
    with pytest.raises(SettingsError, match=r"study\.yaml cannot be read: line 2 begins with a tab"):
        read_config(file)
    with pytest.raises(SettingsError, match=r"there is no config .*studi\.yaml; did you mean study\.yaml\?$"):
        read_config(tmp_path / "studi.yaml")
