"""Operations whose gradient is written out, against the plain formula and the gradient that JAX derives of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_flax.kernels.products import weighted
from speech_flax.layers import feed_forward
from speech_flax.layers.feed_forward import gelu, silu
from speech_flax.layers.normalization import instance_norm, layer_norm

RANDOM = np.random.default_rng(0)


def draw(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def assert_equal(ours, plain, *operands):
    """Outputs and gradients to 1e-5 of the largest value: float32 sums of up to 36 terms in different orders."""

    @jax.jit
    def both(operands, cotangent):
        results = []
        for function in (ours, plain):
            outputs, transpose = jax.vjp(function, *operands)
            results.append((outputs, *transpose(cotangent)))
        return results

    actual, expected = both(operands, draw(*jax.eval_shape(plain, *operands).shape))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("leading", [(6,), (3, 12), (2, 3, 4)])
def test_product_with_weights(leading):
    assert_equal(weighted, jnp.matmul, draw(*leading, 5), draw(5, 7))


def test_gelu():
    """Of values between -6 and 6: both tails of the distribution too."""
    assert_equal(gelu, lambda values: jax.nn.gelu(values, approximate=False), np.linspace(-6, 6, 97, dtype=np.float32))


def test_silu():
    assert_equal(silu, jax.nn.silu, np.linspace(-20, 20, 97, dtype=np.float32))


def test_the_formulation_of_silu_for_tpus(monkeypatch):
    """A sigmoid to one unit of its last place, times values up to 20; and its gradient."""
    monkeypatch.setattr(feed_forward, "for_platform", lambda *operands, tpu, **_: tpu(*operands))
    values = np.linspace(-20, 20, 97, dtype=np.float32)
    actual, expected = (jax.vmap(jax.value_and_grad(function))(values) for function in (silu, jax.nn.silu))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=20 * 2**-23)


@pytest.mark.parametrize("leading", [(6,), (3, 12)])
def test_layer_norm(leading):
    def plain(inputs, scale, bias):
        centred = inputs - inputs.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias

    assert_equal(lambda *operands: layer_norm(*operands, 1e-5), plain, 3 * draw(*leading, 8) + 2, draw(8), draw(8))


def test_instance_norm_over_the_frames_that_count():
    counted = jnp.arange(9) < jnp.array([9, 6, 1])[:, None]

    def plain(inputs, scale, bias):
        where = counted[:, :, None]
        centred = inputs - inputs.mean(1, keepdims=True, where=where)
        variance = (centred**2).mean(1, keepdims=True, where=where)
        return centred / jnp.sqrt(variance + 0.1) * scale + bias

    def ours(inputs, scale, bias):
        return instance_norm(inputs, scale, bias, counted, 0.1)

    assert_equal(ours, plain, 3 * draw(3, 9, 4) + 2, draw(4), draw(4))
