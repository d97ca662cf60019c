# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Both MAE cells, at full size, against numbers recorded from the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.losses import MaskedMSELoss
from common.methods.mae import TransformerMAE, UNetMAE
from common.networks import primus_m, resenc_l
from common.weights.published import ImportedWeights, import_network_weights

from .golden import draw, read, synthetic_weights


def load(method: nn.Module, imported: ImportedWeights) -> None:
    state = {f"backbone.{key}": value for key, value in imported.backbone.items()} | imported.method
    method.load_state_dict(state, strict=True)


def assert_output(output: Tensor, expected: dict) -> None:
    flat = output.detach().flatten().numpy()
    assert flat.size == expected["shape_numel"]
    samples = flat[np.random.RandomState(7).randint(0, flat.size, 64)]
    tolerance = 1e-3 * expected["absmax"]
    np.testing.assert_allclose(samples, expected["samples"], atol=tolerance, rtol=0)
    np.testing.assert_allclose(
        [flat.mean(), flat.std(), np.abs(flat).max()],
        [expected["mean"], expected["std"], expected["absmax"]],
        atol=tolerance,
    )


def total_norm(method: nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in method.parameters()]).norm())


def test_mae_resenc_l_equals_the_reference() -> None:
    golden = read("mae_resenc_l")
    method = UNetMAE(resenc_l())
    load(method, import_network_weights(synthetic_weights(golden)))
    hidden = torch.zeros(2, 4 * 4 * 4, dtype=torch.bool)
    for row, blocks in zip(hidden, golden["input"]["masked_block_indices"], strict=True):
        row[blocks] = True
    batch = {"image": draw(golden["salt"], "x", (2, 1, 64, 64, 64)), "hidden": hidden.view(2, 4, 4, 4)}
    pred = method.eval()(batch)
    loss = MaskedMSELoss()(pred, batch)
    loss.backward()
    expected = golden["expected"]
    assert_output(pred["reconstruction"], expected["reconstruction"])
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-4)
    assert total_norm(method) == pytest.approx(expected["grad_norm_total"], rel=1e-2)
    net = method.backbone
    ours = {
        "encoder.stem.convs.0.conv.weight": net.encoder.stem.conv.weight,
        "encoder.stages.1.blocks.1.conv1.conv.weight": net.encoder.stages[1][1].conv1.conv.weight,
        "encoder.stages.3.blocks.4.conv2.norm.weight": net.encoder.stages[3][4].conv2.norm.weight,
        "encoder.stages.5.blocks.4.conv1.conv.weight": net.encoder.stages[5][4].conv1.conv.weight,
        "decoder.stages.1.convs.0.norm.bias": net.decoder.stages[1].norm.bias,
        "decoder.seg_layers.4.bias": net.head.bias,
    }
    for name, parameter in ours.items():
        assert float(parameter.grad.norm()) == pytest.approx(expected["grad_norms"][name], rel=1e-2), name


def test_mae_primus_m_equals_the_reference() -> None:
    golden = read("mae_primus_m")
    method = TransformerMAE(primus_m(input_size=64))
    load(method, import_network_weights(synthetic_weights(golden)))
    visible = torch.zeros(2, 8 * 8 * 8, dtype=torch.bool)
    for row, tokens in zip(visible, golden["input"]["keep_token_indices"], strict=True):
        row[tokens] = True
    visible = visible.view(2, 8, 8, 8).transpose(1, 2)  # recorded with the first two axes exchanged
    batch = {"image": draw(golden["salt"], "x", (2, 1, 64, 64, 64)), "hidden": ~visible}
    pred = method.eval()(batch)
    loss = MaskedMSELoss()(pred, batch)
    loss.backward()
    expected = golden["expected"]
    assert_output(pred["reconstruction"], expected["reconstruction"])
    assert float(loss) == pytest.approx(expected["loss_with_mask_at_true_positions"], rel=1e-4)
    assert total_norm(method) == pytest.approx(expected["grad_norm_total_with_mask_at_true_positions"], rel=1e-2)
    blocks = method.backbone.encoder.transformer.blocks
    ours = {
        "mask_token": method.mask_token,
        "eva.blocks.3.attn.q_proj.bias": blocks[3].attention.query.bias,
        "eva.blocks.4.mlp.fc2.weight": blocks[4].mlp.output.weight,
        "eva.blocks.6.mlp.fc1_g.weight": blocks[6].mlp.gate.weight,
        "eva.blocks.10.gamma_2": blocks[10].scale2,
        "eva.blocks.11.mlp.fc1_x.weight": blocks[11].mlp.value.weight,
        "eva.blocks.15.attn.q_proj.weight": blocks[15].attention.query.weight,
        "decoder.blocks.0.attn.v_proj.weight": method.decoder.blocks[0].attention.value.weight,
        "decoder.norm.bias": method.decoder.norm.bias,
    }
    for name, parameter in ours.items():
        recorded = expected["grad_norms_with_mask_at_true_positions"][name]
        assert float(parameter.grad.norm()) == pytest.approx(recorded, rel=1e-2), name


def test_a_checkpoint_taken_without_its_token_order_is_caught() -> None:
    """The conversion matters: the same weights read as if trained in straight order miss the recorded output."""
    golden = read("mae_primus_m")
    method = TransformerMAE(primus_m(input_size=64))
    load(method, import_network_weights(synthetic_weights(golden), token_order="straight"))
    visible = torch.zeros(2, 8 * 8 * 8, dtype=torch.bool)
    for row, tokens in zip(visible, golden["input"]["keep_token_indices"], strict=True):
        row[tokens] = True
    visible = visible.view(2, 8, 8, 8).transpose(1, 2)
    with torch.no_grad():
        pred = method.eval()({"image": draw(golden["salt"], "x", (2, 1, 64, 64, 64)), "hidden": ~visible})
    with pytest.raises(AssertionError):
        assert_output(pred["reconstruction"], golden["expected"]["reconstruction"])
