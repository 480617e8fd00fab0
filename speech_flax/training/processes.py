"""Several processes that train as one, and how they are told to stop."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_T = TypeVar("_T")


def join_processes(distributed: bool) -> None:
    """Connect to the other processes of a run, once and before any device is used.

    On TPU slices, Slurm, Kubernetes and Open MPI jax finds them by itself. Elsewhere the environment variables
    ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` name them; the
    first of them also stands for ``distributed``.

    Raises:
        ValueError: when the processes cannot be found.
    """
    if not (distributed or "JAX_COORDINATOR_ADDRESS" in os.environ) or jax.distributed.is_initialized():
        return
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    number, identity = (int(os.environ[name]) if name in os.environ else None for name in names)
    try:
        jax.distributed.initialize(num_processes=number, process_id=identity)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot join the processes of this run ({error}); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID, or leave distributed out on a single machine"
        ) from error


def check_agreement(what: str, text: str) -> None:
    """Refuse processes that were not given the same; each would train on something else without a word.

    Raises:
        ValueError: when ``text`` differs between processes.
    """
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint8)
    everyone = np.reshape(multihost_utils.process_allgather(digest), (-1, digest.size))
    if different := np.flatnonzero((everyone != everyone[0]).any(axis=1)).tolist():
        raise ValueError(
            f"{what} of process {different[0]} differ from those of process 0; start all processes with the same "
            "command, on the same files"
        )


def together(work: Callable[[], _T]) -> _T:
    """What ``work`` returns; where it fails on one process, all fail at once instead of waiting for that one.

    ``work`` itself must not wait for other processes; all must call this together.

    Raises:
        ValueError: naming the process, where another one failed.
        Exception: what ``work`` raises.
    """
    failure = None
    try:
        result = work()
    except Exception as error:
        failure = error
    messages = exchange(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for index, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"process {index}: {message}")
    return result


def exchange(own: Any) -> list[Any]:
    """What every process passes, JSON values, in the order of the processes; all must call it together."""
    if jax.process_count() == 1:
        return [own]
    encoded = np.frombuffer(json.dumps(own).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([encoded.size], np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: encoded.size] = encoded
    gathered = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(gathered, sizes, strict=True)]


class StopRequest:
    """Whether the run shall end after a checkpoint, because of SIGTERM, SIGINT or a preemption notice.

    A context manager that handles the signals of a single process; a second signal stops it at once. Among several
    processes jax's preemption service receives SIGTERM, to any one of them, and makes all stop at the same call.
    """

    def __init__(self):
        self._received = False
        self._polls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: Any) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = True

    def __call__(self) -> bool:
        """True from the first call after the request on; all processes must call it equally often."""
        if jax.process_count() > 1 and not self._received:
            self._polls += 1
            self._received = multihost_utils.reached_preemption_sync_point(self._polls)
        return self._received
