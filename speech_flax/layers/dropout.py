"""Dropout of activations."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from speech_flax.kernels.dropout import head_seeds, kept


class Dropout(nn.Module):
    """Zeros instead of a share ``rate`` of the inputs, and the others scaled up (Srivastava et al. 2014).

    Which are dropped is a hash of row, frame and channel with a key of the stream ``dropout``, as it is for attention
    probabilities: the same on every mesh, in far fewer integer operations than JAX's generator takes, which on TPUs
    cost time comparable to that of the matrix products before it.
    """

    rate: float

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch frames features"], deterministic: bool
    ) -> Float[Array, "batch frames features"]:
        if self.rate == 0 or deterministic:
            return inputs
        if self.rate == 1:
            return jnp.zeros_like(inputs)
        batch, frames, features = inputs.shape
        seeds = head_seeds(self.make_rng("dropout"), batch, 1)[:, 0]
        frame, channel = (jnp.arange(size, dtype=jnp.int32) for size in (frames, features))
        mask = kept(seeds, frame[:, None], channel[None], self.rate)
        return jnp.where(mask, inputs / (1 - self.rate), 0)
