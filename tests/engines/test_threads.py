# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A busy machine gets fewer threads, unless the user says how many; an idle one all."""

from __future__ import annotations

import pytest

from common.engines import threads


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is asked of PyTorch on a machine of four cores with a load."""
    found: list[int] = []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads.torch, "set_num_threads", found.append)
    monkeypatch.setattr(threads.psutil, "getloadavg", lambda: (3.0, 0.0, 0.0))
    return found


@pytest.mark.parametrize(("free", "expected"), [(0.0, [1]), (0.4, [1]), (1.6, [2]), (2.6, [3]), (3.6, []), (4.0, [])])
def test_as_many_threads_as_cores_are_free(
    chosen: list[int],
    free: float,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: free)
    threads.choose_threads("cpu")
    said = capsys.readouterr().out
    assert chosen == expected
    assert bool(said) is bool(expected)
    if expected:
        assert f"computing with {expected[0]} thread" in said
        assert "OMP_NUM_THREADS=4 before the command" in said


def test_nothing_is_chosen_where_it_is_said_or_not_asked(chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: 0.0)
    threads.choose_threads("meta")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RANK"):
        with monkeypatch.context() as said:
            said.setenv(name, "4")
            threads.choose_threads("cpu")
    monkeypatch.setattr(threads.psutil, "getloadavg", lambda: (0.2, 0.0, 0.0))
    threads.choose_threads("cpu")
    assert chosen == []


def test_cores_that_this_process_may_use_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda interval, percpu: [0.0, 100.0, 80.0, 0.0])
    assert threads.free_cores() == pytest.approx(1.2)
