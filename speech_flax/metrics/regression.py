"""How far predicted values are from true ones."""

from collections.abc import Sequence

import numpy as np


def mean_squared_error(references: Sequence[float], predictions: Sequence[float]) -> float:
    """Mean of squared differences."""
    return float(np.mean(np.square(np.subtract(references, predictions))))


def mean_absolute_error(references: Sequence[float], predictions: Sequence[float]) -> float:
    """Mean of absolute differences."""
    return float(np.mean(np.abs(np.subtract(references, predictions))))


def pearson_correlation(references: Sequence[float], predictions: Sequence[float]) -> float:
    """Linear correlation; 0 where either side does not vary."""
    left, right = np.asarray(references, np.float64), np.asarray(predictions, np.float64)
    left, right = left - left.mean(), right - right.mean()
    norms = np.sqrt(np.square(left).sum() * np.square(right).sum())
    return 0.0 if norms == 0 else float((left * right).sum() / norms)
