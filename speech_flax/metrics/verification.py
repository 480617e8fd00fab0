"""Verification of speakers: are two utterances by the same one?"""

import numpy as np
from jaxtyping import Bool, Float


def equal_error_rate(scores: Float[np.ndarray, "trials"], same: Bool[np.ndarray, "trials"]) -> float:
    """Error rate at the threshold where as large a share of same-speaker trials is rejected as of others is accepted.

    Thresholds between scores are interpolated, so that the result does not depend on which of two neighbouring
    thresholds is taken. Not a number if any score is none.

    Raises:
      ValueError: all trials are of one kind.
    """
    if same.all() or not same.any():
        kind = "the same speaker" if same.all() else "different speakers"
        raise ValueError(f"all {same.size} trials are of {kind}; an equal error rate needs both kinds")
    if np.isnan(scores).any():
        return float("nan")
    thresholds = np.append(np.unique(scores), np.inf)
    rejected = np.searchsorted(np.sort(scores[same]), thresholds) / same.sum()
    accepted = 1 - np.searchsorted(np.sort(scores[~same]), thresholds) / (~same).sum()
    crossing = int(np.argmax(rejected >= accepted))  # rejections rise from 0 to 1, acceptances fall from 1 to 0
    before, after = (rejected - accepted)[crossing - 1], (rejected - accepted)[crossing]
    weight = -before / (after - before)
    return float(rejected[crossing - 1] + weight * (rejected[crossing] - rejected[crossing - 1]))
