"""Error rates of a model on a set of utterances, by greedy CTC decoding."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from speech_flax.data.loader import Batch
from speech_flax.metrics import character_error_rate, word_error_rate
from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer
from speech_flax.training.step import Predictions


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    ``loss`` is the mean over feasible utterances; ``wer`` and ``cer`` are ratios over all words and characters;
    ``pairs`` holds (id, reference, hypothesis); ``bad`` the messages of unreadable files, which are not scored.
    """

    loss: float
    wer: float
    cer: float
    utterances: int
    infeasible: int
    pairs: list[tuple[str, str, str]]
    bad: list[str]

    def numbers(self) -> dict[str, float | int]:
        """The scalar results."""
        fields = ("loss", "wer", "cer", "utterances", "infeasible")
        return {name: getattr(self, name) for name in fields} | {"bad_files": len(self.bad)}


def evaluate(
    params: PyTree,
    batches: Iterable[Batch],
    predict: Callable[[PyTree, Batch], Predictions],
    tokenizer: Wav2Vec2CTCTokenizer,
) -> Evaluation:
    """Score ``predict`` on ``batches``. Every process must call it with its own rows of the same batches."""
    losses: list[float] = []
    infeasible = 0
    pairs: list[tuple[str, str, str]] = []
    bad: list[str] = []
    for batch in batches:
        predictions = predict(params, batch)
        labels, lengths, row_losses, row_infeasible = (
            _local_rows(array)
            for array in (predictions.labels, predictions.lengths, predictions.losses, predictions.infeasible)
        )
        bad.extend(batch.bad)
        for row in np.flatnonzero(batch.valid):
            hypothesis = tokenizer.decode(labels[row, : lengths[row]].tolist())
            pairs.append((batch.ids[row], batch.texts[row], hypothesis))
            infeasible += int(row_infeasible[row])
            if not row_infeasible[row]:
                losses.append(float(row_losses[row]))
    pairs, losses, bad, infeasible = _from_all_processes((pairs, losses, bad, infeasible))
    if not pairs:
        raise ValueError(f"no utterance could be evaluated{': ' + bad[0] if bad else ''}")
    references, hypotheses = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
    return Evaluation(
        loss=float(np.mean(losses)) if losses else float("inf"),
        wer=word_error_rate(references, hypotheses),
        cer=character_error_rate(references, hypotheses),
        utterances=len(pairs),
        infeasible=infeasible,
        pairs=pairs,
        bad=bad,
    )


def _local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded array that this process holds, in order."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _from_all_processes(parts: tuple) -> tuple:
    """Join every process's lists and sum its counts."""
    if jax.process_count() == 1:
        return parts
    import json

    encoded = np.frombuffer(json.dumps(parts).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([encoded.size], np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: encoded.size] = encoded
    gathered = multihost_utils.process_allgather(padded)
    everyone = [json.loads(bytes(row[:size])) for row, size in zip(gathered, sizes, strict=True)]
    pairs = sorted(tuple(pair) for part in everyone for pair in part[0])
    losses = [loss for part in everyone for loss in part[1]]
    bad = [message for part in everyone for message in part[2]]
    return pairs, losses, bad, sum(part[3] for part in everyone)
