"""The convolutions with which HuBERT reads a waveform (Schneider et al. 2019; Baevski et al. 2020, section 2)."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from speech_flax.configuration import HubertConfig
from speech_flax.layers.feed_forward import activation
from speech_flax.layers.normalization import InstanceNorm, LayerNorm
from speech_flax.layers.platform import by_platform
from speech_flax.layers.sharding import shard_batch


def valid_convolution(
    inputs: Float[Array, "batch frames inputs"], kernel: Float[Array, "width inputs outputs"], stride: int
) -> Float[Array, "batch shorter outputs"]:
    """``output[t] = sum over k of inputs[stride * t + k] @ kernel[k]``, without padding.

    A waveform, with its single channel, is read in blocks of ``stride`` samples everywhere; on the CPU all inputs are.
    """
    by_blocks = partial(_convolution_by_blocks, stride=stride)
    if inputs.shape[-1] == 1:
        return by_blocks(inputs, kernel)
    return by_platform(cpu=by_blocks, default=partial(_direct_convolution, stride=stride))(inputs, kernel)


def _direct_convolution(inputs: Array, kernel: Array, *, stride: int) -> Array:
    return lax.conv_general_dilated(inputs, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))


def _convolution_by_blocks(inputs: Array, kernel: Array, *, stride: int) -> Array:
    """One matrix product for every ``stride`` taps of the kernel, with ``stride`` frames as one vector."""
    (batch, frames, channels), width = inputs.shape, kernel.shape[0]
    outputs = (frames - width) // stride + 1
    tap_blocks = -(-width // stride)
    wanted = (outputs + tap_blocks - 1) * stride
    inputs = jnp.pad(inputs[:, :wanted], ((0, 0), (0, max(0, wanted - frames)), (0, 0)))
    blocks = inputs.reshape(batch, -1, stride * channels)
    windows, taps = [], []
    for index in range(tap_blocks):
        block = kernel[index * stride : (index + 1) * stride].reshape(-1, kernel.shape[-1])
        windows.append(blocks[:, index : index + outputs, : len(block)])
        taps.append(block)
    if channels == 1:  # so narrow that one product of the windows side by side is faster
        return jnp.concatenate(windows, axis=-1) @ jnp.concatenate(taps)
    return sum(window @ block for window, block in zip(windows, taps, strict=True))


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
            outputs = outputs + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
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
