"""Checkpoints of the whole training state, written by orbax in the background."""

import functools
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from speech_flax.storage import AnyPath, exists, storage_path
from speech_flax.training.step import TrainState

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """Checkpoints that cannot be restored into this experiment."""


class Checkpoints:
    """The checkpoints of one run: the newest ``keep``, and those at multiples of ``keep_every`` steps.

    A checkpoint appears in its directory only when it is complete, and holds checksums of every array. Saving returns
    before the files are written; :meth:`close` waits for them.
    """

    def __init__(self, directory: str | AnyPath, keep: int = 2, keep_every: int | None = None):
        path = storage_path(directory)
        self.directory = path.resolve() if isinstance(path, Path) else path
        self._kept = {"max_to_keep": keep, "keep_period": keep_every}
        found = [path.name for path in self.directory.iterdir()] if exists(self.directory) else []
        self._is_new = not found
        for step in sorted(_numbers(found) - set(self.steps())):
            if jax.process_index() == 0:
                logger.warning("the checkpoint at step %d in %s is incomplete and left out", step, self.directory)

    @functools.cached_property
    def _manager(self) -> Any:
        """Opened when there is something to read or to write: a new run need not wait for the import."""
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True, **self._kept
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _is_open(self) -> bool:
        return "_manager" in vars(self)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        if self._is_new and not self._is_open():
            return []
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Save ``state`` under its step, with ``progress``: JSON values that the loop needs to go on."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        import orbax.checkpoint as ocp

        record = {"progress": progress, "checksums": checksums(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=items)

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state and progress that can be read, each array as ``abstract`` shapes and shards it.

        A damaged checkpoint is reported in the log and renamed to ``<step>.damaged``, and the one before it is used;
        ``None`` when there is no checkpoint.

        Raises:
            CheckpointError: when the checkpoint belongs to another model, or when all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            damage = None
            try:
                restored = self._restore(abstract, step)
            except CheckpointError:
                raise
            except Exception as error:  # whatever orbax, tensorstore and JSON raise for files that are not as written
                damage = " ".join(str(error).split())[:200] or type(error).__name__
            if not _on_any_process(damage is not None):
                return restored
            self._set_aside(step, damage or "another process cannot read it")
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read; choose another run_directory to start anew"
            )
        return None

    def _restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The checkpoint of one step.

        Raises:
            CheckpointError: when it belongs to another model.
            Exception: when it is damaged.
        """
        import orbax.checkpoint as ocp

        self._check_shapes(abstract, step)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        record = restored.record
        ours = checksums(restored.state)
        wrong = [name for name, value in record["checksums"].items() if ours[name] != value]
        if wrong:
            raise ValueError(f"the checksum of {wrong[0]} is wrong")
        return restored.state, record["progress"]

    def _set_aside(self, step: int, damage: str) -> None:
        logger.warning("the checkpoint at step %d in %s is damaged and left out: %s", step, self.directory, damage)
        if jax.process_index() == 0:
            path = self.directory / str(step)
            path.rename(path.with_name(f"{step}.damaged"))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()

    def _check_shapes(self, abstract: TrainState, step: int) -> None:
        """Raise CheckpointError for a checkpoint of another model, ValueError for one that does not say of which."""
        import orbax.checkpoint as ocp

        saved = ocp.StandardCheckpointer().metadata(self.directory / str(step) / "state")
        tree = getattr(saved, "item_metadata", saved)
        theirs, ours = _shapes(tree), _shapes(abstract)
        if not theirs:
            raise ValueError("what it says of its arrays cannot be read")
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise CheckpointError(
                    f"the checkpoint at step {step} in {self.directory} belongs to another model: {name} is "
                    f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here; "
                    "choose another run_directory or restore the configuration it was made with"
                )

    def wait(self) -> None:
        """Return when every save has been completed."""
        if self._is_open():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish pending saves and release the directory."""
        if self._is_open():
            self._manager.wait_until_finished()
            self._manager.close()


def checksums(tree: PyTree) -> dict[str, int]:
    """A 32-bit checksum of the bits of every array, by path; the same however the array is sharded."""
    sums = jax.device_get(_checksums(tree))
    return {_name(path): int(value) for path, value in jax.tree_util.tree_flatten_with_path(sums)[0]}


@jax.jit
def _checksums(tree: PyTree) -> PyTree:
    def checksum(array: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        places = [np.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
                  for axis, stride in enumerate(strides)]  # fmt: skip
        odd = 2 * sum(places, start=jnp.zeros(array.shape, jnp.uint32)) + 1
        return (bits * odd).sum(dtype=jnp.uint32)  # modulo 2^32, so that the order of the sum does not matter

    return jax.tree.map(checksum, tree)


def _numbers(names: list[str]) -> set[int]:
    """Steps of the directories with these names, complete or being written, but not damaged."""
    return {int(name.split(".")[0]) for name in names if re.fullmatch(r"\d+(\.orbax-checkpoint-tmp.*)?", name)}


def _on_any_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array([flag])).any())


def _name(path: tuple) -> str:
    """A path, spelled alike for dataclasses, tuples and what orbax makes of them."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def _shapes(tree: PyTree) -> Mapping[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
