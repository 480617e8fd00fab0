"""What is learned, as the rest of the training program sees it: it knows no task but through this."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

from speech_flax.data.loader import LabelEncoder
from speech_flax.training.experiment import Experiment
from speech_flax.training.front_end import FrontEnd

#: Reads pretrained parameters, in float32; a run that goes on from a checkpoint does without.
WeightLoader = Callable[[], PyTree]


@flax.struct.dataclass
class RowResults:
    """What a model makes of a batch, row by row.

    ``losses`` are 0 in rows that do not count; ``infeasible`` marks rows that no output of the model can satisfy;
    ``predictions`` holds arrays whose first axis numbers the rows, as the task needs them to score. Arrays are on the
    device, or fetched from it.
    """

    losses: Float[Array | np.ndarray, "batch"]
    infeasible: Bool[Array | np.ndarray, "batch"]
    predictions: dict[str, Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class ScoredRow:
    """One utterance of an evaluation: its id, its label as the data has it, and what the model says (plain data)."""

    id: str
    reference: str
    hypothesis: Any


#: Columns that labels are taken from, the first that exists; transcripts (``None``) have columns of their own.
LABEL_COLUMNS: dict[str, tuple[str, ...] | None] = {
    "ctc": None,
    "sequence_classification": ("label", "labels", "class", "category", "intent"),
    "frame_classification": ("segments", "labels", "label"),
    "xvector": ("speaker", "speaker_id", "client_id", "label"),
}


@runtime_checkable
class Task(Protocol):
    """A model with its data: labels, losses and metrics."""

    #: Sub-command of ``speech-flax`` that applies the trained model to files.
    command: ClassVar[str]
    #: What to do about infeasible utterances; continues "N utterances ...".
    infeasible_advice: ClassVar[str]

    model: nn.Module
    front_end: FrontEnd
    label_encoder: LabelEncoder
    label_dtype: DTypeLike

    @classmethod
    def make(cls, experiment: Experiment, labels: Sequence[str]) -> tuple["Task", WeightLoader | None]:
        """See :func:`make_task`."""

    @classmethod
    def load(cls, experiment: Experiment, model: nn.Module, directory: str | Path) -> "Task":
        """The task with a trained model and its feature extractor, see :func:`load_task`."""

    def results(
        self, params: PyTree, batch: dict[str, Array], *, deterministic: bool, rngs: dict[str, Array] | None = None
    ) -> RowResults:
        """Losses and predictions of a batch; called inside the compiled step."""

    def check(self, labels: Sequence[str]) -> None:
        """Refuse labels that the task cannot learn.

        Raises:
            ExperimentError: with what is wrong and an example.
        """

    def check_evaluation(self, ids: Sequence[str], labels: Sequence[str]) -> None:
        """Refuse utterances that cannot be scored together.

        Raises:
            ExperimentError, SourceError: with what to change.
        """

    def hypothesis(self, prediction: dict[str, np.ndarray | np.generic]) -> Any:
        """What the model says about one row, as plain data that JSON can hold."""

    def score(self, rows: Sequence[ScoredRow]) -> dict[str, float]:
        """The metrics by name."""

    def examples(self, rows: Sequence[ScoredRow]) -> list[ScoredRow]:
        """A few rows worth showing to a person."""

    def save(self, directory: Path, params: PyTree) -> None:
        """Write the model and what turns audio into its inputs, as Transformers reads them."""


def initial_parameters(task: Task, key: Array) -> PyTree:
    """Random parameters; deterministic in ``key`` and independent of the mesh."""
    second = jnp.zeros((1, 16_000)), jnp.full((1,), 16_000, jnp.int32)
    return task.model.init({"params": key}, *task.front_end(*second))["params"]


def make_task(experiment: Experiment, labels: Sequence[str]) -> tuple[Task, WeightLoader | None]:
    """The task that ``experiment`` names, for the ``labels`` of its training utterances, and what loads the pretrained
    weights (``None`` when training starts from random ones).

    Raises:
        ExperimentError: for labels or model settings that do not fit the task.
    """
    return _task_class(experiment).make(experiment, labels)


def load_task(experiment: Experiment, directory: str | Path) -> tuple[Task, PyTree]:
    """The task of ``experiment`` with the model in ``directory``, and its parameters, for evaluation."""
    from speech_flax.training.family import FAMILIES

    family = FAMILIES[experiment.model.family]
    _, model_class = family.classes(experiment.task)
    model, params = model_class.from_pretrained(directory, dtype=jnp.dtype(experiment.model.dtype))
    return _task_class(experiment).load(experiment, model, directory), params


def _task_class(experiment: Experiment) -> type:
    from speech_flax.training.tasks.ctc import CTCTask
    from speech_flax.training.tasks.frames import FrameTask
    from speech_flax.training.tasks.sequences import SequenceTask
    from speech_flax.training.tasks.speakers import SpeakerTask

    classes = {
        "ctc": CTCTask,
        "sequence_classification": SequenceTask,
        "frame_classification": FrameTask,
        "xvector": SpeakerTask,
    }
    return classes[experiment.task]
