"""The convolutions with which HuBERT reads a waveform (Schneider et al. 2019; Baevski et al. 2020, section 2)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from speech_flax.configuration import HubertConfig
from speech_flax.kernels.platforms import for_platform
from speech_flax.kernels.products import biased, kernel_gradient, weighted
from speech_flax.layers.feed_forward import activation
from speech_flax.layers.normalization import InstanceNorm, LayerNorm
from speech_flax.layers.sharding import shard_batch


def valid_convolution(
    inputs: Float[Array, "batch frames inputs"], kernel: Float[Array, "width inputs outputs"], stride: int
) -> Float[Array, "batch shorter outputs"]:
    """``output[t] = sum over k of inputs[stride * t + k] @ kernel[k]``, without padding.

    A waveform, with its single channel, is read in blocks of ``stride`` samples. The gradient of other inputs is
    written out for the CPU, where what XLA derives for a convolution with a stride is several times slower.
    """
    if inputs.shape[-1] == 1:
        return _convolution_of_samples(inputs, kernel, stride)
    return _convolution(inputs, kernel, stride)


def _convolution_of_samples(inputs: Array, kernel: Array, stride: int) -> Array:
    width, _, features = kernel.shape

    def by_product(inputs: Array, kernel: Array) -> Array:
        """With the windows side by side."""
        return weighted(jnp.concatenate(_windows(inputs, width, stride), axis=-1), kernel.reshape(-1, features))

    def by_blocks(inputs: Array, kernel: Array) -> Array:
        return _plain_convolution(_in_blocks(inputs, width, stride), _kernel_in_blocks(kernel, stride), 1)

    return for_platform(inputs, kernel, cpu=by_product, default=by_blocks)


def _in_blocks(inputs: Array, width: int, stride: int) -> Array:
    """What windows see, ``stride`` frames as one vector: ``[batch, outputs + ceil(width / stride) - 1, ...]``."""
    batch, frames, channels = inputs.shape
    wanted = ((frames - width) // stride + -(-width // stride)) * stride
    inputs = jnp.pad(inputs[:, :wanted], ((0, 0), (0, max(0, wanted - frames)), (0, 0)))
    return inputs.reshape(batch, -1, stride * channels)


def _kernel_in_blocks(kernel: Array, stride: int) -> Array:
    """The kernel that goes over :func:`_in_blocks` without a stride."""
    width, channels, features = kernel.shape
    return jnp.pad(kernel, ((0, -width % stride), (0, 0), (0, 0))).reshape(-1, stride * channels, features)


def _windows(inputs: Array, width: int, stride: int) -> list[Array]:
    """What every output sees, ``stride`` frames as one vector: ``[batch, outputs, up to stride * channels]`` each."""
    blocks, parts = _in_blocks(inputs, width, stride), -(-width // stride)
    outputs = blocks.shape[1] - parts + 1
    sizes = [min(stride, width - part * stride) * inputs.shape[-1] for part in range(parts)]
    return [blocks[:, part : part + outputs, :size] for part, size in enumerate(sizes)]


def _plain_convolution(inputs: Array, kernel: Array, stride: int) -> Array:
    return lax.conv_general_dilated(inputs, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(inputs: Array, kernel: Array, stride: int) -> Array:
    return _plain_convolution(inputs, kernel, stride)


def _convolution_forward(inputs: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _plain_convolution(inputs, kernel, stride), (inputs, kernel)


def _convolution_backward(stride: int, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    by_products = partial(_gradients_by_products, stride=stride)
    derived = partial(_derived_gradients, stride=stride)
    return for_platform(*residuals, cotangent, cpu=by_products, default=derived)


_convolution.defvjp(_convolution_forward, _convolution_backward)


def _derived_gradients(inputs: Array, kernel: Array, cotangent: Array, *, stride: int) -> tuple[Array, Array]:
    return jax.vjp(partial(_plain_convolution, stride=stride), inputs, kernel)[1](cotangent)


def _gradients_by_products(inputs: Array, kernel: Array, cotangent: Array, *, stride: int) -> tuple[Array, Array]:
    """A product for each part of the windows, and its gradient; windows without zeros in place of taps."""
    (batch, frames, channels), (width, _, features) = inputs.shape, kernel.shape
    windows = _windows(inputs, width, stride)
    of_blocks, of_taps = jnp.zeros((), inputs.dtype), []
    for part, window in enumerate(windows):
        first, size = part * stride * channels, window.shape[-1]
        taps = kernel.reshape(-1, features)[first : first + size]
        of_window = lax.dot_general(cotangent, taps, (((2,), (1,)), ((), ())))
        of_blocks += jnp.pad(of_window, ((0, 0), (part, len(windows) - 1 - part), (0, stride * channels - size)))
        # Transposes the cotangent, once for all. XLA would undo that if it were to see the other transposition.
        of_taps.append(lax.optimization_barrier(kernel_gradient(cotangent, window)).T)
    of_inputs = of_blocks.reshape(batch, -1, channels)[:, :frames]
    of_inputs = jnp.pad(of_inputs, ((0, 0), (0, frames - of_inputs.shape[1]), (0, 0)))
    return of_inputs, jnp.concatenate(of_taps).reshape(kernel.shape)


class ValidConvolution(nn.Module):
    """:func:`valid_convolution` with parameters ``kernel`` ``[width, inputs, outputs]`` and, if wanted, ``bias``."""

    features: int
    width: int
    stride: int
    use_bias: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "batch frames inputs"]) -> Float[Array, "batch shorter outputs"]:
        initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", initializer, (self.width, inputs.shape[-1], self.features))
        outputs = valid_convolution(inputs.astype(self.dtype), kernel.astype(self.dtype), self.stride)
        if self.use_bias:
            outputs = biased(outputs, self.param("bias", nn.initializers.zeros, (self.features,)))
        return outputs


class ConvolutionLayer(nn.Module):
    """Convolution, norm, activation: layer ``index`` of the feature encoder.

    With ``feat_extract_norm`` ``"layer"`` every layer normalises the channels of each frame; with ``"group"`` the first
    normalises each channel over all frames, and the others have no norm. Both norms use an epsilon of 1e-5 whatever the
    configuration says, as the reference does.
    """

    config: HubertConfig
    index: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch frames inputs"], lengths: Int[Array, "batch"] | None
    ) -> Float[Array, "batch shorter outputs"]:
        config = self.config
        hidden = ValidConvolution(
            config.conv_dim[self.index],
            config.conv_kernel[self.index],
            config.conv_stride[self.index],
            config.conv_bias,
            self.dtype,
            name="conv",
        )(inputs)
        if config.feat_extract_norm == "layer":
            hidden = LayerNorm(1e-5, self.dtype, name="layer_norm")(hidden)
        elif self.index == 0:
            hidden = InstanceNorm(1e-5, self.dtype, name="layer_norm")(hidden, lengths)
        return activation(config.feat_extract_activation)(hidden)


class FeatureEncoder(nn.Module):
    """Waveforms ``[batch, samples]`` to features ``[batch, frames, config.conv_dim[-1]]``.

    Frames are as many as :func:`~speech_flax.layers.masks.convolution_output_lengths` says. Without padding in the
    convolutions, a frame inside of an utterance sees nothing outside of it; only group norm does, over whose frames
    ``first_lengths`` (frames of the first layer per row; all by default) restricts the statistics.

    Raises:
      ValueError: the waveforms are too short for a single frame.
    """

    config: HubertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, waveforms: Float[Array, "batch samples"], first_lengths: Int[Array, "batch"] | None = None
    ) -> Float[Array, "batch frames channels"]:
        config = self.config
        hidden = shard_batch(waveforms.astype(self.dtype)[:, :, None])
        for index in range(config.num_feat_extract_layers):
            if hidden.shape[1] < config.conv_kernel[index]:
                raise ValueError(f"waveforms of {waveforms.shape[1]} samples are too short for one frame; pad them")
            layer = ConvolutionLayer(config, index, self.dtype, name=f"conv_layers_{index}")
            hidden = shard_batch(layer(hidden, first_lengths))
        return hidden
