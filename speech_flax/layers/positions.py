"""Positions in attention: distances between keys and queries, sinusoids, rotations.

A term that depends on the distance between key and query is computed as one score per query and distance, then skewed
into one score per query and key: by padding and reshaping, without a gather and without a tensor of
``[queries, keys, head size]``.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


def skew(
    by_distance: Float[Array, "*heads queries distances"], num_keys: int
) -> Float[Array, "*heads queries {num_keys}"]:
    """Scores by key from scores by distance.

    Column ``c`` of query ``i`` holds the score of the key ``c - (queries - 1) + i`` places after the block's first
    query would see its first key; ``distances = num_keys + queries - 1``. Query ``i`` needs the columns
    ``queries - 1 - i`` to ``queries - 2 - i + num_keys``: adding a column and reading the rows one shorter moves each
    row by one more than the row above.
    """
    *heads, queries, distances = by_distance.shape
    flat = jnp.pad(by_distance, [(0, 0)] * (len(heads) + 1) + [(0, 1)]).reshape(*heads, queries * (distances + 1))
    rows = flat[..., queries - 1 : queries - 1 + queries * distances].reshape(*heads, queries, distances)
    return rows[..., :num_keys]


def relative_key_scores(
    query: Float[Array, "batch heads queries head_size"],
    distance_embedding: Float[Array, "distances head_size"],
    first_query: int | Int[Array, ""],
    num_keys: int,
    left: int,
) -> Float[Array, "batch heads queries {num_keys}"]:
    """Products of queries with the embedding of their distance to each key (Shaw et al. 2018, section 3.2, keys only).

    Args:
      query: A block of queries.
      distance_embedding: Embeddings of the distances ``-left`` to ``right``; those beyond are clipped.
      first_query: Frame of the block's first query.
      num_keys: Number of keys, which start at frame 0.
      left: Largest distance to the left.
    """
    queries = query.shape[2]
    near = jnp.einsum("bhld,pd->bhlp", query, distance_embedding)
    reach = num_keys + queries
    far_left = jnp.broadcast_to(near[..., :1], (*near.shape[:3], reach))
    far_right = jnp.broadcast_to(near[..., -1:], (*near.shape[:3], reach))
    every_distance = jnp.concatenate([far_left, near, far_right], axis=-1)
    start = num_keys + 1 + left - first_query
    return skew(lax.dynamic_slice_in_dim(every_distance, start, num_keys + queries - 1, axis=3), num_keys)


def relative_scores(
    query: Float[Array, "batch heads queries head_size"],
    positions: Float[Array, "distances heads head_size"],
    first_query: int | Int[Array, ""],
    num_keys: int,
) -> Float[Array, "batch heads queries {num_keys}"]:
    """Products of queries with projected sinusoids of their distance to each key (Dai et al. 2019, section 3.3).

    ``positions`` holds the distances ``num_keys - 1`` (key far to the left) to ``1 - num_keys``.
    """
    queries = query.shape[2]
    padded = jnp.pad(positions, ((queries, queries), (0, 0), (0, 0)))  # blocks may reach past the last key
    needed = lax.dynamic_slice_in_dim(padded, num_keys - first_query, num_keys + queries - 1, axis=0)
    return skew(jnp.einsum("bhld,phd->bhlp", query, needed), num_keys)


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
