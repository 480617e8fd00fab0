"""Sums over the devices of a mesh axis, of which every device keeps its own part."""

import os

import jax
from jax import lax
from jaxtyping import Array, Float

#: Each device makes as many steps less one; beyond that XLA's own operation is better than so long a program.
_LONGEST_RING = 32
#: Chips with cores beside that for matrices ("SparseCores") that can move and sum arrays meanwhile.
_HELPED = "TPU v6"
#: What their compiler has to be told for it.
_OFFLOADING = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
}


def compiler_options(device_kind: str) -> dict[str, bool]:
    """Options with which a program of ``device_kind`` (as in ``TPU v6 lite``) communicates beside its other work.

    None where the chips need no options, or where the environment's ``LIBTPU_INIT_ARGS`` says what SparseCores do.
    """
    told = "sparse_core" in os.environ.get("LIBTPU_INIT_ARGS", "")
    return {} if told or not device_kind.startswith(_HELPED) else dict(_OFFLOADING)


def _helped() -> bool:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.device_kind.startswith(_HELPED)


def sum_scatter(
    terms: Float[Array, "rows columns"], axis_name: str, dimension: int
) -> Float[Array, "own_rows own_columns"]:
    """The sum of ``terms`` over the devices of ``axis_name``, cut along ``dimension``: device ``i`` gets part ``i``.

    To be called where ``axis_name`` is manual, as in ``shard_map``. What a device holds goes once around a ring of
    neighbours, half of it in each direction, and every device adds its own term in the type of ``terms``. That is
    ``lax.psum_scatter`` written out, because the compilers for TPU v5e and v5p make that an all-reduce of the whole,
    which moves twice as much. On v6e it is left to the SparseCores (:func:`compiler_options`).

    Args:
      terms: Each device's own; the size of ``dimension`` is a multiple of the number of devices.
    """
    if _helped() or lax.axis_size(axis_name) > _LONGEST_RING:
        return lax.psum_scatter(terms, axis_name, scatter_dimension=dimension, tiled=True)
    other = 1 - dimension
    half = terms.shape[other] // 2
    halves = [lax.slice_in_dim(terms, 0, half, axis=other), lax.slice_in_dim(terms, half, None, axis=other)]
    sums = [_around(part, axis_name, dimension, direction) for part, direction in zip(halves, (1, -1), strict=True)]
    return lax.concatenate(sums, other)


def _around(terms: Array, axis_name: str, dimension: int, direction: int) -> Array:
    devices, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    width = terms.shape[dimension] // devices
    neighbours = [(device, (device + direction) % devices) for device in range(devices)]

    def part_of(device: Array) -> Array:
        return lax.dynamic_slice_in_dim(terms, device % devices * width, width, dimension)

    total = part_of(index - direction)
    for step in range(1, devices):
        total = lax.ppermute(total, axis_name, neighbours) + part_of(index - direction * (1 + step))
    return total
