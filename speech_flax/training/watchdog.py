"""What a run shows of itself when it hangs."""

import faulthandler
import sys
from typing import TextIO


class Watchdog:
    """Prints the stacks of all threads when :meth:`alive` is not called for ``minutes``, and again after as long.

    Works even while Python's lock is held, in a collective that waits for another host for instance. 0 turns it off.
    """

    def __init__(self, minutes: float, file: TextIO | None = None):
        self._seconds = 60 * minutes
        self._file = sys.__stderr__ if file is None else file

    def alive(self) -> None:
        """Begin to wait anew."""
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def __enter__(self) -> "Watchdog":
        self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds > 0:
            faulthandler.cancel_dump_traceback_later()
