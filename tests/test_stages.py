"""Stages of a kernel that take turns."""

from speech_flax.kernels.stages import interleave, prepared


def _stage(name, pairs, done):
    for pair in range(pairs):
        done.append(f"{name}{pair}")
        yield
    done.append(f"{name} written")


def test_stages_take_turns_from_their_first_one_on():
    done = []
    interleave((1, _stage("a", 2, done)), (0, _stage("b", 3, done)))
    assert done == ["b0", "a0", "b1", "a1", "b2", "a written", "b written"]


def test_a_stage_may_begin_long_after_the_others_have_ended():
    done = []
    interleave((0, _stage("a", 1, done)), (4, _stage("b", 1, done)))
    assert done == ["a0", "a written", "b0", "b written"]


def test_a_prepared_stage_begins_when_it_is_called():
    done = []
    stage = prepared(_stage)("a", 2, done)
    assert done == ["a0"]
    interleave((0, stage), (0, iter(())))
    assert done == ["a0", "a1", "a written"]
