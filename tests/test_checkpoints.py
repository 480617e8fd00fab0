"""Checkpoints: which are kept, what is noticed when one is damaged, and what is refused."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from speech_flax.training.checkpoints import CheckpointError, Checkpoints, checksums
from speech_flax.training.experiment import OptimizerSettings
from speech_flax.training.optimizer import Optimizer
from speech_flax.training.step import TrainState

WIDTH = 64


def make_state(step: int, width: int = WIDTH) -> TrainState:
    """A state on a mesh of one device, with numbers that tell its step."""
    params = {"head": {"kernel": jnp.arange(width * 32.0).reshape(width, 32) + step, "bias": jnp.full(32, 1.0 * step)}}
    state = TrainState.create(params, Optimizer(OptimizerSettings(), 10)).replace(step=jnp.int32(step))
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def save(directory: Path, *steps: int, **options: int | None) -> None:
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(make_state(step), {"seen": step})
    checkpoints.close()


def restore(directory: Path, width: int = WIDTH) -> tuple[TrainState, dict] | None:
    checkpoints = Checkpoints(directory, keep=10)
    try:
        return checkpoints.restore_newest(abstract(make_state(0, width)))
    finally:
        checkpoints.close()


def data_files(directory: Path, step: int) -> list[Path]:
    """The files of a checkpoint that hold arrays, the largest first."""
    files = [path for path in (directory / str(step) / "state").rglob("d/*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def test_state_and_progress_come_back_bit_for_bit(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, 3, 7)
    state, progress = restore(tmp_path)
    assert progress == {"seen": 7}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(7))


def test_newest_and_those_at_multiples_are_kept(tmp_path):
    save(tmp_path, *range(1, 11), keep=2, keep_every=4)
    assert Checkpoints(tmp_path).steps() == [4, 8, 9, 10]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("part", ["arrays", "metadata", "record"])
def test_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, caplog, damage, part):
    save(tmp_path, 3, 7)
    if part == "arrays":
        damage(data_files(tmp_path, 7)[0])
    else:
        damage(tmp_path / "7" / {"metadata": "state/_METADATA", "record": "record/metadata"}[part])
    with caplog.at_level(logging.WARNING, "speech_flax"):
        state, progress = restore(tmp_path)
    assert progress == {"seen": 3} and int(state.step) == 3
    assert "the checkpoint at step 7" in caplog.text and "damaged" in caplog.text
    assert (tmp_path / "7.damaged").is_dir()
    save(tmp_path, 7, keep=10)  # the step can be saved anew
    assert restore(tmp_path)[1] == {"seen": 7}


def test_bits_that_changed_without_a_trace_in_the_files_are_noticed(tmp_path, caplog):
    save(tmp_path, 3, 7)
    record = tmp_path / "7" / "record" / "metadata"
    content = json.loads(record.read_text())
    content["checksums"]["params/head/kernel"] ^= 1
    record.write_text(json.dumps(content))
    assert restore(tmp_path)[1] == {"seen": 3}
    assert "checksum of params/head/kernel" in caplog.text


def test_checkpoint_that_was_being_written_is_reported_and_cleared_away(tmp_path, caplog):
    save(tmp_path, 3)
    partial = tmp_path / "7.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "speech_flax"):
        assert restore(tmp_path)[1] == {"seen": 3}
    assert not partial.exists()
    ours = [record.message for record in caplog.records if record.name.startswith("speech_flax")]
    assert ours == [f"the checkpoint at step 7 in {tmp_path} is incomplete and left out"]


def test_nothing_is_started_anew_when_all_are_damaged(tmp_path):
    save(tmp_path, 3, 7)
    for step in (3, 7):
        truncate(data_files(tmp_path, step)[0])
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        restore(tmp_path)


def test_checkpoint_of_another_model_is_refused_and_left_alone(tmp_path):
    save(tmp_path, 7)
    with pytest.raises(CheckpointError, match=r"another model: .*head/kernel is \(64, 32\) there and \(48, 32\) here"):
        restore(tmp_path, width=48)
    assert restore(tmp_path)[1] == {"seen": 7}


def test_checksum_tells_values_and_their_order():
    values = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    known = checksums({"a": jnp.asarray(values)})["a"]
    changed = values.copy()
    changed[3, 2] = np.nextafter(changed[3, 2], np.float32(9))
    assert checksums({"a": jnp.asarray(changed)})["a"] != known
    assert checksums({"a": jnp.asarray(values[::-1])})["a"] != known
    assert checksums({"a": jnp.asarray(values.reshape(6, 8))})["a"] == known
    assert checksums({"a": jnp.asarray([0.0])}) != checksums({"a": jnp.asarray([-0.0])})
