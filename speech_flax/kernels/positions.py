"""Scores that attention adds for the distance between key and query.

They are computed as one score per query and distance, then skewed into one score per query and key: by padding and
reshaping, without a gather and without a tensor of ``[queries, keys, head size]``.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class RelativeKey(flax.struct.PyTreeNode):
    """Embeddings of clipped distances, added to the keys (Shaw et al. 2018, section 3.2, keys only).

    Attributes:
      embeddings: ``[distances, head_size]``, one for each distance of a key to its query, from ``-left`` on; distances
        beyond are clipped.
      left: Largest distance to the left.
    """

    embeddings: Any  # no array type: while JAX handles trees, their leaves may be anything
    left: int = flax.struct.field(pytree_node=False)

    def scores(
        self,
        query: Float[Array, "batch heads queries head_size"],
        first_query: int | Int[Array, ""],
        num_keys: int,
    ) -> Float[Array, "batch heads queries {num_keys}"]:
        """Scores of a block of queries, of which the first is frame ``first_query``, before scaling."""
        queries = query.shape[2]
        near = jnp.einsum("bhld,pd->bhlp", query, self.embeddings, preferred_element_type=jnp.float32)
        reach = num_keys + queries
        far_left = jnp.broadcast_to(near[..., :1], (*near.shape[:3], reach))
        far_right = jnp.broadcast_to(near[..., -1:], (*near.shape[:3], reach))
        every_distance = jnp.concatenate([far_left, near, far_right], axis=-1)
        start = num_keys + 1 + self.left - first_query
        return skew(lax.dynamic_slice_in_dim(every_distance, start, num_keys + queries - 1, axis=3), num_keys)


class Relative(flax.struct.PyTreeNode):
    """Projected sinusoids of distances, and biases of the queries (Dai et al. 2019, section 3.3).

    Attributes:
      projections: ``[distances, heads, head_size]``, one for each distance, from ``num_keys - 1`` (key far to the left)
        down to ``1 - num_keys``.
      content_bias: ``[heads, head_size]``, added to the query for the scores of content.
      position_bias: ``[heads, head_size]``, added to the query for the scores of positions.
    """

    projections: Any
    content_bias: Any
    position_bias: Any

    def scores(
        self,
        query: Float[Array, "batch heads queries head_size"],
        first_query: int | Int[Array, ""],
        num_keys: int,
    ) -> Float[Array, "batch heads queries {num_keys}"]:
        """Scores of a block of queries, of which the first is frame ``first_query``, before scaling."""
        queries = query.shape[2]
        padded = jnp.pad(self.projections, ((queries, queries), (0, 0), (0, 0)))  # blocks may end past the last key
        needed = lax.dynamic_slice_in_dim(padded, num_keys - first_query, num_keys + queries - 1, axis=0)
        located = query + self.position_bias[:, None]
        return skew(jnp.einsum("bhld,phd->bhlp", located, needed, preferred_element_type=jnp.float32), num_keys)


Positions = RelativeKey | Relative | None


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
