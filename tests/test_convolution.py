"""Convolutions over frames in every formulation, against their definition: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_flax.layers import convolution
from speech_flax.layers.convolution import causal_depthwise_convolution


def _definition(inputs, kernel):
    width, frames = kernel.shape[0], inputs.shape[1]
    padded = jnp.pad(inputs, ((0, 0), (width - 1, 0), (0, 0)))
    return sum(padded[:, tap : tap + frames] * kernel[tap] for tap in range(width))


@pytest.mark.parametrize(("frames", "width"), [(37, 7), (5, 31), (1, 1)])
def test_depthwise_convolution_and_both_formulations_of_its_gradient_equal_the_definition(frames, width):
    random = np.random.default_rng(frames)
    inputs, cotangent = random.standard_normal((2, 2, frames, 6), np.float32)
    kernel = random.standard_normal((width, 1, 6), np.float32)

    @jax.jit
    def run(inputs, kernel, cotangent):
        expected, transpose = jax.vjp(_definition, inputs, kernel)
        actual, transpose_actual = jax.vjp(causal_depthwise_convolution, inputs, kernel)
        by_shifts = convolution._gradients_by_shifts(inputs, kernel, cotangent)
        return (expected, *transpose(cotangent)), [
            (actual, *transpose_actual(cotangent)),
            (actual, *by_shifts),
        ]

    expected, formulations = run(inputs, kernel, cotangent)
    for formulation in formulations:
        for actual, value in zip(formulation, expected, strict=True):
            # Sums of up to 74 float32 products in different orders.
            np.testing.assert_allclose(actual, value, rtol=0, atol=1e-5 * np.abs(value).max())


def test_depthwise_convolution_sees_no_later_frame():
    inputs = jnp.ones((1, 12, 3))
    later = inputs.at[:, 7:].set(5.0)
    kernel = jnp.ones((4, 1, 3))
    run = jax.jit(causal_depthwise_convolution)
    np.testing.assert_array_equal(run(inputs, kernel)[:, :7], run(later, kernel)[:, :7])
