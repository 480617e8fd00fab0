"""The encoder layer of Wav2Vec2-BERT: a Conformer block (Gulati et al. 2020, section 2) with a causal convolution."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.layers.attention import SelfAttention
from speech_flax.layers.convolution import CausalDepthwiseConvolution, pointwise_convolution
from speech_flax.layers.dropout import Dropout
from speech_flax.layers.encoder_layer import EncoderLayer
from speech_flax.layers.feed_forward import FeedForward, activation, gated_linear_unit
from speech_flax.layers.normalization import LayerNorm
from speech_flax.layers.sharding import shard_batch


class ConvolutionModule(nn.Module):
    """Norm, pointwise convolution, gate, causal depthwise convolution, norm, activation, pointwise convolution."""

    config: Wav2Vec2BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, hidden_states: Float[Array, "batch frames hidden"], mask: Bool[Array, "batch frames"], deterministic: bool
    ) -> Float[Array, "batch frames hidden"]:
        config = self.config
        size = hidden_states.shape[-1]
        norm = partial(LayerNorm, config.layer_norm_eps, self.dtype)
        hidden = norm(name="layer_norm")(hidden_states)
        hidden = jnp.where(mask[:, :, None], hidden, 0)  # padding must not reach speech through the convolution
        hidden = pointwise_convolution(2 * size, name="pointwise_conv1", dtype=self.dtype)(hidden)
        hidden = shard_batch(gated_linear_unit(hidden))
        width = config.conv_depthwise_kernel_size
        hidden = shard_batch(CausalDepthwiseConvolution(width, self.dtype, name="depthwise_conv")(hidden))
        hidden = activation(config.hidden_act)(norm(name="depthwise_layer_norm")(hidden))
        hidden = pointwise_convolution(size, name="pointwise_conv2", dtype=self.dtype)(hidden)
        return Dropout(config.conformer_conv_dropout)(hidden, deterministic)


class ConformerLayer(EncoderLayer):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm: each but the last with a residual."""

    config: Wav2Vec2BertConfig

    def _layer(self, hidden_states: Array, mask: Array) -> tuple[Array, Array | None]:
        config, deterministic = self.config, self.deterministic
        norm = partial(LayerNorm, config.layer_norm_eps, self.dtype)
        feed_forward = partial(
            FeedForward,
            config.intermediate_size,
            config.hidden_act,
            config.activation_dropout,
            config.hidden_dropout,
            config.initializer_range,
            self.dtype,
        )
        hidden = shard_batch(hidden_states)
        hidden = hidden + 0.5 * feed_forward(name="ffn1")(norm(name="ffn1_layer_norm")(hidden), deterministic)
        attention = SelfAttention(config, config.position_embeddings_type, self.dtype, name="self_attn")
        attended, attentions = attention(
            norm(name="self_attn_layer_norm")(hidden), mask, deterministic, self.output_attentions
        )
        # As in the reference, the rate is that of the attention probabilities.
        hidden = hidden + Dropout(config.attention_dropout)(attended, deterministic)
        hidden = hidden + ConvolutionModule(config, self.dtype, name="conv_module")(hidden, mask, deterministic)
        hidden = hidden + 0.5 * feed_forward(name="ffn2")(norm(name="ffn2_layer_norm")(hidden), deterministic)
        return shard_batch(norm(name="final_layer_norm")(hidden)), attentions
