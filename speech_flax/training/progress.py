"""What a run says while it goes: one progress bar and one log line at a time, from process 0 alone."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from speech_flax.data.loader import Batch
from speech_flax.training.run_directory import MetricsLog
from speech_flax.training.step import StepMetrics


def say(text: str) -> None:
    """Print one line from process 0, without breaking a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(text)


class Progress:
    """Averages of the metrics between log lines, on a bar, in the log file and for TensorBoard.

    Numbers of a step are fetched when the next one has been dispatched, so that the device never waits for them.
    """

    def __init__(
        self,
        steps: int,
        first_step: int,
        log: MetricsLog | None,
        learning_rate: Callable[[int], Any],
        log_every: int,
    ):
        self._log = log
        self._learning_rate = learning_rate
        self._every = log_every
        self._pending: tuple[int, StepMetrics, Batch] | None = None
        self._window: list[tuple[StepMetrics, float]] = []
        self._since = time.monotonic()
        self.latest: StepMetrics | None = None
        quiet = True if jax.process_index() else None  # None: only on a terminal
        self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=quiet, dynamic_ncols=True, smoothing=0.1)

    def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        """Note the metrics of a dispatched ``step``; they are looked at in the next call."""
        self._fetch()
        self._pending = (step, metrics, batch)

    def flush(self) -> StepMetrics | None:
        """Wait for the pending metrics and return them."""
        self._fetch()
        return self.latest

    def _fetch(self) -> None:
        if self._pending is None:
            return
        step, metrics, batch = self._pending
        self._pending = None
        self.latest = jax.device_get(metrics)
        padded = batch.waveforms.shape[0] * batch.waveforms.shape[1] * jax.process_count() / 16_000
        self._window.append((self.latest, padded))
        self._bar.update(step - self._bar.n)
        if step % self._every == 0 or step == self._bar.total:
            self._report(step)

    def _report(self, step: int) -> None:
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        metrics = [metric for metric, _ in self._window]
        finite = [float(metric.loss) for metric in metrics if np.isfinite(metric.loss)]
        seconds = sum(float(metric.audio_samples) for metric in metrics) / 16_000
        padded = sum(padded for _, padded in self._window)
        values = {
            "train/loss": float(np.mean(finite)) if finite else None,
            "train/learning_rate": float(self._learning_rate(step - 1)),
            "train/gradient_norm": _finite_or_none(np.mean([metric.gradient_norm for metric in metrics])),
            "train/audio_seconds_per_second": seconds / elapsed,
            "train/padding": 1 - seconds / padded if padded else None,
            "train/infeasible": int(sum(metric.infeasible for metric in metrics)),
            "train/skipped_steps": int(metrics[-1].skipped),
            "train/seconds": round(elapsed, 3),
        }
        self._window.clear()
        self.write(step, values)
        loss = f"{values['train/loss']:.3f}" if finite else "not finite"
        rate, speed = values["train/learning_rate"], values["train/audio_seconds_per_second"]
        self._bar.set_postfix_str(f"loss {loss}, lr {rate:.1e}, {speed:.0f} audio-s/s", refresh=False)
        if self._bar.disable:
            say(f"step {step}/{self._bar.total}: loss {loss}, lr {rate:.1e}, {speed:.0f} audio-s/s")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log ``values`` of ``step``."""
        if self._log is not None:
            self._log.write(step, values)

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        say(text)

    def close(self) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()


def _finite_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
