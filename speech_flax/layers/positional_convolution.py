"""The convolution that tells the Transformer of HuBERT where a frame is (Mohamed et al. 2019; Baevski et al. 2020)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from speech_flax.configuration import HubertConfig
from speech_flax.kernels.platforms import for_platform
from speech_flax.kernels.products import biased
from speech_flax.layers.feed_forward import activation
from speech_flax.layers.sharding import sum_over_rows

#: Frames that :func:`_convolution_by_products` and :func:`_kernel_gradient` take at once.
_BLOCK = 8


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def grouped_convolution(
    inputs: Float[Array, "batch frames channels"],
    kernel: Float[Array, "width group_channels channels"],
    groups: int,
    left: int,
) -> Float[Array, "batch frames channels"]:
    """``output[t] = sum over k of inputs[t + k - left] @ kernel[k]`` within each of ``groups`` groups of channels.

    Frames outside of the input are zero. The gradient is written out: what XLA derives for a grouped kernel takes
    fifteen times as long as the operation on the CPU, and two minutes to compile for TPUs.
    """
    padding = [(left, kernel.shape[0] - 1 - left)]
    convolve = partial(
        lax.conv_general_dilated, window_strides=(1,), padding=padding, dimension_numbers=("NWC", "WIO", "NWC")
    )

    def one_by_one(inputs: Array, kernel: Array) -> Array:
        pairs = zip(jnp.split(inputs, groups, -1), jnp.split(kernel, groups, -1), strict=True)
        return jnp.concatenate([convolve(*pair) for pair in pairs], axis=-1)

    # XLA:CPU takes up to forty times as long for inputs shorter than the kernel.
    short = inputs.shape[1] < kernel.shape[0]
    on_cpu = partial(_convolution_by_products, groups=groups, left=left) if short else one_by_one
    together = partial(convolve, feature_group_count=groups)
    return for_platform(inputs, kernel, cpu=on_cpu, default=together)


def _convolution_by_products(inputs: Array, kernel: Array, *, groups: int, left: int) -> Array:
    """One matrix product per group, of windows of a few frames with all parts of the kernel that see them.

    A frame of the output is the sum of what every part of the kernel found at its distance.
    """
    (batch, frames, channels), (width, group_channels, _) = inputs.shape, kernel.shape
    parts = -(-width // _BLOCK)
    starts = frames + (parts - 1) * _BLOCK
    inputs = jnp.pad(inputs, ((0, 0), (left, starts + _BLOCK - 1 - frames - left), (0, 0)))
    kernel = jnp.pad(kernel, ((0, parts * _BLOCK - width), (0, 0), (0, 0)))
    of_groups = jnp.moveaxis(inputs.reshape(batch, -1, groups, group_channels), 2, 0)
    kernels = kernel.reshape(parts, _BLOCK * group_channels, groups, group_channels).transpose(2, 1, 0, 3)

    def of_group(pair: tuple[Array, Array]) -> Array:
        seen, kernel = pair
        windows = jnp.concatenate([seen[:, shift : shift + starts] for shift in range(_BLOCK)], axis=-1)
        found = windows.reshape(batch * starts, -1) @ kernel.reshape(windows.shape[-1], -1)
        found = found.reshape(batch, starts, parts, group_channels)
        return sum(found[:, part * _BLOCK : part * _BLOCK + frames, part] for part in range(parts))

    return jnp.moveaxis(lax.map(of_group, (of_groups, kernels)), 0, 2).reshape(batch, frames, channels)


def _forward(inputs: Array, kernel: Array, groups: int, left: int) -> tuple[Array, tuple[Array, Array]]:
    return grouped_convolution(inputs, kernel, groups, left), (inputs, kernel)


def _backward(groups: int, left: int, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    inputs, kernel = residuals
    width, group_channels, _ = kernel.shape
    swapped = kernel[::-1].reshape(width, group_channels, groups, group_channels).swapaxes(1, 3)
    of_inputs = grouped_convolution(cotangent, swapped.reshape(kernel.shape), groups, width - 1 - left)
    of_kernel = sum_over_rows(partial(_kernel_gradient, groups=groups, width=width, left=left), inputs, cotangent)
    return of_inputs, of_kernel.astype(kernel.dtype)


def _kernel_gradient(
    inputs: Float[Array, "batch frames channels"],
    cotangent: Float[Array, "batch frames channels"],
    groups: int,
    width: int,
    left: int,
) -> Float[Array, "width group_channels channels"]:
    """``sum over t of outer(inputs[t + k - left], cotangent[t])``: one matrix product per group.

    Blocks of frames of the cotangent meet all frames that any of their frames sees; the sum over a block follows the
    diagonals of that product.
    """
    batch, frames, channels = inputs.shape
    blocks = -(-frames // _BLOCK)
    window = -(-(width + _BLOCK - 1) // _BLOCK)  # blocks that a block sees
    right = (blocks + window - 1) * _BLOCK - frames - left

    def by_group(frames_of_channels: Array) -> Array:
        return jnp.moveaxis(frames_of_channels.reshape(batch, -1, _BLOCK, groups, channels // groups), 3, 0)

    seen = by_group(jnp.pad(inputs, ((0, 0), (left, right), (0, 0))))
    sent = by_group(jnp.pad(cotangent, ((0, 0), (0, blocks * _BLOCK - frames), (0, 0))))

    def of_group(pair: tuple[Array, Array]) -> Array:
        seen, sent = pair
        windows = jnp.stack([seen[:, shift : shift + blocks] for shift in range(window)], axis=2)
        product = jnp.einsum("bnwpc,bnqd->wpcqd", windows, sent, preferred_element_type=jnp.float32)
        product = product.reshape(window * _BLOCK, *product.shape[2:])
        return sum(product[frame : frame + width, :, frame] for frame in range(_BLOCK))

    gradient = lax.map(of_group, (seen, sent))
    return gradient.transpose(1, 2, 0, 3).reshape(width, channels // groups, channels)


grouped_convolution.defvjp(_forward, _backward)


class PositionalConvolution(nn.Module):
    """The grouped convolution, ``config.num_conv_pos_embeddings`` frames wide, with weight norm (Salimans and Kingma
    2016): ``kernel[k] = weight_g[k] * weight_v[k] / norm(weight_v[k])``."""

    config: HubertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "batch frames channels"]) -> Float[Array, "batch frames channels"]:
        config = self.config
        width, groups, channels = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups, inputs.shape[-1]
        shape = (width, channels // groups, channels)
        if config.conv_pos_batch_norm:
            kernel = self.param("kernel", nn.initializers.variance_scaling(2.0, "fan_in", "normal"), shape)
        else:
            # As in Transformers and fairseq, where the initialisation that was meant has no effect on the weight norm.
            direction = self.param("weight_v", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), shape)
            norm = jnp.sqrt(jnp.square(direction).sum((1, 2)))
            scale = self.param("weight_g", lambda _: norm)
            kernel = direction * (scale / norm)[:, None, None]
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        inputs, kernel = inputs.astype(self.dtype), kernel.astype(self.dtype)
        return biased(grouped_convolution(inputs, kernel, groups, width // 2), bias)


class FrozenBatchNorm(nn.Module):
    """Batch norm with the stored statistics, in training too: they are no parameters, and get no gradient."""

    @nn.compact
    def __call__(self, inputs: Float[Array, "batch frames channels"]) -> Float[Array, "batch frames channels"]:
        shape = (inputs.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = lax.stop_gradient(self.param("mean", nn.initializers.zeros, shape))
        variance = lax.stop_gradient(self.param("var", nn.initializers.ones, shape))
        normed = (inputs.astype(jnp.float32) - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
        return normed.astype(inputs.dtype)


class PositionalEmbedding(nn.Module):
    """What is added to the frames to say where they are: ``[batch, frames, hidden]`` to the same shape.

    Padded frames are to be zero, so that they do not reach the others. Batch norm makes them something else; the
    corrected behaviour zeroes them again.
    """

    config: HubertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, hidden_states: Float[Array, "batch frames hidden"], mask: Bool[Array, "batch frames"]
    ) -> Float[Array, "batch frames hidden"]:
        config = self.config
        if config.conv_pos_batch_norm:
            hidden_states = FrozenBatchNorm(name="batch_norm")(hidden_states)
            if config.compatibility == "corrected":
                hidden_states = jnp.where(mask[:, :, None], hidden_states, 0)
        hidden_states = PositionalConvolution(config, self.dtype, name="conv")(hidden_states)
        return activation(config.feat_extract_activation)(hidden_states)
