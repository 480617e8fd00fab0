"""Matrix products: with weights and biases, whose gradients are fast and exact, and of blocks inside kernels."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from speech_flax.kernels.platforms import for_platform

#: Contracted dimensions of ``a @ b``, ``a @ b.T`` and ``a.T @ b``.
PLAIN, OF_ROWS, OF_COLUMNS = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@jax.custom_vjp
def weighted(
    inputs: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """``inputs @ kernel``.

    The gradient of the weights, which sums over rows and frames, is :func:`kernel_gradient` on the CPU.
    """
    return lax.dot_general(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ())))


def _forward(inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # Not by name: rematerialisation that keeps products looks for them.
    return lax.dot_general(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ()))), (inputs, kernel)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    inputs, kernel = residuals
    of_inputs = lax.dot_general(cotangent, kernel, (((cotangent.ndim - 1,), (1,)), ((), ())))
    return of_inputs, for_platform(inputs, cotangent, cpu=kernel_gradient, default=_over_rows_and_frames)


def kernel_gradient(
    inputs: Float[Array, "*batch inputs"], cotangent: Float[Array, "*batch outputs"]
) -> Float[Array, "inputs outputs"]:
    """Sum of the outer products, for XLA:CPU.

    It sums over several axes by way of copies, at two thirds of the speed: rows and frames are one axis here. And it
    sums over the first axis of both operands at as little as half the speed: the inputs are transposed before.
    """
    inputs, cotangent = (states.reshape(-1, states.shape[-1]) for states in (inputs, cotangent))
    return lax.dot_general(lax.optimization_barrier(inputs.T), cotangent, PLAIN)  # without, it would undo that


def _over_rows_and_frames(inputs: Array, cotangent: Array) -> Array:
    leading = tuple(range(inputs.ndim - 1))
    return lax.dot_general(cotangent, inputs, ((leading, leading), ((), ()))).T


weighted.defvjp(_forward, _backward)


def biased(outputs: Float[Array, "*batch features"], bias: Float[Array, "features"]) -> Float[Array, "*batch features"]:
    """``outputs + bias`` in the type of ``outputs``, but added in float32.

    So is what is added up for the gradient of ``bias``, over all rows and frames: in bfloat16 it would be wrong by
    percents.
    """
    return (outputs.astype(jnp.float32) + bias.astype(jnp.float32)).astype(outputs.dtype)


def multiply(left: Array, right: Array, dimensions: tuple = PLAIN) -> Float[Array, "rows columns"]:
    """Product with float32 sums; operands of float32 are not rounded."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
