"""The depthwise kernels of TPUs, interpreted, against the definition; the step's tests compile them for TPUs."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_flax.kernels import tpu_depthwise

CHANNELS = 128


def definition(inputs, taps):
    width, frames = taps.shape[0], inputs.shape[1]
    padded = jnp.pad(inputs.astype(jnp.float32), ((0, 0), (width - 1, 0), (0, 0)))
    return sum(padded[:, tap : tap + frames] * taps[tap] for tap in range(width)).astype(inputs.dtype)


@functools.partial(jax.jit, static_argnums=(3,))
def _both(inputs, taps, cotangent, longest_block):
    expected, transpose = jax.vjp(definition, inputs, taps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_depthwise, "_LONGEST_BLOCK", longest_block)
        outputs = tpu_depthwise.forward(inputs, taps, interpret=True)
        gradients = tpu_depthwise.backward(inputs, cotangent, taps, interpret=True)
    return (expected, *transpose(cotangent)), (outputs, *gradients)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    rows=st.integers(1, 2),
    frames=st.integers(1, 290),
    width=st.integers(1, 33),
    tiles=st.sampled_from((1, 2, 5)),
    longest_block=st.sampled_from((128, 256)),
    dtype=st.sampled_from(("float32", "bfloat16")),
    seed=st.integers(0, 2**31),
)
def test_outputs_and_gradients_equal_the_definition(rows, frames, width, tiles, longest_block, dtype, seed):
    random = np.random.default_rng(seed)
    shape = (rows, frames, tiles * CHANNELS)
    inputs, cotangent = (jnp.asarray(random.standard_normal(shape), dtype) for _ in range(2))
    taps = jnp.asarray(random.standard_normal((width, shape[2])), jnp.float32)
    expected, actual = _both(inputs, taps, cotangent, longest_block)
    for value, one in zip(expected, actual, strict=True):
        assert value.dtype == one.dtype
        value, one = np.asarray(value, np.float32), np.asarray(one, np.float32)
        # Sums of up to 580 float32 products in different orders; in bfloat16 what is rounded may round the other way,
        # and the definition's own gradient of the taps is of products rounded to it.
        tolerance = 1e-5 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(one, value, rtol=0, atol=tolerance * max(1, np.abs(value).max()))


@pytest.mark.parametrize(("width", "channels", "suits"), [(31, 1024, True), (34, 1024, False), (31, 144, False)])
def test_what_the_kernels_take(width, channels, suits):
    assert tpu_depthwise.suits(width, channels) == suits


def test_rows_are_independent_and_what_lies_behind_the_last_frame_counts_for_nothing():
    """Neither filters' gradients nor those of inputs take from frames that a block has and the input does not."""
    random = np.random.default_rng(0)
    inputs, cotangent = jnp.asarray(random.standard_normal((2, 2, 130, CHANNELS), np.float32))
    taps = jnp.asarray(random.standard_normal((31, CHANNELS), np.float32))
    whole = tpu_depthwise.backward(inputs, cotangent, taps, interpret=True)
    rows = [
        tpu_depthwise.backward(inputs[row : row + 1], cotangent[row : row + 1], taps, interpret=True) for row in (0, 1)
    ]
    np.testing.assert_array_equal(whole[0], np.concatenate([of_inputs for of_inputs, _ in rows]))
    np.testing.assert_allclose(whole[1], rows[0][1] + rows[1][1], rtol=1e-5, atol=1e-4)
