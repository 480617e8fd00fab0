"""SpecAugment's spans: counted as Transformers counts them, drawn where they may be."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.layers.spec_augment import num_spans, sample_mask_spans, spec_augment

ROWS, FRAMES = 3, 60


def counts_of_transformers(lengths, num_frames, epsilon, mask_prob, mask_length, min_masks):
    """Spans per row: how many starts the reference asks its random generator for."""
    counts = []

    def choice(starts, count, replace):
        assert not replace
        counts.append(count)
        return starts[:count]

    attention_mask = np.arange(num_frames) < np.array(lengths)[:, None]
    import torch

    with mock.patch("numpy.random.rand", lambda _: np.array([epsilon])), mock.patch("numpy.random.choice", choice):
        _compute_mask_indices(
            (len(lengths), num_frames), mask_prob, mask_length, torch.tensor(attention_mask), min_masks=min_masks
        )
    return counts or [0] * len(lengths)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, FRAMES), min_size=ROWS - 1, max_size=ROWS - 1),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.01, 0.05, 0.065, 0.3, 0.65, 1.0]),
    st.integers(1, 20),
    st.integers(0, 8),
)
def test_rows_get_as_many_spans_as_in_transformers(lengths, epsilon, mask_prob, mask_length, min_masks):
    lengths = [FRAMES, *lengths]
    wanted = mask_prob * np.array(lengths) / mask_length + epsilon
    assume((np.abs(wanted - np.round(wanted)) > 1e-5).all())  # float32 may round these the other way
    rule = {"mask_prob": mask_prob, "mask_length": mask_length, "min_masks": min_masks}
    expected = counts_of_transformers(lengths, FRAMES, epsilon, **rule)
    np.testing.assert_array_equal(num_spans(jnp.array(lengths), FRAMES, epsilon, **rule), expected)


def runs(mask):
    """Lengths of the runs of masked frames in one row."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, int), [0]])))
    return edges[1::2] - edges[::2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, FRAMES), min_size=ROWS - 1, max_size=ROWS - 1),
    st.integers(0, 2**31),
    st.sampled_from([(0.65, 10, 2), (0.05, 10, 2), (0.3, 1, 0), (0.9, 5, 0)]),
)
def test_spans_lie_inside_of_the_valid_frames(lengths, seed, rule):
    mask_prob, mask_length, min_masks = rule
    lengths = np.array([FRAMES, *lengths])
    rule = {"mask_prob": mask_prob, "mask_length": mask_length, "min_masks": min_masks}
    key = jax.random.key(seed)
    masks = np.asarray(sample_mask_spans(key, jnp.array(lengths), FRAMES, **rule))
    epsilon = jax.random.uniform(jax.random.split(key)[0])
    counts = np.asarray(num_spans(jnp.array(lengths), FRAMES, epsilon, **rule))
    for row, length, count in zip(masks, lengths, counts, strict=True):
        if count:
            assert length >= mask_length
            assert not row[length:].any()
            assert (runs(row) >= mask_length).all()
            assert mask_length <= row.sum() <= count * mask_length
        else:  # none drawn or none fits: the last padded frame stands in, as in the reference
            np.testing.assert_array_equal(np.flatnonzero(row), [FRAMES - 1] if counts.max() else [])
    if mask_length == 1:
        np.testing.assert_array_equal(masks.sum(-1)[counts > 0], counts[counts > 0])


def test_every_start_is_equally_likely_and_the_key_decides():
    rule = {"mask_prob": 0.2, "mask_length": 1}
    draw = jax.jit(lambda key: sample_mask_spans(key, jnp.array([20]), 25, **rule)[0])
    masks = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 5000)))
    # 4 of 20 frames; the standard error of each frequency is 0.0057
    np.testing.assert_allclose(masks.mean(0)[:20], 0.2, atol=0.025)
    assert not masks[:, 20:].any()
    np.testing.assert_array_equal(draw(jax.random.key(7)), draw(jax.random.key(7)))
    assert len(np.unique(masks, axis=0)) > 2000


def test_a_span_longer_than_the_batch_masks_nothing_and_an_empty_one_is_refused():
    lengths = jnp.array([5, 3])
    assert not sample_mask_spans(jax.random.key(0), lengths, 5, mask_prob=1.0, mask_length=6, min_masks=2).any()
    with pytest.raises(ValueError, match="at least 1, not 0"):
        sample_mask_spans(jax.random.key(0), lengths, 5, mask_prob=1.0, mask_length=0)


def test_frames_become_the_embedding_and_features_zero_in_all_frames():
    config = Wav2Vec2BertConfig(mask_time_prob=0.3, mask_time_length=4, mask_feature_prob=0.4, mask_feature_length=2)
    hidden = jnp.asarray(np.random.default_rng(0).normal(5.0, 0.1, (2, 30, 16)), jnp.float32)
    embedding = jnp.arange(16.0) - 100
    augmented = np.asarray(spec_augment(hidden, embedding, jnp.array([30, 18]), None, config, jax.random.key(3)))
    silenced = (augmented == 0).all(1)
    assert ((augmented == 0) == silenced[:, None]).all()
    assert silenced.any(-1).all() and not silenced.all(-1).any()
    masked = (augmented == embedding).any(-1)
    kept = ~masked[:, :, None] & ~silenced[:, None]
    np.testing.assert_array_equal(augmented[kept], np.asarray(hidden)[kept])
    spoken = masked[:, :, None] & ~silenced[:, None]
    np.testing.assert_array_equal(augmented[spoken], np.broadcast_to(embedding, augmented.shape)[spoken])
    assert masked.any(-1).all() and not masked[1, 18:].any()


def test_evaluation_changes_nothing_but_given_frames():
    config = Wav2Vec2BertConfig(mask_time_prob=1.0, mask_feature_prob=1.0)
    hidden, embedding, lengths = jnp.ones((1, 4, 3)), jnp.full(3, 9.0), jnp.array([4])
    np.testing.assert_array_equal(spec_augment(hidden, embedding, lengths, None, config, None), hidden)
    given_frames = np.array([[0, 1, 0, 0]])
    augmented = spec_augment(hidden, embedding, lengths, given_frames, config, None)
    np.testing.assert_array_equal(augmented[0, :, 0], [1, 9, 1, 1])
    with pytest.raises(ValueError, match="needs a mask embedding"):
        spec_augment(hidden, None, lengths, given_frames, config, None)
