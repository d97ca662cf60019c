# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shlex
import subprocess

import pytest

from ..conftest import ROOT
from ..starts import python


def sharding(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [python(), "-W", "ignore", str(ROOT / "tools" / "sharding.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_process_holds_half_of_what_is_sharded() -> None:
    narrow = ["--embed_dim", "48", "--depth", "4", "--num_heads", "4", "--repeats", "1"]
    result = sharding("simmim_primus_m", *narrow)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [
        line.strip("| ").split(" | ")
        for line in result.stdout.splitlines()
        if line.startswith(("| copied", "| sharded"))
    ]
    together = {row[0]: float(row[4]) for row in rows}
    assert together["sharded"] == pytest.approx(together["copied"] / 2, rel=0.1)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("next:    torchrun --standalone --nproc_per_node 2 -m monai.bundle run --config_file ")
    files = ["bundles/simmim_primus_m/configs/pretrain.yaml", "common/configs/fsdp.yaml"]
    assert shlex.split(last)[9:] == [str(files), *("--dataset_dir", "FOLDER"), *narrow[:-2]]


@pytest.mark.parametrize(
    ("arguments", "sign"),
    [
        (["mae_resenc_l"], "no bundle with a Primus backbone"),
        (["mae_primus_m", "--batch_size", "3"], "batch_size 3 does not split over 2 processes"),
        (
            ["mae_primus_m", "--device", "cuda", "--processes", "99", "--batch_size", "99"],
            "99 processes need as many GPUs",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], sign: str) -> None:
    result = sharding(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("Stopped: ")
    assert sign in result.stderr
