"""Convolutions over frames: causal depthwise, and strided for sub-sampling."""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from speech_flax.kernels import tpu_depthwise
from speech_flax.kernels.platforms import for_platform
from speech_flax.layers.linear import Linear
from speech_flax.layers.sharding import map_rows

#: The outputs of depthwise convolutions have this name for policies of rematerialisation.
CONVOLVED = "convolved"


@jax.custom_vjp
def causal_depthwise_convolution(
    inputs: Float[Array, "batch frames channels"], kernel: Float[Array, "width 1 channels"]
) -> Float[Array, "batch frames channels"]:
    """Each channel correlated with its own filter over the current and the ``width - 1`` previous frames.

    The gradient is written out: what XLA derives for the filters of a grouped convolution is a hundred times slower
    than the operation itself on the CPU, and does not finish compiling for TPUs. The outputs are named ``CONVOLVED``.
    """
    return _depthwise_forward(inputs, kernel)[0]


def _depthwise_forward(inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    outputs = for_platform(inputs, kernel, default=_padded_correlation, **_tpu_kernel(_forward_on_tpu, kernel))
    return checkpoint_name(outputs, CONVOLVED), (inputs, kernel)


def _tpu_kernel(function: Callable[..., Any], kernel: Array) -> dict[str, Callable[..., Any]]:
    """``function`` as the formulation of TPUs, if it takes such filters."""
    width, _, channels = kernel.shape
    return {"tpu": function} if tpu_depthwise.suits(width, channels) else {}


def _forward_on_tpu(inputs: Array, kernel: Array) -> Array:
    return map_rows(tpu_depthwise.forward, inputs, whole=(kernel[:, 0],))


def _padded_correlation(inputs: Array, kernel: Array) -> Array:
    return _correlate(jnp.pad(inputs, ((0, 0), (kernel.shape[0] - 1, 0), (0, 0))), kernel)


def _correlate(padded: Array, kernel: Array) -> Array:
    """``output[t] = sum over k of padded[t + k] * kernel[k]``."""
    width, frames = kernel.shape[0], padded.shape[1] - kernel.shape[0] + 1

    def shifted_sum(padded: Array, kernel: Array) -> Array:
        total = padded[:, :frames] * kernel[0]
        for tap in range(1, width):
            total = total + padded[:, tap : tap + frames] * kernel[tap]
        return total

    def grouped(padded: Array, kernel: Array) -> Array:
        layout = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            padded, kernel, (1,), "VALID", dimension_numbers=layout, feature_group_count=kernel.shape[-1]
        )

    return for_platform(padded, kernel, cpu=shifted_sum, default=grouped)


def _depthwise_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    formulations = {"cpu": _gradients_by_fourier, **_tpu_kernel(_gradients_on_tpu, residuals[1])}
    return for_platform(*residuals, cotangent, default=_gradients_by_shifts, **formulations)


def _gradients_on_tpu(inputs: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    def of_own_rows(inputs: Array, cotangent: Array, taps: Array) -> tuple[Array, Array]:
        of_inputs, of_taps = tpu_depthwise.backward(inputs, cotangent, taps)
        return of_inputs, of_taps[None]

    of_inputs, of_taps = map_rows(of_own_rows, inputs, cotangent, whole=(kernel[:, 0],))
    return of_inputs, of_taps.sum(0)[:, None].astype(kernel.dtype)


def _gradients_by_shifts(inputs: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    width, frames = kernel.shape[0], inputs.shape[1]
    of_inputs = _correlate(jnp.pad(cotangent, ((0, 0), (0, width - 1), (0, 0))), kernel[::-1])
    padded = jnp.pad(inputs, ((0, 0), (width - 1, 0), (0, 0)))
    of_taps = [
        jnp.einsum("btc,btc->c", padded[:, tap : tap + frames], cotangent, preferred_element_type=jnp.float32)
        for tap in range(width)
    ]
    return of_inputs, jnp.stack(of_taps)[:, None].astype(kernel.dtype)


def _gradients_by_fourier(inputs: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    """Both correlations as products of spectra: on the CPU four times as fast as by shifts."""
    width, frames = kernel.shape[0], inputs.shape[1]
    size = next(size for size in itertools.count(-(-(frames + width - 1) // 32) * 32, 32) if _is_smooth(size))

    def spectra(states: Array) -> Array:
        return jnp.fft.rfft(states.astype(jnp.float32).swapaxes(1, 2), size)

    def delayed(spectrum: Array) -> Array:
        return jnp.fft.irfft(spectrum, size)[..., :frames].swapaxes(1, 2)

    response = spectra(kernel[::-1].swapaxes(0, 1))
    seen, sent = map_rows(spectra, inputs), map_rows(spectra, cotangent)
    of_inputs = map_rows(delayed, sent * response.conj())
    of_delays = jnp.fft.irfft((seen.conj() * sent).sum(0), size)[:, :width]
    return of_inputs.astype(inputs.dtype), of_delays[:, ::-1].T[:, None].astype(kernel.dtype)


def _is_smooth(size: int) -> bool:
    """Whether a number has no prime factors above 5: the sizes at which Fourier transforms are fast."""
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    return size == 1


causal_depthwise_convolution.defvjp(_depthwise_forward, _depthwise_backward)


class CausalDepthwiseConvolution(nn.Module):
    """Depthwise convolution without bias that sees the past alone; parameter ``kernel`` is ``[width, 1, channels]``."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "batch frames channels"]) -> Float[Array, "batch frames channels"]:
        initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", initializer, (self.width, 1, inputs.shape[-1]))
        return causal_depthwise_convolution(inputs.astype(self.dtype), kernel.astype(self.dtype))


def pointwise_convolution(features: int, *, name: str, dtype: DTypeLike) -> Linear:
    """A convolution of width 1 without bias: a matrix product at every frame."""
    initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    return Linear(features, use_bias=False, dtype=dtype, kernel_init=initializer, name=name)


def strided_convolution(
    features: int, width: int, stride: int, padding: int, *, name: str, dtype: DTypeLike
) -> nn.Conv:
    """A convolution over frames with ``padding`` zeros on both sides; kernel ``[width, inputs, features]``."""
    initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

    def bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        bound = (features / 2 * width) ** -0.5  # features are twice the inputs: a gated linear unit follows
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Conv(
        features,
        (width,),
        (stride,),
        padding=padding,
        dtype=dtype,
        kernel_init=initializer,
        bias_init=bias,
        name=name,
    )
