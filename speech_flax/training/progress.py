"""What a run says while it goes: one progress bar and one log line at a time, from process 0 alone."""

from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from speech_flax.data.plan import BatchPlan
from speech_flax.data.stream_plan import StreamPlan
from speech_flax.training.goodput import Clock, Estimate
from speech_flax.training.metrics_log import MetricsLog
from speech_flax.training.step import StepMetrics


def say(text: str) -> None:
    """Print one line from process 0, without breaking a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(text)


class Progress:
    """Averages of the metrics between log lines, on a bar, in the log file and for TensorBoard.

    Numbers of a step are fetched when the next one has been dispatched, so that the device never waits for them.

    Args:
        steps: Steps of the run.
        first_step: Steps that it has done.
        plan: What the steps train on.
        log: Where numbers are written; none on processes other than 0.
        log_every: Steps between two log lines.
        evaluate_every: Steps between two evaluations, for the estimate of the time that remains; none has none.
        clock: Where the time goes.
    """

    def __init__(
        self,
        *,
        steps: int,
        first_step: int,
        plan: BatchPlan | StreamPlan,
        log: MetricsLog | None,
        log_every: int,
        evaluate_every: int | None,
        clock: Clock,
    ):
        self._plan = plan
        self._log = log
        self._every = log_every
        self._evaluate_every = evaluate_every
        self._clock = clock
        self._estimate = Estimate(plan.bucket_samples)
        self._pending: tuple[int, StepMetrics] | None = None
        self._window: list[tuple[StepMetrics, float]] = []
        self._reported = self._fetched = self._now()
        quiet = True if jax.process_index() else None  # None: only on a terminal
        shown = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self._bar = tqdm(total=steps, initial=first_step, bar_format=shown, disable=quiet, dynamic_ncols=True)

    def add(self, step: int, metrics: StepMetrics) -> tuple[int, StepMetrics] | None:
        """Note the metrics of a dispatched ``step``; returns the step before and its metrics, which have arrived."""
        arrived = self.flush()
        self._pending = (step, metrics)
        return arrived

    def flush(self) -> tuple[int, StepMetrics] | None:
        """Wait for the pending metrics and return them with their step."""
        if self._pending is None:
            return None
        step, pending = self._pending
        self._pending = None
        metrics = jax.device_get(pending)
        now, bucket = self._now(), self._plan.batch(step - 1).bucket_index
        self._estimate.add(bucket, now["steps"] - self._fetched["steps"])
        self._fetched = now
        padded = self._plan.buckets[bucket].batch_size * self._plan.bucket_samples[bucket]
        self._window.append((metrics, padded / self._plan.sampling_rate))
        self._bar.update(step - self._bar.n)
        if step % self._every == 0 or step == self._bar.total:
            self._report(step)
        return step, metrics

    def settle(self) -> tuple[int, StepMetrics] | None:
        """As :meth:`flush`, and all that was logged is kept: to be called before a checkpoint."""
        arrived = self.flush()
        if self._log is not None:
            self._log.flush()
        return arrived

    def _now(self) -> dict[str, float]:
        """Seconds so far: of the run, of its steps with what they wait for data, and of that."""
        running, data = self._clock.running, self._clock.seconds("data")
        between = self._clock.seconds("evaluation") + self._clock.seconds("compilation")
        return {"running": running, "steps": running - between, "data": data}

    def _report(self, step: int) -> None:
        now = self._now()
        spent = {name: now[name] - self._reported[name] for name in now}
        self._reported = now
        metrics = [metric for metric, _ in self._window]
        seconds = sum(float(metric.audio_samples) for metric in metrics) / self._plan.sampling_rate
        padded = sum(padded for _, padded in self._window)
        self._window.clear()
        finite = [float(metric.loss) for metric in metrics if np.isfinite(metric.loss)]
        speed = seconds / max(spent["steps"], 1e-9)
        remaining = self.remaining_seconds(step)
        values = {
            "train/loss": float(np.mean(finite)) if finite else None,
            "train/learning_rate": float(metrics[-1].learning_rate),
            "train/gradient_norm": _finite_or_none(float(np.mean([metric.gradient_norm for metric in metrics]))),
            "train/infeasible": int(sum(metric.infeasible for metric in metrics)),
            "train/skipped_steps": int(metrics[-1].skipped),
            "speed/audio_seconds_per_second": speed,
            "speed/padding": 1 - seconds / padded,
            "speed/seconds": round(spent["running"], 3),
            "speed/seconds_waiting_for_data": round(spent["data"], 3),
            "speed/goodput": round(self._clock.goodput, 4),
            "speed/remaining_seconds": None if remaining is None else round(remaining, 1),
            "speed/device_memory_gib": device_memory(),
        }
        loss = f"{values['train/loss']:.3f}" if finite else "not finite"
        parts = [f"loss {loss}", f"lr {values['train/learning_rate']:.1e}", f"{speed:.0f} audio-s/s"]
        if remaining:
            parts.append(f"{_clock_time(remaining)} left")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        if self._bar.disable:
            say(f"step {step}/{self._bar.total}: {', '.join(parts)}")
        self.write(step, values)

    def remaining_seconds(self, step: int) -> float | None:
        """Seconds that the steps after ``step`` and their evaluations will take."""
        seconds = self._estimate.seconds(self._plan.batches_between(step, self._bar.total))
        if seconds is None or self._evaluate_every is None:
            return seconds
        # None follows the last step: what is scored then is not training's.
        evaluations = max(0, (self._bar.total - 1) // self._evaluate_every - step // self._evaluate_every)
        return seconds + evaluations * self._clock.mean("evaluation")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log ``values`` of ``step``."""
        if self._log is not None:
            self._log.write(step, values)

    def close(self) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()


def device_memory() -> float | None:
    """Most memory that was ever in use on one of this process's devices, in GiB, where the platform tells."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    peaks = [known["peak_bytes_in_use"] for known in statistics if known and "peak_bytes_in_use" in known]
    return round(max(peaks) / 2**30, 3) if peaks else None


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _finite_or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
