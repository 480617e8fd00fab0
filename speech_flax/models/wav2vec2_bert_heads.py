"""Wav2Vec2-BERT that classifies: signatures of Transformers over the heads of both families."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.layers.masks import adapter_output_lengths, length_mask
from speech_flax.models.heads import (
    AudioFrameClassification,
    Labels,
    Mask,
    SequenceClassification,
    XVector,
    as_output,
)
from speech_flax.models.wav2vec2_bert import Features, Wav2Vec2BertModel
from speech_flax.outputs import SequenceClassifierOutput, TokenClassifierOutput, XVectorOutput


def output_frame_mask(attention_mask: Mask, num_frames: int, config: Wav2Vec2BertConfig) -> Bool[Array, "batch frames"]:
    """Which frames of the model's output are no padding. In Transformers that is all of them in an utterance without
    any frame."""
    lengths = adapter_output_lengths(attention_mask.astype(jnp.int32).sum(-1), config)
    if config.compatibility != "corrected":
        lengths = jnp.where(lengths == 0, num_frames, lengths)
    return length_mask(lengths, num_frames)


class Wav2Vec2BertHead:
    """What makes a head one of Wav2Vec2-BERT."""

    config: Wav2Vec2BertConfig
    base_model_prefix = "wav2vec2_bert"
    base_model_class = Wav2Vec2BertModel
    frame_mask = staticmethod(output_frame_mask)


class Wav2Vec2BertForSequenceClassification(Wav2Vec2BertHead, SequenceClassification):
    """The model with one label per utterance: keywords, languages, emotions, or a value.

    Attributes are those of :class:`~speech_flax.Wav2Vec2BertModel`.

    Raises:
      ValueError: the configuration has an adapter.
    """

    def __call__(
        self,
        input_features: Features,
        attention_mask: Mask | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Labels | None = None,
        *,
        deterministic: bool = True,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Score every label, and compute the loss if ``labels`` are given.

        Args:
          input_features: Stacked log-mel frames, from :class:`~speech_flax.SeamlessM4TFeatureExtractor`.
          attention_mask: 1 for frames that count, 0 for padding on the right; all count by default.
          output_attentions: Return attention probabilities; default ``config.output_attentions``.
          output_hidden_states: Return the states of all layers; default ``config.output_hidden_states``.
          return_dict: ``False`` returns a tuple.
          labels: Class ids ``[batch]``, of which -100 does not count (cross-entropy); values, if there is one label
            (mean squared error); zeros and ones ``[batch, labels]``, if ``config.problem_type`` is
            ``"multi_label_classification"`` (binary cross-entropy).
          deterministic: No dropout, SpecAugment or LayerDrop.
        """
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        output = self.classify(input_features, attention_mask, labels, deterministic=deterministic, **options)
        return as_output(output, return_dict)


class Wav2Vec2BertForAudioFrameClassification(Wav2Vec2BertHead, AudioFrameClassification):
    """The model with labels for every frame, for speaker diarization for instance.

    Attributes are those of :class:`~speech_flax.Wav2Vec2BertModel`.

    Raises:
      ValueError: the configuration has an adapter.
    """

    def __call__(
        self,
        input_features: Features,
        attention_mask: Mask | None = None,
        labels: Labels | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        deterministic: bool = True,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Score every label at every frame, and compute the loss if ``labels`` are given.

        Args:
          labels: One-hot vectors ``[batch, frames, labels]`` or class ids ``[batch, frames]`` (cross-entropy); any
            number of ones per frame, if ``config.problem_type`` is ``"multi_label_classification"`` (binary
            cross-entropy). The loss is the mean over all frames; in Transformers, and here unless
            ``config.compatibility`` is ``"corrected"``, the cross-entropy of padding counts too.

        The other arguments are those of :class:`Wav2Vec2BertForSequenceClassification`.
        """
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        output = self.classify(input_features, attention_mask, labels, deterministic=deterministic, **options)
        return as_output(output, return_dict)


class Wav2Vec2BertForXVector(Wav2Vec2BertHead, XVector):
    """The model that embeds speakers, for speaker verification: compare ``embeddings`` by their cosine.

    Attributes are those of :class:`~speech_flax.Wav2Vec2BertModel`.
    """

    def __call__(
        self,
        input_features: Features,
        attention_mask: Mask | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Labels | None = None,
        *,
        deterministic: bool = True,
    ) -> XVectorOutput | tuple[Any, ...]:
        """Embed every utterance, and compute the loss if ``labels`` are given.

        Args:
          labels: Speaker ids ``[batch]``, of which -100 does not count (additive-margin softmax).

        The other arguments are those of :class:`Wav2Vec2BertForSequenceClassification`.

        Raises:
          ValueError: fewer frames than the time-delay layers see at once.
        """
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        output = self.classify(input_features, attention_mask, labels, deterministic=deterministic, **options)
        return as_output(output, return_dict)
