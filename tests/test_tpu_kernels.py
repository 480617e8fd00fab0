"""The kernels, compiled for every kind of TPU at the sizes of real models, without a TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from speech_flax.kernels.positions import RelativeKey
from speech_flax.layers.attention import attention
from speech_flax.layers.convolution import causal_depthwise_convolution
from speech_flax.training.tpu_slices import parse_slice, prepare_compiler, slice_devices

pytestmark = pytest.mark.tpu

BFLOAT16, FLOAT32 = jnp.bfloat16, jnp.float32
SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")

# rows, frames, heads, head size, computation type, (left, right) of relative keys or None, dropout
SIZES = {
    "w2v-bert-2.0, 20 s": (16, 1024, 16, 64, BFLOAT16, (64, 8), 0.1),
    "w2v-bert-2.0, 5 min": (1, 15000, 16, 64, BFLOAT16, (64, 8), 0.1),
    "hubert-xlarge, 30 s": (4, 1499, 16, 80, BFLOAT16, None, 0.1),
    "heads of 128, wide clip, float32": (2, 2100, 8, 128, FLOAT32, (300, 200), 0.0),
}


@pytest.fixture(scope="module", autouse=True)
def compiler():
    prepare_compiler()


# rows, frames, channels, width, computation type
CONVOLUTIONS = {
    "w2v-bert-2.0, 20 s": (16, 1019, 1024, 31, BFLOAT16),
    "w2v-bert-2.0, 5 min": (1, 15000, 1024, 31, BFLOAT16),
    "short, float32": (3, 45, 640, 5, FLOAT32),
}


@pytest.mark.parametrize("slice_name", SLICES)
@pytest.mark.parametrize("size", SIZES)
def test_training_with_the_kernels_compiles_and_holds_no_score_matrix(slice_name, size):
    rows, frames, heads, head_size, dtype, reach, rate = SIZES[size]
    sharding = SingleDeviceSharding(slice_devices(parse_slice(slice_name))[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    states = array(rows, frames, heads * head_size)
    embeddings = None if reach is None else array(sum(reach) + 1, head_size)

    def loss(query, key, value, embeddings, mask, random):
        states = (states.reshape(rows, frames, heads, head_size) for states in (query, key, value))
        positions = None if reach is None else RelativeKey(embeddings, reach[0])
        attended, _ = attention(*states, mask, positions=positions, dropout_rate=rate, dropout_key=random)
        return jnp.square(attended.astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2) if reach is None else (0, 1, 2, 3)))
    inputs = (states, states, states, embeddings, array(rows, frames, dtype=bool), array(2, dtype=jnp.uint32))
    compiled = gradient.trace(*inputs).lower(lowering_platforms=("tpu",)).compile()

    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    score_matrix = rows * heads * frames**2 * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < score_matrix


@pytest.mark.parametrize("slice_name", SLICES)
@pytest.mark.parametrize("size", CONVOLUTIONS)
def test_depthwise_convolution_compiles_to_one_kernel_in_each_direction(slice_name, size):
    rows, frames, channels, width, dtype = CONVOLUTIONS[size]
    sharding = SingleDeviceSharding(slice_devices(parse_slice(slice_name))[0])
    states = jax.ShapeDtypeStruct((rows, frames, channels), dtype, sharding=sharding)
    kernel = jax.ShapeDtypeStruct((width, 1, channels), dtype, sharding=sharding)

    def loss(inputs, kernel):
        return jnp.square(causal_depthwise_convolution(inputs, kernel).astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.trace(states, kernel).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
