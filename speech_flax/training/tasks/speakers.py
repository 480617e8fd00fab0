"""Embeddings of speakers, scored by how well they verify: the same speaker or not?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from speech_flax.data.labels import ClassEncoder
from speech_flax.data.trials import Trial, find_trials, read_trials
from speech_flax.layers.time_delay import time_delay_context
from speech_flax.losses import additive_margin_softmax
from speech_flax.metrics import equal_error_rate, pair_scores, trial_scores
from speech_flax.training.experiment import Experiment, ExperimentError
from speech_flax.training.family import FAMILIES, Family, make_model
from speech_flax.training.front_end import FrontEnd
from speech_flax.training.task import RowResults, ScoredRow, WeightLoader
from speech_flax.training.tasks.sequences import class_names

#: Continues what is wrong with the trials.
_ADVICE = "; change data.trials, or evaluate on other data"


@dataclasses.dataclass(frozen=True)
class SpeakerTask:
    """Waveforms to embeddings. ``trials`` are what an evaluation is scored on; without, all pairs of its utterances."""

    command: ClassVar[str] = "classify"
    infeasible_advice: ClassVar[str] = (
        "are shorter than the time-delay layers see, or of unknown speakers: set data.train.min_seconds"
    )
    label_dtype: ClassVar[DTypeLike] = np.int32

    model: nn.Module
    family: Family
    feature_extractor: Any
    trials: tuple[Trial, ...] | None = None

    @classmethod
    def make(cls, experiment: Experiment, labels: Sequence[str]) -> tuple["SpeakerTask", WeightLoader | None]:
        """A model that learns to tell the speakers ``labels`` apart.

        Raises:
            ExperimentError: there is only one.
        """
        family = FAMILIES[experiment.model.family]
        extractor = family.make_extractor(experiment)
        speakers = class_names(experiment, labels)
        if len(set(labels)) < 2:
            raise ExperimentError(f"all utterances are by the speaker {labels[0]!r}; telling speakers apart needs two")
        model, load_weights = make_model(experiment, {"id2label": speakers, **family.decided_fields(extractor)})
        return cls(model, family, extractor, _trials(experiment)), load_weights

    @classmethod
    def load(cls, experiment: Experiment, model: nn.Module, directory: str | Path) -> "SpeakerTask":
        family = FAMILIES[experiment.model.family]
        return cls(model, family, family.extractor_class().from_pretrained(directory), _trials(experiment))

    @property
    def front_end(self) -> FrontEnd:
        return self.family.front_end(self.feature_extractor)

    @property
    def label_encoder(self) -> ClassEncoder:
        return ClassEncoder(self.model.config.id2label)

    def results(
        self, params: PyTree, batch: dict[str, Array], *, deterministic: bool, rngs: dict[str, Array] | None = None
    ) -> RowResults:
        """Additive-margin loss and embedding of every utterance. Unknown speakers, and utterances shorter than what the
        time-delay layers see at once, are infeasible."""
        config = self.model.config
        inputs, mask = self.front_end(batch["waveforms"], batch["sample_lengths"])
        output = self.model.apply({"params": params}, inputs, mask, deterministic=deterministic, rngs=rngs)
        weight = params["objective"]["weight"]
        losses, counted = additive_margin_softmax(output.logits, weight, batch["labels"][:, 0])
        counted &= self.family.lengths(mask, config) >= time_delay_context(config)
        valid = batch["valid"]
        predictions = {"embedding": output.embeddings.astype(jnp.float32)}
        return RowResults(jnp.where(valid & counted, losses, 0.0), valid & ~counted, predictions)

    def check(self, labels: Sequence[str]) -> None:
        """Speakers need not be known: verification is about unknown ones."""

    def check_evaluation(self, ids: Sequence[str], labels: Sequence[str]) -> None:
        """Refuse utterances among which there are no trials of both kinds."""
        if self.trials is None:
            speakers = len(set(labels))
            kinds = {"the same speaker": speakers < len(labels), "different speakers": speakers > 1}
        else:
            *_, same = find_trials(self.trials, ids)
            kinds = {"the same speaker": same.any(), "different speakers": not same.all()}
        for kind, present in kinds.items():
            if not present:
                raise ExperimentError(f"no trial is of {kind}, but an equal error rate needs both kinds{_ADVICE}")

    def hypothesis(self, prediction: dict[str, np.ndarray | np.generic]) -> list[float]:
        return prediction["embedding"].tolist()

    def score(self, rows: Sequence[ScoredRow]) -> dict[str, float]:
        """The equal error rate over the trials whose utterances are both here, and how many these are.

        Raises:
            ExperimentError, SourceError: there are no trials of both kinds.
        """
        embeddings = np.array([row.hypothesis for row in rows], np.float32)
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        if self.trials is None:
            scores, same = pair_scores(embeddings, [row.reference for row in rows])
        else:
            first, second, same = find_trials(self.trials, [row.id for row in rows])
            scores = trial_scores(embeddings, first, second)
        try:
            rate = equal_error_rate(scores, same)
        except ValueError as error:
            raise ExperimentError(f"{error}{_ADVICE}") from error
        return {"equal_error_rate": rate, "trials": scores.size}

    def examples(self, rows: Sequence[ScoredRow]) -> list[ScoredRow]:
        return []

    def save(self, directory: Path, params: PyTree) -> None:
        self.model.save_pretrained(directory, self.model, params)
        self.feature_extractor.save_pretrained(directory)


def _trials(experiment: Experiment) -> tuple[Trial, ...] | None:
    return None if experiment.data.trials is None else tuple(read_trials(experiment.data.trials))
