"""In bfloat16, whatever is added up over rows and frames is added up in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_parameters import random_parameters

from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig
from speech_flax.layers.feature_encoder import ValidConvolution
from speech_flax.layers.linear import Linear
from speech_flax.layers.positional_convolution import PositionalConvolution
from speech_flax.layers.spec_augment import spec_augment

RANDOM = np.random.default_rng(0)
POSITIONAL = HubertConfig(
    hidden_size=8, num_attention_heads=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
)


def cotangent_of(outputs: jax.Array) -> jax.Array:
    """Numbers that do not cancel out, so that rounding of each partial sum would be seen."""
    return jnp.asarray(1 + RANDOM.uniform(size=outputs.shape), jnp.bfloat16)


def assert_summed_exactly(gradient: jax.Array, cotangent: jax.Array) -> None:
    exact = np.asarray(cotangent, np.float64).sum((0, 1))
    np.testing.assert_allclose(gradient, exact, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        Linear(6, dtype=jnp.bfloat16),
        ValidConvolution(6, 3, 2, use_bias=True, dtype=jnp.bfloat16),
        PositionalConvolution(POSITIONAL, jnp.bfloat16),
    ],
    ids=["linear", "strided", "positional"],
)
def test_gradients_of_biases(layer: nn.Module):
    inputs = jnp.asarray(RANDOM.standard_normal((4, 500, 8)), jnp.bfloat16)
    params = random_parameters(layer, inputs)
    outputs, pull = jax.vjp(lambda params: layer.apply({"params": params}, inputs), params)
    assert outputs.dtype == jnp.bfloat16
    cotangent = cotangent_of(outputs)
    assert_summed_exactly(pull(cotangent)[0]["bias"], cotangent)


def test_gradient_of_the_mask_embedding():
    config = Wav2Vec2BertConfig(mask_time_prob=0.1)
    states = jnp.asarray(RANDOM.standard_normal((4, 500, 8)), jnp.bfloat16)
    everywhere, lengths = jnp.ones((4, 500), bool), jnp.full(4, 500)

    def masked(embedding: jax.Array) -> jax.Array:
        return spec_augment(states, embedding, lengths, everywhere, config, None)

    outputs, pull = jax.vjp(masked, jnp.asarray(RANDOM.standard_normal(8), jnp.float32))
    assert outputs.dtype == jnp.bfloat16
    cotangent = cotangent_of(outputs)
    assert_summed_exactly(pull(cotangent)[0], cotangent)
