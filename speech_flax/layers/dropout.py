"""Dropout of activations."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from speech_flax.kernels.dropout import head_seeds, kept


class Dropout(nn.Module):
    """Zeros instead of a share ``rate`` of the inputs, and the others scaled up (Srivastava et al. 2014).

    Which are dropped is a hash of row, frame and channel with a key of the stream ``dropout``, as it is for attention
    probabilities: the same on every mesh, and a tenth of the integer operations of JAX's generator, which on TPUs
    took as long as the matrix products that it followed.
    """

    rate: float

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch frames features"], deterministic: bool
    ) -> Float[Array, "batch frames features"]:
        if self.rate == 0 or deterministic:
            return inputs
        batch, frames, features = inputs.shape
        seeds = head_seeds(self.make_rng("dropout"), batch, 1)[:, 0]
        frame, channel = (jnp.arange(size, dtype=jnp.int32) for size in (frames, features))
        mask = kept(seeds, frame[:, None], channel[None], self.rate)
        return jnp.where(mask, inputs / (1 - self.rate), 0)
