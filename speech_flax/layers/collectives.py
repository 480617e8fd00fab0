"""What the devices of a mesh axis have together: whole arrays from their parts, and sums of which each keeps a part."""

import os

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

#: Beyond that, all devices send to all others along a line that is too long.
_MOST_DEVICES = 32
#: Chips with cores beside that for matrices ("SparseCores") that can move and sum arrays meanwhile.
_HELPED = "TPU v6"
_LIGHT = ("TPU v5 lite", "TPU v5e")
#: Devices of a slice beyond which these cannot exchange arrays beside other work, but scatter sums by themselves.
_MOST_LIGHT = 16
#: TPUs that do other work while they gather; all others wait.
_GATHERING = (_HELPED, *_LIGHT)
#: What compilers have to be told so that communication goes on beside other work, by kind of device.
_OPTIONS = {
    _HELPED: {
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
        "xla_tpu_use_tc_device_shape_on_sc": True,
        "xla_sc_disable_megacore_partitioning": True,
    },
    "TPU": {"xla_tpu_enable_async_all_to_all": True},
}


def compiler_options(device_kind: str, devices: int) -> dict[str, bool]:
    """Options with which a program of ``devices`` of ``device_kind`` (as in ``TPU v6 lite``) communicates beside its
    other work.

    Left out are those that the environment's ``LIBTPU_INIT_ARGS`` gives, whatever their value.
    """
    if device_kind.startswith(_LIGHT) and devices > _MOST_LIGHT:
        return {}
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    options = next((options for kind, options in _OPTIONS.items() if device_kind.startswith(kind)), {})
    return {name: value for name, value in options.items() if name not in given}


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None else device.device_kind


def _scatters_sums() -> bool:
    """Whether the devices have a good ``lax.psum_scatter``."""
    light = _device_kind().startswith(_LIGHT) and jax.sharding.get_abstract_mesh().size > _MOST_LIGHT
    return light or _device_kind().startswith(_HELPED)


def gather(part: Float[Array, "own_rows own_columns"], axis_name: str, dimension: int) -> Float[Array, "rows columns"]:
    """The parts of all devices of ``axis_name``, side by side along ``dimension``.

    To be called where ``axis_name`` is manual, as in ``shard_map``. It is ``lax.all_gather``, but on TPUs that wait for
    it, as v4 and v5p do: there every device sends its part to all others, and other work goes on meanwhile.
    """
    waits = _device_kind().startswith("TPU") and not _device_kind().startswith(_GATHERING)
    if not waits or lax.axis_size(axis_name) > _MOST_DEVICES:
        return lax.all_gather(part, axis_name, axis=dimension, tiled=True)
    copies = jnp.broadcast_to(part, (lax.axis_size(axis_name), *part.shape)).reshape(-1, part.shape[1])
    return lax.all_to_all(copies, axis_name, 0, dimension, tiled=True)


def sum_scatter(
    terms: Float[Array, "rows columns"], axis_name: str, dimension: int
) -> Float[Array, "own_rows own_columns"]:
    """The sum of ``terms`` over the devices of ``axis_name``, cut along ``dimension``: device ``i`` gets part ``i``.

    To be called where ``axis_name`` is manual, as in ``shard_map``. Every device sends all others their parts, and adds
    up what it gets, in the type of ``terms``. The SparseCores of TPU v6e and larger slices of v5e do better by
    ``lax.psum_scatter``; elsewhere that is an all-reduce of the whole, which moves twice as much and is waited for.

    Args:
      terms: Each device's own; the size of ``dimension`` is a multiple of the number of devices.
    """
    devices = lax.axis_size(axis_name)
    with jax.named_scope("sum_scatter"):
        if _scatters_sums() or devices > _MOST_DEVICES:
            return lax.psum_scatter(terms, axis_name, scatter_dimension=dimension, tiled=True)
        parts = lax.all_to_all(terms, axis_name, dimension, 0, tiled=True)
        return parts.reshape(devices, -1, parts.shape[-1]).sum(0)
