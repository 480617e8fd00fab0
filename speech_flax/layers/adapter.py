"""The adapter of Wav2Vec2-BERT: strided convolutions with attention that shorten the sequence."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.layers.attention import SelfAttention
from speech_flax.layers.convolution import strided_convolution
from speech_flax.layers.dropout import Dropout
from speech_flax.layers.feed_forward import FeedForward, gated_linear_unit
from speech_flax.layers.linear import linear
from speech_flax.layers.masks import length_mask, sub_sampled_lengths
from speech_flax.layers.normalization import LayerNorm


class AdapterLayer(nn.Module):
    """Sub-samples ``[batch, frames, features]`` by ``config.adapter_stride``.

    As in Transformers, padded frames are not zeroed before the convolutions, so that the last output frame may see one
    of them, and the convolutions pad by half their stride where the lengths assume half the kernel. With
    ``config.compatibility`` "corrected" padding is zeroed, and both take half the kernel.
    """

    config: Wav2Vec2BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, hidden_states: Float[Array, "batch frames features"], lengths: Int[Array, "batch"], deterministic: bool
    ) -> Float[Array, "batch shorter features"]:
        config = self.config
        norm = partial(LayerNorm, config.layer_norm_eps, self.dtype)
        residual = self._shorten("residual_conv", norm(name="residual_layer_norm")(hidden_states), lengths)
        hidden = self._shorten("self_attn_conv", norm(name="self_attn_layer_norm")(hidden_states), lengths)
        mask: Bool[Array, "batch shorter"] = length_mask(sub_sampled_lengths(lengths, config), hidden.shape[1])
        hidden, _ = SelfAttention(config, None, self.dtype, name="self_attn")(hidden, mask, deterministic)
        hidden = residual + Dropout(config.conformer_conv_dropout)(hidden, deterministic)
        feed_forward = FeedForward(
            config.intermediate_size,
            config.adapter_act,
            config.activation_dropout,
            config.hidden_dropout,
            config.initializer_range,
            self.dtype,
            name="ffn",
        )
        return hidden + feed_forward(norm(name="ffn_layer_norm")(hidden), deterministic)

    def _shorten(self, name: str, hidden: Array, lengths: Array) -> Array:
        """A strided convolution and its gate."""
        kernel, stride = self.config.adapter_kernel_size, self.config.adapter_stride
        padding = stride // 2
        if self.config.compatibility == "corrected":
            hidden = jnp.where(length_mask(lengths, hidden.shape[1])[:, :, None], hidden, 0)
            padding = kernel // 2
        convolution = strided_convolution(2 * hidden.shape[-1], kernel, stride, padding, name=name, dtype=self.dtype)
        return gated_linear_unit(convolution(hidden))


class Adapter(nn.Module):
    """A projection if the output has another width, then ``config.num_adapter_layers`` layers.

    LayerDrop never skips these layers: a skipped one would leave the sequence longer than its lengths say, which is
    what the reference does, with a silently wrong CTC loss.
    """

    config: Wav2Vec2BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, hidden_states: Float[Array, "batch frames hidden"], lengths: Int[Array, "batch"], deterministic: bool
    ) -> Float[Array, "batch shorter features"]:
        config = self.config
        if config.output_hidden_size != config.hidden_size:
            project = linear(
                config.output_hidden_size, name="proj", dtype=self.dtype, initializer_range=config.initializer_range
            )
            norm = LayerNorm(config.layer_norm_eps, self.dtype, name="proj_layer_norm")
            hidden_states = norm(project(hidden_states))
        for index in range(config.num_adapter_layers):
            layer = AdapterLayer(config, self.dtype, name=f"layers_{index}")
            hidden_states = layer(hidden_states, lengths, deterministic)
            lengths = sub_sampled_lengths(lengths, config)
        return hidden_states
