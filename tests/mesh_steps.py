"""Three steps on one global batch, on a mesh; run by test_meshes.py in processes of its own.

    python mesh_steps.py single DIRECTORY      all layouts on 8 devices of this process
    python mesh_steps.py joined DIRECTORY      one of two processes of 4 devices each

Each layout's losses, gradient norms, parameters and moments go to ``DIRECTORY/<name>.npz``.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tone_corpus import TINY_MODEL, speak

from speech_flax.data.loader import IGNORED_LABEL, Batch
from speech_flax.data.sources import DataSource
from speech_flax.training.checkpoints import Checkpoints
from speech_flax.training.experiment import (
    DataSettings,
    Experiment,
    MeshSettings,
    ModelSettings,
    OptimizerSettings,
)
from speech_flax.training.optimizer import Optimizer
from speech_flax.training.processes import join_processes
from speech_flax.training.programs import Programs
from speech_flax.training.sharding import make_mesh, process_shard
from speech_flax.training.task import make_task

#: No other dimension of anything is this large, so that a gathered batch can be seen in a compiled program.
ROWS = 24
SAMPLES = 7_200
STEPS = 3
QUIET = {
    **TINY_MODEL,
    "layerdrop": 0.0,
    "final_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "apply_spec_augment": False,
    "intermediate_size": 32,
}
HUBERT = {
    **{name: TINY_MODEL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{f"{place}_dropout": 0.0 for place in ("hidden", "activation", "attention", "feat_proj", "final")},
    **{"layerdrop": 0.5, "apply_spec_augment": False, "intermediate_size": 32},
    **{"conv_dim": (8, 8), "conv_kernel": (40, 8), "conv_stride": (40, 8)},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
}
RANDOM = {**TINY_MODEL, "layerdrop": 0.5, "attention_dropout": 0.1, "hidden_dropout": 0.1, "mask_time_prob": 0.3}


def experiment(config: dict, **settings) -> Experiment:
    data = DataSettings(train=DataSource(path="unused"))
    # The gradients of the biases of the keys are zero but for rounding; a larger epsilon keeps Adam from dividing them
    # by themselves and taking whole steps with noise.
    optimizer = OptimizerSettings(learning_rate=1e-3, warmup=0.0, epsilon=1e-4)
    return Experiment(
        data=data, run_directory="unused", model=ModelSettings(config=config, **settings), optimizer=optimizer
    )


def batch(step: int, encode, shard: tuple[int, int]) -> Batch:
    """Rows of unequal length, two of which are empty; this process's part of them."""
    random = np.random.default_rng(step)
    texts = ["".join(random.choice(list("abcd"), random.integers(1, 6))) for _ in range(ROWS)]
    waveforms, labels = np.zeros((ROWS, SAMPLES), np.float32), np.full((ROWS, 8), IGNORED_LABEL, np.int32)
    sample_lengths, label_lengths = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
    valid = np.ones(ROWS, bool)
    valid[[3, 11]] = False
    for row in np.flatnonzero(valid):
        waveform, spelled = speak(texts[row], random), encode(texts[row])
        waveforms[row, : waveform.size], labels[row, : len(spelled)] = waveform, spelled
        sample_lengths[row], label_lengths[row] = waveform.size, len(spelled)
    index, count = shard
    part = slice(index * ROWS // count, (index + 1) * ROWS // count)
    rows = (array[part] for array in (waveforms, sample_lengths, labels, label_lengths, valid))
    return Batch(step, *rows, ids=[], texts=[], bad=[])


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and how the step is compiled."""

    name: str
    mesh: tuple[int, int, int] = (1, 1, 1)
    family: str = "wav2vec2-bert"
    config: tuple[tuple[str, object], ...] = tuple(QUIET.items())
    accumulation: int = 1
    remat: str = "none"
    scan_unroll: int = 1
    save: bool = False
    restore: str = ""

    def run(self, directory: Path) -> None:
        """Do the steps from the beginning, or go on from the checkpoint after the first one of another layout."""
        described = experiment(dict(self.config), family=self.family, remat=self.remat, scan_unroll=self.scan_unroll)
        mesh = make_mesh(MeshSettings(*self.mesh), jax.devices()[: int(np.prod(self.mesh))])
        task, _ = make_task(described, ["abcd ab"])
        optimizer = Optimizer(described.optimizer, 100)
        programs = Programs(task, optimizer, mesh, seed=0, accumulation=self.accumulation)
        checkpoints = Checkpoints(directory / "checkpoints" / (self.restore or self.name))
        if self.restore:
            state, _ = checkpoints.restore_newest(programs.abstract_state)
        else:
            state = programs.initial_state()
        for array in jax.tree.leaves(state):
            assert array.sharding.mesh == mesh
        losses, norms = [], []
        first = batch(0, task.label_encoder.encode, process_shard(mesh))
        (directory / f"{self.name}.hlo").write_text(programs.compile(first, training=True).as_text())
        for step in range(int(state.step), STEPS):
            state, metrics = programs.train(state, batch(step, task.label_encoder.encode, process_shard(mesh)))
            losses.append(float(metrics.loss))
            norms.append(float(metrics.gradient_norm))
            if self.save and step == 0:
                checkpoints.save(state, {})
        checkpoints.close()
        self._write(directory, state, losses, norms)

    def _write(self, directory: Path, state, losses: list[float], norms: list[float]) -> None:
        leaves = jax.tree_util.tree_flatten_with_path({"params": state.params, "optimizer": state.optimizer})[0]
        if jax.process_count() > 1:
            leaves = [(path, multihost_utils.process_allgather(leaf, tiled=True)) for path, leaf in leaves]
        if jax.process_index() == 0:
            arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
            np.savez(directory / f"{self.name}.npz", losses=losses, norms=norms, **arrays)


SINGLE = (
    Layout("reference"),
    Layout("2x4x1 unrolled", (2, 4, 1), scan_unroll=2, save=True),
    Layout("2x1x1 accumulation 4", (2, 1, 1), accumulation=4),
    Layout("restored on 2x2x2", (2, 2, 2), restore="2x4x1 unrolled"),
    Layout("restored on 1 remat dots", remat="dots", restore="2x4x1 unrolled"),
    Layout("random reference", config=tuple(RANDOM.items())),
    Layout("random 8x1x1 remat full", (8, 1, 1), config=tuple(RANDOM.items()), remat="full", save=True),
    Layout("random restored on 2x4x1", (2, 4, 1), config=tuple(RANDOM.items()), restore="random 8x1x1 remat full"),
    Layout("hubert reference", family="hubert", config=tuple(HUBERT.items())),
    Layout("hubert 2x2x2", (2, 2, 2), family="hubert", config=tuple(HUBERT.items())),
)
JOINED = (Layout("restored on two processes", (2, 2, 2), restore="2x4x1 unrolled"),)


if __name__ == "__main__":
    kind, directory = sys.argv[1], Path(sys.argv[2])
    join_processes(False)
    layouts = SINGLE if kind == "single" else JOINED
    for layout in layouts:
        layout.run(directory)
