"""Metrics of a model on a set of utterances."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jaxtyping import PyTree

from speech_flax.data.loader import Batch
from speech_flax.data.tables import SourceError
from speech_flax.training.corpus import Split
from speech_flax.training.experiment import ExperimentError
from speech_flax.training.processes import exchange
from speech_flax.training.stream_corpus import StreamSplit
from speech_flax.training.task import RowResults, ScoredRow, Task

#: Titles of the metrics that are ratios, by their names in results and logs.
RATIOS = {
    "wer": "WER",
    "cer": "CER",
    "accuracy": "accuracy",
    "frame_error_rate": "frame error rate",
    "f1": "F1",
    "equal_error_rate": "EER",
}
#: Titles of those that are not.
VALUES = {"loss": "loss", "mean_squared_error": "mean squared error", "correlation": "correlation"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    ``loss`` is the mean over feasible utterances; ``metrics`` are those of the task, over all ``rows``; ``bad`` holds
    the messages of unreadable files, which are not scored.
    """

    loss: float
    metrics: dict[str, float]
    infeasible: int
    rows: list[ScoredRow]
    bad: list[str]

    def numbers(self) -> dict[str, float | int]:
        """The scalar results; no loss where no utterance has one, as with speakers that training does not know."""
        counts = {"utterances": len(self.rows), "infeasible": self.infeasible, "bad_files": len(self.bad)}
        loss = {"loss": self.loss} if math.isfinite(self.loss) else {}
        return {**loss, **self.metrics, **counts}


def describe(numbers: dict[str, float]) -> str:
    """The metrics among ``numbers`` for people: ratios in percent."""
    ratios = [f"{title} {numbers[name]:.1%}" for name, title in RATIOS.items() if name in numbers]
    return ", ".join(ratios + [f"{title} {numbers[name]:.3g}" for name, title in VALUES.items() if name in numbers])


def check_evaluations(splits: Mapping[str, Split | StreamSplit], task: Task) -> None:
    """Refuse data that ``task`` could not score, before anything is trained.

    Raises:
        ExperimentError: with the name of the split and what to change.
    """
    for name, split in splits.items():
        if name != "train":
            try:
                task.check_evaluation(split.utterances.ids(), split.labels())
            except (ExperimentError, SourceError) as error:
                raise ExperimentError(f"data.{name}: {error}") from error


def evaluate(
    params: PyTree, batches: Iterable[Batch], predict: Callable[[PyTree, Batch], RowResults], task: Task
) -> Evaluation:
    """Score ``predict`` on ``batches``. Every process must call it with its own rows of the same batches."""
    losses: list[float] = []
    infeasible = 0
    rows: list[ScoredRow] = []
    bad: list[str] = []
    for batch in batches:
        results = jax.tree.map(_local_rows, predict(params, batch))
        bad.extend(batch.bad)
        for row in np.flatnonzero(batch.valid):
            prediction = {name: values[row] for name, values in results.predictions.items()}
            rows.append(ScoredRow(batch.ids[row], batch.texts[row], task.hypothesis(prediction)))
            infeasible += int(results.infeasible[row])
            if not results.infeasible[row]:
                losses.append(float(results.losses[row]))
    rows, losses, bad, infeasible = _from_all_processes(rows, losses, bad, infeasible)
    if not rows:
        raise ValueError(f"no utterance could be evaluated{': ' + bad[0] if bad else ''}")
    loss = float(np.mean(losses)) if losses else float("inf")
    return Evaluation(loss, task.score(rows), infeasible, rows, bad)


def _local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded array that this process holds, in order."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _from_all_processes(
    rows: list[ScoredRow], losses: list[float], bad: list[str], infeasible: int
) -> tuple[list[ScoredRow], list[float], list[str], int]:
    """Join every process's lists and sum its counts."""
    if jax.process_count() == 1:
        return rows, losses, bad, infeasible
    everyone = exchange(([dataclasses.astuple(row) for row in rows], losses, bad, infeasible))
    rows = sorted((ScoredRow(*row) for part in everyone for row in part[0]), key=lambda row: (row.id, row.reference))
    losses = [loss for part in everyone for loss in part[1]]
    bad = [message for part in everyone for message in part[2]]
    return rows, losses, bad, sum(part[3] for part in everyone)
