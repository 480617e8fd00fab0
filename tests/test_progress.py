"""What a run says of itself: time, what remains, hangs, and where numbers are written."""

import json
import sys
import time
import types

import numpy as np
import pytest

from speech_flax.data.buckets import Bucket
from speech_flax.data.plan import BatchPlan
from speech_flax.training.experiment import ExperimentError
from speech_flax.training.goodput import Clock, Estimate
from speech_flax.training.metrics_log import MetricsLog, check_wandb
from speech_flax.training.progress import Progress, device_memory
from speech_flax.training.step import StepMetrics
from speech_flax.training.trainer import Trainer, TrainingError
from speech_flax.training.watchdog import Watchdog


def make_plan(shuffle: bool = True) -> BatchPlan:
    lengths = np.random.default_rng(0).integers(1, 48_000, 50)
    return BatchPlan(lengths, [Bucket(1.0, 4), Bucket(2.0, 2), Bucket(3.0, 3)], seed=1, shuffle=shuffle)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_per_bucket_between_two_steps_are_counted_exactly(shuffle):
    plan = make_plan(shuffle)
    epoch = plan.steps_per_epoch
    for first, last in ((0, 0), (0, 5), (3, epoch), (epoch - 2, epoch + 3), (5, 3 * epoch + 7), (epoch, 2 * epoch)):
        counted = np.bincount([plan.batch(step).bucket_index for step in range(first, last)], minlength=3)
        np.testing.assert_array_equal(plan.batches_between(first, last), counted)


def test_time_that_remains_is_the_sum_over_the_buckets():
    estimate = Estimate([100, 200, 400])
    assert estimate.seconds([1, 1, 1]) is None
    for seconds in (1.0, 3.0):
        estimate.add(0, seconds)
    estimate.add(1, 4.0)
    # 2 s per step of the first bucket, 4 s of the second; the third was never seen: 8 s of 400 samples, 400 in it.
    assert estimate.seconds([10, 5, 2]) == pytest.approx(20 + 20 + 2 * 8)


def test_goodput_counts_restarts_against_a_run():
    clock = Clock()
    with clock.spending("compilation"):
        time.sleep(0.05)
    record = clock.record()
    record["begun"] -= 10.0  # an interruption of ten seconds
    restarted = Clock(record)
    assert restarted.running >= record["running"] >= 0.05
    assert restarted.seconds("compilation") >= 0.05
    assert 0 <= restarted.goodput < 0.05


def metrics(loss: float) -> StepMetrics:
    return StepMetrics(*(np.float32(value) for value in (loss, 1, 0.1, 4, 0, 16_000, 0, 0)))


class KeptLog(MetricsLog):
    def __init__(self):
        self.written: list[tuple[int, dict]] = []

    def write(self, step, values):
        self.written.append((step, values))

    def flush(self):
        pass

    def close(self):
        pass


def test_numbers_of_a_step_are_looked_at_after_the_next_was_dispatched():
    plan = make_plan()
    log = KeptLog()
    written = log.written
    progress = Progress(
        steps=3, first_step=0, plan=plan, log=log, log_every=2,
        evaluate_every=None, clock=Clock(),
    )  # fmt: skip
    assert progress.add(1, metrics(5.0)) is None
    step, arrived = progress.add(2, metrics(3.0))
    assert step == 1 and arrived.loss == 5.0 and not written
    progress.add(3, metrics(1.0))
    (step, values), = written  # fmt: skip
    assert step == 2 and values["train/loss"] == 4.0 and values["train/learning_rate"] == np.float32(0.1)
    samples = sum(
        plan.buckets[b].batch_size * plan.bucket_samples[b] for b in (plan.batch(s).bucket_index for s in (0, 1))
    )
    assert values["speed/padding"] == pytest.approx(1 - 32_000 / samples)
    assert progress.flush()[0] == 3 and [step for step, _ in written] == [2, 3]
    progress.close()


def test_time_that_remains_counts_the_evaluations_to_come_and_ends_at_zero():
    clock, log = Clock(), KeptLog()
    with clock.spending("evaluation"):
        time.sleep(0.2)
    progress = Progress(
        steps=4, first_step=0, plan=make_plan(), log=log, log_every=1,
        evaluate_every=2, clock=clock,
    )  # fmt: skip
    for step in range(1, 5):
        progress.add(step, metrics(1.0))
    progress.settle()
    progress.close()
    remaining = [values["speed/remaining_seconds"] for _, values in log.written]
    assert remaining[0] >= 0.2 and remaining[-1] == 0, "one evaluation follows step 2, and none of training's the last"


def test_most_memory_of_any_device_is_logged_where_the_platform_tells(monkeypatch):
    def devices(*peaks: int | None) -> list[types.SimpleNamespace]:
        statistics = [None if peak is None else {"bytes_in_use": 1, "peak_bytes_in_use": peak} for peak in peaks]
        return [types.SimpleNamespace(memory_stats=lambda known=known: known) for known in statistics]

    monkeypatch.setattr("jax.local_devices", lambda: devices(3 * 2**29, 2**30))
    assert device_memory() == 1.5
    plan, log = make_plan(), KeptLog()
    progress = Progress(
        steps=1, first_step=0, plan=plan, log=log, log_every=1, evaluate_every=None,
        clock=Clock(),
    )  # fmt: skip
    progress.add(1, metrics(1.0))
    progress.settle()
    progress.close()
    assert log.written[0][1]["speed/device_memory_gib"] == 1.5
    monkeypatch.setattr("jax.local_devices", lambda: devices(None))
    assert device_memory() is None


def test_hang_shows_the_stacks_of_all_threads(tmp_path):
    with (tmp_path / "stacks").open("w+") as file:
        with Watchdog(0.1 / 60, file) as watchdog:
            for _ in range(4):
                time.sleep(0.05)
                watchdog.alive()
            assert file.seek(0) == 0 and file.read() == ""
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and "Timeout" not in (tmp_path / "stacks").read_text():
                time.sleep(0.05)
        text = (tmp_path / "stacks").read_text()
    assert "Timeout" in text and "test_hang_shows_the_stacks_of_all_threads" in text


def test_log_goes_on_as_if_it_had_never_been_interrupted(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (2, 4, 6):
        log.write(step, {"train/loss": 1.0 / step, "note": "text"})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed while it wrote
    log = MetricsLog(tmp_path, 4)
    log.write(6, {"train/loss": 0.5})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(2, 0.5), (4, 0.25), (6, 0.5)]


def test_evaluation_that_is_done_again_replaces_what_was_logged_of_it(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(4, {"validation/loss": 3.0})
    log.write(8, {"train/loss": 1.0})
    log.write(8, {"validation/loss": 2.0})
    log.close()
    log = MetricsLog(tmp_path, 8, evaluated=False)
    log.write(8, {"validation/loss": 1.5})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 4, "validation/loss": 3.0},
        {"step": 8, "train/loss": 1.0},
        {"step": 8, "validation/loss": 1.5},
    ]


def test_two_parts_of_a_run_within_a_second_have_files_of_their_own_for_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    for first_step in (0, 8):
        log = MetricsLog(tmp_path, first_step)
        log.write(first_step + 1, {"train/loss": 1.0})
        log.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_weights_and_biases_get_the_same_numbers_when_asked_for(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricsLog(tmp_path, 0, "project")
    log.write(1, {"train/loss": 2.0, "note": "text"})
    log.close()
    assert calls[0]["project"] == "project" and calls[0]["resume"] == "allow"
    assert calls[1:] == [(1, {"train/loss": 2.0}), "end"]


def test_weights_and_biases_without_the_package_are_refused(monkeypatch):
    check_wandb(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match="pip install"):
        check_wandb("project")


def test_steps_skipped_in_a_row_abort_and_say_what_to_change():
    """What the loop does with the numbers of a step that has arrived."""
    plan = make_plan()
    experiment = types.SimpleNamespace(
        data=types.SimpleNamespace(max_bad_fraction=1.0), optimizer=types.SimpleNamespace(max_skipped_steps=3)
    )
    advice = types.SimpleNamespace(infeasible_advice="have too few frames")
    splits = {"train": types.SimpleNamespace(plan=plan)}
    trainer = types.SimpleNamespace(
        experiment=experiment, task=advice, splits=splits, rows_seen=0, bad_rows=0, bad_files=[]
    )
    Trainer._check(trainer, None)
    Trainer._check(trainer, (1, metrics(1.0).replace(skipped_in_a_row=np.int32(2))))
    with pytest.raises(
        TrainingError, match=r"3 steps in a row up to step 2 \(optimizer.max_skipped_steps\).*too few frames"
    ):
        Trainer._check(trainer, (2, metrics(1.0).replace(skipped_in_a_row=np.int32(3))))
