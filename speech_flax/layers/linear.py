"""Linear layers whose weights may be sharded over the devices that share a batch."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from speech_flax.kernels.products import biased, weighted
from speech_flax.layers.collectives import gather, sum_scatter
from speech_flax.layers.sharding import BATCH_AXES, batch_shards, parameter_spec


class Linear(nn.Module):
    """``inputs @ kernel + bias``: ``[..., inputs]`` to ``[..., features]``, computed in ``dtype``.

    Parameters are ``kernel`` ``[inputs, features]`` and, with ``use_bias``, ``bias`` ``[features]``, in float32.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        inputs = inputs.astype(self.dtype)
        shared = batch_shards("fsdp") > 1 and inputs.shape[0] % batch_shards() == 0
        axes = parameter_spec("/".join((*self.path, "kernel")))[-2:] if shared else ()
        if "fsdp" in axes:
            outputs = sharded_product(inputs, kernel, axes)
        else:
            outputs = weighted(inputs, kernel.astype(self.dtype))
        if self.use_bias:
            outputs = biased(outputs, self.param("bias", self.bias_init, (self.features,)))
        return outputs


def linear(features: int, *, name: str, dtype: DTypeLike, initializer_range: float, use_bias: bool = True) -> Linear:
    """A linear layer with normally distributed weights and zero bias."""
    initializer = nn.initializers.normal(initializer_range)
    return Linear(features, use_bias=use_bias, dtype=dtype, kernel_init=initializer, name=name)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sharded_product(
    inputs: Float[Array, "batch *rest inputs"], kernel: Float[Array, "inputs features"], axes: tuple[str | None, ...]
) -> Float[Array, "batch *rest features"]:
    """``inputs @ kernel`` where ``fsdp`` shards both the batch and one dimension of ``kernel``, as ``axes`` say.

    Every device gathers the kernel in the type of ``inputs``, in the backward pass again, and keeps of the kernel's
    gradient its own shard alone, summed over devices in float32. Left to itself the partitioner sums gradients whole,
    or multiplies with one shard after another while they pass by, which costs TPUs more in memory traffic than it hides
    in communication.
    """
    return inputs @ _whole(kernel, inputs.dtype, axes)


def _whole(kernel: Array, dtype: DTypeLike, axes: tuple[str | None, ...]) -> Array:
    shard = lax.with_sharding_constraint(kernel.astype(dtype), P(*axes))
    gathered = partial(gather, axis_name="fsdp", dimension=axes.index("fsdp"))
    own = P(*(axis if axis == "fsdp" else None for axis in axes))
    return jax.shard_map(gathered, in_specs=own, out_specs=P(), axis_names={"fsdp"}, check_vma=False)(shard)


def _product_forward(inputs: Array, kernel: Array, axes: tuple[str | None, ...]) -> tuple[Array, tuple[Array, Array]]:
    return inputs @ _whole(kernel, inputs.dtype, axes), (inputs, kernel)  # not by name: remat looks for products


def _product_backward(
    axes: tuple[str | None, ...], residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    inputs, kernel = residuals
    of_inputs = cotangent @ _whole(kernel, inputs.dtype, axes).T
    shard = tuple(axis if axis == "fsdp" else None for axis in axes)

    def of_own_rows(inputs: Array, cotangent: Array) -> Array:
        contracted = tuple(range(inputs.ndim - 1))
        whole = lax.dot_general(
            inputs, cotangent, ((contracted, contracted), ((), ())), preferred_element_type=jnp.float32
        )
        return lax.psum(sum_scatter(whole, "fsdp", shard.index("fsdp")), "data")

    of_kernel = jax.shard_map(
        of_own_rows,
        in_specs=P(BATCH_AXES),
        out_specs=P(*shard),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(inputs, cotangent)
    return of_inputs, of_kernel.astype(kernel.dtype)


sharded_product.defvjp(_product_forward, _product_backward)
