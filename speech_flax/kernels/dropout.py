"""Dropout of attention probabilities that every formulation of attention can recompute.

Whether a probability is kept is a hash of the head's seed, the query and the key, in 32-bit integer operations that
every processor has. So the mask is the same forward and backward, in kernels and in plain JAX, for any block size and
any sharding, and it is never stored.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Key, Shaped

_GOLDEN = -1640531527  # 2**32 divided by the golden ratio, as a signed integer
_MULTIPLIERS = (2146121005, -2073254261)  # of the 32-bit mixer "lowbias32" (Wellons 2018)


def mix(values: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """A bijection of 32-bit integers in which every input bit flips every output bit with probability close to 1/2."""
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        values = (values ^ lax.shift_right_logical(values, jnp.int32(shift))) * jnp.int32(multiplier)
    return values ^ lax.shift_right_logical(values, jnp.int32(16))


def head_seeds(key: Key[Array, ""] | Shaped[Array, "2"], batch: int, heads: int) -> Int[Array, "batch heads"]:
    """One seed for every head of every row of a batch."""
    seeds = jax.random.bits(key, (2,), jnp.uint32).astype(jnp.int32)
    rows = mix(seeds[0] + jnp.arange(batch, dtype=jnp.int32) * jnp.int32(_GOLDEN))[:, None]
    return mix(mix(rows ^ seeds[1]) + jnp.arange(heads, dtype=jnp.int32) * jnp.int32(_GOLDEN))


def kept(
    seeds: Int[Array, "*heads"],
    queries: Int[Array, "#rows #columns"],
    keys: Int[Array, "#rows #columns"],
    rate: float,
) -> Bool[Array, "*heads rows columns"]:
    """``True`` for the probabilities that dropout at ``rate`` keeps, of the given queries and keys (frame numbers).

    One of them runs along the rows, the other along the columns.
    """
    by_query = mix(seeds[..., None, None] + queries * jnp.int32(_GOLDEN))
    by_key = mix(keys * jnp.int32(_GOLDEN))
    threshold = min(round(rate * 2**32), 2**32 - 1) - 2**31
    return mix(by_query ^ by_key) >= jnp.int32(threshold)
