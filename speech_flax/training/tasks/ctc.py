"""Transcription by connectionist temporal classification."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from speech_flax.losses import ctc_loss
from speech_flax.metrics import character_error_rate, word_error_rate
from speech_flax.pretrained import pretrained_directory
from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer
from speech_flax.text.vocabulary import build_vocabulary
from speech_flax.training.experiment import Experiment, ExperimentError
from speech_flax.training.family import FAMILIES, Family, make_model
from speech_flax.training.front_end import FrontEnd
from speech_flax.training.task import RowResults, ScoredRow, WeightLoader


@dataclasses.dataclass(frozen=True)
class CTCTask:
    """Waveforms to transcripts, decoded greedily."""

    command: ClassVar[str] = "transcribe"
    infeasible_advice: ClassVar[str] = (
        "have too few frames for their labels: set model.config.ctc_zero_infinity, or lower the learning rate"
    )
    label_dtype: ClassVar[DTypeLike] = np.int32

    model: nn.Module
    family: Family
    processor: Any

    @classmethod
    def make(cls, experiment: Experiment, labels: Sequence[str]) -> tuple["CTCTask", WeightLoader | None]:
        """A model for the characters of the transcripts ``labels``, and what loads its pretrained weights."""
        family = FAMILIES[experiment.model.family]
        processor = make_processor(experiment, family, labels)
        tokenizer = processor.tokenizer
        decided = {
            "ctc_zero_infinity": True,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        model, load_weights = make_model(experiment, decided | family.decided_fields(processor.feature_extractor))
        return cls(model, family, processor), load_weights

    @classmethod
    def load(cls, experiment: Experiment, model: nn.Module, directory: str | Path) -> "CTCTask":
        family = FAMILIES[experiment.model.family]
        return cls(model, family, family.processor_class().from_pretrained(directory))

    @property
    def front_end(self) -> FrontEnd:
        return self.family.front_end(self.processor.feature_extractor)

    @property
    def label_encoder(self) -> Wav2Vec2CTCTokenizer:
        return self.processor.tokenizer

    def results(
        self, params: PyTree, batch: dict[str, Array], *, deterministic: bool, rngs: dict[str, Array] | None = None
    ) -> RowResults:
        """Loss per utterance, normalised by its labels if the configuration says "mean"; greedy label of every frame,
        and how many frames count."""
        config = self.model.config
        inputs, mask = self.front_end(batch["waveforms"], batch["sample_lengths"])
        logits = self.model.apply({"params": params}, inputs, mask, deterministic=deterministic, rngs=rngs).logits
        lengths = self.family.lengths(mask, config)
        losses, feasible = ctc_loss(
            logits, lengths, batch["labels"], batch["label_lengths"], blank_id=config.pad_token_id
        )
        if config.ctc_loss_reduction == "mean":
            losses = losses / jnp.maximum(batch["label_lengths"], 1)
        counted = batch["valid"] & feasible if config.ctc_zero_infinity else batch["valid"]
        predictions = {"labels": logits.argmax(-1).astype(jnp.int32), "lengths": lengths}
        return RowResults(jnp.where(counted, losses, 0.0), batch["valid"] & ~feasible, predictions)

    def check(self, labels: Sequence[str]) -> None:
        """Refuse transcripts that the tokenizer would spell with its unknown token."""
        check_characters(self.processor.tokenizer, labels)

    def check_evaluation(self, ids: Sequence[str], labels: Sequence[str]) -> None:
        """All utterances can be scored."""

    def hypothesis(self, prediction: dict[str, np.ndarray | np.generic]) -> str:
        return self.processor.tokenizer.decode(prediction["labels"][: prediction["lengths"]].tolist())

    def score(self, rows: Sequence[ScoredRow]) -> dict[str, float]:
        references, hypotheses = [row.reference for row in rows], [row.hypothesis for row in rows]
        return {
            "wer": word_error_rate(references, hypotheses),
            "cer": character_error_rate(references, hypotheses),
        }

    def examples(self, rows: Sequence[ScoredRow]) -> list[ScoredRow]:
        return list(rows[:: max(1, len(rows) // 5)][:5])

    def save(self, directory: Path, params: PyTree) -> None:
        self.model.save_pretrained(directory, self.model, params)
        self.processor.save_pretrained(directory)


def make_processor(experiment: Experiment, family: Family, texts: Iterable[str]) -> Any:
    """Feature extractor and tokenizer: given, those of the pretrained model, or built from training ``texts``.

    Raises:
        ExperimentError: when transcripts hold characters that the vocabulary lacks, or the tokenizer has no blank.
    """
    texts = list(texts)
    pretrained = experiment.model.pretrained
    if experiment.data.vocabulary is not None:
        tokenizer = Wav2Vec2CTCTokenizer(experiment.data.vocabulary)
    elif pretrained is not None and (pretrained_directory(pretrained) / "vocab.json").exists():
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(pretrained)
    else:
        tokenizer = Wav2Vec2CTCTokenizer(build_vocabulary(texts), pad_token="<pad>")
    if tokenizer.pad_token_id is None:
        raise ExperimentError(f"the tokenizer of {pretrained} has no pad_token, which is the blank of CTC")
    check_characters(tokenizer, texts)
    return family.processor_class()(family.make_extractor(experiment), tokenizer)


def check_characters(tokenizer: Wav2Vec2CTCTokenizer, texts: Iterable[str]) -> None:
    """Refuse transcripts that the tokenizer would spell with its unknown token, the blank, or marks of a sentence.

    What counts are the symbols that the tokenizer takes a text apart into: some vocabularies have ones of several
    characters.

    Raises:
        ExperimentError: with the symbols, how often they occur, and one transcript that holds them.
    """
    roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    known = tokenizer.get_vocab().keys() - roles
    unknown: Counter[str] = Counter()
    example = None
    for text in texts:
        missing = [symbol for symbol in tokenizer.tokenize(text) if symbol not in known]
        unknown.update(missing)
        example = text if missing and example is None else example
    if unknown:
        listed = ", ".join(f"{symbol!r} ({count})" for symbol, count in unknown.most_common(8))
        raise ExperimentError(
            f"transcripts hold characters outside the vocabulary: {listed}, as in {example!r}; normalise them with "
            "data.train.case and data.train.punctuation, or give a data.vocabulary that has them"
        )
