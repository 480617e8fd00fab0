"""The device mesh, and where every parameter lives on it.

Activations are sharded by row of the batch over ``data`` and ``fsdp``; parameters and optimizer state over ``fsdp`` and
``tensor`` as the table of :mod:`speech_flax.layers.sharding` says.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from speech_flax.layers.sharding import BATCH_AXES, ShardingError, parameter_spec
from speech_flax.training.experiment import MeshSettings


def make_mesh(settings: MeshSettings, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices with axes ``data``, ``fsdp`` and ``tensor``.

    Raises:
        ShardingError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": settings.data, "fsdp": settings.fsdp, "tensor": settings.tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ShardingError(f"mesh sizes must be positive, and at most one -1; they are {sizes}")
    taken, present = math.prod(size for size in sizes.values() if size != -1), len(devices)
    if present % taken or (not free and taken != present):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        fsdp = math.gcd(max(1, settings.fsdp), present)
        raise ShardingError(
            f"mesh {shape} does not fit {present} device(s): the sizes must multiply to {present}, where -1 takes the "
            f"rest; --mesh.data -1 --mesh.fsdp {fsdp} --mesh.tensor 1 would fit"
        )
    if free:
        sizes[free[0]] = present // taken
    shape, names, types = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    except NotImplementedError:  # fsdp 16 on 8 x 8 chips, say: no axes of the network make up that of the mesh
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), names, types)


def process_shard(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of every batch this process reads: (index, count).

    Raises:
        ShardingError: when processes would have to read the same rows, or unequal numbers of them.
    """
    blocks = mesh.devices.reshape(batch_divisor(mesh), -1)
    owners = [{device.process_index for device in block} for block in blocks]
    if any(len(owner) > 1 for owner in owners):
        local = len(mesh.local_devices)
        raise ShardingError(
            f"mesh.tensor = {mesh.shape['tensor']} spreads a layer over several hosts, of {local} devices each; "
            f"choose a divisor of {local}"
        )
    order = list(dict.fromkeys(owner.pop() for owner in owners))
    return order.index(jax.process_index()), len(order)


def batch_divisor(mesh: Mesh) -> int:
    """Number of shards that a batch is cut into: its rows must be a multiple of it."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ``data`` and ``fsdp``, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def check_heads(mesh: Mesh | AbstractMesh, num_attention_heads: int) -> None:
    """Every shard of a layer computes whole attention heads.

    Raises:
        ShardingError: when ``mesh.tensor`` does not divide their number.
    """
    tensor = mesh.shape["tensor"]
    if num_attention_heads % tensor:
        raise ShardingError(
            f"mesh.tensor = {tensor} does not divide the model's {num_attention_heads} attention heads; "
            f"choose {_choices(num_attention_heads, mesh)}"
        )


def _choices(size: int, mesh: Mesh | AbstractMesh) -> str:
    """The sizes of an axis that divide both a width and the number of devices, as a list for people."""
    shared = math.gcd(size, mesh.size)
    divisors = [str(number) for number in range(1, shared + 1) if shared % number == 0]
    return " or ".join(filter(None, (", ".join(divisors[:-1]), divisors[-1])))


def _key(entry: jax.tree_util.KeyEntry) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def state_shardings(state: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Shardings of a training state: parameters by the table, moments as their parameter, the rest replicated.

    Raises:
        ShardingError: when a dimension is not divisible by the mesh axis that shards it.
    """

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [_key(entry) for entry in path]
        owner = next((i for i, name in enumerate(names) if name in ("params", "mu", "nu")), None)
        if owner is None:
            return NamedSharding(mesh, P())
        name = "/".join(names[owner + 1 :])
        spec = parameter_spec(name)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ShardingError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide the width {size} of {name}; "
                    f"choose {_choices(size, mesh)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays over all devices from the rows that this process holds."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
