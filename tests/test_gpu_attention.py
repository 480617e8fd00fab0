"""The attention kernels for GPUs, without a GPU: in bfloat16 against the definition, and lowered to Triton."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_flax.kernels.attention import attend
from speech_flax.kernels.dropout import head_seeds
from speech_flax.kernels.fused_attention import fused_attention
from speech_flax.kernels.gpu_attention import GPUAttention
from speech_flax.kernels.positions import RelativeKey
from speech_flax.layers.attention import attention

# rows, frames, heads, head size, computation type, (left, right) of relative keys or None, dropout
SIZES = {
    "w2v-bert-2.0, 20 s": (16, 1023, 16, 64, jnp.bfloat16, (64, 8), 0.1),
    "w2v-bert-2.0, 5 min": (1, 15000, 16, 64, jnp.bfloat16, (64, 8), 0.1),
    "hubert-xlarge, 30 s": (4, 1499, 16, 80, jnp.bfloat16, None, 0.1),
    "heads of 128, wide clip, float32": (2, 2100, 8, 128, jnp.float32, (300, 200), 0.0),
}


@pytest.mark.parametrize("size", SIZES)
def test_training_is_lowered_to_three_triton_kernels_for_cuda(size):
    rows, frames, heads, head_size, dtype, reach, rate = SIZES[size]
    states = jax.ShapeDtypeStruct((rows, frames, heads, head_size), dtype)
    embeddings = None if reach is None else jax.ShapeDtypeStruct((sum(reach) + 1, head_size), dtype)
    mask, random = jax.ShapeDtypeStruct((rows, frames), bool), jax.ShapeDtypeStruct((2,), jnp.uint32)

    def loss(query, key, value, embeddings, mask, random):
        positions = None if reach is None else RelativeKey(embeddings, reach[0])
        attended, _ = attention(query, key, value, mask, positions=positions, dropout_rate=rate, dropout_key=random)
        return jnp.square(attended.astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2) if reach is None else (0, 1, 2, 3)))
    traced = gradient.trace(states, states, states, embeddings, mask, random)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("__gpu$xla.gpu.triton") == 3
    assert f"{frames}x{frames}x" not in program  # no score matrix


def test_bfloat16_is_as_close_to_float32_as_the_definition_in_bfloat16():
    rows, frames, heads, head_size, rate = 2, 70, 2, 24, 0.2
    random = np.random.default_rng(0)
    states = [random.standard_normal((rows, frames, heads, head_size), np.float32) for _ in range(4)]
    table = random.standard_normal((9, head_size), np.float32)
    mask = jnp.arange(frames) < jnp.array([[70], [51]])
    seeds = head_seeds(jax.random.key(0), rows, heads)

    def definition(query, key, value, embeddings):
        states = (states.swapaxes(1, 2) for states in (query, key, value))
        return attend(*states, mask, RelativeKey(embeddings, 5), rate, seeds)[0].swapaxes(1, 2)

    def kernel(query, key, value, embeddings):
        chosen = partial(GPUAttention, longest_block=32, interpret=True)
        positions = RelativeKey(embeddings, 5)
        return fused_attention(query, key, value, mask, positions, seeds, dropout_rate=rate, formulation=chosen)

    def run(function, dtype):
        *inputs, cotangent = (jnp.asarray(array, dtype) for array in (*states[:3], table, states[3]))

        @jax.jit
        def with_gradients(cotangent, *inputs):
            attended, transpose = jax.vjp(function, *inputs)
            return attended, *transpose(cotangent)

        return [np.asarray(array, np.float32) for array in with_gradients(cotangent, *inputs)]

    exact = run(definition, jnp.float32)
    for true, of_kernel, of_definition in zip(
        exact, run(kernel, jnp.bfloat16), run(definition, jnp.bfloat16), strict=True
    ):
        error = np.abs(of_definition - true).mean()
        # Both round the same operands; a factor for sums in another order.
        assert 0 < np.abs(of_kernel - true).mean() < 1.2 * error
