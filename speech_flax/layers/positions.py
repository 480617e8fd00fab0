"""Tables of positions: sinusoids of distances, rotations of states."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def relative_sinusoids(num_frames: int, features: int) -> Float[np.ndarray, "distances features"]:
    """Sinusoids of the distances ``num_frames - 1`` down to ``1 - num_frames``, sines and cosines interleaved."""
    distances = np.arange(num_frames - 1, -num_frames, -1, dtype=np.float32)
    rates = np.exp(np.arange(0, features, 2, dtype=np.float32) * np.float32(-(np.log(10000.0) / features)))
    angles = distances[:, None] * rates
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(distances), -1)[:, :features]


def rotate(
    hidden_states: Float[Array, "batch frames hidden"], num_heads: int, base: float | int
) -> Float[Array, "batch frames hidden"]:
    """Rotary positions on hidden states, per head (Su et al. 2021, section 3.2.2, halves instead of pairs)."""
    batch, frames, hidden = hidden_states.shape
    head_size = hidden // num_heads
    rates = 1.0 / base ** (np.arange(0, head_size, 2, dtype=np.float32) / head_size)
    angles = np.concatenate([np.arange(frames, dtype=np.float32)[:, None] * rates] * 2, axis=-1)[:, None]
    heads = hidden_states.reshape(batch, frames, num_heads, head_size)
    first, second = jnp.split(heads, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cosine, sine = (jnp.asarray(table, hidden_states.dtype) for table in (np.cos(angles), np.sin(angles)))
    return (heads * cosine + turned * sine).reshape(batch, frames, hidden)
