"""Wav2Vec2-BERT (Seamless Communication et al. 2023, arXiv:2312.05187, section 3.2.1; Chung et al. 2021)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.layers.adapter import Adapter
from speech_flax.layers.conformer import ConformerLayer
from speech_flax.layers.dropout import Dropout
from speech_flax.layers.encoder_layer import scan_layers
from speech_flax.layers.feed_forward import FeedForward
from speech_flax.layers.linear import Linear, linear
from speech_flax.layers.masks import adapter_output_lengths, as_bool_mask
from speech_flax.layers.normalization import LayerNorm
from speech_flax.layers.sharding import shard_batch
from speech_flax.layers.spec_augment import spec_augment
from speech_flax.models.ctc import loss_of_labels
from speech_flax.models.pretrained_model import PretrainedModel
from speech_flax.outputs import CausalLMOutput, Wav2Vec2BaseModelOutput

Features = Float[Array | np.ndarray, "batch frames features"]
Mask = Shaped[Array | np.ndarray, "batch frames"]


class FeatureProjection(nn.Module):
    """Norm and linear layer: ``[batch, frames, features]`` to ``[batch, frames, hidden]``, and the normed input."""

    config: Wav2Vec2BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Features, deterministic: bool) -> tuple[Array, Array]:
        config = self.config
        normed = LayerNorm(config.layer_norm_eps, self.dtype, name="layer_norm")(features)
        bound = config.feature_projection_input_dim**-0.5

        def uniform(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        project = Linear(
            config.hidden_size, dtype=self.dtype, kernel_init=uniform, bias_init=uniform, name="projection"
        )
        return Dropout(config.feat_proj_dropout)(project(normed), deterministic), normed


class Encoder(nn.Module):
    """The stack of Conformer layers, compiled once and scanned; parameters are stacked along a leading axis."""

    config: Wav2Vec2BertConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "batch frames hidden"],
        mask: Bool[Array, "batch frames"],
        deterministic: bool,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> tuple[Array, tuple[Array, ...] | None, tuple[Array, ...] | None]:
        config = self.config
        hidden_states = jnp.where(mask[:, :, None], hidden_states, 0)
        hidden_states = Dropout(config.hidden_dropout)(hidden_states, deterministic)
        return scan_layers(
            ConformerLayer,
            config,
            hidden_states,
            mask,
            deterministic=deterministic,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            dtype=self.dtype,
            remat=self.remat,
            scan_unroll=self.scan_unroll,
        )


class Wav2Vec2BertModel(PretrainedModel, nn.Module):
    """The bare model: feature projection, SpecAugment, encoder, and the adapter if the configuration has one.

    Attributes:
      config: Configuration.
      dtype: Computation type; parameters are float32, norms and softmax are computed in float32.
      remat: What the backward pass recomputes: nothing (``"none"``), all but matrix products, depthwise
        convolutions and attention (``"dots"``), all but attention (``"attention"``), or each layer from its input
        (``"full"``).
      scan_unroll: Layers per iteration of the compiled loop.
    """

    config: Wav2Vec2BertConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    def setup(self):
        config = self.config
        self.feature_projection = FeatureProjection(config, self.dtype)
        if config.has_mask_embedding:
            self.masked_spec_embed = self.param(
                "masked_spec_embed", nn.initializers.uniform(1.0), (config.hidden_size,)
            )
        self.encoder = Encoder(config, self.dtype, self.remat, self.scan_unroll)
        if config.use_intermediate_ffn_before_adapter:
            self.intermediate_ffn = FeedForward(
                config.intermediate_size,
                "relu",
                config.activation_dropout,
                config.hidden_dropout,
                config.initializer_range,
                self.dtype,
            )
        if config.add_adapter:
            self.adapter = Adapter(config, self.dtype)

    def __call__(
        self,
        input_features: Features,
        attention_mask: Mask | None = None,
        mask_time_indices: Mask | None = None,
        *,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Wav2Vec2BaseModelOutput:
        """Encode log-mel features.

        Args:
          input_features: Stacked log-mel frames, from :class:`~speech_flax.SeamlessM4TFeatureExtractor`.
          attention_mask: 1 for frames that count, 0 for padding on the right; all count by default.
          mask_time_indices: Frames to replace by the mask embedding instead of those that SpecAugment would draw; has
            an effect only if ``config.apply_spec_augment``, and then in evaluation too.
          deterministic: No dropout, SpecAugment or LayerDrop. Otherwise the random streams ``dropout``,
            ``spec_augment`` and ``layer_drop`` are needed.
          output_attentions: Return attention probabilities; default ``config.output_attentions``.
          output_hidden_states: Return the states of all layers; default ``config.output_hidden_states``.
        """
        config = self.config
        attentions_wanted = config.output_attentions if output_attentions is None else output_attentions
        states_wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        batch, frames, _ = input_features.shape
        mask = as_bool_mask(attention_mask, batch, frames)
        lengths = mask.sum(-1).astype(jnp.int32)

        hidden, normed = self.feature_projection(shard_batch(jnp.asarray(input_features)), deterministic)
        if config.apply_spec_augment:
            drawn = config.has_mask_embedding and not deterministic
            key = self.make_rng("spec_augment") if drawn else None
            embedding = self.masked_spec_embed if config.has_mask_embedding else None
            hidden = spec_augment(hidden, embedding, lengths, mask_time_indices, config, key)
        hidden, states, attentions = self.encoder(hidden, mask, deterministic, attentions_wanted, states_wanted)
        if config.use_intermediate_ffn_before_adapter:
            hidden = hidden + 0.5 * self.intermediate_ffn(hidden, deterministic)
        if config.add_adapter:
            hidden = self.adapter(hidden, lengths, deterministic)
        return Wav2Vec2BaseModelOutput(hidden, normed, states, attentions)


class Wav2Vec2BertForCTC(PretrainedModel, nn.Module):
    """The model with a linear layer that scores the symbols of a vocabulary at every frame.

    Attributes are those of :class:`Wav2Vec2BertModel`.

    Raises:
      ValueError: the configuration has no ``vocab_size``.
    """

    config: Wav2Vec2BertConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    def setup(self):
        config = self.config
        if config.vocab_size is None:
            raise ValueError("a CTC model needs config.vocab_size: the number of symbols of the tokenizer")
        self.wav2vec2_bert = Wav2Vec2BertModel(config, self.dtype, self.remat, self.scan_unroll)
        self.dropout = Dropout(config.final_dropout)
        self.lm_head = linear(
            config.vocab_size, name="lm_head", dtype=self.dtype, initializer_range=config.initializer_range
        )

    def __call__(
        self,
        input_features: Features,
        attention_mask: Mask | None = None,
        mask_time_indices: Mask | None = None,
        labels: Int[Array | np.ndarray, "batch labels"] | None = None,
        *,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutput:
        """Score every frame, and compute the CTC loss if ``labels`` are given.

        Args:
          labels: Label ids; negative ones (-100 by custom) are left out, wherever they stand. The blank is left out too
            unless ``config.compatibility`` is ``"transformers-4.37"``.

        The other arguments are those of :class:`Wav2Vec2BertModel`. The loss is reduced as ``ctc_loss_reduction`` and
        ``ctc_zero_infinity`` of the configuration say; ``infeasible`` counts the utterances with too few frames for
        their labels.

        Raises:
          ValueError: a label that is not below ``vocab_size`` (checked outside of ``jit`` alone).
        """
        config = self.config
        outputs = self.wav2vec2_bert(
            input_features,
            attention_mask,
            mask_time_indices,
            deterministic=deterministic,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(self.dropout(outputs.last_hidden_state, deterministic))
        loss = infeasible = None
        if labels is not None:
            frames = as_bool_mask(attention_mask, *input_features.shape[:2]).sum(-1).astype(jnp.int32)
            loss, infeasible = loss_of_labels(logits, adapter_output_lengths(frames, config), labels, config)
        return CausalLMOutput(loss, logits, outputs.hidden_states, outputs.attentions, infeasible)
