"""Linear layers, activations and the feed-forward block."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from speech_flax.kernels.platforms import for_platform
from speech_flax.layers.dropout import Dropout
from speech_flax.layers.linear import linear


@jax.custom_vjp
def gelu(inputs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x`` times the probability that a standard normal variable is below it (Hendrycks and Gimpel 2016).

    The backward pass computes the error function again: that costs less than storing it, and than the complementary one
    that ``jax.nn.gelu`` takes.
    """
    return inputs * _normal_distribution(inputs).astype(inputs.dtype)


def _normal_distribution(inputs: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(inputs.astype(jnp.float32) * np.float32(0.5**0.5))


def _gelu_forward(inputs: Array) -> tuple[Array, Array]:
    return gelu(inputs), inputs


def _gelu_backward(inputs: Array, cotangent: Array) -> tuple[Array]:
    values = inputs.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(values)) * np.float32((2 * np.pi) ** -0.5)
    return (cotangent * (_normal_distribution(inputs) + values * density).astype(cotangent.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def silu(inputs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x`` times its sigmoid (Elfwing et al. 2018), also called swish.

    The backward pass computes the sigmoid again.
    """
    values = inputs.astype(jnp.float32)
    return (values * _sigmoid(values)).astype(inputs.dtype)


def _sigmoid(values: Array) -> Array:
    """In float32; on TPUs, where the hyperbolic tangent is a single instruction, by that: to 1e-7."""
    return for_platform(values, default=jax.nn.sigmoid, tpu=lambda values: 0.5 + 0.5 * jnp.tanh(0.5 * values))


def _silu_forward(inputs: Array) -> tuple[Array, Array]:
    return silu(inputs), inputs


def _silu_backward(inputs: Array, cotangent: Array) -> tuple[Array]:
    values = inputs.astype(jnp.float32)
    sigmoid = _sigmoid(values)
    return ((cotangent.astype(jnp.float32) * sigmoid * (1 + values * (1 - sigmoid))).astype(cotangent.dtype),)


silu.defvjp(_silu_forward, _silu_backward)

#: Activations by the names of Transformers. ``gelu`` is the exact one.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": silu,
    "swish": silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation of that name.

    Raises:
      ValueError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"there is no activation {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gated_linear_unit(inputs: Float[Array, "*batch doubled"]) -> Float[Array, "*batch features"]:
    """First half of the channels, gated by the sigmoid of the second (Dauphin et al. 2017)."""
    values, gates = jnp.split(inputs, 2, axis=-1)
    return values * jax.nn.sigmoid(gates)


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear, dropout: ``[batch, frames, features]`` to the same shape."""

    intermediate_size: int
    hidden_act: str
    activation_dropout: float
    hidden_dropout: float
    initializer_range: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, hidden_states: Float[Array, "batch frames features"], deterministic: bool
    ) -> Float[Array, "batch frames features"]:
        dense = partial(linear, dtype=self.dtype, initializer_range=self.initializer_range)
        hidden = dense(self.intermediate_size, name="intermediate_dense")(hidden_states)
        hidden = activation(self.hidden_act)(hidden)
        hidden = Dropout(self.activation_dropout)(hidden, deterministic)
        hidden = dense(hidden_states.shape[-1], name="output_dense")(hidden)
        return Dropout(self.hidden_dropout)(hidden, deterministic)
