# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the reference, in and out: every published cell, damaged files, and files of something else."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import SettingsError, WeightsError
from common.files import read_record, sha256, write_json
from common.networks import Primus
from common.weights import (
    Cell,
    ImportedWeights,
    Known,
    Receipt,
    Told,
    export_checkpoint,
    export_network_weights,
    export_safetensors,
    import_checkpoint,
    import_network_weights,
    inspect,
    read_checkpoint,
    transfer_weights,
    write_imported_state,
)
from common.weights.cells import BACKBONES, backbone_of
from common.weights.exchange import reported_digest_warning
from common.weights.orders import evident_order, roughness
from tools.checkpoints import catalogue, importing
from tools.checkpoints.cells import bundle_cell
from tools.checkpoints.exporting import export_checkpoint as export_tool
from tools.checkpoints.importing import import_checkpoint as import_tool
from tools.checkpoints.inspecting import inspect_weights as inspect_tool
from tools.checkpoints.settings import ExportCheckpoint, ImportCheckpoint, InspectWeights
from tools.commanding.settings import filled

from ..conftest import BUNDLES, ROOT, WITH_TEACHER, method_of, pretraining, run, small_settings
from ..parity import golden
from ..starts import python
from .synthetic import CELLS, ORDERS, TRAINERS, checkpoint_of, weights_of

WRAPPED = ("voco", "simclr", "swinunetr")


def is_wrapped(bundle: str) -> bool:
    return bundle.endswith("primus_m") and bundle.startswith(WRAPPED)


def narrow(bundle: str, **settings: Any) -> tuple[Cell, dict[str, Tensor], dict[str, Tensor]]:
    """Return a narrow cell, with a backbone and the rest of its method drawn at random."""
    cell, method = bundle_cell(bundle, small_settings(bundle) | settings, with_method=True)
    assert method is not None
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in method.state_dict().items()}
    backbone = {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}
    return cell, backbone, {name: value for name, value in state.items() if not name.startswith("backbone.")}


def published(bundle: str, backbone: dict[str, Tensor], method: dict[str, Tensor], heads: int | None) -> dict[str, Any]:
    """Return a checkpoint as the reference would have published these weights, tokens in its order."""
    weights = export_network_weights(backbone, method, wrapped=is_wrapped(bundle))
    if ORDERS.get(bundle) == "swapped":  # exchanging twice changes nothing
        other = import_network_weights(weights, token_order="swapped", num_heads=heads)
        weights = export_network_weights(other.backbone, other.method, wrapped=is_wrapped(bundle))
    content: dict[str, Any] = {"network_weights": weights, "init_args": {"index": ["x"] * 10}}
    return content | ({"trainer_name": TRAINERS[bundle]} if bundle in TRAINERS else {})


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def of_openmind(bundle: str) -> Told:
    """Say that a file is the published one of a bundle."""
    known = [known for known in catalogue.checkpoints() if known.data_set and "-OpenMind-" in known.repository]
    return Told(known=next((k for k in known if bundle == f"{k.bundle}_{k.backbone}"), None))


def take(path: Path, cell: Cell, folder: Path, **options: Any) -> tuple[Receipt, ImportedWeights]:
    told = options.pop("told", of_openmind(cell.bundle))
    return import_checkpoint(path, cell, output=folder / "pretrained_encoder.pt", told=told, **options)


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def unet(tmp_path: Path) -> tuple[Cell, Path]:
    """A narrow U-Net cell and its published checkpoint."""
    cell, backbone, method = narrow("mae_resenc_l")
    return cell, saved(published("mae_resenc_l", backbone, method, None), tmp_path / "checkpoint_final.pth")


@pytest.fixture
def primus(tmp_path: Path) -> tuple[Cell, Path]:
    """A narrow transformer cell and its published checkpoint."""
    cell, backbone, method = narrow("mae_primus_m")
    content = published("mae_primus_m", backbone, method, cell.num_heads)
    return cell, saved(content, tmp_path / "checkpoint_final.pth")


def test_all_published_cells_are_known() -> None:
    assert sorted(TRAINERS) == CELLS
    assert len(CELLS) == 14


@pytest.mark.parametrize("cell", CELLS)
def test_the_table_of_names_reads_both_ways(cell: str) -> None:
    """At the published shapes, without their memory: every name but the heads that were never used comes back."""
    recording = golden.read(cell)
    manifest = recording["published_manifest"] | {
        key: value
        for key, value in recording.get("published_spark_manifest", {}).items()
        if not key.startswith("architecture.")
    }
    imported = import_network_weights(
        {key: torch.zeros(1).expand(shape) for key, (shape, _) in manifest.items()}, token_order=ORDERS[cell]
    )
    exported = export_network_weights(imported.backbone, imported.method, wrapped=is_wrapped(cell))
    left = {key for key in manifest if key not in exported}
    assert left == {key for key in manifest if key.startswith("decoder.seg_layers.") and ".4." not in key}
    for key, value in exported.items():
        assert list(value.shape) == manifest[key][0], key


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_checkpoint_goes_in_and_out_of_every_bundle(bundle: str, tmp_path: Path) -> None:
    cell, backbone, method = narrow(bundle)
    heads = cell.num_heads
    if bundle in TRAINERS:
        file = saved(published(bundle, backbone, method, heads), tmp_path / "checkpoint_final.pth")
    else:
        torch.save({"method": {f"backbone.{k}": v for k, v in backbone.items()} | method}, tmp_path / "state.pt")
        file = tmp_path / "first" / "checkpoint_final.pth"
        told = export_checkpoint(tmp_path / "state.pt", cell, output=file).notes
        if method_of(bundle) in WITH_TEACHER:
            assert any(note.startswith(f"{len(method)} tensors of the pre-training alone") for note in told)
            method = {}
        else:
            assert not any("left out" in note for note in told)
    receipt, imported = take(file, cell, tmp_path / "in")
    assert receipt.encoder_share == 1.0
    assert receipt.missing == []
    written = read_checkpoint(tmp_path / "in" / "pretrained_encoder.pt")
    assert equal(written, backbone)
    assert equal(imported.method, {k: v for k, v in method.items() if k in imported.method})
    assert set(method) <= set(imported.method)

    export_checkpoint(tmp_path / "in" / "pretrained_encoder.pt", cell, output=tmp_path / "out" / "checkpoint_final.pth")
    take(tmp_path / "out" / "checkpoint_final.pth", cell, tmp_path / "again")
    assert equal(read_checkpoint(tmp_path / "again" / "pretrained_encoder.pt"), backbone)
    plan = json.loads((tmp_path / "out" / "adaptation_plan.json").read_text())
    exported = read_checkpoint(tmp_path / "out" / "checkpoint_final.pth")
    weights = exported["network_weights"]
    assert exported["nnssl_adaptation_plan"] == {k: v for k, v in plan.items() if k != "trainer_name"}
    assert plan.get("token_order") == ("straight" if heads else None)
    for key in ("key_to_encoder", "key_to_stem"):
        assert any(name.startswith(plan[key]) for name in weights)
    for key in plan["keys_to_in_proj"]:
        assert f"{key}.weight" in weights
    tokens = {name: value for name, value in weights.items() if name.endswith("mask_token")}
    if heads:  # an encoder alone has learned none
        width = backbone["encoder.patch_embedding.weight"].shape[0]
        assert list(tokens) == ["encoder.mask_token" if is_wrapped(bundle) else "mask_token"]
        assert torch.equal(*tokens.values(), torch.zeros(1, 1, width))
    else:
        assert not tokens
    if bundle in TRAINERS:
        recorded = golden.read(bundle)["adaptation_plan"]
        assert recorded.keys() == plan.keys() - {"token_order", "trainer_name"}
        for key in recorded.keys() - {"pretrain_plan", "architecture_plans"}:
            assert plan[key] == recorded[key], key
        assert recorded["pretrain_plan"].keys() == plan["pretrain_plan"].keys()


def test_a_mask_token_that_nobody_learned_is_no_part_of_a_method(tmp_path: Path) -> None:
    cell, backbone, method = narrow("simmim_primus_m")
    torch.save(backbone, tmp_path / "encoder.pt")
    export_checkpoint(tmp_path / "encoder.pt", cell, output=tmp_path / "encoder" / "checkpoint_final.pth")
    _, imported = take(tmp_path / "encoder" / "checkpoint_final.pth", cell, tmp_path / "in")
    assert imported.method == {}
    assert imported.unused["mask_token"] == "place that no method has filled"
    torch.save({"method": {f"backbone.{k}": v for k, v in backbone.items()} | method}, tmp_path / "state.pt")
    export_checkpoint(tmp_path / "state.pt", cell, output=tmp_path / "whole" / "checkpoint_final.pth")
    weights = read_checkpoint(tmp_path / "whole" / "checkpoint_final.pth")["network_weights"]
    assert torch.equal(weights["mask_token"], method["mask_token"].reshape(1, 1, -1))
    assert equal(take(tmp_path / "whole" / "checkpoint_final.pth", cell, tmp_path / "in")[1].method, method)


@pytest.mark.parametrize("bundle", ["mae_resenc_l", "mae_primus_m"])
def test_the_contrast_of_mae_stays_here_and_its_export_is_of_mae(bundle: str, tmp_path: Path) -> None:
    cell, backbone, method = narrow(bundle, contrast_weight=0.5)
    torch.save({"method": {f"backbone.{k}": v for k, v in backbone.items()} | method}, tmp_path / "state.pt")
    told = export_checkpoint(tmp_path / "state.pt", cell, output=tmp_path / "out" / "checkpoint_final.pth")
    ours = [name for name in method if name.startswith("projection.")]
    assert len(ours) > 4
    assert any(re.match(rf"{len(ours)} tensors .* are left out: projection$", note) for note in told.notes)
    receipt, imported = take(tmp_path / "out" / "checkpoint_final.pth", cell, tmp_path / "in", told=Told())
    assert receipt.method == "MAE"
    assert equal(imported.method, {name: value for name, value in method.items() if name not in ours})


def test_the_plan_of_the_published_sizes_names_them() -> None:
    from common.weights import adaptation_plan

    for bundle, name in (("mae_resenc_l", "ResEncL"), ("voco_primus_m", "PrimusM")):
        cell, _ = bundle_cell(bundle, {})
        plan, notes = adaptation_plan(cell, cell.backbone.state_dict(), Receipt("x", "0" * 64))
        recorded = golden.read(bundle)["adaptation_plan"]
        assert plan["architecture_plans"] == recorded["architecture_plans"]
        assert plan["architecture_plans"]["arch_class_name"] == name
        ours, theirs = (p["pretrain_plan"]["configurations"]["onemmiso"] for p in (plan, recorded))
        assert [ours[key] for key in ("spacing", "patch_size")] == [theirs[key] for key in ("spacing", "patch_size")]
        assert notes == []


def round_trip(bundle: str, folder: Path) -> None:
    cell, _ = bundle_cell(bundle, {})
    file = saved(checkpoint_of(bundle), folder / "checkpoint_final.pth")
    receipt, imported = take(file, cell, folder / "in")
    del imported
    assert receipt.encoder_share == 1.0
    assert receipt.missing == []
    assert sum(receipt.parameters[outcome] for outcome in ("taken", "adapted")) == sum(
        value.numel() for value in cell.backbone.state_dict().values()
    )
    file.unlink()
    export_checkpoint(folder / "in" / "pretrained_encoder.pt", cell, output=folder / "out" / "checkpoint_final.pth")
    take(folder / "out" / "checkpoint_final.pth", cell, folder / "again")
    one, other = (read_checkpoint(folder / name / "pretrained_encoder.pt", mmap=True) for name in ("in", "again"))
    assert equal(one, other)
    state = cell.backbone.state_dict()
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("bundle", CELLS)
def test_every_cell_of_the_published_size_goes_in_and_out(bundle: str, tmp_path: Path) -> None:
    round_trip(bundle, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_largest_checkpoint_takes_little_memory_and_time(tmp_path: Path) -> None:
    file = saved(checkpoint_of("mae_primus_m"), tmp_path / "checkpoint_final.pth")
    began = time.monotonic()
    arguments = ("mae_primus_m", "--source", file, "--output", tmp_path / "pretrained_encoder.pt")
    assert peak_gib("import_checkpoint.py", *arguments, "--token_order", "swapped") < 2
    assert time.monotonic() - began < 60
    cell, _ = bundle_cell("mae_primus_m", {})
    written = read_checkpoint(tmp_path / "pretrained_encoder.pt", mmap=True)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in cell.backbone.state_dict().items()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_largest_training_checkpoint_takes_little_memory(tmp_path: Path) -> None:
    """With Spark3D's second dictionary, and an optimizer state that is never read."""
    content = checkpoint_of("spark3d_resenc_l", training=True)
    content["optimizer_state"]["state"] = {0: {"momentum_buffer": torch.ones(192_645_541)}}
    content["init_args"]["index"] = [
        f"/data/OpenMind/sub-{index:06}/anat/sub-{index:06}_T1w.nii.gz" for index in range(10**6)
    ]
    file = saved(content, tmp_path / "checkpoint_latest.pth")
    arguments = ("spark3d_resenc_l", "--source", file, "--output", tmp_path / "e.pt", "--resume")
    assert peak_gib("import_checkpoint.py", *arguments) < 3
    assert read_checkpoint(tmp_path / "pretraining_state.pt", mmap=True)["epoch"] == 7


def test_converted_tokens_give_the_features_of_the_order_they_were_trained_in(tmp_path: Path) -> None:
    """The reference's order is the straight one of an image whose first two axes are exchanged, kernels with it."""
    table = weights_of("voco_primus_m")
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: 0.05 * torch.randn(value.shape, generator=generator)
        for key, value in table.items()
        if "blocks" not in key or any(f"blocks.{index}." in key for index in (0, 1))
    }
    features = {}
    image = torch.randn(1, 1, 64, 64, 64, generator=generator)
    for order in ("straight", "swapped"):
        network = Primus(input_size=64, depth=2, with_decoder=False).eval()
        network.load_state_dict(import_network_weights(weights, token_order=order).backbone)
        with torch.no_grad():
            if order == "straight":
                kernel = network.encoder.patch_embedding.weight
                kernel.copy_(kernel.transpose(2, 3).clone())
                features[order] = network.encode(image.transpose(2, 3))[0].transpose(2, 3)
            else:
                features[order] = network.encode(image)[0]
    assert torch.allclose(features["straight"], features["swapped"], atol=1e-5)
    naive = Primus(input_size=64, depth=2, with_decoder=False).eval()
    naive.load_state_dict(import_network_weights(weights, token_order="straight").backbone)
    with torch.no_grad():
        assert float((naive.encode(image)[0] - features["swapped"]).abs().max()) > 1e-2


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_taken_off(prefix: str, unet: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = unet
    content = torch.load(file)
    content["network_weights"] = {prefix + key: value for key, value in content["network_weights"].items()}
    take(file, cell, tmp_path / "plain")
    take(saved(content, file), cell, tmp_path / "prefixed")
    plain, prefixed = (read_checkpoint(tmp_path / name / "pretrained_encoder.pt") for name in ("plain", "prefixed"))
    assert equal(plain, prefixed)


def test_untrained_copies_are_not_taken(tmp_path: Path) -> None:
    cell, backbone, method = narrow("spark3d_resenc_l")
    content = published("spark3d_resenc_l", backbone, method, None)
    weights = content["network_weights"]
    for key in weights:
        if key.endswith((".conv.weight", ".norm.weight")) and "transpconvs" not in key:
            weights[key] = torch.randn_like(weights[key])  # within decoder.encoder as well
    content["spark_weights"] = {
        key: weights.pop(key) for key in list(weights) if key.startswith(("mask_tokens", "densify"))
    }
    receipt, imported = take(saved(content, tmp_path / "c.pth"), cell, tmp_path / "in")
    assert equal(read_checkpoint(tmp_path / "in" / "pretrained_encoder.pt"), backbone)
    assert equal(imported.method, method)
    assert "untrained" in receipt.skipped["encoder.stem.convs.0.conv.weight"]
    assert any("second names in the file with other values" in note for note in receipt.notes)
    del content["spark_weights"]  # as published
    take(saved(content, tmp_path / "c.pth"), cell, tmp_path / "published")
    with pytest.raises(WeightsError, match=r"it fits spark3d_resenc_l, as trainer_name is VariableSparkMAETrainer_BS8"):
        take(tmp_path / "c.pth", narrow("mae_resenc_l")[0], tmp_path / "other", told=Told())


def test_plans_may_be_missing_beside_or_wrong(primus: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = primus
    receipt, _ = take(file, cell, tmp_path / "none")
    assert any("no adaptation plan" in note for note in receipt.notes)
    assert receipt.patch_size == [16, 16, 16]
    plan = golden.read("mae_primus_m")["adaptation_plan"]
    plan["key_to_in_proj"] = plan.pop("keys_to_in_proj")  # as some versions of the reference write it
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(plan))
    receipt, _ = take(file, cell, tmp_path / "beside")
    assert any("beside the file" in note for note in receipt.notes)
    assert any("patch_size [160, 160, 160]" in note and "8 places" in note for note in receipt.notes)
    assert receipt.patch_size == [16, 16, 16]
    (tmp_path / "adaptation_plan.json").write_text("{")
    with pytest.raises(WeightsError, match="is not a JSON file"):
        take(file, cell, tmp_path / "broken")
    (tmp_path / "adaptation_plan.json").unlink()
    content = torch.load(file)
    saved(content | {"nnssl_adaptation_plan": {"token_order": "hwd"}}, file)
    with pytest.raises(WeightsError, match="token_order of the adaptation plan is 'hwd'"):
        take(file, cell, tmp_path / "order")
    one, two, three = (
        read_checkpoint(tmp_path / name / "pretrained_encoder.pt") for name in ("none", "beside", "none")
    )
    assert equal(one, two)
    assert equal(one, three)


def test_the_plan_of_an_uneven_patch_gives_the_grid(tmp_path: Path) -> None:
    settings = small_settings("models_genesis_primus_m") | {"patch_size": [16, 24, 32]}
    cell, _ = bundle_cell("models_genesis_primus_m", settings)
    state = {name: torch.randn(value.shape) for name, value in cell.backbone.state_dict().items()}
    torch.save(state, tmp_path / "pretrained_encoder.pt")
    export_checkpoint(tmp_path / "pretrained_encoder.pt", cell, output=tmp_path / "checkpoint_final.pth")
    receipt, _ = take(tmp_path / "checkpoint_final.pth", cell, tmp_path / "in")
    assert equal(read_checkpoint(tmp_path / "in" / "pretrained_encoder.pt"), state)
    assert receipt.patch_size == [16, 24, 32]


def test_the_order_of_tokens_can_be_asked_for(primus: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = primus
    found = {}
    for order in ("auto", "swapped", "straight", "keep"):
        take(file, cell, tmp_path / order, token_order=order)
        found[order] = read_checkpoint(tmp_path / order / "pretrained_encoder.pt")
    assert equal(found["auto"], found["swapped"])
    assert equal(found["straight"], found["keep"])
    assert not equal(found["auto"], found["keep"])
    with pytest.raises(SettingsError, match="token_order is 'hwd'"):
        take(file, cell, tmp_path, token_order="hwd")


@pytest.mark.parametrize("bundle", ["voco_resenc_l", "volumefusion_resenc_l", "mae_resenc_l", "swinunetr_primus_m"])
def test_a_file_that_does_not_say_its_method_is_of_none(bundle: str, tmp_path: Path) -> None:
    """Whatever its tensors look like, it goes into every bundle of its backbone, and nothing goes on from it."""
    cell, backbone, method = narrow(bundle)
    content = published(bundle, backbone, method, cell.num_heads) | {"trainer_name": "BaseDINOv3Trainer"}
    file, size = saved(content, tmp_path / "c.pth"), backbone_of(bundle)
    order = "swapped" if cell.num_heads else "auto"
    for other in ("simmim", "spark3d"):
        target = narrow(f"{other}_{size}")[0]
        receipt, imported = take(file, target, tmp_path / other, told=Told(), token_order=order)
        assert receipt.origin == f"{BACKBONES[size].title} encoder, method unknown"
        assert receipt.citation == []
        assert receipt.licence == "unknown"
        assert receipt.spacing_mm is None
        notes = "\n".join(receipt.notes)
        for words in (
            "trainer_name is BaseDINOv3Trainer",
            "licence unknown",
            "whom to cite is unknown",
            "--method mae or",
        ):
            assert words in notes
        written = read_checkpoint(tmp_path / other / "pretrained_encoder.pt")
        for name, value in backbone.items():
            assert not name.startswith("encoder.") or torch.equal(written[name], value)
        about = read_record(tmp_path / other / "pretrained_encoder.json")
        assert (about["method"], about["settings"]["bundle"]) == ("unknown", f"{other}_{size}")
        assert "spacing_mm" not in about["settings"]
        with pytest.raises(WeightsError, match=r"is not known to be of .*only fine-tuning"):
            write_imported_state(
                torch.nn.Module(), imported, tmp_path / "s.pt", cell=target, path=file, receipt=receipt
            )
    wrong = narrow("mae_primus_m" if size == "resenc_l" else "mae_resenc_l")[0]
    with pytest.raises(WeightsError, match=rf"it is a network of .*which fits the bundles that end in _{size}"):
        take(file, wrong, tmp_path / "wrong", told=Told())
    assert f"{BACKBONES[size].title} encoder, method unknown" in inspect(file)
    export_checkpoint(
        tmp_path / "simmim" / "pretrained_encoder.pt", narrow(f"simmim_{size}")[0], output=tmp_path / "e.pth"
    )
    again, _ = take(tmp_path / "e.pth", narrow(f"voco_{size}")[0], tmp_path / "again", told=Told())
    assert again.method == "unknown", "an export of it is of no method either"


def test_the_user_may_say_where_a_file_is_from(tmp_path: Path) -> None:
    cell, backbone, method = narrow("voco_resenc_l")
    content = published("voco_resenc_l", backbone, method, None)
    del content["trainer_name"]
    file = saved(content, tmp_path / "c.pth")
    said = Told(method="MoCo", licence="CC-BY-NC-SA-4.0", citation="Me et al.")
    receipt, _ = take(file, cell, tmp_path, told=said)
    assert (receipt.method, receipt.licence, receipt.citation) == ("MoCo", "CC-BY-NC-SA-4.0", ["Me et al."])
    assert any("forbids commercial use" in note for note in receipt.notes)
    assert any("demands share-alike" in note for note in receipt.notes)
    receipt, imported = take(file, cell, tmp_path, told=Told(method="voco"))
    assert receipt.method == "VoCo", "said otherwise, the receipt is written anew"
    assert read_record(tmp_path / "pretrained_encoder.json")["method"] == "VoCo"
    assert not list(tmp_path.glob("*_previous*"))
    _, network = bundle_cell("voco_resenc_l", small_settings("voco_resenc_l"), with_method=True)
    assert network is not None
    write_imported_state(network, imported, tmp_path / "s.pt", cell=cell, path=file, receipt=receipt)
    with pytest.raises(SettingsError, match="--method is 'mae', which does not go with its projector"):
        take(file, cell, tmp_path, told=Told(method="mae"))
    saved(content | {"trainer_name": "SimCLRTrainer_BS32"}, file)
    with pytest.raises(SettingsError, match="--method is 'voco', but trainer_name is SimCLRTrainer_BS32; leave it out"):
        take(file, cell, tmp_path, told=Told(method="voco"))
    with pytest.raises(WeightsError, match="it fits simclr_resenc_l, as trainer_name is SimCLRTrainer_BS32"):
        take(file, cell, tmp_path, told=Told())
    saved(content | {"trainer_name": "BaseMAETrainer"}, file)
    receipt, _ = take(file, cell, tmp_path, told=Told())
    assert receipt.method == "unknown", "a file that contradicts itself says nothing"
    assert any("which does not go with its projector" in note for note in receipt.notes)


def test_a_card_says_what_it_says(tmp_path: Path) -> None:
    cell, backbone, _ = narrow("mae_resenc_l")
    content = published("mae_resenc_l", backbone, {}, None)
    del content["trainer_name"]
    file, card = saved(content, tmp_path / "c.pth"), tmp_path / "README.md"
    card.write_text(
        "---\nlicense: cc-by-sa-4.0\ndatasets:\n- a/b\n- c/d\ntags: [x]\n---\n\n# Great Encoder\n\n```bibtex\n"
        "@article{x,\n  title={A {Great} Encoder},\n  author={Doe, J and Roe, R},\n  year={2026}\n}\n```\n"
        "arXiv 2604.00001\n"
    )
    receipt, _ = take(file, cell, tmp_path, told=Told(card=card))
    assert (receipt.name, receipt.licence, receipt.data) == ("Great Encoder", "CC-BY-SA-4.0", "a/b, c/d")
    assert receipt.citation == ["Doe, J and Roe, R. A Great Encoder. 2026"]
    assert receipt.method == "unknown", "a card is prose"
    assert "called        Great Encoder" in receipt.summary()
    card.write_text("---\nlicense: other\nlicense_name: research-only\n---\nSee arXiv:2604.00001 and 2604.00001.")
    receipt, _ = take(file, cell, tmp_path, told=Told(card=card))
    assert (receipt.licence, receipt.citation) == ("research-only", ["arXiv:2604.00001"])
    assert any("forbids commercial use" in note for note in receipt.notes)
    card.write_text("# Some other readme\nlicense: mit\n")
    assert take(file, cell, tmp_path, told=Told(card=card))[0].licence == "unknown"


def test_the_order_of_tokens_is_never_assumed(primus: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = primus
    with pytest.raises(
        WeightsError, match=r"order of its tokens .*--token_order swapped if .*--token_order straight if"
    ):
        take(file, cell, tmp_path / "in", told=Told())
    assert not (tmp_path / "in").exists()
    assert any("token order not known" in line for line in inspect(file))
    for order in ("swapped", "straight"):
        known = Known("a/b", "c.pth", "primus_m", "MAE", bundle="mae", token_order=order)
        receipt, _ = take(file, cell, tmp_path / order, told=Told(known=known, by="its digest"))
        assert f"token order: {order}, as in a/b, by its digest" in receipt.notes
        take(file, cell, tmp_path / f"said_{order}", told=Told(), token_order=order)
        one, other = (read_checkpoint(tmp_path / f"{name}{order}" / "pretrained_encoder.pt") for name in ("", "said_"))
        assert equal(one, other)
    content = torch.load(file) | {"nnssl_adaptation_plan": {"token_order": "straight"}}
    receipt, _ = take(saved(content, file), cell, tmp_path / "plan")
    assert "token order: straight, by the adaptation plan" in receipt.notes, "the plan is nearer than the repository"


@pytest.mark.parametrize("order", ["straight", "swapped"])
@pytest.mark.parametrize("grid", [[2, 3, 4], [10, 20, 20], [20, 16, 4]])
def test_a_smooth_position_table_shows_its_order_unless_it_is_of_a_cube(order: str, grid: list[int]) -> None:
    """Smooth fields with noise, as trained tables are; what is not smooth, or of a cube, shows nothing."""
    generator = torch.Generator().manual_seed(0)

    def table(grid: list[int], noise: float) -> Tensor:
        d, h, w = grid
        field = torch.nn.functional.interpolate(
            torch.randn(1, 24, 3, 3, 3, generator=generator), size=grid, mode="trilinear", align_corners=True
        )
        field = field + noise * torch.randn(field.shape, generator=generator)
        places = field[0].permute(1, 2, 3, 0)  # (d, h, w, C)
        return (places.transpose(0, 1) if order == "swapped" else places).reshape(1, d * h * w, 24)

    if grid != [2, 3, 4]:  # too few places to be smooth
        assert evident_order(table(grid, 0.1), grid) == order
    assert evident_order(table(grid, 100.0), grid) is None, "not smooth"
    assert evident_order(table(grid, 0.1), None) is None
    cube = table([12, 12, 12], 0.1)
    assert evident_order(cube, [12, 12, 12]) is None
    one, other = (roughness(cube, [12, 12, 12], name) for name in ("straight", "swapped"))
    assert one == pytest.approx(other), "on a cube both orders are alike, which is why nothing is read from it"


def test_the_position_table_of_an_uneven_patch_decides(tmp_path: Path) -> None:
    settings = small_settings("models_genesis_primus_m") | {"patch_size": [32, 64, 64]}
    cell, _ = bundle_cell("models_genesis_primus_m", settings)
    state = {name: torch.randn(value.shape) for name, value in cell.backbone.state_dict().items()}
    table = "encoder.transformer.position_embedding"
    channels, grid = state[table].shape[1], state[table].shape[2:]
    state[table] = torch.nn.functional.interpolate(torch.randn(1, channels, 2, 2, 2), size=grid, mode="trilinear")
    torch.save(state, tmp_path / "pretrained_encoder.pt")
    export_checkpoint(tmp_path / "pretrained_encoder.pt", cell, output=tmp_path / "c.pth")
    content = torch.load(tmp_path / "c.pth")
    (tmp_path / "adaptation_plan.json").unlink()
    del content["nnssl_adaptation_plan"]["token_order"]
    (tmp_path / "c.json").unlink()
    receipt, _ = take(saved(content, tmp_path / "c.pth"), cell, tmp_path / "in", told=Told())
    assert equal(read_checkpoint(tmp_path / "in" / "pretrained_encoder.pt"), state)
    assert any("straight: only so are neighbours alike" in note for note in receipt.notes)


def damaged(file: Path, how: str) -> str:
    """Damage a checkpoint; return what the refusal says."""
    whole = file.read_bytes()
    content = torch.load(file)
    weights = content["network_weights"]
    trained = "encoder.stages.1.blocks.0.conv1.all_modules.0.weight"
    if how == "cut":
        file.write_bytes(whole[: len(whole) // 2])
        return "is not a complete checkpoint"
    if how == "empty":
        file.write_bytes(b"")
        return "is not a complete checkpoint"
    if how == "zeros":
        file.write_bytes(bytes(len(whole)))
        return "is not a complete checkpoint"
    if how == "hole":
        start = whole.index(weights[trained].numpy().tobytes()[:64])
        file.write_bytes(whole[:start] + bytes(256) + whole[start + 256 :])
        return "the checksum of its part"
    if how == "text":
        file.write_text("<html>Not Found</html>")
        return "is a web page"
    if how == "code":
        saved(content | {"extra": Path()}, file)
        return "holds other things than tensors and plain values"
    if how == "list":
        saved([1], file)
        return "holds a list"
    if how == "nothing":
        saved({"epoch": 1}, file)
        return "holds no network: it has 'epoch'"
    if how == "foreign":
        saved({"network_weights": {"layer1.0.conv1.weight": torch.ones(4, 4)}}, file)
        return "it fits no bundle, for its names are of neither"
    if how == "values":
        saved({"network_weights": weights | {"encoder.stem.convs.0.bias": 1.0}}, file)
        return "is not a tensor"
    if how == "ours":
        saved({"encoder.stem.conv.weight": torch.ones(4, 1, 3, 3, 3)}, file)
        return "an encoder of this collection already"
    value = weights[trained].clone()
    if how == "nan":
        value[0, 0, 0, 0, 0] = float("nan")
        words = "NaN or infinite values in 1 of"
    elif how == "wiped":
        value.zero_()
        words = "only zeros in 1 of"
    elif how == "shape":
        value = value[:2].clone()
        words = r"\[2, 4, 3, 3, 3\] in the file, \[8, 4, 3, 3, 3\] in this bundle"
    else:
        for key in [key for key in weights if "encoder.stages.1.blocks.0.conv1" in key]:
            del weights[key]
        words = "% of the encoder of mae_resenc_l .*is not in the file"
    for key in {trained, f"decoder.{trained}"} & set(weights):
        weights[key] = value
    saved(content, file)
    return words


DAMAGE = "cut empty zeros hole text code list nothing foreign values ours nan wiped shape incomplete".split()  # noqa: SIM905


@pytest.mark.parametrize("how", DAMAGE)
def test_a_bad_file_is_refused_and_the_old_one_kept(how: str, unet: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = unet
    take(file, cell, tmp_path / "in")
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    words = damaged(file, how)
    with pytest.raises(WeightsError, match=words) as error:
        take(file, cell, tmp_path / "in")
    assert file.name in str(error.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    if how == "incomplete":
        receipt, _ = take(file, cell, tmp_path / "in", allow_partial=True)
        assert 0 < receipt.encoder_share < 1
        assert len(receipt.missing) == 4


def test_an_encoder_alone_is_enough(unet: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = unet
    content = torch.load(file)
    content["network_weights"] = {k: v for k, v in content["network_weights"].items() if not k.startswith("decoder.")}
    receipt, _ = take(saved(content, file), cell, tmp_path / "in")
    assert receipt.encoder_share == 1.0
    assert receipt.missing
    assert all(name.startswith(("decoder.", "head.")) for name in receipt.missing)


def test_half_precision_becomes_single(unet: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = unet
    content = torch.load(file)
    content["network_weights"] = {key: value.half() for key, value in content["network_weights"].items()}
    take(saved(content, file), cell, tmp_path / "in")
    assert {v.dtype for v in read_checkpoint(tmp_path / "in" / "pretrained_encoder.pt").values()} == {torch.float32}


def test_an_earlier_encoder_is_never_lost(unet: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = unet
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "pretrained_encoder.pt").write_bytes(b"weeks of work")
    take(file, cell, folder)
    assert (folder / "pretrained_encoder_previous.pt").read_bytes() == b"weeks of work"
    receipt, _ = take(file, cell, folder)
    assert any("was this import already" in note for note in receipt.notes)
    assert sorted(path.name for path in folder.iterdir()) == [
        "pretrained_encoder.json",
        "pretrained_encoder.pt",
        "pretrained_encoder_previous.pt",
    ]


def test_an_interrupted_conversion_leaves_the_old_file(
    unet: tuple[Cell, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, file = unet
    take(file, cell, tmp_path / "in")
    before = (tmp_path / "in" / "pretrained_encoder.pt").read_bytes()
    content = torch.load(file)
    content["network_weights"]["encoder.stem.convs.0.all_modules.0.bias"] += 1
    saved(content, file)
    save = torch.save

    def half(content: Any, stream: Any) -> None:
        save(content, stream)
        stream.truncate(1000)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            take(file, cell, tmp_path / "in")
    assert (tmp_path / "in" / "pretrained_encoder.pt").read_bytes() == before
    assert not list((tmp_path / "in").glob(".*.part"))
    take(file, cell, tmp_path / "in")
    assert (tmp_path / "in" / "pretrained_encoder.pt").read_bytes() != before


MEASURED = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    status = Path("/proc/self/status").read_text()
    print([line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")][0])
"""


def peak_gib(name: str, *arguments: object) -> float:
    """Run a tool in a process of its own and return the most memory it had."""
    command = [python(), "-c", MEASURED, str(ROOT / "tools" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return int(result.stdout.splitlines()[-1]) / 2**20


def test_what_another_process_has_just_renamed_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / ".model.json.1.part"
    monkeypatch.setattr(Path, "glob", lambda *_: iter([gone]))
    write_json({"a": 1}, tmp_path / "model.json")
    assert json.loads((tmp_path / "model.json").read_text()) == {"a": 1}


def test_two_imports_at_once(unet: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = unet
    processes = multiprocessing.get_context("fork")
    start = processes.Barrier(4)

    def work() -> None:
        start.wait()
        take(file, cell, tmp_path / "in")

    all_at_once = [processes.Process(target=work) for _ in range(4)]
    for process in all_at_once:
        process.start()
    for process in all_at_once:
        process.join(60)
    assert [process.exitcode for process in all_at_once] == [0] * 4
    take(file, cell, tmp_path / "alone")
    target = tmp_path / "in" / "pretrained_encoder.pt"
    assert equal(read_checkpoint(target), read_checkpoint(tmp_path / "alone" / "pretrained_encoder.pt"))
    assert json.loads(target.with_suffix(".json").read_text())["sha256"] == sha256(target)
    assert not list(target.parent.glob(".*.part"))


def test_the_tools_as_a_user_runs_them(
    unet: tuple[Cell, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the tools set it
    monkeypatch.chdir(tmp_path)  # they work from anywhere
    _, file = unet
    small = small_settings("mae_resenc_l")
    target = tmp_path / "models" / "pretrained_encoder.pt"
    import_tool(filled(ImportCheckpoint, "mae_resenc_l", source=str(file), output=str(target), **small))
    text = capsys.readouterr().out
    for words in ("method        MAE with ResEnc-L", "encoder covered 100.0 %", "please cite", "0.5 mm angiography"):
        assert words in text
    out = tmp_path / "out" / "checkpoint_final.pth"
    export_tool(filled(ExportCheckpoint, "mae_resenc_l", source=str(target), output=str(out), **small))
    inspect_tool(InspectWeights(str(target)))
    assert "encoder covered 100.0 %" in capsys.readouterr().out
    export_tool(
        filled(
            ExportCheckpoint,
            "mae_resenc_l",
            source=str(target),
            format="safetensors",
            output=str(tmp_path / "e.safetensors"),
            **small,
        )
    )
    with pytest.raises(WeightsError, match="of the encoder of mae_resenc_l"):
        import_tool(
            filled(ImportCheckpoint, "mae_resenc_l", source=str(file), output=str(target), allow_partial="false")
        )
    with pytest.raises(WeightsError, match="it fits mae_resenc_l, as trainer_name is"):
        import_tool(filled(ImportCheckpoint, "voco_resenc_l", source=str(file), output=str(target)))
    with pytest.raises(WeightsError, match="there is no file"):
        import_tool(filled(ImportCheckpoint, "mae_resenc_l", source=str(tmp_path / "none.pth")))
    for bundle, options, words in (
        ("simmim_resenc_l", {}, "has no published weights"),
        ("nothing", {}, "there is no bundle 'nothing'; choose one of"),
        ("mae_resenc_l", {"sorce": str(file)}, "unknown setting --sorce"),
        ("mae_resenc_l", {"source": str(file), "resume": "nope"}, "--resume is 'nope'; it must be true or false"),
    ):
        with pytest.raises(SettingsError, match=words):
            import_tool(filled(ImportCheckpoint, bundle, **options))


def test_a_refusal_ends_the_tool_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(b"PK")
    command = [python(), str(ROOT / "tools" / "inspect_weights.py"), str(tmp_path / "cut.pth")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Stopped: ")
    assert "is not a complete checkpoint" in result.stderr


def test_pre_training_goes_on_from_an_imported_state(
    unet: tuple[Cell, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = unet
    target = tmp_path / "models" / "pretrained_encoder.pt"
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    small = small_settings("mae_resenc_l")
    import_tool(filled(ImportCheckpoint, "mae_resenc_l", source=str(file), output=str(target), resume=True, **small))
    before = read_checkpoint(target)
    result = run("mae_resenc_l", "pretrain", *pretraining(tmp_path, images, epochs=1))
    assert "the optimizer starts afresh" in result.stdout + result.stderr
    after = read_checkpoint(target)
    assert before.keys() == after.keys()
    changed = float((after["encoder.stem.conv.weight"] - before["encoder.stem.conv.weight"]).abs().max())
    assert 0 < changed < 0.2, "a few steps from the imported weights, not a random start"
    assert json.loads(target.with_suffix(".json").read_text())["epochs"] == 1


def test_a_method_that_is_not_whole_cannot_go_on(tmp_path: Path) -> None:
    cell, backbone, method = narrow("voco_resenc_l")
    file = saved(published("voco_resenc_l", backbone, {}, None), tmp_path / "c.pth")
    receipt, imported = take(file, cell, tmp_path)
    _, network = bundle_cell("voco_resenc_l", small_settings("voco_resenc_l"), with_method=True)
    assert network is not None
    assert method
    with pytest.raises(WeightsError, match="does not hold the whole method"):
        write_imported_state(
            network, imported, tmp_path / "pretraining_state.pt", cell=cell, path=file, receipt=receipt
        )


def test_safetensors_carry_their_receipt(unet: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = unet
    take(file, cell, tmp_path / "in", told=Told(revision="f" * 40))
    path = tmp_path / "encoder.safetensors"
    export_safetensors(tmp_path / "in" / "pretrained_encoder.pt", cell, output=path)
    assert equal(read_checkpoint(path), read_checkpoint(tmp_path / "in" / "pretrained_encoder.pt"))
    text = "\n".join(inspect(path))
    assert "MAE with ResEnc-L" in text
    assert "f" * 40 in text
    from common.networks import ResEncUNet

    network = ResEncUNet(1, 2, features_per_stage=[4, 8, 8], blocks_per_stage=[1, 1, 1])
    receipt = transfer_weights(network, path)
    assert receipt.encoder_share == 1.0
    assert receipt.method == "MAE"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="is not a complete"):
        read_checkpoint(path)


def test_inspection_tells_what_is_in_a_file(primus: tuple[Cell, Path], tmp_path: Path) -> None:
    _, file = primus
    text = "\n".join(inspect(file))
    assert "MAE with Primus-M" in text
    assert "trainer_name BaseEvaMAETrainer_BS8" in text
    assert "token order not known" in text
    text = "\n".join(inspect(file, told=of_openmind("mae_primus_m")))
    assert "token order swapped, as in MIC-DKFZ/PrimusM-OpenMind-MAE" in text
    foreign = saved({"layer1.weight": torch.full((2, 2), torch.nan)}, tmp_path / "foreign.pt")
    text = "\n".join(inspect(foreign))
    assert "of no network of OpenMind" in text
    assert "layer1.weight" in text
    assert "warning" in text
    assert "NaN" in text


def test_what_others_reported_of_a_published_file_is_compared(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint_final.pth"
    file.write_bytes(b"x")
    for name, digest, told in (
        ("AnonRes/ResEncL-OpenMind-MAE", "0" * 64, "491,198,606"),
        ("MIC-DKFZ/PrimusM-OpenMind-MAE", "b866ac5f61d7e90d3a6cbb00a759ffc9d73beb5e63baa6b3cd654671ebc9a552", ""),
        ("AnonRes/PrimusM-OpenMind-VF", "0" * 64, ""),
    ):
        known = catalogue.by_repository(name)
        assert known is not None
        assert told in (reported_digest_warning(known, file, digest) or "")
        assert bool(told) == bool(reported_digest_warning(known, file, digest))


def test_a_file_with_a_certain_digest_must_have_it(unet: tuple[Cell, Path], tmp_path: Path) -> None:
    cell, file = unet
    with pytest.raises(WeightsError, match=r"is complete, but has sha256 \w+, not 0000"):
        take(file, cell, tmp_path / "in", told=Told(expected_sha256="0" * 64))


def test_the_published_file_is_compared_once_one_was_seen(
    unet: tuple[Cell, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the tool sets it
    _, file = unet
    address, recorded = "https://huggingface.co/MIC-DKFZ/ResEncL-OpenMind-MAE/resolve/main/checkpoint_final.pth", []
    monkeypatch.setattr(importing, "record_digest", lambda *told: recorded.append(told) or "kept in the catalogue")
    options = {"output": str(tmp_path / "encoder.pt")} | small_settings("mae_resenc_l")
    monkeypatch.setattr(importing, "published_file", lambda _: (address, file, None))
    import_tool(filled(ImportCheckpoint, "mae_resenc_l", source=str(file), **options))
    assert recorded == [], "a file of one's own says nothing of the published one"
    import_tool(filled(ImportCheckpoint, "mae_resenc_l", **options))
    assert recorded == [("mae_resenc_l", sha256(file))]
    assert "kept in the catalogue" in capsys.readouterr().out
    monkeypatch.setattr(importing, "published_file", lambda _: (address, file, "0" * 64))
    with pytest.raises(
        WeightsError, match=r"not 0000\w+, which large_files\.yml of mae_resenc_l says; .*remove hash_val"
    ):
        import_tool(filled(ImportCheckpoint, "mae_resenc_l", **options))
