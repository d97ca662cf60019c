# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The budget: what a step holds and computes is counted right, and what is said to fit does fit.

The device that stands in for a GPU is known to the whole process, so all of this runs in processes of its own.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import run as run_bundle

from common.bundles import read_config
from common.engines.budget.starting import memory_problem
from common.errors import SettingsError
from tools.benchmarking.settings import Benchmark
from tools.benchmarking.steps import step_memory_gib
from tools.budgeting.checking import ALLOWED

from ..conftest import BUNDLES, ROOT, WHOLE_CHAIN, small_settings
from ..starts import python

_SETUP = """
import json, sys, torch
import torch.nn.functional as F
from common.engines.budget.standin import StandIn, SynchronisationError
"""


def alone(code: str, *arguments: str) -> Any:
    """Run code in a process of its own and return what it prints last, as JSON."""
    command = [python(), "-W", "ignore", "-c", _SETUP + code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


COUNTING = """
found = {}
with StandIn() as device:
    a, b = (torch.empty(256, 128, device="standin") for _ in range(2))
    found["held"] = device.held["temporaries"]
    with device.as_part("activations"):
        c = a @ b.T
    found["part"] = device.held["activations"]
    found["flops"] = device.flops
    del a
    found["after"] = device.held["temporaries"]
    view = c[:10]
    device.assign(c, "gradients")
    found["assigned"] = [device.held["activations"], device.held["gradients"]]
    found["peak"] = sum(device.peak.values())
    device.forget()
    found["forgotten"] = [sum(device.peak.values()), device.flops]
    weight = torch.empty(8, 4, 3, 3, 3, device="standin", requires_grad=True)
    image = torch.empty(2, 4, 16, 16, 16, device="standin")
    device.forget()
    F.conv3d(image, weight, padding=1).sum().backward()
    found["convolution"] = device.flops
    with torch.autocast("cuda", torch.bfloat16):
        y = F.conv3d(image, weight, padding=1)
        kinds = [y, F.layer_norm(y, [16]), y.float() + y, torch.cat([y, y.float()]), y.sum(), F.leaky_relu(y)]
        with torch.autocast("standin", enabled=False):
            kinds.append(F.conv3d(image, weight))
    found["kinds"] = [str(kind.dtype) for kind in kinds]
    q = torch.empty(1, 12, 4096, 72, device="standin", requires_grad=True)
    device.forget()
    before = sum(device.held.values())
    F.scaled_dot_product_attention(q, q, q).sum().backward()
    found["attention"] = [device.flops, (sum(device.peak.values()) - before) / (12 * 4096 * 72 * 4)]
    for name, read in {
        "item": lambda: y.sum().item(),
        "bool": lambda: bool((y > 0).all()),
        "nonzero": lambda: y.nonzero(),
        "mask": lambda: y[y > 0],
        "unique": lambda: y.unique(),
        "to_list": lambda: y.flatten()[:3].tolist(),
        "numpy": lambda: y.detach().cpu().numpy(),
    }.items():
        try:
            read()
            found[name] = "no error"
        except (SynchronisationError, RuntimeError) as error:
            found[name] = type(error).__name__
    found["from the CPU"] = torch.tensor([1.5, 2.5]).to("standin", non_blocking=True).device.type
    found["real"] = torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
with StandIn(strict=True) as device:
    for name, copy in {
        "waits": lambda: torch.ones(3).to("standin"),
        "back": lambda: torch.ones(3, device="standin").cpu(),
        "goes on": lambda: torch.ones(3).to("standin", non_blocking=True),
    }.items():
        try:
            copy()
            found[name] = "no error"
        except SynchronisationError as error:
            found[name] = type(error).__name__
print(json.dumps(found))
"""


def test_what_is_held_and_computed_is_counted_and_no_value_is_read() -> None:
    found = alone(COUNTING)
    one = 256 * 128 * 4
    assert found["held"] == 2 * one
    assert found["part"] == 256 * 256 * 4
    assert found["flops"] == 2 * 256 * 256 * 128
    assert found["after"] == one
    assert found["assigned"] == [0, 256 * 256 * 4]
    assert found["peak"] == 2 * one + 256 * 256 * 4
    assert found["forgotten"] == [one + 256 * 256 * 4, 0]
    assert found["convolution"] == 2 * 2 * (2 * 8 * 16**3 * 4 * 27)  # forward, and of the weight: the image needs none
    lower, full = "torch.bfloat16", "torch.float32"
    assert found["kinds"] == [lower, full, full, full, full, lower, full]
    flops, memory = found["attention"]
    assert flops == 2 * 2 * 12 * 4096**2 * 72 * (1 + 2.5)
    assert 3 < memory < 9, "no number for each pair of tokens, which would be 57 of these"
    for name in ("item", "bool", "nonzero", "mask", "unique", "to_list"):
        assert found[name] == "SynchronisationError", name
    assert found["numpy"] != "no error"
    assert found["from the CPU"] == "standin"
    assert found["real"] == pytest.approx([0.4963, 0.7682, 0.0885], abs=1e-4)
    assert [found[name] for name in ("waits", "back", "goes on")] == [*["SynchronisationError"] * 2, "no error"]


STEPS = """
from common.bundles import read_config
from common.engines.budget.step import training_step
told = json.loads(sys.argv[1])
found = []
for bundle, config, settings in told:
    content = read_config(f"bundles/{bundle}/configs/{config}.yaml")
    processes = settings.pop("processes", 1)
    step = training_step({**content, "bundle_root": f"bundles/{bundle}", **settings}, processes=processes)
    found.append({**vars(step), "peak": step.peak})
print(json.dumps(found))
"""


COPIED = "torch.nn.parallel.DistributedDataParallel"


def classification(bundle: str) -> dict[str, Any]:
    """Return the settings of a narrow network for volumes of which no table is there."""
    own = {name: value for name, value in small_settings(bundle).items() if name not in ("block_size", "patch_size")}
    return own | {"input_size": [16, 16, 16], "table": "none.csv", "target": "kind"}


def steps(*told: tuple[str, str, dict[str, Any]]) -> list[dict[str, int]]:
    found: list[dict[str, int]] = alone(STEPS, json.dumps(told))
    return found


def test_a_step_takes_what_its_settings_say() -> None:
    small = {"patch_size": [64, 64, 64], "batch_size": 4, "amp": True, "amp_dtype": "bfloat16"}
    small |= {"checkpointing": "none"}
    told = [
        ("mae_resenc_l", "pretrain", small),
        ("mae_resenc_l", "pretrain", small | {"amp": False}),
        ("mae_resenc_l", "pretrain", small | {"accumulation_steps": 4}),
        ("mae_resenc_l", "pretrain", small | {"batch_size": 8}),
        ("mae_resenc_l", "pretrain", small | {"checkpointing": "full"}),
        ("mae_resenc_l", "train", small | {"labels": ["background", *"abcdefgh"]}),
        ("mae_primus_m", "train", small),
        ("mae_primus_m", "train", small | {"tuning": "frozen"}),
    ]
    plain, full, parts, twice, again, many, primus, frozen = steps(*told)
    assert plain["weights"] == pytest.approx(4 * 102_348_193, rel=1e-3)
    assert plain["optimizer"] == pytest.approx(plain["weights"], rel=1e-3)
    assert full["weights"] == plain["weights"]
    assert 1.6 < full["highest"] / plain["highest"] < 2.0, "what is computed in float32 in both is the rest"
    assert 0.2 < parts["highest"] / plain["highest"] < 0.5
    assert parts["multiply_adds"] == plain["multiply_adds"]
    assert parts["read"] == plain["read"]
    assert twice["multiply_adds"] == 2 * plain["multiply_adds"]
    assert again["highest"] < 0.8 * plain["highest"]
    assert 1.2 < again["multiply_adds"] / plain["multiply_adds"] < 1.4
    assert many["highest"] > plain["highest"]
    assert primus["optimizer"] == pytest.approx(2 * primus["weights"], rel=0.01)
    assert frozen["optimizer"] < 0.1 * primus["optimizer"]
    assert frozen["multiply_adds"] < 0.5 * primus["multiply_adds"]


def test_several_processes_share_the_batch_and_hold_buckets_or_a_share_of_the_network() -> None:
    whole = {**small_settings("mae_primus_m"), "batch_size": 4, "amp": False}
    copied, sharded = ({"network": {"_target_": name}} for name in (COPIED, "common.sharding.fully_sharded"))
    told = [whole, whole | {"batch_size": 2}, whole | copied | {"processes": 2}, whole | sharded | {"processes": 2}]
    told += [whole | {"accumulation_steps": 4}]
    _, half, two, shared, parts = steps(*(("mae_primus_m", "pretrain", settings) for settings in told))
    kept = ("weights", "optimizer")
    assert [two[name] for name in kept] == [half[name] for name in kept]
    assert [shared[name] for name in kept] == [half[name] // 2 for name in kept]
    for name in ("multiply_adds", "read"):
        assert two[name] == shared[name] == half[name]
    assert two["gradients"] == pytest.approx(two["weights"], rel=0.02), "buckets are there all the time"
    assert two["peak"] - two["highest"] >= two["weights"] + two["gradients"] + two["optimizer"] - 512
    assert parts["multiply_adds"] == 2 * half["multiply_adds"], "of four parts, not only of those that were run"


def test_every_cell_has_a_budget() -> None:
    amp = {"batch_size": 2, "amp": True, "amp_dtype": "bfloat16"}
    told = [(bundle, "pretrain", small_settings(bundle) | amp) for bundle in BUNDLES]
    told += [(bundle, "train", small_settings(bundle) | amp) for bundle in WHOLE_CHAIN]
    told += [(bundle, "train_classification", classification(bundle) | amp) for bundle in WHOLE_CHAIN]
    found = steps(*told)
    assert len(found) == len(BUNDLES) + 2 * len(WHOLE_CHAIN)
    for (bundle, config, _), step in zip(told, found, strict=True):
        assert min(step[name] for name in ("weights", "optimizer", "multiply_adds", "read")) > 0, (bundle, config)
        assert step["peak"] >= step["weights"] + step["optimizer"] + step["activations"], (bundle, config)
        assert step["highest"] >= step["activations"] + step["temporaries"], (bundle, config)


FITTING = """
from common.bundles import read_config
from common.engines.budget.fitting import Fits, needed_gib, override
content = {**read_config("bundles/mae_resenc_l/configs/pretrain.yaml"), "bundle_root": "bundles/mae_resenc_l"}
content |= {"amp": True, "amp_dtype": "bfloat16", "patch_size": [96, 96, 96], "batch_size": 4}
content |= {"features_per_stage": [16, 32, 32], "blocks_per_stage": [1, 1, 1]}
fits = Fits(content)
plain, parts = needed_gib(fits.step()), needed_gib(fits.step(accumulation_steps=4))
least = needed_gib(fits.step(patch_size=[64, 64, 64], accumulation_steps=4, checkpointing="full"))
found = {"fits": []}
for gib in (plain + 0.01, plain - 0.01, parts + 0.01, least + 0.01, 0.9):
    fit = fits.within(gib)
    found["fits"].append(fit and [gib, needed_gib(fit.step), fit.changes, override(fit.changes)])
print(json.dumps(found))
"""


def test_what_is_said_to_fit_fits_and_changes_as_little_as_it_can() -> None:
    found = alone(FITTING)
    roomy, tight, small, smaller, none = found["fits"]
    assert none is None
    assert roomy[2] == {}, "the settings as they are"
    for gib, needed, changes, told in (tight, small, smaller):
        assert needed <= gib
        assert changes
        assert all(f"--{name} " in told for name in changes)
    assert "patch_size" not in tight[2]
    assert "patch_size" in smaller[2], "only where nothing else fits"


STRICT = """
from common.bundles import read_config
from common.engines.budget.step import inference_step, training_step
found = {}
for bundle, config, settings in json.loads(sys.argv[1]):
    content = {**read_config(f"bundles/{bundle}/configs/{config}.yaml"), "bundle_root": f"bundles/{bundle}"}
    function = inference_step if config == "inference" else training_step
    name = f"{bundle} {config}"
    try:
        found.setdefault(name, []).append(function({**content, **settings}, strict=True).looks)
    except Exception as error:
        chain = []
        while error is not None:
            chain.append(f"{type(error).__name__}: {str(error)[:300]}")
            last = error.__traceback__
            while last is not None:
                code = last.tb_frame.f_code
                if "/common/" in code.co_filename:
                    chain.append(f"{code.co_filename}:{last.tb_lineno}")
                last = last.tb_next
            error = error.__cause__
        found[name] = chain[-12:]
print(json.dumps(found))
"""


def test_no_step_makes_the_host_wait_for_the_device() -> None:
    """Views, forward, loss, backward, clip and optimizer of every cell read no value; a prediction one for a row."""
    amp = {"amp": True, "amp_dtype": "bfloat16"}
    told = [(bundle, "pretrain", small_settings(bundle) | amp | {"batch_size": 4}) for bundle in BUNDLES]
    for bundle in WHOLE_CHAIN:
        own = {name: value for name, value in small_settings(bundle).items() if name != "block_size"} | amp
        # all that is drawn for some samples only is drawn for these
        often = {"rotation_probability": 1.0, "zoom_probability": 1.0}
        told += [(bundle, "train", own | {"batch_size": 4} | often)]
        regions = {"labels": {"a": 0, "b": 1, "c": 2}, "regions": {"all": [1, 2], "c": [2]}, "ignore_label": 3}
        told += [(bundle, "train", own | {"batch_size": 4, "checkpointing": "full", "accumulation_steps": 2} | regions)]
        told += [(bundle, "inference", own | {"mirror_axes": [0]})]
        cases = classification(bundle) | amp | {"batch_size": 4} | often
        told += [(bundle, "train_classification", cases | {"balance": True})]
        told += [(bundle, "train_classification", cases | {"target": ["a", "b"], "tuning": "linear_probe"})]
        told += [(bundle, "train_classification", cases | {"target": "age", "task": "regression"})]
    found = alone(STRICT, json.dumps(told))
    assert len(found) == len(BUNDLES) + 6
    for name, looks in found.items():
        assert looks == ([1] if "inference" in name else [0] * len(looks)), (name, looks)


LOOKS = """
from types import SimpleNamespace
from common.handlers import Progress, StopAtNonFiniteLoss
found = {"stop": [], "progress": []}
with StandIn(strict=True) as device:
    optimizer = torch.optim.SGD([torch.empty(1, device="standin", requires_grad=True)], lr=0.1)
    stop, progress = StopAtNonFiniteLoss("models"), Progress("run", optimizer, history_file=sys.argv[1])
    loss = torch.empty((), device="standin")
    state = SimpleNamespace(epoch=1, max_epochs=1, epoch_length=20, iteration=0, output={"loss": loss}, batch={})
    state.gradient_norm = loss
    engine = SimpleNamespace(state=state)
    progress._start_epoch(engine)
    for state.iteration in range(1, 21):
        for name, watch in (("stop", stop._watch), ("progress", progress._step)):
            try:
                watch(engine)
            except SynchronisationError:
                found[name].append(state.iteration)
print(json.dumps(found))
"""


def test_what_has_to_look_at_a_loss_does_so_between_steps_and_every_tenth_time(tmp_path: Path) -> None:
    assert alone(LOOKS, str(tmp_path / "history.json")) == {"stop": [10, 20], "progress": [10, 20]}


CHECKED = """
from tools.budgeting.checking import estimated_gib
print(json.dumps(estimated_gib(*json.loads(sys.argv[1]))))
"""


@pytest.mark.parametrize("bundle", ["mae_resenc_l", "simmim_primus_m"])
def test_the_estimate_is_what_a_process_takes(bundle: str) -> None:
    """The whole table at full width: python tools/budget.py all --check 64."""
    narrow = {"features_per_stage": [16, 32, 32], "blocks_per_stage": [1, 1, 1], "depth": 4}
    base, peak = step_memory_gib(bundle, "ours", Benchmark(cells=(bundle,), patch_size=64, settings=narrow))
    estimate = alone(CHECKED, json.dumps([bundle, 64, narrow]))
    assert peak - base > 0.3, "enough to tell"
    assert (estimate + base) / peak == pytest.approx(1, abs=ALLOWED)


def problem(settings: dict[str, Any], gib: float) -> dict[str, Any] | None:
    content = read_config(ROOT / "bundles" / "mae_resenc_l" / "configs" / "train.yaml")
    small = small_settings("mae_resenc_l") | {"amp": True, "amp_dtype": "bfloat16", "patch_size": [64, 64, 64]}
    return memory_problem({**content, **small, **settings}, gib)


def test_a_training_that_cannot_fit_says_so_before_the_first_step_with_what_fits(tmp_path: Path) -> None:
    root = "bundles/mae_resenc_l"
    told = {**small_settings("mae_resenc_l"), "patch_size": [64, 64, 64], "batch_size": 8, "amp": True}
    folders = {name: str(tmp_path / name) for name in ("output_dir", "ckpt_dir", "store_dir", "dataset_dir")}
    (tmp_path / "dataset_dir").mkdir()
    limit = {"memory_check#memory_gib": 0.1, "run": ["@settings_check", "@memory_check", "$print('a step')"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        fits = r"^this training needs some \d\.\d GiB, and the GPU has 0\.1; nothing that was tried fits it"
        with pytest.raises(SettingsError, match=fits):
            run_bundle(config_file=f"{root}/configs/train.yaml", bundle_root=root, **told, **folders, **limit)
    roomy, tight, broken = (
        problem({}, 100.0),
        problem({"batch_size": 8}, 1.1),
        problem({"patch_size": [63, 64, 64]}, 9.0),
    )
    assert roomy is None
    assert tight is not None
    assert "add --" in tight["text"]
    assert tight["changes"]
    assert problem({"batch_size": 8} | tight["changes"], 1.1) is None
    assert broken is not None
    assert "could not be found out" in broken["text"]
    assert not broken["sure"]
    assert problem({"lr": object()}, 1.0) == {"sure": False, "changes": {}, "text": AnyText()}


class AnyText:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and "could not be found out" in other

    __hash__ = None  # type: ignore[assignment]


def test_configs_look_at_memory_before_the_first_step() -> None:
    for bundle in BUNDLES:
        for name in ("pretrain", "train", "train_classification"):
            run = read_config(ROOT / "bundles" / bundle / "configs" / f"{name}.yaml")["run"]
            assert run.index("@memory_check") < len(run) - 1
