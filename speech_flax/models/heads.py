"""Heads that classify: whole utterances, frames, or speakers; the same for both model families.

A model with a head names its base model as Transformers does, and computes its outputs by a class of this module. The
base model's states are those of the last layer, or, with ``config.use_weighted_layer_sum``, a learned mean over all
layers (Yang et al. 2021, arXiv:2105.01051, section 3.2).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from speech_flax.configuration import SpeechConfig
from speech_flax.layers.linear import Linear, linear
from speech_flax.layers.masks import as_bool_mask, length_mask
from speech_flax.layers.time_delay import time_delay_context, time_delay_layers, time_delay_lengths
from speech_flax.losses import additive_margin_softmax, binary_cross_entropy, cross_entropy, mean_of_counted
from speech_flax.models.pretrained_model import PretrainedModel
from speech_flax.outputs import ModelOutput, SequenceClassifierOutput, TokenClassifierOutput, XVectorOutput

Mask = Shaped[Array | np.ndarray, "batch positions"]
Labels = Shaped[Array | np.ndarray, "*batch"]


class ModelWithHead(PretrainedModel, nn.Module):
    """A base model, and the states that its head sees.

    Attributes:
      config: Configuration.
      dtype: Computation type; parameters are float32, norms, softmax and losses are computed in float32.
      remat: What the backward pass recomputes; see the base model.
      scan_unroll: Layers per iteration of the compiled loop.
    """

    config: SpeechConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    #: Name of the base model among the parameters, and its class.
    base_model_prefix: ClassVar[str]
    base_model_class: ClassVar[type[nn.Module]]
    #: Which frames of the encoder's output are no padding, from (attention mask, number of frames, configuration).
    frame_mask: ClassVar[Callable[[Mask, int, SpeechConfig], Bool[Array, "batch frames"]]]

    def _refuse_adapter(self, task: str) -> None:
        if self.config.add_adapter:
            raise ValueError(f"{task} does not support adapters: set config.add_adapter to false")

    def setup_base(self) -> None:
        """Make the base model and the weights of its layers."""
        base = self.base_model_class(self.config, self.dtype, self.remat, self.scan_unroll)
        setattr(self, self.base_model_prefix, base)
        if self.config.use_weighted_layer_sum:
            states = self.config.num_hidden_layers + 1
            self.layer_weights = self.param("layer_weights", nn.initializers.constant(1 / states), (states,))

    def linear(self, features: int, name: str) -> Linear:
        """A linear layer of the head."""
        return linear(features, name=name, dtype=self.dtype, initializer_range=self.config.initializer_range)

    def encode(
        self,
        inputs: Array | np.ndarray,
        attention_mask: Mask | None,
        deterministic: bool,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> tuple[Float[Array, "batch frames hidden"], ModelOutput]:
        """What the head sees, and the base model's outputs."""
        weighted = self.config.use_weighted_layer_sum
        outputs = getattr(self, self.base_model_prefix)(
            inputs,
            attention_mask,
            deterministic=deterministic,
            output_attentions=output_attentions,
            output_hidden_states=True if weighted else output_hidden_states,
        )
        if not weighted:
            return outputs.last_hidden_state, outputs
        weights = jax.nn.softmax(self.layer_weights.astype(jnp.float32))
        mean = sum(weight * state for weight, state in zip(weights, outputs.hidden_states, strict=True))
        return mean.astype(self.dtype), outputs

    def valid_frames(self, attention_mask: Mask | None, hidden: Array) -> Bool[Array, "batch frames"]:
        """Which of the frames are no padding; all without a mask."""
        config = self.config
        batch, frames, _ = hidden.shape
        before_adapter = config.use_weighted_layer_sum and config.add_adapter and config.compatibility == "corrected"
        if attention_mask is None or before_adapter:
            return as_bool_mask(attention_mask, batch, frames)
        return type(self).frame_mask(jnp.asarray(attention_mask), frames, config)


def as_output(output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple[Any, ...]:
    """The output, or a tuple of its fields if ``return_dict`` is ``False``."""
    return output.to_tuple() if return_dict is False else output


class SequenceClassification(ModelWithHead):
    """One label per utterance: linear layer, mean over its frames, linear layer."""

    def setup(self):
        self._refuse_adapter("sequence classification")
        self.setup_base()
        self.projector = self.linear(self.config.classifier_proj_size, "projector")
        self.classifier = self.linear(self.config.num_labels, "classifier")

    def classify(
        self,
        inputs: Array | np.ndarray,
        attention_mask: Mask | None,
        labels: Labels | None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Logits, and their loss if there are labels."""
        hidden, outputs = self.encode(inputs, attention_mask, **options)
        hidden = self.projector(hidden)
        valid = self.valid_frames(attention_mask, hidden)
        total = jnp.where(valid[:, :, None], hidden, 0).sum(1, dtype=jnp.float32)
        pooled = total / jnp.maximum(valid.sum(1), 1)[:, None]
        logits = self.classifier(pooled.astype(self.dtype))
        loss = None if labels is None else sequence_loss(logits, jnp.asarray(labels), self.config)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def sequence_losses(
    logits: Float[Array, "batch labels"], labels: Labels, config: SpeechConfig
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Loss of every utterance, and which of them count.

    Cross-entropy of class ids (-100 does not count). With a single label it is the squared error of a value instead;
    with ``config.problem_type == "multi_label_classification"`` the binary cross-entropy of zeros and ones
    ``[batch, labels]``, as the documentation of Transformers has it.
    """
    everyone = jnp.ones(logits.shape[0], bool)
    if config.problem == "regression":
        differences = logits.astype(jnp.float32) - labels.reshape(logits.shape).astype(jnp.float32)
        return jnp.square(differences).mean(-1), everyone
    if config.problem == "multi_label_classification":
        return binary_cross_entropy(logits, labels), everyone
    return cross_entropy(logits, labels.reshape(-1))


def sequence_loss(logits: Float[Array, "batch labels"], labels: Labels, config: SpeechConfig) -> Float[Array, ""]:
    """Mean of :func:`sequence_losses` over the utterances that count."""
    return mean_of_counted(*sequence_losses(logits, labels, config))


class AudioFrameClassification(ModelWithHead):
    """Labels for every frame, who speaks for instance: a linear layer."""

    def setup(self):
        self._refuse_adapter("audio frame classification")
        self.setup_base()
        self.classifier = self.linear(self.config.num_labels, "classifier")

    def classify(
        self,
        inputs: Array | np.ndarray,
        attention_mask: Mask | None,
        labels: Labels | None,
        **options: Any,
    ) -> TokenClassifierOutput:
        """Logits of every frame, and their loss if there are labels."""
        hidden, outputs = self.encode(inputs, attention_mask, **options)
        logits = self.classifier(hidden)
        loss = None
        if labels is not None:
            losses, counted = frame_losses(logits, jnp.asarray(labels), self.config)
            if self.config.compatibility == "corrected" or self.config.problem == "multi_label_classification":
                counted &= self.valid_frames(attention_mask, hidden)  # Transformers counts padding too
            loss = mean_of_counted(losses, counted)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def frame_losses(
    logits: Float[Array, "batch frames labels"], labels: Labels, config: SpeechConfig
) -> tuple[Float[Array, "batch frames"], Bool[Array, "batch frames"]]:
    """Loss of every frame, and which of them count.

    Cross-entropy of class ids ``[batch, frames]`` (-100 does not count) or of one-hot vectors ``[batch, frames,
    labels]``, of which the largest entry counts; with ``config.problem_type == "multi_label_classification"`` the
    binary cross-entropy of such vectors, in which any number of entries may be 1.
    """
    if config.problem == "multi_label_classification":
        return binary_cross_entropy(logits, labels), jnp.ones(logits.shape[:2], bool)
    return cross_entropy(logits, labels if labels.ndim == 2 else labels.argmax(-1))


class AngularObjective(nn.Module):
    """The class vectors that embeddings are compared with in training; not used afterwards."""

    num_labels: int

    @nn.compact
    def __call__(
        self, embeddings: Float[Array, "batch dimensions"], labels: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
        shape = (embeddings.shape[-1], self.num_labels)
        return additive_margin_softmax(embeddings, self.param("weight", nn.initializers.normal(1.0), shape), labels)


class XVector(ModelWithHead):
    """Speaker embeddings (Snyder et al. 2018, "X-vectors: robust DNN embeddings for speaker recognition", section 3).

    A linear layer, time-delay layers, mean and standard deviation over the frames of the utterance, a linear layer
    (``embeddings``) and another (``logits``), which an additive-margin softmax compares with the speakers in training.
    """

    def setup(self):
        config = self.config
        self.setup_base()
        self.projector = self.linear(config.tdnn_dim[0], "projector")
        self.tdnn = time_delay_layers(config, self.dtype)
        self.feature_extractor = self.linear(config.xvector_output_dim, "feature_extractor")
        self.classifier = self.linear(config.xvector_output_dim, "classifier")
        self.objective = AngularObjective(config.num_labels)

    def classify(
        self,
        inputs: Array | np.ndarray,
        attention_mask: Mask | None,
        labels: Labels | None,
        **options: Any,
    ) -> XVectorOutput:
        """Embeddings, logits, and their loss if there are labels."""
        hidden, outputs = self.encode(inputs, attention_mask, **options)
        valid = self.valid_frames(attention_mask, hidden)
        if hidden.shape[1] < (context := time_delay_context(self.config)):
            raise ValueError(
                f"the time-delay layers see {context} frames at once (tdnn_kernel, tdnn_dilation), but the input has "
                f"{hidden.shape[1]}: use longer audio"
            )
        hidden = self.projector(hidden)
        for layer in self.tdnn:
            hidden = layer(hidden)
        lengths = time_delay_lengths(valid.sum(1).astype(jnp.int32), self.config)
        pooled = statistics_pooling(hidden, lengths)
        embeddings = self.feature_extractor(pooled.astype(self.dtype))
        logits = self.classifier(embeddings)
        loss = None
        if labels is not None or self.is_initializing():
            ids = jnp.zeros(logits.shape[0], jnp.int32) if labels is None else jnp.asarray(labels).reshape(-1)
            loss = mean_of_counted(*self.objective(logits, ids))
        return XVectorOutput(loss, logits, embeddings, outputs.hidden_states, outputs.attentions)


def statistics_pooling(
    hidden: Float[Array, "batch frames features"], lengths: Int[Array, "batch"]
) -> Float[Array, "batch doubled_features"]:
    """Mean and unbiased standard deviation over the first ``lengths`` frames, in float32.

    Of a single frame the deviation is 0, and without any frame the mean is too (not a number, both, in PyTorch).
    """
    hidden = hidden.astype(jnp.float32)
    counted = length_mask(lengths, hidden.shape[1])[:, :, None]
    count = counted.sum(1)
    mean = jnp.where(counted, hidden, 0).sum(1) / jnp.maximum(count, 1)
    squares = jnp.where(counted, jnp.square(hidden - mean[:, None]), 0).sum(1)
    variance = squares / jnp.maximum(count - 1, 1)
    varies = variance > 0  # the root of 0 has no gradient; PyTorch takes it for 0 as well
    return jnp.concatenate([mean, jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)], axis=-1)
