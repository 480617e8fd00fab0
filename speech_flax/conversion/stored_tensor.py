"""Tensors in files: their names and shapes are known before any of them is read."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

_TILE = 64  # rows and columns: 16 KiB of float32


class CheckpointFileError(ValueError):
    """A file that does not hold what it should, in one sentence that names the file."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
      shape: Its shape.
      dtype: Its type as stored; bfloat16 is that of ``ml_dtypes``.
      read: Reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def copy_tensor(source: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = source``, tile by tile where that is a transposed matrix.

    Row by row it would miss the caches of the processor with every element, and take several times as long.
    """
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for row in range(0, source.shape[0], _TILE):
        for column in range(0, source.shape[1], _TILE):
            tile = slice(row, row + _TILE), slice(column, column + _TILE)
            target[tile] = source[tile]
