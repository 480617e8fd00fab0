"""The encoder layer of HuBERT: a Transformer block (Vaswani et al. 2017), normed after or before each sub-layer."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from speech_flax.configuration import HubertConfig
from speech_flax.layers.attention import attention
from speech_flax.layers.dropout import Dropout
from speech_flax.layers.encoder_layer import EncoderLayer
from speech_flax.layers.feed_forward import FeedForward
from speech_flax.layers.linear import linear
from speech_flax.layers.normalization import LayerNorm
from speech_flax.layers.sharding import shard_batch


class Attention(nn.Module):
    """Multi-head self-attention without positions: ``[batch, frames, features]`` to the same shape."""

    config: HubertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "batch frames features"],
        mask: Bool[Array, "batch frames"],
        deterministic: bool,
        output_attentions: bool = False,
    ) -> tuple[Float[Array, "batch frames features"], Float[Array, "batch heads frames frames"] | None]:
        config = self.config
        batch, frames, features = hidden_states.shape
        dense = partial(linear, features, dtype=self.dtype, initializer_range=config.initializer_range)

        def heads(name: str) -> Array:
            return dense(name=name)(hidden_states).reshape(batch, frames, config.num_attention_heads, -1)

        rate = 0.0 if deterministic else config.attention_dropout
        attended, probabilities = attention(
            heads("q_proj"),
            heads("k_proj"),
            heads("v_proj"),
            mask,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            output_attentions=output_attentions,
        )
        return dense(name="out_proj")(attended), probabilities


class LanguageAdapter(nn.Module):
    """Norm and two linear layers that fit a layer to a language (Pratap et al. 2023, section 4.1)."""

    config: HubertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "batch frames hidden"]) -> Float[Array, "batch frames hidden"]:
        config = self.config
        dense = partial(linear, dtype=self.dtype, initializer_range=config.initializer_range)
        hidden = LayerNorm(1e-5, self.dtype, name="norm")(hidden_states)
        hidden = jax.nn.relu(dense(config.adapter_attn_dim, name="linear_1")(hidden))
        return dense(config.hidden_size, name="linear_2")(hidden)


class TransformerLayer(EncoderLayer):
    """Attention and feed-forward, each with a residual and a norm.

    The norm follows the residual, or with ``config.do_stable_layer_norm`` it comes before the sub-layer (Xiong et al.
    2020); only then is there a language adapter, if ``config.adapter_attn_dim`` is given.
    """

    config: HubertConfig

    def _layer(self, hidden_states: Array, mask: Array) -> tuple[Array, Array | None]:
        config, deterministic = self.config, self.deterministic
        self_attention = Attention(config, self.dtype, name="attention")
        layer_norm = LayerNorm(config.layer_norm_eps, self.dtype, name="layer_norm")
        final_layer_norm = LayerNorm(config.layer_norm_eps, self.dtype, name="final_layer_norm")
        feed_forward = FeedForward(
            config.intermediate_size,
            config.hidden_act,
            config.activation_dropout,
            config.hidden_dropout,
            config.initializer_range,
            self.dtype,
            name="feed_forward",
        )
        stable = config.do_stable_layer_norm
        hidden = shard_batch(hidden_states)
        attended, attentions = self_attention(
            layer_norm(hidden) if stable else hidden, mask, deterministic, self.output_attentions
        )
        hidden = hidden + Dropout(config.hidden_dropout)(attended, deterministic)
        if stable:
            hidden = hidden + feed_forward(final_layer_norm(hidden), deterministic)
            if config.adapter_attn_dim is not None:
                hidden = hidden + LanguageAdapter(config, self.dtype, name="adapter_layer")(hidden)
        else:
            hidden = layer_norm(hidden)
            hidden = final_layer_norm(hidden + feed_forward(hidden, deterministic))
        return shard_batch(hidden), attentions
