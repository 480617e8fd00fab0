"""Checkpoints of the whole training state, written by orbax in the background."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from speech_flax.training.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint that cannot be restored into this experiment."""


class Checkpoints:
    """The checkpoints of one run, the newest ``keep`` of them.

    A checkpoint appears in its directory only when it is complete. Saving returns before the files are written;
    :meth:`close` waits for them.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(directory).resolve(), options=options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or ``None``."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Save ``state`` under its step, with ``progress``: JSON values that the loop needs to go on."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        self._manager.save(step, args=items)

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state at ``step`` (the newest by default), each array as ``abstract`` shapes and shards it.

        Raises:
            CheckpointError: when the checkpoint belongs to another model.
        """
        step = self._manager.latest_step() if step is None else step
        self._check_shapes(abstract, step)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.progress

    def _check_shapes(self, abstract: TrainState, step: int) -> None:
        saved = ocp.StandardCheckpointer().metadata(self._manager.directory / str(step) / "state")
        tree = getattr(saved, "item_metadata", saved)
        theirs, ours = _shapes(tree), _shapes(abstract)
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise CheckpointError(
                    f"the checkpoint at step {step} in {self._manager.directory} belongs to another model: {name} is "
                    f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here; "
                    "choose another run_directory or restore the configuration it was made with"
                )

    def wait(self) -> None:
        """Return when every save has been completed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish pending saves and release the directory."""
        self._manager.wait_until_finished()
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape by path; paths are spelled alike for dataclasses, tuples and what orbax makes of them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = lambda entry: str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))  # noqa: E731
    return {"/".join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
