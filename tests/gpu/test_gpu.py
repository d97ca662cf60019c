# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: every cell takes a training step under AMP, equals the CPU and never makes the host wait.

Skipped without CUDA, run wherever one is at hand: ``python -m pytest -m gpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from common.bundles import read_config

from ..bundles.conftest import from_the_root  # noqa: F401 (a fixture)
from ..bundles.processes import distance, run_in_processes
from ..bundles.test_cells import build, scans  # noqa: F401 (a fixture)
from ..bundles.test_distributed import SGD, tiny
from ..conftest import BUNDLES, method_of, small_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("from_the_root"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
# their voxel noise and permutations follow one law on all devices, but are not the same numbers
DRAWN_ON_THE_DEVICE = ("models_genesis", "swinunetr")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail at any operation that makes the host wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_training_step_under_amp_equals_the_cpu(bundle: str, scans: Path) -> None:  # noqa: F811
    extra = {"drop_path": 0.0} if bundle.endswith("primus_m") else {}
    reference = build(bundle, scans, **extra)
    cell = build(bundle, scans, device="cuda", **extra)
    cell.method.load_state_dict(reference.method.state_dict())
    if method_of(bundle) not in DRAWN_ON_THE_DEVICE:
        for name, value in reference.batch.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(cell.batch[name].cpu(), value, rtol=1e-3, atol=1e-3)
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in reference.batch.items()}
    expected = reference.loss(reference.method.train()(reference.batch), reference.batch)
    expected.backward()
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    with torch.autocast("cuda", dtype):
        loss = cell.loss(cell.method.train()(batch), batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=3e-2)
    norms = [
        float(torch.nn.utils.get_total_norm([p.grad for p in c.method.parameters() if p.grad is not None]))
        for c in (reference, cell)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_host_never_waits_within_a_step(bundle: str, scans: Path) -> None:  # noqa: F811
    cell = build(bundle, scans, device="cuda")
    for attempt in range(2):  # the first call may load kernels and choose algorithms
        context = no_waiting() if attempt else torch.no_grad()
        with context, torch.enable_grad():
            with torch.no_grad():
                views = cell.views(cell.raw)
            with torch.autocast("cuda", torch.bfloat16):
                loss = cell.loss(cell.method(views), views)
            cell.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            cell.optimizer.step()


@pytest.mark.parametrize("bundle", ["mae_resenc_l", "mae_primus_m"])
def test_inference_under_amp_equals_the_cpu(bundle: str) -> None:
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/inference.yaml"))
    names = ("features_per_stage", "blocks_per_stage", "embed_dim", "depth", "num_heads", "patch_size")
    parser.update({name: value for name, value in small_settings(bundle).items() if name in names})
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def").eval()
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        expected = network(image)
        with torch.autocast("cuda", torch.bfloat16):
            found = network.cuda()(image.cuda())
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_weights_equal_copied_ones_on_two_gpus(images: Path, tmp_path: Path) -> None:
    own = {"device": "$torch.device('cuda', int(os.environ['LOCAL_RANK']))", "optimizer": SGD, "lr": 0.01}
    overlays = ("multi_gpu", "fsdp")
    runs = [tiny("mae_primus_m", images, tmp_path / name, overlay=name, **own) for name in overlays]
    assert run_in_processes(runs, tmp_path, gpus=True) == [[None, None]] * 2
    one, other = (tmp_path / name / "models" / "pretraining_state.pt" for name in overlays)
    assert distance(one, other, "method") <= 1e-4
