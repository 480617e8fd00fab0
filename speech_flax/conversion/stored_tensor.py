"""Tensors in files: their names and shapes are known before any of them is read."""

import dataclasses
from collections.abc import Callable

import numpy as np


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
