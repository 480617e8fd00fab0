"""Dropout of activations: how much, what becomes of the rest, and what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_flax.layers.dropout import Dropout

SHAPE = (3, 200, 96)


def dropped(rate: float, seed: int = 0, dtype=jnp.float32) -> np.ndarray:
    inputs = jnp.full(SHAPE, 3.0, dtype)
    outputs = Dropout(rate).apply({}, inputs, False, rngs={"dropout": jax.random.key(seed)})
    assert outputs.dtype == dtype
    return np.asarray(outputs)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_a_share_becomes_zero_and_the_rest_is_scaled_up(rate):
    outputs = dropped(rate)
    np.testing.assert_allclose(outputs[outputs != 0], 3 / (1 - rate), rtol=1e-6)
    spread = (rate * (1 - rate) / outputs.size) ** 0.5
    assert (outputs == 0).mean() == pytest.approx(rate, abs=4 * spread)


def test_no_row_frame_or_channel_is_like_another():
    """Shares along every axis scatter as those of independent draws do, and no two lines are alike."""
    zero = dropped(0.5) == 0
    for axis in range(3):
        lines = np.moveaxis(zero, axis, 0).reshape(SHAPE[axis], -1)
        assert len(np.unique(lines, axis=0)) == SHAPE[axis]
        assert abs(lines.mean(1) - 0.5).max() < 5 * 0.5 / lines.shape[1] ** 0.5
        agreement = (lines[1:] == lines[:-1]).mean(1)
        assert abs(agreement - 0.5).max() < 5 * 0.5 / lines.shape[1] ** 0.5


def test_the_key_decides():
    np.testing.assert_array_equal(dropped(0.3), dropped(0.3))
    assert (dropped(0.3) != dropped(0.3, seed=1)).mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.01)


def test_nothing_is_dropped_where_nothing_is_random():
    inputs = jnp.ones(SHAPE)
    assert Dropout(0.0).apply({}, inputs, False) is inputs
    assert Dropout(0.5).apply({}, inputs, True) is inputs


def test_everything_can_be_dropped():
    def total(inputs):
        return Dropout(1.0).apply({}, inputs, False, rngs={"dropout": jax.random.key(0)}).sum()

    value, gradient = jax.value_and_grad(total)(jnp.ones(SHAPE))
    assert value == 0 and not gradient.any()


def test_gradients_are_those_of_what_is_kept():
    def total(inputs):
        return Dropout(0.25).apply({}, inputs, False, rngs={"dropout": jax.random.key(0)}).sum()

    gradient = np.asarray(jax.grad(total)(jnp.full(SHAPE, 3.0, jnp.bfloat16)), np.float32)
    np.testing.assert_array_equal(gradient == 0, dropped(0.25, dtype=jnp.bfloat16) == 0)
