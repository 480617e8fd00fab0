"""Activations stay sharded by row of the batch."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped

#: Mesh axes that the rows of a batch are spread over.
BATCH_AXES = ("data", "fsdp")


def shard_batch(activations: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
    """Keep the rows of ``activations`` where they are, and everything else whole.

    Without it the partitioner may gather the global batch where parameters are sharded. Outside of a mesh with the
    batch axes this is the identity.
    """
    return activations if _shards() == 1 else jax.lax.with_sharding_constraint(activations, P(BATCH_AXES))


def map_rows(function: Callable[..., PyTree], *arrays: Shaped[Array, "batch ..."]) -> PyTree:
    """``function(*arrays)``, each device computing it for its own rows alone.

    For what treats every row by itself but which the partitioner cannot cut: it gathers the global batch for a Fourier
    transform on the CPU, for instance. Rows that the devices cannot share equally are not cut.
    """
    if _shards() == 1 or arrays[0].shape[0] % _shards():
        return function(*arrays)
    return jax.shard_map(function, in_specs=P(BATCH_AXES), out_specs=P(BATCH_AXES), check_vma=False)(*arrays)


def _shards() -> int:
    """Into how many parts the mesh that is set cuts a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return 1
    return math.prod(mesh.shape[name] for name in BATCH_AXES)
