"""Labels of every frame: who speaks when, which phone it is, whether there is speech."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, PyTree

from speech_flax.data.frame_labels import MOST_LABELS, SILENCE, FrameEncoder, frame_label_names
from speech_flax.data.labels import LabelError
from speech_flax.data.loader import IGNORED_LABEL
from speech_flax.layers.masks import length_mask
from speech_flax.metrics import FrameCounts
from speech_flax.models.heads import frame_losses
from speech_flax.training.experiment import Experiment, ExperimentError
from speech_flax.training.family import FAMILIES, Family, make_model
from speech_flax.training.front_end import FrontEnd
from speech_flax.training.task import RowResults, ScoredRow, WeightLoader

_SEVERAL = "multi_label_classification"


@dataclasses.dataclass(frozen=True)
class FrameTask:
    """Waveforms to labels of frames.

    Any number of labels may hold at a frame, as in conversations, unless ``model.config.problem_type`` is
    "single_label_classification".
    """

    command: ClassVar[str] = "classify"
    infeasible_advice: ClassVar[str] = "have no labelled frame: lower the learning rate"
    label_dtype: ClassVar[DTypeLike] = np.int32

    model: nn.Module
    family: Family
    feature_extractor: Any

    @classmethod
    def make(cls, experiment: Experiment, labels: Sequence[str]) -> tuple["FrameTask", WeightLoader | None]:
        """A model for the names in ``labels``, in alphabetical order."""
        family, fields = FAMILIES[experiment.model.family], experiment.model.config
        extractor = family.make_extractor(experiment)
        decided = {"problem_type": _SEVERAL, **family.decided_fields(extractor)}
        try:
            if "id2label" not in fields:
                several = fields.get("problem_type", _SEVERAL) == _SEVERAL
                decided["id2label"] = list(frame_label_names(labels, several))
            model, load_weights = make_model(experiment, decided)
            task = cls(model, family, extractor)
            task.check(labels)
        except LabelError as error:
            raise ExperimentError(str(error)) from error
        return task, load_weights

    @classmethod
    def load(cls, experiment: Experiment, model: nn.Module, directory: str | Path) -> "FrameTask":
        family = FAMILIES[experiment.model.family]
        return cls(model, family, family.extractor_class().from_pretrained(directory))

    @property
    def several(self) -> bool:
        return self.model.config.problem == _SEVERAL

    @property
    def front_end(self) -> FrontEnd:
        return self.family.front_end(self.feature_extractor)

    @property
    def label_encoder(self) -> FrameEncoder:
        config = self.model.config
        return FrameEncoder(config.id2label, self.family.frame_seconds(self.feature_extractor, config), self.several)

    def results(
        self, params: PyTree, batch: dict[str, Array], *, deterministic: bool, rngs: dict[str, Array] | None = None
    ) -> RowResults:
        """Loss of every utterance, the mean over its labelled frames; the labels of every frame, as the encoder has
        them, and how many frames are audio."""
        config = self.model.config
        inputs, mask = self.front_end(batch["waveforms"], batch["sample_lengths"])
        output = self.model.apply({"params": params}, inputs, mask, deterministic=deterministic, rngs=rngs)
        logits = output.logits.astype(jnp.float32)
        lengths = self.family.lengths(mask, config)
        labels = self._of_frames(batch["labels"], batch["label_lengths"], logits.shape[1])
        targets = (labels[:, :, None] >> jnp.arange(config.num_labels)) & 1 if self.several else labels
        losses, _ = frame_losses(logits, targets, config)
        counted = (labels != IGNORED_LABEL) & length_mask(lengths, logits.shape[1])
        frames = counted.sum(1)
        losses = jnp.where(counted, losses, 0.0).sum(1) / jnp.maximum(frames, 1)
        if self.several:
            predicted = jnp.where(logits > 0, 1 << jnp.arange(config.num_labels), 0).sum(-1)
        else:
            predicted = logits.argmax(-1)
        valid = batch["valid"]
        predictions = {"labels": predicted.astype(jnp.int32), "lengths": lengths}
        return RowResults(jnp.where(valid, losses, 0.0), valid & (frames == 0), predictions)

    def _of_frames(
        self, labels: Int[Array, "batch labels"], lengths: Int[Array, "batch"], num_frames: int
    ) -> Int[Array, "batch frames"]:
        """The labels of exactly ``num_frames`` frames; the last label of a row holds for the rest of them."""
        frames = jnp.arange(num_frames)
        return jnp.take_along_axis(labels, jnp.minimum(frames, jnp.maximum(lengths - 1, 0)[:, None]), axis=1)

    def check(self, labels: Sequence[str]) -> None:
        """Refuse labels of another form, or with names that the model does not have."""
        names = self.model.config.id2label
        if self.several and len(names) > MOST_LABELS:
            raise ExperimentError(
                f"{len(names)} labels of frames are too many to hold at once, at most {MOST_LABELS} can: set "
                "model.config.problem_type to single_label_classification"
            )
        try:
            for label in labels:
                self.label_encoder.encode(label)
        except LabelError as error:
            raise ExperimentError(str(error)) from error

    def check_evaluation(self, ids: Sequence[str], labels: Sequence[str]) -> None:
        """All utterances can be scored."""

    def hypothesis(self, prediction: dict[str, np.ndarray | np.generic]) -> list[int]:
        return prediction["labels"][: prediction["lengths"]].tolist()

    def score(self, rows: Sequence[ScoredRow]) -> dict[str, float]:
        """The share of wrong frames, and F1 of all labels of all frames, silence left out."""
        counts = functools.reduce(operator.add, map(self._counts, rows), FrameCounts())
        return {"frame_error_rate": counts.error_rate, "f1": counts.f1}

    def _counts(self, row: ScoredRow) -> FrameCounts:
        encoder, predicted = self.label_encoder, np.array(row.hypothesis, np.int32)
        known = np.array(encoder.encode(row.reference), np.int32)
        reference = known[np.minimum(np.arange(predicted.size), known.size - 1)]
        labelled = reference != IGNORED_LABEL
        return FrameCounts.of(self._present(reference[labelled]), self._present(predicted[labelled]))

    def _present(self, numbers: Int[np.ndarray, "frames"]) -> Bool[np.ndarray, "frames labels"]:
        """Which labels, other than silence, hold."""
        names = self.model.config.id2label
        index = np.arange(len(names))
        present = (numbers[:, None] >> index) & 1 == 1 if self.several else numbers[:, None] == index
        return present[:, [name != SILENCE for name in names]]

    def examples(self, rows: Sequence[ScoredRow]) -> list[ScoredRow]:
        return []

    def save(self, directory: Path, params: PyTree) -> None:
        self.model.save_pretrained(directory, self.model, params)
        self.feature_extractor.save_pretrained(directory)
