"""Matrix products: with weights, whose gradient is fast on the CPU too, and of blocks inside kernels."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from speech_flax.kernels.platforms import for_platform


@jax.custom_vjp
def weighted(
    inputs: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """``inputs @ kernel``.

    XLA:CPU sums over several axes at once, as the gradient of the weights does over rows and frames, by way of copies
    with the axes swapped, at two thirds of the speed. Here they are one axis by then.
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
    """Sum of the outer products, with rows and frames as one axis."""
    return _over_rows_and_frames(*(states.reshape(-1, states.shape[-1]) for states in (inputs, cotangent)))


def _over_rows_and_frames(inputs: Array, cotangent: Array) -> Array:
    leading = tuple(range(inputs.ndim - 1))
    return lax.dot_general(cotangent, inputs, ((leading, leading), ((), ()))).T


weighted.defvjp(_forward, _backward)

#: Contracted dimensions of ``a @ b``, ``a @ b.T`` and ``a.T @ b``.
PLAIN, OF_ROWS, OF_COLUMNS = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def multiply(left: Array, right: Array, dimensions: tuple = PLAIN) -> Float[Array, "rows columns"]:
    """Product with float32 sums; operands of float32 are not rounded."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
