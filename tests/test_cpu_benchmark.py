"""benchmarks/cpu.py: both sides of a row compute the same, take turns, and are timed by many runs if they are short."""

import itertools
import time

import numpy as np
import pytest


@pytest.fixture(scope="module")
def cpu(benchmarks):
    import cpu

    return cpu


def test_both_sides_of_ctc_compute_the_same_loss(cpu):
    from cpu_sides import prepare_ours, prepare_torch

    case = cpu.Case("ctc", rows=3, seconds=1, symbols=12)
    loss, _ = prepare_ours(case)()
    np.testing.assert_allclose(loss, prepare_torch(case, compiled=False)().item(), rtol=1e-5)


def test_both_sides_of_log_mel_compute_the_same_features(cpu):
    from cpu_sides import prepare_numpy_log_mel, prepare_ours

    case = cpu.Case("log-mel", seconds=1)
    ours, theirs = prepare_ours(case)(), prepare_numpy_log_mel(case)()
    # the tolerance of test_front_end.py
    np.testing.assert_allclose(ours["input_features"], theirs["input_features"], atol=5e-4, rtol=0)


def test_short_runs_are_repeated_and_their_time_is_that_of_one(cpu, monkeypatch):
    import cpu_sides

    clock = itertools.count()
    monkeypatch.setattr(cpu_sides.time, "perf_counter", lambda: next(clock) * 0.01)
    runs = []
    timed = cpu_sides.timed(lambda: runs.append(None))
    assert len(runs) > 5
    assert timed["wall"] == pytest.approx(0.01, rel=0.2)


def test_sides_take_turns_and_a_row_has_the_medians_of_both(cpu, tmp_path):
    began = time.perf_counter()
    row = cpu.measure(cpu.Case("log-mel", seconds=1), ("ours", "numpy"), 2, tmp_path / "unused", huge_pages=False)
    passed = 1000 * (time.perf_counter() - began)
    assert set(row) == {"ours", "numpy"}
    for side in row.values():
        assert 0 < side["wall_ms"] < passed and 0 < side["cpu_ms"] < passed
        assert side["memory_mib"] > 0
    table = list(cpu.table({"rows": {"log-mel": row}}))
    assert len(table) == 3 and f"| {row['numpy']['wall_ms'] / row['ours']['wall_ms']:.2f} / " in table[2]
