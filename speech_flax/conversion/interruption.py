"""Signals that ask a program to end: nothing that is half done stays, and the exit code says which signal it was.

Python turns Ctrl-C into an exception wherever the program happens to be, and lets the other signals kill it on the
spot. Here all of them are exceptions, the first one counts, and where files are being written they wait.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

#: What a terminal sends at Ctrl-C and when it is closed, and what ``kill`` and batch systems send.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TIDYING = 10.0  # seconds


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
      exit_code: That of a program which this signal ended: 130 for Ctrl-C, 143 for ``kill``.
    """

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}; nothing incomplete was left behind")
        self.exit_code = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, a signal raises :class:`Interrupted`.

    Impatient ones that follow disturb neither the tidying up nor the end of the program, which is then near.
    """
    deadline = 0.0

    def end(number: int, _frame: Any) -> None:
        nonlocal deadline
        now = time.monotonic()
        if now >= deadline:  # should Python have lost the exception in a destructor, the next signal counts again
            deadline = now + _TIDYING
            raise Interrupted(number)

    previous = _handle(end)
    try:
        yield
    except Interrupted:
        previous.clear()
        raise
    finally:
        _restore(previous)


@contextlib.contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Within, signals wait: for a call of the function that this gives, which then raises, or for the end.

    Whatever handled signals before gets the first one when all is left, tidied up or complete.
    """
    received: list[int] = []

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    previous = _handle(lambda number, _frame: received.append(number))
    try:
        yield check
    finally:
        _restore(previous)
        if received:
            signal.raise_signal(received[0])


def _handle(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Let ``handler`` have the signals that are not ignored (as under ``nohup``); returns who had them before."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python gives signals to the main thread alone
    heeded = [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heeded}


def _restore(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
