"""Parameters as an orbax checkpoint: ``config.json`` and ``params/``, encoder layers stacked."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from speech_flax.conversion.rules import Place
from speech_flax.conversion.stored_tensor import CheckpointFileError, StoredTensor
from speech_flax.conversion.tree import flat, leaf_places, nested

_PARAMS = "params"


def is_orbax_directory(directory: Path) -> bool:
    """Whether ``directory`` is what :func:`write_orbax_directory` writes."""
    return (directory / _PARAMS).is_dir()


def write_orbax_directory(directory: Path, leaves: Mapping[str, StoredTensor]) -> None:
    """Write the leaves of a tree by path below ``directory``, with the types that they have.

    orbax wants whole trees and keeps two more copies of them while it writes. Handed one leaf after the other, it needs
    memory for the largest alone. Weights are hardly smaller when they are compressed, which takes longer than the disk.
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
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.resolve() / _PARAMS, args=ocp.args.PyTreeSave(nested(leaves)))


def read_orbax_directory(directory: Path) -> dict[str, StoredTensor]:
    """The tensors by path and encoder layer; each leaf is read on its own.

    Raises:
      CheckpointFileError: the checkpoint is damaged or no tree of arrays.
    """
    import orbax.checkpoint as ocp

    leaves: dict[str, np.ndarray] = {}  # the one that was read last: its layers are asked for one after the other

    def read(place: Place) -> np.ndarray:
        if place.path not in leaves:
            leaves.clear()
            leaves[place.path] = _read_leaf(directory, place.path)
        return leaves[place.path] if place.layer is None else leaves[place.path][place.layer]

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = flat(checkpointer.metadata(directory.resolve() / _PARAMS).item_metadata.tree)
        return {
            str(place): StoredTensor(
                tuple(leaf.shape[place.layer is not None :]), np.dtype(leaf.dtype), partial(read, place)
            )
            for path, leaf in metadata.items()
            for place in leaf_places(path, leaf.shape)
        }
    except Exception as error:  # orbax raises whatever fits the place where the damage was noticed
        raise CheckpointFileError(
            f"{directory / _PARAMS} is damaged or no orbax checkpoint: {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_leaf(directory: Path, path: str) -> np.ndarray:
    import orbax.checkpoint as ocp

    arguments = ocp.args.PyTreeRestore(
        item=nested({path: 0}),
        restore_args=nested({path: ocp.RestoreArgs(restore_type=np.ndarray)}),
        partial_restore=True,
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return flat(checkpointer.restore(directory.resolve() / _PARAMS, args=arguments))[path]
    except Exception as error:
        raise CheckpointFileError(
            f"{directory / _PARAMS} is damaged: {path} cannot be read: {_reason(error)}"
        ) from None
