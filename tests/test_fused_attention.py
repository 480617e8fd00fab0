"""The formulations of attention without a score matrix, against the definition: outputs and every gradient."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_flax.kernels.attention import attend
from speech_flax.kernels.blocked_attention import BlockedAttention
from speech_flax.kernels.dropout import head_seeds
from speech_flax.kernels.flash_attention import FlashAttention
from speech_flax.kernels.fused_attention import fused_attention
from speech_flax.kernels.gpu_attention import GPUAttention
from speech_flax.kernels.positions import RelativeKey

# frames, heads, head size, (left, right) of the clipped distances or None, dropout. Tiles of 16 queries and blocks of
# at most 32 or 64 frames: one block, of one tile and of three, and several blocks; two heads to a register and one;
# clips within a tile, beyond it and beyond the input.
CASES = {
    "relative keys, dropout, one block": (40, 2, 8, (5, 3), 0.2),
    "relative keys, dropout, one tile": (13, 2, 8, (5, 3), 0.2),
    "relative keys, dropout, three blocks": (70, 2, 8, (20, 3), 0.3),
    "relative keys that reach beyond the input, odd head size": (37, 2, 5, (100, 50), 0.0),
    "no positions, one head, dropout, two blocks": (50, 1, 16, None, 0.2),
}
BATCH = 3


@cache
def _programs(case: str):
    """The definition and both formulations, each with its gradients, compiled once."""
    frames, _, _, reach, rate = CASES[case]
    left = reach[0] if reach else None

    def positions(embeddings):
        return None if reach is None else RelativeKey(embeddings, left)

    def definition(query, key, value, embeddings, mask, seeds):
        states = (states.swapaxes(1, 2) for states in (query, key, value))
        return attend(*states, mask, positions(embeddings), rate, seeds)[0].swapaxes(1, 2)

    def formulation(chosen):
        def run(query, key, value, embeddings, mask, seeds):
            return fused_attention(
                query, key, value, mask, positions(embeddings), seeds, dropout_rate=rate, formulation=chosen
            )

        return run

    def with_gradients(function):
        def run(states, embeddings, mask, seeds, cotangent):
            attended, transpose = jax.vjp(lambda *inputs: function(*inputs, mask, seeds), *states, embeddings)
            return attended, transpose(cotangent)

        return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})

    kernel = partial(FlashAttention, tile=16, longest_block=64 if frames == 40 else 32, interpret=True)
    formulations = (
        partial(BlockedAttention, longest_block=16),
        kernel,
        partial(GPUAttention, longest_block=16, interpret=True),
    )
    return [with_gradients(function) for function in (definition, *map(formulation, formulations))]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_formulation_equals_the_definition(case, data):
    frames, heads, head_size, reach, _ = CASES[case]
    lengths = data.draw(st.lists(st.integers(0, frames), min_size=BATCH, max_size=BATCH))
    seed = data.draw(st.integers(0, 2**31 - 1))
    holes = data.draw(st.booleans())
    random = np.random.default_rng(seed)
    states = [random.standard_normal((BATCH, frames, heads, head_size), np.float32) * 2 for _ in range(3)]
    cotangent = random.standard_normal(states[0].shape, np.float32)
    embeddings = None if reach is None else random.standard_normal((sum(reach) + 1, head_size), np.float32)
    mask = np.arange(frames) < np.array(lengths)[:, None]
    if holes:
        mask &= random.random(mask.shape) < 0.7
    seeds = head_seeds(jax.random.key(seed), BATCH, heads)
    definition, *formulations = _programs(case)
    expected = definition(states, embeddings, mask, seeds, cotangent)
    for formulation in formulations:
        jax.tree.map(_assert_close, formulation(states, embeddings, mask, seeds, cotangent), expected)


def _assert_close(actual, expected):
    """To 1e-5 of the largest value: sums of up to 70 float32 products in different orders."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-30)
