# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from common.errors import SettingsError, WeightsError
from common.files import sha256
from common.networks import Primus, ResEncUNet
from common.weights import (
    fine_tuning_network,
    import_network_weights,
    keep_previous,
    read_checkpoint,
    trained_network,
    transfer_weights,
    write_checkpoint,
)


def unet(**options: object) -> ResEncUNet:
    return ResEncUNet(**{"features_per_stage": [4, 8], "blocks_per_stage": [1, 1], **options})  # type: ignore[arg-type]


def primus(**options: object) -> Primus:
    return Primus(**{"input_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2, **options})  # type: ignore[arg-type]


def saved(network: torch.nn.Module, path: Path) -> Path:
    write_checkpoint(network.state_dict(), path)
    return path


def test_encoder_transfer_takes_the_encoder_and_leaves_the_rest(tmp_path: Path) -> None:
    source, target = unet(), unet(out_channels=3)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    receipt = transfer_weights(target, saved(source, tmp_path / "e.pt"))
    assert receipt.encoder_share == 1.0
    for key, value in target.state_dict().items():
        expected = source.state_dict()[key] if key.startswith("encoder.") else before[key]
        assert torch.equal(value, expected), key
    transfer_weights(target, tmp_path / "e.pt", transfer="encoder+decoder")
    assert torch.equal(target.decoder.stages[0].conv.weight, source.decoder.stages[0].conv.weight)
    assert torch.equal(target.head.weight, before["head.weight"])


def test_more_channels_see_the_mean_of_them(tmp_path: Path) -> None:
    for build in (unet, primus):
        source, target = build().eval(), build(in_channels=3).eval()
        receipt = transfer_weights(target, saved(source, tmp_path / "e.pt"))
        assert len(receipt.adapted) == 1
        image = torch.randn(1, 1, 16, 16, 16)
        three = image.repeat(1, 3, 1, 1, 1)
        assert torch.allclose(source.encode(image)[-1], target.encode(three)[-1], atol=1e-5)


def test_another_input_size_interpolates_the_position_table(tmp_path: Path) -> None:
    source, target = primus().eval(), primus(input_size=[32, 16, 24]).eval()
    receipt = transfer_weights(target, saved(source, tmp_path / "e.pt"))
    assert list(receipt.adapted) == ["encoder.transformer.position_embedding"]
    image = torch.randn(1, 1, 32, 16, 24)
    assert torch.allclose(source.encode(image)[0], target.encode(image)[0], atol=1e-6)


def test_another_network_is_refused(tmp_path: Path) -> None:
    path = saved(unet(), tmp_path / "e.pt")
    with pytest.raises(WeightsError, match="of another network"):
        transfer_weights(unet(features_per_stage=[4, 16]), path)
    with pytest.raises(WeightsError, match="of another network"):
        transfer_weights(unet(blocks_per_stage=[1, 2]), path)
    with pytest.raises(WeightsError, match="of another network"):
        transfer_weights(unet(), saved(unet(blocks_per_stage=[1, 2]), tmp_path / "deep.pt"))
    with pytest.raises(WeightsError, match="of another network"):
        transfer_weights(primus(), path)
    assert transfer_weights(unet(blocks_per_stage=[1, 2]), path, allow_partial=True).encoder_share < 1
    with pytest.raises(SettingsError, match="must be one of"):
        transfer_weights(unet(), path, transfer="all")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = saved(unet(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-500])
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"encoder.x": Path()}, tmp_path / "code.pt")
    torch.save({"network_weights": {}}, tmp_path / "published.pt")
    for name, words in (
        ("none", "there is no"),
        ("cut", "not a complete"),
        ("text", "is no checkpoint"),
        ("list", "holds a list"),
        ("code", "other things than tensors"),
    ):
        with pytest.raises(WeightsError, match=words) as error:
            read_checkpoint(tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(error.value)
    with pytest.raises(WeightsError, match="must be imported first"):
        transfer_weights(unet(), tmp_path / "published.pt")


def test_config_entry_points_end_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--from_scratch true"):
        fine_tuning_network(unet(), pretrained=str(tmp_path / "none.pt"), settings={})
    assert fine_tuning_network(network := unet(), pretrained="none", settings={}, from_scratch=True) is network
    fine_tuning_network(
        unet(), pretrained=str(saved(unet(), tmp_path / "e.pt")), receipt_file=str(tmp_path / "r.json"), settings={}
    )
    receipt = json.loads((tmp_path / "r.json").read_text())
    assert receipt["encoder_share"] == 1.0
    assert len(receipt["sha256"]) == 64
    with pytest.raises(WeightsError, match="fine-tune with this bundle"):
        trained_network(unet(), str(tmp_path / "none.pt"), settings={})
    with pytest.raises(WeightsError, match=r"head\.weight is \[1"):
        trained_network(unet(out_channels=3), str(tmp_path / "e.pt"), settings={})


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(unet(), tmp_path / "e.pt")
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        saved(unet(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["e.pt"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a tiny disk needs root")
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this system does not let tests mount a disk")
    try:
        write_checkpoint({"x": torch.zeros(1000)}, disk / "state.pt")
        with pytest.raises(OSError, match="No space left") as error:
            write_checkpoint({"x": torch.zeros(1_000_000)}, disk / "state.pt")
        assert "state.pt" in str(error.value)
        assert len(read_checkpoint(disk / "state.pt")["x"]) == 1000
        assert [p.name for p in disk.iterdir()] == ["state.pt"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_the_previous_model_is_kept(tmp_path: Path) -> None:
    keep_previous(str(tmp_path / "model.pt"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.pt").write_text("one")
    keep_previous(str(tmp_path / "model.pt"))
    (tmp_path / "model.pt").write_text("two")
    keep_previous(str(tmp_path / "model.pt"))
    assert (tmp_path / "model_previous.pt").read_text() == "one"
    assert (tmp_path / "model_previous_2.pt").read_text() == "two"


def test_settings_that_no_tensor_shows_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(primus(), tmp_path / "e.pt")
    path.with_suffix(".json").write_text(json.dumps({"settings": {"num_heads": 2, "spacing_mm": 1.0}}))
    with pytest.raises(WeightsError, match="add --num_heads 2"):
        fine_tuning_network(primus(num_heads=4), pretrained=str(path), settings={"num_heads": 4})
    fine_tuning_network(primus(), pretrained=str(path), settings={"num_heads": 2, "spacing_mm": 2.0})
    assert "pre-training had spacing_mm 1.0, this run has 2.0" in capsys.readouterr().out
    with pytest.raises(WeightsError, match=r"--spacing_mm was 1\.0, here 2\.0"):
        trained_network(primus(), str(path), settings={"spacing_mm": 2.0})


def test_a_decoder_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    path = saved(primus(), tmp_path / "e.pt")
    same = transfer_weights(primus(), path, transfer="encoder+decoder")
    other = transfer_weights(primus(out_channels=3), path, transfer="encoder+decoder")
    assert any(key.startswith("decoder.") for key in same.taken)
    assert not any(key.startswith("decoder.") for key in [*other.taken, *other.adapted])


def test_names_of_neither_backbone_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"the first is 'layer1\.weight'"):
        import_network_weights({"layer1.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="not a cube"):
        import_network_weights({"eva.pos_embed": torch.zeros(1, 100, 864)}, token_order="straight")
    with pytest.raises(WeightsError, match="token_order is None; it must be"):
        import_network_weights({"eva.pos_embed": torch.zeros(1, 100, 864)})
    with pytest.raises(WeightsError, match="token_order"):
        import_network_weights({}, token_order="hwd")


def test_a_position_table_of_another_shape_than_a_cube_is_read_by_its_grid() -> None:
    grid = torch.arange(2 * 3 * 4.0).view(2, 3, 4)  # the value of each place of the image's grid
    straight, swapped = grid.flatten(), grid.transpose(0, 1).flatten()
    for order, rows in (("straight", straight), ("swapped", swapped)):
        table = {"eva.pos_embed": rows.view(1, -1, 1).expand(1, -1, 864)}
        backbone = import_network_weights(table, token_order=order, grid=[2, 3, 4]).backbone
        assert torch.equal(backbone["encoder.transformer.position_embedding"][0, 0], grid)
    with pytest.raises(WeightsError, match=r"24 rows, which is not \[2, 3, 5\]"):
        import_network_weights(table, grid=[2, 3, 5], token_order="straight")


def test_of_names_with_other_values_the_last_in_the_order_of_modules_is_taken() -> None:
    first, second, third, last = (torch.full((4, 1, 3, 3, 3), value) for value in (1.0, 2.0, 3.0, 4.0))
    stem = "encoder.stem.convs.0"
    weights = {
        f"module.decoder.{stem}.all_modules.0.weight": last,  # whatever stands where in the file
        f"module.{stem}.conv.weight": first,
        f"module.{stem}.all_modules.0.weight": second,
        f"module.decoder.{stem}.conv.weight": third,
        "module.encoder.stages.0.blocks.0.conv1.all_modules.1.bias": torch.ones(32),
        "module.encoder.stages.0.blocks.0.conv1.norm.bias": torch.ones(32),
    }
    for expected in (last, third, second, first):
        imported = import_network_weights(weights)
        assert torch.equal(imported.backbone["encoder.stem.conv.weight"], expected)
        assert "encoder.stages.0.0.conv1.norm.bias" in imported.backbone
        told = sum("with other values" in why for why in imported.unused.values())
        assert told == len(weights) - 3, "equal values contradict nothing"
        assert sum(map(len, imported.contradicted.values())) == told
        weights = {key: value for key, value in weights.items() if value is not expected}


def test_a_smaller_kernel_gets_the_mean_of_a_larger_one(tmp_path: Path) -> None:
    path = saved(unet(), tmp_path / "e.pt")
    flat = unet()
    flat.encoder.stem.conv = torch.nn.Conv3d(1, 4, kernel_size=(1, 3, 3), padding=(0, 1, 1))
    receipt = transfer_weights(flat, path)
    expected = read_checkpoint(path)["encoder.stem.conv.weight"].mean(dim=2, keepdim=True)
    assert torch.equal(flat.encoder.stem.conv.weight, expected)
    assert receipt.adapted == {"encoder.stem.conv.weight": "kernel [3, 3, 3] averaged to [1, 3, 3]"}
    assert receipt.encoder_share == 1.0


def test_another_depth_takes_what_both_have_if_allowed(tmp_path: Path) -> None:
    shallow, deep = unet(), unet(features_per_stage=[4, 8, 8], blocks_per_stage=[1, 2, 1])
    for source, target in ((shallow, deep), (deep, shallow)):
        path = saved(source, tmp_path / "e.pt")
        with pytest.raises(WeightsError, match="--allow_partial true"):
            transfer_weights(target, path)
        receipt = transfer_weights(target, path, allow_partial=True)
        assert torch.equal(target.encoder.stages[1][0].conv1.conv.weight, source.encoder.stages[1][0].conv1.conv.weight)
        assert (receipt.encoder_share == 1.0) == (target is shallow)
        assert sum(receipt.parameters[key] for key in ("taken", "adapted", "missing")) == sum(
            value.numel() for value in target.state_dict().values()
        )


def test_an_encoder_without_finite_values_is_refused(tmp_path: Path) -> None:
    source = unet()
    with torch.no_grad():
        source.encoder.stem.conv.weight[0] = torch.nan
    with pytest.raises(WeightsError, match=r"NaN or infinite .*encoder\.stem\.conv\.weight"):
        transfer_weights(unet(), saved(source, tmp_path / "e.pt"))


def test_the_receipt_of_fine_tuning_says_where_the_weights_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(unet(), tmp_path / "e.pt")
    about = {"sha256": sha256(path), "method": "MAE", "backbone": "ResEnc-L", "licence": "CC-BY-4.0", "spacing_mm": 1.0}
    path.with_suffix(".json").write_text(json.dumps(about | {"citation": ["Wald et al."], "patch_size": [160] * 3}))
    for spacing, words in ((0.5, "this run has 0.5 x 0.5 x 0.5 mm voxels"), (1.2, "far from the pre-training spacing")):
        fine_tuning_network(unet(), pretrained=str(path), settings={"spacing_mm": spacing})
        text = capsys.readouterr().out
        for expected in (words, "MAE with ResEnc-L", "CC-BY-4.0", "Wald et al.", "160 x 160 x 160", "parameters"):
            assert expected in text
    plain = saved(unet(), tmp_path / "plain.pt")
    fine_tuning_network(unet(), pretrained=str(plain), settings={})
    assert json.loads(plain.with_suffix(".json").read_text())["encoder_share"] == 1.0
