"""Profiler traces of a few steps, for TensorBoard or Perfetto."""

from contextlib import ExitStack
from typing import Any

import jax

from speech_flax.storage import AnyPath, written_locally


class ProfilerTrace:
    """Traces the steps ``first`` to ``last`` (from 1) into a directory; nothing when ``steps`` is ``None``."""

    def __init__(self, steps: tuple[int, int] | None, directory: AnyPath):
        self._first, self._last = steps or (0, 0)
        self._directory = directory
        self._tracing = False
        self._copying = ExitStack()

    def before(self, step: int) -> None:
        """To be called before ``step`` is dispatched."""
        if step == self._first:
            jax.profiler.start_trace(str(self._copying.enter_context(written_locally(self._directory))))
            self._tracing = True

    def after(self, step: int, results: Any) -> None:
        """To be called after ``step`` was dispatched; waits for the ``results`` of the last one."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Write what was traced."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._copying.close()
