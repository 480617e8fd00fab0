"""Verification of speakers: are two utterances by the same one?"""

import bisect
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

#: How many utterances are compared with all before them, and how many trials are scored, at a time.
_UTTERANCES, _TRIALS = 256, 8192


def pair_scores(
    embeddings: Float32[np.ndarray, "utterances features"], speakers: Sequence[str]
) -> tuple[Float32[np.ndarray, "pairs"], Bool[np.ndarray, "pairs"]]:
    """Inner products of the embeddings of all pairs of utterances, and whether both are by the same speaker.

    ``n`` utterances have ``n (n - 1) / 2`` pairs, which take five bytes each, and a block of them a little more.
    """
    number = np.unique(speakers, return_inverse=True)[1]
    scores, same = [np.zeros(0, np.float32)], [np.zeros(0, bool)]
    for start in range(0, len(number), _UTTERANCES):
        block = slice(start, start + _UTTERANCES)
        before = slice(0, start + _UTTERANCES)
        pairs = np.tri(len(number[block]), len(number[before]), start - 1, dtype=bool)
        scores.append((embeddings[block] @ embeddings[before].T)[pairs])
        same.append((number[block, None] == number[before])[pairs])
    return np.concatenate(scores), np.concatenate(same)


def trial_scores(
    embeddings: Float32[np.ndarray, "utterances features"],
    first: Int[np.ndarray, "trials"],
    second: Int[np.ndarray, "trials"],
) -> Float32[np.ndarray, "trials"]:
    """Inner products of the embeddings of the utterances ``first`` and ``second``, a block of trials at a time."""
    scores = np.empty(first.size, np.float32)
    for start in range(0, first.size, _TRIALS):
        block = slice(start, start + _TRIALS)
        scores[block] = (embeddings[first[block]] * embeddings[second[block]]).sum(-1)
    return scores


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
    sorted_same, sorted_others = np.sort(scores[same]), np.sort(scores[~same])

    def rejected(index: int) -> float:
        return np.searchsorted(sorted_same, thresholds[index]) / sorted_same.size

    def excess(index: int) -> float:
        """Rejections less acceptances: the former rise from 0 to 1, the latter fall from 1 to 0."""
        return rejected(index) - (1 - np.searchsorted(sorted_others, thresholds[index]) / sorted_others.size)

    crossing = bisect.bisect_left(range(thresholds.size), 0, key=excess)
    before, after = excess(crossing - 1), excess(crossing)
    weight = -before / (after - before)
    return float(rejected(crossing - 1) + weight * (rejected(crossing) - rejected(crossing - 1)))
