"""Programs that are compiled ahead of the steps that need them."""

import threading
from unittest.mock import create_autospec

import jax
import numpy as np
import pytest
from tone_corpus import write_config, write_corpus

from speech_flax.data.loader import Batch
from speech_flax.training.experiment import read_experiment
from speech_flax.training.programs import Programs, training_programs
from speech_flax.training.sharding import make_mesh
from speech_flax.training.task import make_task


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What programs are made of."""
    directory = tmp_path_factory.mktemp("programs")
    config = write_config(
        directory / "config.yaml", write_corpus(directory / "corpus", {"train": 1}), directory / "run"
    )
    experiment = read_experiment(config)
    task, _ = make_task(experiment, ["a b"])
    return experiment, task, make_mesh(experiment.mesh)


class Recorded:
    """Stands for a jitted function: notes which thread compiled what, and fails where it is told to."""

    def __init__(self):
        self.compiled: list[tuple[str, tuple[int, ...]]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.begun = threading.Event()

    def lower(self, _state, arrays):
        self.begun.set()
        self.may_go_on.wait()
        shape = arrays["waveforms"].shape
        self.compiled.append((threading.current_thread().name, shape))
        if shape[1] > 1000:
            raise MemoryError(f"no room for {shape}")
        return self

    def compile(self) -> jax.stages.Compiled:
        return create_autospec(jax.stages.Compiled, instance=True)


@pytest.fixture
def programs(made) -> tuple[Programs, Recorded]:
    programs, recorded = training_programs(*made), Recorded()
    programs._jitted = dict.fromkeys(programs._jitted, recorded)
    return programs, recorded


def batch(samples: int) -> Batch:
    counts = np.zeros(2, np.int32)
    labels = np.zeros((2, 3), np.int32)
    return Batch(0, np.zeros((2, samples), np.float32), counts, labels, counts, np.zeros(2, bool), [], [], [])


def test_a_program_is_compiled_once_in_the_thread_and_then_ready(programs, capsys):
    programs, recorded = programs
    recorded.may_go_on.clear()
    for _ in range(2):
        programs.compile_ahead("the first", batch(100), training=True)
    assert not programs.ready(batch(100), training=True)
    recorded.may_go_on.set()
    assert programs.compile(batch(100), training=True) is programs.compile(batch(100), training=True)
    assert programs.ready(batch(100), training=True) and not programs.ready(batch(100), training=False)
    ((thread, shape),) = recorded.compiled
    assert thread.startswith("compiler") and shape == (2, 100)
    assert capsys.readouterr().out.startswith("compiled the first in ")


def test_what_nobody_asked_for_ahead_is_compiled_by_who_needs_it(programs, capsys):
    programs, recorded = programs
    assert programs.compile(batch(100), training=True) is programs.compile(batch(100), training=True)
    assert recorded.compiled == [(threading.current_thread().name, (2, 100))]
    assert not capsys.readouterr().out


def test_a_failure_ahead_is_raised_before_its_step_comes(programs):
    programs, _ = programs
    programs.compile_ahead("too large", batch(2000), training=True)
    programs.compile_ahead("the next", batch(100), training=True)
    programs.compile(batch(100), training=True)
    with pytest.raises(MemoryError, match="no room"):
        programs.check_ahead()


def test_a_failure_is_raised_again_to_who_asks_again(programs):
    programs, _ = programs
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            programs.compile(batch(2000), training=True)
        assert not programs.ready(batch(2000), training=True)


def test_abandoned_programs_are_not_compiled(programs):
    programs, recorded = programs
    recorded.may_go_on.clear()
    for samples in (100, 200, 300):
        programs.compile_ahead("one", batch(samples), training=True)
    recorded.begun.wait()
    programs.abandon_ahead()
    recorded.may_go_on.set()
    programs.compile(batch(100), training=True)
    assert [shape for _, shape in recorded.compiled] == [(2, 100)]


def test_who_waits_for_the_last_program_shows_that_others_are_compiled(programs):
    programs, recorded = programs
    for samples in (100, 200, 300):
        programs.compile_ahead("one", batch(samples), training=True)
    alive = []
    programs.wait(batch(300), lambda: alive.append(len(recorded.compiled)), training=True)
    assert programs.ready(batch(300), training=True)
    assert len(alive) == 2 and alive[0] >= 1 and alive[1] >= 2
    programs.wait(batch(400), lambda: alive.append(0), training=True)
    assert programs.ready(batch(400), training=True) and len(alive) == 2


def test_parameters_are_placed_without_moments(programs):
    programs, _ = programs
    abstract = programs.abstract_state.params
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), abstract)
    before = {id(array) for array in jax.live_arrays()}
    placed = programs.place(params)
    assert len([array for array in jax.live_arrays() if id(array) not in before]) == len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, placed, abstract)))
