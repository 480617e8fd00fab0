"""Stages of a kernel's computation, as generators whose text is written next to each other.

The TPU compiler keeps to the order of the text by and large: matrix units that wait for the results of one stage have
the products of another to compute, if these come next.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any


def prepared(stage: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    """Decorator of stages that begin, up to their first ``yield``, when they are called."""

    @functools.wraps(stage)
    def begun(*arguments: Any) -> Iterator[None]:
        turns = stage(*arguments)
        next(turns)
        return turns

    return begun


def interleave(*stages: tuple[int, Iterator[None]]) -> None:
    """Take turns with stages until all have ended, each from its own turn on (the first is 0)."""
    remaining = list(stages)
    for turn in itertools.count():
        remaining = [(first, stage) for first, stage in remaining if turn < first or next(stage, stage) is not stage]
        if not remaining:
            return
