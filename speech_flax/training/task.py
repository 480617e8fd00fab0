"""What is learned: a model, its processor and its losses, as an experiment describes them."""

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from speech_flax.audio.feature_extraction import SeamlessM4TFeatureExtractor
from speech_flax.audio.log_mel import log_mel
from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.layers.masks import adapter_output_lengths
from speech_flax.losses import ctc_loss
from speech_flax.models.wav2vec2_bert import Wav2Vec2BertForCTC
from speech_flax.processing import Wav2Vec2BertProcessor
from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer
from speech_flax.text.vocabulary import build_vocabulary
from speech_flax.training.experiment import Experiment, ExperimentError


@dataclasses.dataclass(frozen=True)
class CTCTask:
    """Waveforms to CTC losses: the part of a step that knows the model and the task.

    ``stride`` and ``num_mel_bins`` describe the log-mel front end; ``padding_value`` fills features past the end.
    """

    model: nn.Module
    stride: int
    num_mel_bins: int
    padding_value: float = 0.0
    blank_id: int = 0

    def logits(
        self, params: PyTree, batch: dict[str, Array], *, deterministic: bool, rngs: dict[str, Array] | None = None
    ) -> tuple[Float[Array, "batch frames vocabulary"], Int[Array, "batch"]]:
        """Logits of every row, and how many of their frames are speech."""
        features, mask = log_mel(
            batch["waveforms"],
            batch["sample_lengths"],
            num_mel_bins=self.num_mel_bins,
            stride=self.stride,
            padding_value=self.padding_value,
        )
        output = self.model.apply({"params": params}, features, mask, deterministic=deterministic, rngs=rngs)
        lengths = adapter_output_lengths(mask.sum(-1).astype(jnp.int32), self.model.config)
        return output.logits, lengths

    def losses(
        self, params: PyTree, batch: dict[str, Array], *, deterministic: bool, rngs: dict[str, Array] | None = None
    ) -> tuple[
        Float[Array, "batch"], Bool[Array, "batch"], Float[Array, "batch frames vocabulary"], Int[Array, "batch"]
    ]:
        """Loss per utterance (normalised by its labels if the configuration says "mean"), which rows are infeasible,
        logits and their lengths. Rows that are not valid have loss 0."""
        config = self.model.config
        logits, lengths = self.logits(params, batch, deterministic=deterministic, rngs=rngs)
        losses, feasible = ctc_loss(logits, lengths, batch["labels"], batch["label_lengths"], blank_id=self.blank_id)
        infeasible = batch["valid"] & ~feasible
        if config.ctc_loss_reduction == "mean":
            losses = losses / jnp.maximum(batch["label_lengths"], 1)
        counted = batch["valid"] & feasible if config.ctc_zero_infinity else batch["valid"]
        return jnp.where(counted, losses, 0.0), infeasible, logits, lengths


def make_processor(experiment: Experiment, texts: Iterable[str]) -> Wav2Vec2BertProcessor:
    """Feature extractor and tokenizer: given, those of the pretrained model, or built from training ``texts``.

    Raises:
        ExperimentError: when transcripts hold characters that the vocabulary lacks.
    """
    texts = list(texts)
    pretrained = experiment.model.pretrained
    features = experiment.features
    if pretrained is not None:
        extractor = SeamlessM4TFeatureExtractor.from_pretrained(pretrained)
    else:
        extractor = SeamlessM4TFeatureExtractor(
            feature_size=features.num_mel_bins, num_mel_bins=features.num_mel_bins, stride=features.stride
        )
    if experiment.data.vocabulary is not None:
        tokenizer = Wav2Vec2CTCTokenizer(experiment.data.vocabulary)
    elif pretrained is not None and (Path(pretrained) / "vocab.json").exists():
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(pretrained)
    else:
        tokenizer = Wav2Vec2CTCTokenizer(build_vocabulary(texts), pad_token="<pad>")
    check_characters(tokenizer, texts)
    return Wav2Vec2BertProcessor(extractor, tokenizer)


def check_characters(tokenizer: Wav2Vec2CTCTokenizer, texts: Iterable[str]) -> None:
    """Refuse transcripts that the tokenizer would spell with its unknown token.

    Raises:
        ExperimentError: with the characters, how often they occur, and one transcript that holds them.
    """
    texts = list(texts)
    known = set(tokenizer.get_vocab()) | {" "}
    if tokenizer.do_lower_case:
        texts = [text.upper() for text in texts]  # as Transformers names it, this option spells in capitals
    unknown = Counter(character for text in texts for character in text if character not in known)
    if unknown:
        example = next(text for text in texts if set(text) - known)
        listed = ", ".join(f"{character!r} ({count})" for character, count in unknown.most_common(8))
        raise ExperimentError(
            f"transcripts hold characters outside the vocabulary: {listed}, as in {example!r}; normalise them with "
            "data.train.case and data.train.punctuation, or give a data.vocabulary that has them"
        )


def model_config(experiment: Experiment, processor: Wav2Vec2BertProcessor) -> dict[str, Any]:
    """Fields of the model configuration: the experiment's, and those that the processor decides.

    Raises:
        ExperimentError: for a field that the configuration does not have, with the nearest that it has.
    """
    known = Wav2Vec2BertConfig.field_names()
    for name in experiment.model.config:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ExperimentError(f"model.config has no field {name!r}{hint}")
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    decided = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "feature_projection_input_dim": extractor.num_mel_bins * extractor.stride,
    }
    return {"ctc_zero_infinity": True, **decided, **experiment.model.config}


def make_task(experiment: Experiment, processor: Wav2Vec2BertProcessor) -> tuple[CTCTask, PyTree | None]:
    """The task, and the pretrained parameters (``None`` when training starts from random weights)."""
    settings = experiment.model
    fields = model_config(experiment, processor)
    try:
        if settings.pretrained is None:
            params, config = None, Wav2Vec2BertConfig(**fields)
        else:
            module, params = Wav2Vec2BertForCTC.from_pretrained(settings.pretrained, **fields)
            config = module.config
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"model: {error}") from error
    model = Wav2Vec2BertForCTC(
        config, dtype=jnp.dtype(settings.dtype), remat=settings.remat, scan_unroll=settings.scan_unroll
    )
    extractor = processor.feature_extractor
    task = CTCTask(
        model=model,
        stride=extractor.stride,
        num_mel_bins=extractor.num_mel_bins,
        padding_value=extractor.padding_value,
        blank_id=config.pad_token_id,
    )
    return task, params


def initial_parameters(task: CTCTask, key: Array) -> PyTree:
    """Random parameters; deterministic in ``key`` and independent of the mesh."""
    features = jnp.zeros((1, 8, task.stride * task.num_mel_bins))
    return task.model.init({"params": key}, features)["params"]
