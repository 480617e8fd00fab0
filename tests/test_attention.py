"""Attention and its positions against literal definitions, and the mask of its dropout."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_flax import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from speech_flax.kernels.dropout import head_seeds, kept
from speech_flax.kernels.positions import RelativeKey
from speech_flax.layers.attention import attention


def _states(frames, *, batch=2, heads=2, head_size=8, count=3):
    keys = jax.random.split(jax.random.key(frames), count)
    return [jax.random.normal(key, (batch, frames, heads, head_size)) for key in keys]


@pytest.mark.parametrize(("left", "right", "frames"), [(3, 2, 9), (0, 0, 5), (6, 0, 7), (20, 9, 8)])
def test_relative_key_scores_are_products_with_the_embedding_of_the_clipped_distance(left, right, frames):
    query, key, value = _states(frames)
    embeddings = jax.random.normal(jax.random.key(1), (left + right + 1, 8))
    mask = jnp.arange(frames) < jnp.array([[frames], [frames - 2]])
    attended, probabilities = attention(
        query, key, value, mask, positions=RelativeKey(embeddings, left), output_attentions=True
    )
    distance = np.clip(np.arange(frames)[None] - np.arange(frames)[:, None], -left, right) + left
    scores = np.einsum("blhd,brhd->bhlr", query, key) + np.einsum("blhd,lrd->bhlr", query, embeddings[distance])
    scores = np.where(mask[:, None, None], scores / 8**0.5, -np.inf)
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    # float32 rounding of sums of 8 products
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(
        attended, np.einsum("bhlr,brhd->blhd", expected, value).reshape(2, frames, -1), atol=1e-5
    )


def test_a_row_without_any_frame_attends_to_all_frames_equally():
    query, key, value = _states(6)
    mask = jnp.array([[True] * 6, [False] * 6])
    attended, _ = attention(query, key, value, mask)
    np.testing.assert_allclose(attended[1], jnp.broadcast_to(value[1].mean(0), (6, 2, 8)).reshape(6, 16), atol=1e-6)


def test_dropout_keeps_the_right_share_independently_of_neighbours_heads_and_seeds():
    frames, rate = 512, 0.1
    position = jnp.arange(frames)
    seeds = head_seeds(jax.random.key(0), 2, 2)
    mask = np.asarray(kept(seeds, position[:, None], position[None], rate))
    # Standard deviation of the share over 2**18 draws is 6e-4; five of them are allowed, everywhere below.
    np.testing.assert_allclose(mask.mean((-1, -2)), 1 - rate, atol=3e-3)
    dropped = (~mask - rate) / np.sqrt(rate * (1 - rate))
    head = dropped[0, 0]
    others = [dropped[0, 1], dropped[1, 0], np.roll(head, 1, 0), np.roll(head, 1, 1), np.roll(head, 16, 0), head.T]
    assert max(abs((head * other).mean()) for other in others) < 5 / frames + 1 / frames  # the diagonal of head.T
    squares = head * np.roll(head, 1, 0) * np.roll(head, 1, 1) * np.roll(head, 1, (0, 1))
    assert abs(squares.mean()) < 5 / frames
    # Sums over rows and columns vary as those of independent draws do.
    for axis in (0, 1):
        assert 0.75 < head.sum(axis).var() / frames < 1.3


def test_dropout_is_a_function_of_its_key_and_leaves_the_mean_unchanged():
    query, key, value = _states(64, batch=1, heads=4)
    mask = jnp.ones((1, 64), bool)

    @jax.jit
    def run(random):
        return attention(query, key, value, mask, dropout_rate=0.5, dropout_key=random, output_attentions=True)

    first, probabilities = run(jax.random.key(0))
    np.testing.assert_array_equal(first, run(jax.random.key(0))[0])
    assert abs(first - run(jax.random.key(1))[0]).max() > 0.1
    whole = attention(query, key, value, mask, output_attentions=True)[1]
    np.testing.assert_allclose(
        jnp.where(probabilities == 0, probabilities, probabilities / 2 / whole), probabilities != 0, rtol=1e-5
    )
    assert 0.45 < (probabilities == 0).mean() < 0.55


def test_long_inputs_in_blocks_equal_short_ones_whole():
    frames = 1030
    query, key, value = _states(frames, batch=1, heads=1)
    mask = jnp.arange(frames)[None] < 1000
    positions = RelativeKey(jax.random.normal(jax.random.key(3), (12, 8)), 7)

    def run(output_attentions):
        def loss(query, key, value, positions):
            attended, _ = attention(
                query, key, value, mask, positions=positions, dropout_rate=0.1, dropout_key=jax.random.key(5),
                output_attentions=output_attentions,
            )  # fmt: skip
            return (attended * jnp.cos(jnp.arange(8.0))).sum(), attended

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(query, key, value, positions)

    # Both sum a thousand float32 products per value, in different orders.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), run(True), run(False))


def test_no_array_of_all_queries_and_keys_exists_in_a_training_step_of_scanned_layers():
    """Nor one of masks, which a scan over layers would find to be the same for all layers and keep."""
    config = Wav2Vec2BertConfig(
        vocab_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=2, layerdrop=0.0
    )
    model = Wav2Vec2BertForCTC(config)
    frames = 1200
    features, labels = jnp.zeros((1, frames, 160)), jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), features)["params"]

    def loss(params, key):
        rngs = {"dropout": key, "spec_augment": key, "layer_drop": key}
        return model.apply({"params": params}, features, labels=labels, deterministic=False, rngs=rngs).loss

    text = jax.jit(jax.value_and_grad(loss)).lower(params, jax.random.key(0)).as_text()
    sizes = [math.prod(map(int, shape.split("x")[:-1])) for shape in set(re.findall(r"tensor<((?:\d+x)+\w+)>", text))]
    assert frames * 160 in sizes
    assert max(sizes) < frames**2
