"""HuBERT (Hsu et al. 2021, arXiv:2106.07447): a convolutional reader of waveforms, and a Transformer."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from speech_flax.configuration import HubertConfig
from speech_flax.layers.dropout import Dropout
from speech_flax.layers.encoder_layer import scan_layers
from speech_flax.layers.feature_encoder import FeatureEncoder
from speech_flax.layers.linear import linear
from speech_flax.layers.masks import (
    Lengths,
    as_bool_mask,
    convolution_output_lengths,
    feature_frame_mask,
    labelled_frames,
)
from speech_flax.layers.normalization import LayerNorm
from speech_flax.layers.positional_convolution import PositionalEmbedding
from speech_flax.layers.spec_augment import spec_augment
from speech_flax.layers.transformer import TransformerLayer
from speech_flax.models.ctc import Labels, loss_of_labels
from speech_flax.models.pretrained_model import PretrainedModel
from speech_flax.outputs import BaseModelOutput, CausalLMOutput

Waveforms = Float[Array | np.ndarray, "batch samples"]
SampleMask = Shaped[Array | np.ndarray, "batch samples"]
FrameMask = Shaped[Array | np.ndarray, "batch frames"]


class HubertPretrainedModel(PretrainedModel):
    """Mixin of the HuBERT models: loading, saving, and the arithmetic of lengths."""

    config: HubertConfig

    def feature_lengths(self, sample_lengths: Lengths) -> Lengths:
        """Frames for waveforms of ``sample_lengths`` samples; 0 or less for those too short for one frame."""
        return convolution_output_lengths(sample_lengths, self.config)

    def feature_mask(self, attention_mask: SampleMask) -> Bool[Array, "batch frames"]:
        """Which frames count, for a mask of samples; see :func:`~speech_flax.layers.masks.feature_frame_mask`."""
        return feature_frame_mask(as_bool_mask(jnp.asarray(attention_mask), *attention_mask.shape), self.config)

    def _get_feat_extract_output_lengths(self, input_lengths: Lengths) -> Lengths:
        """:meth:`feature_lengths`, by the name that users of Transformers call."""
        return self.feature_lengths(input_lengths)

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: SampleMask
    ) -> Bool[Array, "batch frames"]:
        """:meth:`feature_mask`, by the name that users of Transformers call."""
        return self.feature_mask(attention_mask)[:, :feature_vector_length]


class FeatureProjection(nn.Module):
    """Norm (unless the configuration leaves it out) and linear layer to the width of the Transformer."""

    config: HubertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch frames channels"], deterministic: bool
    ) -> Float[Array, "batch frames hidden"]:
        config = self.config
        if config.feat_proj_layer_norm:
            features = LayerNorm(config.layer_norm_eps, self.dtype, name="layer_norm")(features)
        project = linear(
            config.hidden_size, name="projection", dtype=self.dtype, initializer_range=config.initializer_range
        )
        return Dropout(config.feat_proj_dropout)(project(features), deterministic)


class Encoder(nn.Module):
    """Positional convolution and the stack of Transformer layers, with the norm before them or, if stable, after."""

    config: HubertConfig
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
        norm = LayerNorm(config.layer_norm_eps, self.dtype, name="layer_norm")
        hidden_states = jnp.where(mask[:, :, None], hidden_states, 0)
        hidden_states = hidden_states + PositionalEmbedding(config, self.dtype, name="pos_conv_embed")(
            hidden_states, mask
        )
        if not config.do_stable_layer_norm:
            hidden_states = norm(hidden_states)
        hidden_states = Dropout(config.hidden_dropout)(hidden_states, deterministic)
        last, states, attentions = scan_layers(
            TransformerLayer,
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
        if config.do_stable_layer_norm:
            last = norm(last)
            if output_hidden_states and config.compatibility in ("transformers-4.37", "corrected"):
                states = (*states[:-1], last)  # the others return the last layer's output as it was before the norm
        return last, states, attentions


class HubertModel(HubertPretrainedModel, nn.Module):
    """The bare model: feature encoder, projection, SpecAugment and Transformer.

    Attributes:
      config: Configuration.
      dtype: Computation type; parameters are float32, norms and softmax are computed in float32.
      remat: What the backward pass recomputes: nothing (``"none"``), all but matrix products and attention
        (``"dots"``), all but attention (``"attention"``), or each layer from its input (``"full"``).
      scan_unroll: Layers per iteration of the compiled loop.
    """

    config: HubertConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    def setup(self):
        config = self.config
        self.feature_extractor = FeatureEncoder(config, self.dtype)
        self.feature_projection = FeatureProjection(config, self.dtype)
        if config.has_mask_embedding:
            self.masked_spec_embed = self.param(
                "masked_spec_embed", nn.initializers.uniform(1.0), (config.hidden_size,)
            )
        self.encoder = Encoder(config, self.dtype, self.remat, self.scan_unroll)

    def __call__(
        self,
        input_values: Waveforms,
        attention_mask: SampleMask | None = None,
        mask_time_indices: FrameMask | None = None,
        *,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Encode waveforms.

        Args:
          input_values: Waveforms at 16 kHz, from :class:`~speech_flax.Wav2Vec2FeatureExtractor`.
          attention_mask: 1 for samples that count, 0 for padding on the right; all count by default.
          mask_time_indices: Frames to replace by the mask embedding instead of those that SpecAugment would draw; has
            an effect only if ``config.apply_spec_augment``, and then in evaluation too.
          deterministic: No dropout, SpecAugment or LayerDrop. Otherwise the random streams ``dropout``,
            ``spec_augment`` and ``layer_drop`` are needed.
          output_attentions: Return attention probabilities; default ``config.output_attentions``.
          output_hidden_states: Return the states of all layers; default ``config.output_hidden_states``. With
            ``config.do_stable_layer_norm`` the last one is normed, except in the behaviour of Transformers 5 and
            fairseq.

        Raises:
          ValueError: the waveforms are too short for one frame.
        """
        config = self.config
        attentions_wanted = config.output_attentions if output_attentions is None else output_attentions
        states_wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        sample_mask = as_bool_mask(attention_mask, *input_values.shape)
        corrected = config.compatibility == "corrected"
        # The reference takes the statistics of group norm over the padding too.
        samples = sample_mask.sum(-1).astype(jnp.int32)
        first_lengths = convolution_output_lengths(samples, config, 1) if corrected else None
        features = self.feature_extractor(jnp.asarray(input_values), first_lengths)
        mask = feature_frame_mask(sample_mask, config)

        hidden = self.feature_projection(features, deterministic)
        if config.apply_spec_augment:
            drawn = config.has_mask_embedding and not deterministic
            embedding = self.masked_spec_embed if config.has_mask_embedding else None
            key = self.make_rng("spec_augment") if drawn else None
            lengths = self._maskable_lengths(mask)
            hidden = spec_augment(hidden, embedding, lengths, mask_time_indices, config, key)
        hidden, states, attentions = self.encoder(hidden, mask, deterministic, attentions_wanted, states_wanted)
        return BaseModelOutput(hidden, states, attentions)

    def _maskable_lengths(self, mask: Bool[Array, "batch frames"]) -> Int[Array, "batch"]:
        """Frames among which SpecAugment draws its spans; in Transformers they may lie in the padding."""
        if self.config.compatibility in ("transformers-4.37", "transformers-5"):
            return jnp.full(mask.shape[:1], mask.shape[1], jnp.int32)
        return mask.sum(-1).astype(jnp.int32)


class HubertForCTC(HubertPretrainedModel, nn.Module):
    """The model with a linear layer that scores the symbols of a vocabulary at every frame.

    Attributes are those of :class:`HubertModel`.

    Raises:
      ValueError: the configuration has no ``vocab_size``.
    """

    config: HubertConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    def setup(self):
        config = self.config
        if config.vocab_size is None:
            raise ValueError("a CTC model needs config.vocab_size: the number of symbols of the tokenizer")
        self.hubert = HubertModel(config, self.dtype, self.remat, self.scan_unroll)
        self.dropout = Dropout(config.final_dropout)
        self.lm_head = linear(
            config.vocab_size, name="lm_head", dtype=self.dtype, initializer_range=config.initializer_range
        )

    @classmethod
    def from_pretrained(
        cls, directory_or_hub_id: str | Path, *, target_lang: str | None = None, **options: Any
    ) -> tuple[nn.Module, PyTree]:
        """The module and its parameters; see :meth:`PretrainedModel.from_pretrained`.

        Args:
          directory_or_hub_id: Local directory, or ``owner/name`` of a model on the hub.
          target_lang: Take adapters and head from ``adapter.<target_lang>.safetensors``; see
            :func:`~speech_flax.language_adapters.with_language_adapter`, which exchanges them later too.
          options: Computation type, module attributes and fields of the configuration to replace.
        """
        module, params = super().from_pretrained(directory_or_hub_id, **options)
        if target_lang is None:
            return module, params
        from speech_flax.language_adapters import with_language_adapter

        return with_language_adapter(module, params, directory_or_hub_id, target_lang)

    def __call__(
        self,
        input_values: Waveforms,
        attention_mask: SampleMask | None = None,
        mask_time_indices: FrameMask | None = None,
        labels: Labels | None = None,
        *,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutput:
        """Score every frame, and compute the CTC loss if ``labels`` are given.

        Args:
          labels: Label ids; negative ones (-100 by custom) are left out, wherever they stand. The blank is left out too
            unless ``config.compatibility`` is ``"transformers-4.37"``.

        The other arguments are those of :class:`HubertModel`. The loss is reduced as ``ctc_loss_reduction`` and
        ``ctc_zero_infinity`` of the configuration say; ``infeasible`` counts the utterances with too few frames for
        their labels.

        Raises:
          ValueError: the waveforms are too short for one frame, or a label is not below ``vocab_size`` (checked outside
            of ``jit`` alone).
        """
        config = self.config
        outputs = self.hubert(
            input_values,
            attention_mask,
            mask_time_indices,
            deterministic=deterministic,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(self.dropout(outputs.last_hidden_state, deterministic))
        loss = infeasible = None
        if labels is not None:
            lengths = self.logit_lengths(as_bool_mask(attention_mask, *input_values.shape))
            loss, infeasible = loss_of_labels(logits, lengths, labels, config)
        return CausalLMOutput(loss, logits, outputs.hidden_states, outputs.attentions, infeasible)

    def logit_lengths(self, sample_mask: Bool[Array, "batch samples"]) -> Int[Array, "batch"]:
        """Frames of each row that the CTC loss aligns its labels with."""
        return labelled_frames(sample_mask, self.config)
