"""What threads read ahead of its use, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def reading_threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what it has not begun when it is left."""
    pool = ThreadPoolExecutor(number, thread_name_prefix="reading")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """``read(item)`` of every item in order, the next ``depth`` of them begun or finished when one is taken.

    Raises:
        Exception: what ``read`` raises, in the place of its result.
    """
    begun: deque[Future[Result]] = deque()
    for item in items:
        begun.append(pool.submit(read, item))
        if len(begun) > depth:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
