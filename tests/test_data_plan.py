"""Buckets and batch plans: the least padding, every utterance once an epoch, order by seed and step alone."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_flax.data.buckets import Bucket, buckets_up_to, duration_samples, suggest_buckets
from speech_flax.data.plan import EMPTY_ROW, BatchPlan
from speech_flax.data.stream_plan import StreamPlan

RATE = 16_000
lengths = st.lists(st.integers(0, 5 * RATE), min_size=1, max_size=60)
#: Batch sizes of buckets of 1, 2.5 and 5 s.
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


def make_plan(num_samples: list[int], batch_sizes: tuple[int, ...], **options) -> BatchPlan:
    buckets = [Bucket(limit, size) for limit, size in zip((1.0, 2.5, 5.0), batch_sizes, strict=True)]
    return BatchPlan(num_samples, buckets, **options)


def rows_of_epoch(plan: BatchPlan, epoch: int) -> list[np.ndarray]:
    first = epoch * plan.steps_per_epoch
    return [plan.batch(step).row_indices for step in range(first, first + plan.steps_per_epoch)]


@settings(deadline=None, max_examples=60)
@given(lengths, sizes, st.integers(0, 2**32 - 1), st.booleans())
def test_every_epoch_visits_every_utterance_once_in_a_bucket_that_holds_it(num_samples, batch_sizes, seed, shuffle):
    plan = make_plan(num_samples, batch_sizes, seed=seed, shuffle=shuffle)
    for epoch in range(2):
        visited = np.concatenate(rows_of_epoch(plan, epoch))
        assert sorted(visited[visited != EMPTY_ROW]) == list(range(len(num_samples)))
    for step in range(plan.steps_per_epoch):
        planned = plan.batch(step)
        assert planned.row_indices.size == plan.buckets[planned.bucket_index].batch_size
        rows = planned.row_indices[planned.row_indices != EMPTY_ROW]
        assert rows.size, "a batch without utterances"
        assert plan.num_samples[rows].max() <= plan.bucket_samples[planned.bucket_index]


@settings(deadline=None, max_examples=30)
@given(lengths, sizes, st.integers(0, 2**32 - 1), st.lists(st.integers(0, 200), min_size=1, max_size=10))
def test_a_batch_depends_on_seed_and_step_alone(num_samples, batch_sizes, seed, steps):
    in_order = make_plan(num_samples, batch_sizes, seed=seed)
    expected = {step: in_order.batch(step).row_indices for step in range(max(steps) + 1)}
    fresh = pickle.loads(pickle.dumps(make_plan(num_samples, batch_sizes, seed=seed)))
    for step in steps:
        np.testing.assert_array_equal(fresh.batch(step).row_indices, expected[step])


@settings(deadline=None, max_examples=30)
@given(lengths, sizes, st.integers(0, 300), st.integers(0, 300))
def test_steps_between_two_are_counted_by_bucket(num_samples, batch_sizes, first, count):
    plan = make_plan(num_samples, batch_sizes)
    steps = range(first, first + count)
    counted = np.bincount([plan.batch(step).bucket_index for step in steps], minlength=3) if count else np.zeros(3)
    np.testing.assert_array_equal(plan.batches_between(first, first + count), counted)


@settings(deadline=None, max_examples=30)
@given(lengths, sizes, st.integers(0, 300), st.booleans())
def test_buckets_are_named_in_the_order_in_which_steps_use_them(num_samples, batch_sizes, first, shuffle):
    plan = make_plan(num_samples, batch_sizes, shuffle=shuffle)
    named = plan.buckets_in_order(first)
    assert sorted(named) == [index for index, batches in enumerate(plan.batches_per_bucket) if batches]
    end = (first // plan.steps_per_epoch + 1) * plan.steps_per_epoch
    used = list(dict.fromkeys(plan.batch(step).bucket_index for step in range(first, end)))
    assert named[: len(used)] == used


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    plan = make_plan([1000 * n for n in range(1, 13)], (4, 4, 4), seed=7)
    assert [plan.batch(step).row_indices.tolist() for step in range(plan.steps_per_epoch + 1)] == GOLDEN


#: Resuming a run depends on this order: whoever changes it breaks the runs of others.
GOLDEN = [[2, 1, 0, 5], [8, 4, 3, 6], [11, 9, 10, 7], [7, 9, 10, 11]]


def test_epochs_differ_in_batches_and_order_and_seeds_do_too():
    num_samples = np.linspace(1000, 5 * RATE, 40).astype(int)
    epochs = [rows_of_epoch(make_plan(num_samples, (4, 4, 4), seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    for left, right in itertools.combinations(epochs, 2):
        assert [rows.tolist() for rows in left] != [rows.tolist() for rows in right]
        assert {tuple(sorted(rows)) for rows in left} != {tuple(sorted(rows)) for rows in right}


def test_without_shuffling_utterances_keep_their_order_and_every_epoch_is_equal():
    plan = make_plan([RATE // 2] * 7, (3, 1, 1), shuffle=False)
    expected = [[0, 1, 2], [3, 4, 5], [6]]
    for epoch in range(2):
        assert [rows[rows != EMPTY_ROW].tolist() for rows in rows_of_epoch(plan, epoch)] == expected


def test_a_remainder_joins_the_longer_bucket_where_that_costs_less_than_empty_rows():
    second = RATE
    few = make_plan([second] * 5 + [2 * second] * 3, (4, 4, 4), shuffle=False)
    assert few.batches_per_bucket == (1, 1, 0)  # the fifth of the short ones fills the batch of the longer ones
    many = make_plan([second] * 7 + [2 * second] * 4, (4, 4, 4), shuffle=False)
    assert many.batches_per_bucket == (2, 1, 0)  # three rows of 2.5 s cost more than the one that stays empty


def test_padding_is_what_the_batches_hold_beside_audio():
    plan = make_plan([RATE // 2] * 3 + [4 * RATE], (2, 1, 1), shuffle=False)
    batches = [plan.batch(step) for step in range(plan.steps_per_epoch)]
    held = sum(batch.row_indices.size * plan.bucket_samples[batch.bucket_index] for batch in batches)
    assert plan.padding_fraction == pytest.approx(1 - (3 * 0.5 + 4) * RATE / held)
    assert f"{plan.padding_fraction:.1%} padding" in plan.summary()


def test_batches_that_exceed_the_budget_of_audio_are_named():
    buckets = buckets_up_to([1.0, 2.0], seconds_per_batch=8.0, batch_multiple=8)
    plans = [
        BatchPlan([RATE, 2 * RATE], buckets, seconds_per_batch=8.0),
        StreamPlan(buckets, readers=1, window_size=16, seed=0, seconds_per_batch=8.0),
    ]
    for plan in plans:
        _, within, over = plan.summary().splitlines()
        assert within.endswith("batches of 8")
        assert "batches of 8, 16 s of audio: more than data.batch_seconds = 8, but fewer rows cannot be shared" in over
        assert "up to 1 s" in within and "up to 2 s" in over


@pytest.mark.parametrize(
    ("num_samples", "buckets", "message"),
    [
        ([], [Bucket(1.0, 1)], "there are no utterances"),
        ([1], [], "there are no length buckets"),
        ([1], [Bucket(2.0, 1), Bucket(1.0, 1)], "bucket lengths must increase"),
        ([1, 40_000], [Bucket(1.0, 1)], r"1 utterances are longer than the longest bucket, 1 s \(the longest has 2.5"),
    ],
)
def test_impossible_plans_are_refused(num_samples, buckets, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(num_samples, buckets)


def test_a_negative_step_is_refused():
    with pytest.raises(IndexError, match="step -1 is negative"):
        make_plan([1], (1, 1, 1)).batch(-1)


def least_padded_length(durations: np.ndarray, num_buckets: int) -> float:
    """By trying every choice of bounds among the durations rounded up to 0.1 s."""
    bounds = np.unique(np.ceil(durations / 0.1 - 1e-9).astype(int))
    best = np.inf
    for chosen in itertools.combinations(bounds[:-1], min(num_buckets, bounds.size) - 1):
        all_bounds = np.array([*chosen, bounds[-1]]) * 0.1
        best = min(best, all_bounds[np.searchsorted(all_bounds, durations - 1e-9)].sum())
    return best


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 4))
def test_suggested_buckets_pad_as_little_as_any(tenths, num_buckets):
    durations = np.array(tenths) * 0.1 - 0.03
    buckets = suggest_buckets(durations, num_buckets, seconds_per_batch=10.0)
    bounds = np.array([bucket.max_seconds for bucket in buckets])
    assert len(buckets) == min(num_buckets, np.unique(tenths).size)
    padded = bounds[np.searchsorted(bounds, durations)].sum()
    assert padded == pytest.approx(least_padded_length(durations, num_buckets))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.05, 30.0), min_size=1, max_size=50),
    st.floats(1.0, 100.0),
    st.one_of(st.none(), st.integers(1, 20)),
    st.integers(1, 8),
)
def test_batch_sizes_keep_to_the_budget_and_to_the_devices(durations, budget, most, multiple):
    durations = np.array(durations)
    buckets = suggest_buckets(durations, 3, seconds_per_batch=budget, max_batch_size=most, batch_multiple=multiple)
    for bucket in buckets:
        size = bucket.batch_size
        assert size % multiple == 0
        if size > multiple:
            assert size * bucket.max_seconds <= budget * (1 + 1e-6)
            assert most is None or size <= most
            assert size < durations.size + multiple


def test_more_durations_than_candidates_still_cover_the_longest():
    durations = np.random.default_rng(0).uniform(0.1, 600.0, 5000)
    buckets = suggest_buckets(durations, 4, seconds_per_batch=1000.0)
    assert buckets[-1].max_seconds >= durations.max()
    evenly = np.quantile(durations, [0.25, 0.5, 0.75, 1.0])
    bounds = np.array([bucket.max_seconds for bucket in buckets])
    assert bounds[np.searchsorted(bounds, durations)].sum() <= 1.01 * evenly[np.searchsorted(evenly, durations)].sum()


@pytest.mark.parametrize(
    ("durations", "num_buckets", "budget", "message"),
    [
        ([0.0, 0.0], 2, 10.0, "no utterance has a known duration"),
        ([1.0], 0, 10.0, "num_buckets is 0"),
        ([1.0], 1, 0.0, "seconds_per_batch is 0"),
    ],
)
def test_impossible_buckets_are_refused(durations, num_buckets, budget, message):
    with pytest.raises(ValueError, match=message):
        suggest_buckets(np.array(durations), num_buckets, seconds_per_batch=budget)


def test_a_bucket_is_positive():
    for seconds, size in ((0.0, 1), (float("nan"), 1), (1.0, 0)):
        with pytest.raises(ValueError, match="of a bucket is"):
            Bucket(seconds, size)


def test_durations_become_samples_rounded_up():
    assert duration_samples(np.array([0.0, 0.1, 1 / 3, 1.00001])).tolist() == [0, 1600, 5334, 16_001]
