"""Activations stay sharded by row of the batch."""

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

#: Mesh axes that the rows of a batch are spread over.
BATCH_AXES = ("data", "fsdp")


def shard_batch(activations: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
    """Keep the rows of ``activations`` where they are, and everything else whole.

    Without it the partitioner may gather the global batch where parameters are sharded. Outside of a mesh with the
    batch axes this is the identity.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return activations
    return jax.lax.with_sharding_constraint(activations, P(BATCH_AXES))
