"""One class, or one value, for every utterance: keywords, languages, emotions, scores."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from speech_flax.data.labels import ClassEncoder, LabelError, ValueEncoder
from speech_flax.metrics import accuracy, macro_f1, mean_absolute_error, mean_squared_error, pearson_correlation
from speech_flax.models.heads import sequence_losses
from speech_flax.training.experiment import Experiment, ExperimentError
from speech_flax.training.family import FAMILIES, Family, make_model
from speech_flax.training.front_end import FrontEnd
from speech_flax.training.task import RowResults, ScoredRow, WeightLoader


@dataclasses.dataclass(frozen=True)
class SequenceTask:
    """Waveforms to classes; to values, if the model has a single label (``num_labels: 1``)."""

    command: ClassVar[str] = "classify"
    infeasible_advice: ClassVar[str] = "have labels that training does not know: lower the learning rate"

    model: nn.Module
    family: Family
    feature_extractor: Any

    @classmethod
    def make(cls, experiment: Experiment, labels: Sequence[str]) -> tuple["SequenceTask", WeightLoader | None]:
        """A model for the classes among ``labels``, in alphabetical order; or for their values, if
        ``model.config.num_labels`` is 1."""
        family, fields = FAMILIES[experiment.model.family], experiment.model.config
        extractor = family.make_extractor(experiment)
        decided = family.decided_fields(extractor)
        if fields.get("num_labels") != 1 and "id2label" not in fields:
            decided["id2label"] = class_names(experiment, labels)
        model, load_weights = make_model(experiment, decided)
        task = cls(model, family, extractor)
        task.check(labels)
        return task, load_weights

    @classmethod
    def load(cls, experiment: Experiment, model: nn.Module, directory: str | Path) -> "SequenceTask":
        family = FAMILIES[experiment.model.family]
        return cls(model, family, family.extractor_class().from_pretrained(directory))

    @property
    def is_regression(self) -> bool:
        return self.model.config.problem == "regression"

    @property
    def front_end(self) -> FrontEnd:
        return self.family.front_end(self.feature_extractor)

    @property
    def label_encoder(self) -> ClassEncoder | ValueEncoder:
        return ValueEncoder() if self.is_regression else ClassEncoder(self.model.config.id2label)

    @property
    def label_dtype(self) -> DTypeLike:
        return np.float32 if self.is_regression else np.int32

    def results(
        self, params: PyTree, batch: dict[str, Array], *, deterministic: bool, rngs: dict[str, Array] | None = None
    ) -> RowResults:
        """Loss of every utterance, and its most likely class or its value. Classes that training does not know are
        infeasible."""
        inputs, mask = self.front_end(batch["waveforms"], batch["sample_lengths"])
        output = self.model.apply({"params": params}, inputs, mask, deterministic=deterministic, rngs=rngs)
        losses, counted = sequence_losses(output.logits, batch["labels"][:, 0], self.model.config)
        logits = output.logits.astype(jnp.float32)
        predictions = {"prediction": logits[:, 0] if self.is_regression else logits.argmax(-1).astype(jnp.int32)}
        valid = batch["valid"]
        return RowResults(jnp.where(valid & counted, losses, 0.0), valid & ~counted, predictions)

    def check(self, labels: Sequence[str]) -> None:
        """Refuse labels that are no numbers, or no classes of the model."""
        if self.model.config.problem == "multi_label_classification":
            raise ExperimentError(
                "task sequence_classification learns one label per utterance: leave out model.config.problem_type"
            )
        if self.is_regression:
            try:
                for label in labels:
                    self.label_encoder.encode(label)
            except LabelError as error:
                raise ExperimentError(str(error)) from error
            return
        check_classes(labels, self.model.config.id2label)

    def check_evaluation(self, ids: Sequence[str], labels: Sequence[str]) -> None:
        """All utterances can be scored."""

    def hypothesis(self, prediction: dict[str, np.ndarray | np.generic]) -> str | float:
        if self.is_regression:
            return float(prediction["prediction"])
        return self.model.config.id2label[int(prediction["prediction"])]

    def score(self, rows: Sequence[ScoredRow]) -> dict[str, float]:
        hypotheses = [row.hypothesis for row in rows]
        if not self.is_regression:
            references = [row.reference for row in rows]
            return {"accuracy": accuracy(references, hypotheses), "f1": macro_f1(references, hypotheses)}
        values = [float(row.reference) for row in rows]
        return {
            "mean_squared_error": mean_squared_error(values, hypotheses),
            "mean_absolute_error": mean_absolute_error(values, hypotheses),
            "correlation": pearson_correlation(values, hypotheses),
        }

    def examples(self, rows: Sequence[ScoredRow]) -> list[ScoredRow]:
        return list(rows[:: max(1, len(rows) // 5)][:5])

    def save(self, directory: Path, params: PyTree) -> None:
        self.model.save_pretrained(directory, self.model, params)
        self.feature_extractor.save_pretrained(directory)


def class_names(experiment: Experiment, labels: Sequence[str]) -> list[str]:
    """Names of the classes: those of the pretrained model if it knows all ``labels``, else the labels themselves."""
    names = sorted(set(labels))
    if experiment.model.pretrained is not None:
        from speech_flax.pretrained import pretrained_directory

        fields = json.loads((pretrained_directory(experiment.model.pretrained) / "config.json").read_text())
        known = [name for _, name in sorted(fields.get("id2label", {}).items(), key=lambda pair: int(pair[0]))]
        if set(names) <= set(known):
            return known
    return names


def check_classes(labels: Sequence[str], names: Sequence[str]) -> None:
    """Refuse labels that are no class of the model.

    Raises:
        ExperimentError: with the labels and the classes.
    """
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise ExperimentError(
            f"the labels {_listed(unknown)} are none of the {len(names)} classes of the model, {_listed(names)}"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
