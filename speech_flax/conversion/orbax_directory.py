"""Parameters as an orbax checkpoint: ``config.json`` and ``params/``, encoder layers stacked."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor
from speech_flax.conversion.tree import is_stacked, leaf_places, nested

_PARAMS = "params"
_ARRAY = "/.zarray"  # the key that every array has


def is_orbax_directory(directory: Path) -> bool:
    """Whether ``directory`` is what :func:`write_orbax_directory` writes."""
    return (directory / _PARAMS).is_dir()


def write_orbax_directory(directory: Path, leaves: Mapping[str, StoredTensor]) -> None:
    """Write the leaves of a tree by path below ``directory``, with the types that they have.

    orbax wants whole trees and keeps two more copies of them while it writes. Handed one leaf after the other, it needs
    memory for the largest alone. Each encoder layer is a chunk of its own, so that it can be read by itself. Weights
    are hardly smaller when they are compressed, which takes longer than the disk.
    """
    import orbax.checkpoint as ocp

    class LeafByLeaf(ocp.type_handlers.NumpyHandler):
        """Reads a leaf when its turn has come, and waits until it is written."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            for leaf, info, arguments in zip(values, infos, args, strict=True):
                for written in await super().serialize([leaf.read()], [info], [arguments]):
                    written.result()
            return []

    registry = ocp.type_handlers.create_type_handler_registry((StoredTensor, LeafByLeaf(deepcopy_host_arrays=False)))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    chunks = {path: ocp.SaveArgs(shard_axes=(0,) if is_stacked(path) else ()) for path in leaves}
    with ocp.Checkpointer(handler) as checkpointer:
        arguments = ocp.args.PyTreeSave(nested(leaves), save_args=nested(chunks))
        checkpointer.save(directory.resolve() / _PARAMS, args=arguments)


def read_orbax_directory(directory: Path) -> dict[str, StoredTensor]:
    """The tensors by path and encoder layer, each read on its own.

    orbax itself restores nothing smaller than a leaf. What it writes are Zarr arrays in a key-value store of
    tensorstore, under the names that lead to a leaf, joined with dots.

    Raises:
      CheckpointFileError: the checkpoint is damaged or no tree of arrays.
    """
    import tensorstore

    params = directory.resolve() / _PARAMS
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params}/"}}

    def opened(name: str) -> Any:
        array = {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}, "fill_missing_data_reads": False}
        return tensorstore.open(array, open=True, read=True).result()

    def read(name: str, leaf: Any, layer: int | None) -> np.ndarray:
        with _damage_named(params, name):
            return (leaf if layer is None else leaf[layer]).read().result()

    with _damage_named(params):
        keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
        leaves = {key.removesuffix(_ARRAY): opened(key.removesuffix(_ARRAY)) for key in keys if key.endswith(_ARRAY)}
        if not leaves:
            raise ValueError("there are no arrays in it")
        return {
            str(place): StoredTensor(
                tuple(leaf.shape[place.layer is not None :]),
                leaf.dtype.numpy_dtype,
                partial(read, name, leaf, place.layer),
            )
            for name, leaf in leaves.items()
            for place in leaf_places(name.replace(".", "/"), leaf.shape)
        }


@contextlib.contextmanager
def _damage_named(params: Path, name: str | None = None) -> Iterator[None]:
    """tensorstore raises whatever fits the place where damage was noticed."""
    try:
        yield
    except Exception as error:
        what = "is damaged or no orbax checkpoint" if name is None else f"is damaged: {name} cannot be read"
        reason = re.split(r" \[|\n", str(error))[0] or type(error).__name__
        raise CheckpointFileError(f"{params} {what}: {reason}") from None
