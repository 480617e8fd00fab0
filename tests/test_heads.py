"""Heads: what a configuration refuses, what counts as a label, and, corrected, no trace of padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_parameters import random_parameters

import speech_flax
from speech_flax import HubertConfig, Wav2Vec2BertConfig
from speech_flax.layers.time_delay import time_delay_lengths
from speech_flax.models.heads import statistics_pooling

TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "num_labels": 3}
BERT = Wav2Vec2BertConfig.from_dict(
    TINY
    | {
        "feature_projection_input_dim": 6,
        "conv_depthwise_kernel_size": 3,
        "left_max_position_embeddings": 3,
        "right_max_position_embeddings": 2,
        "classifier_proj_size": 7,
        "vocab_size": 5,
        "tdnn_dim": (6, 7),
        "tdnn_kernel": (3, 2),
        "tdnn_dilation": (1, 3),
        "xvector_output_dim": 4,
    }
)
HUBERT = HubertConfig.from_dict(
    TINY
    | {
        "conv_dim": (8, 8),
        "conv_kernel": (6, 3),
        "conv_stride": (4, 2),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 7,
        "vocab_size": 5,
    }
)


def random(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def initialised(name: str, config, inputs: np.ndarray):
    """A model, and parameters none of which is trivial."""
    model = getattr(speech_flax, name)(config)
    return model, random_parameters(model, inputs)


def applied(model, params, *arguments, **named):
    return jax.jit(lambda: model.apply({"params": params}, *arguments, **named))()


def outputs_alone_and_padded(model, params, inputs, length, padded_length) -> tuple[dict, dict]:
    """Outputs for the first ``length`` positions of an item, without and with padding full of other numbers."""

    @jax.jit
    def apply(inputs, mask):
        return model.apply({"params": params}, inputs, mask)

    alone = apply(inputs[:1, :length], np.ones((1, length), np.int32))
    mask = (np.arange(padded_length) < np.array([[length], [padded_length]])).astype(np.int32)
    padded = apply(inputs[:, :padded_length], mask)
    kept = {"loss", "hidden_states", "attentions"}
    names = [field.name for field in dataclasses.fields(alone) if field.name not in kept]
    values = {
        name: (getattr(alone, name)[0], getattr(padded, name)[0]) for name in names if getattr(alone, name) is not None
    }
    return {name: pair[0] for name, pair in values.items()}, {name: pair[1] for name, pair in values.items()}


# float32 rounding of sums in another order
TOLERANCE = 2e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Wav2Vec2BertModel", {"add_adapter": True, "num_adapter_layers": 2, "adapter_kernel_size": 5}),
        ("Wav2Vec2BertForCTC", {"add_adapter": True}),
        ("Wav2Vec2BertForSequenceClassification", {"use_weighted_layer_sum": True}),
        ("Wav2Vec2BertForAudioFrameClassification", {}),
        ("Wav2Vec2BertForXVector", {"use_weighted_layer_sum": True, "add_adapter": True}),
        ("Wav2Vec2BertForXVector", {"add_adapter": True, "output_hidden_size": 6}),
    ],
)
def test_corrected_wav2vec2_bert_gives_the_same_alone_and_padded(name, changes):
    inputs = 3 * random(2, 24, 6)
    model, params = initialised(name, BERT.replace(compatibility="corrected", **changes), inputs)
    alone, padded = outputs_alone_and_padded(model, params, inputs, 19, 24)
    assert alone.keys() == padded.keys() and alone
    for key, value in alone.items():
        np.testing.assert_allclose(padded[key][: len(value)], value, atol=TOLERANCE, rtol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("HubertForCTC", {}),
        ("HubertForSequenceClassification", {"use_weighted_layer_sum": True}),
        (
            "HubertForSequenceClassification",
            {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "use_weighted_layer_sum": True},
        ),
    ],
)
def test_corrected_hubert_gives_the_same_alone_and_padded(name, changes):
    inputs = random(2, 120)
    model, params = initialised(name, HUBERT.replace(compatibility="corrected", **changes), inputs)
    alone, padded = outputs_alone_and_padded(model, params, inputs, 83, 120)
    assert alone.keys() == padded.keys() and alone
    for key, value in alone.items():
        np.testing.assert_allclose(padded[key][: len(value)], value, atol=TOLERANCE, rtol=TOLERANCE, err_msg=key)


def test_default_speaker_model_lets_padding_in_as_transformers_does():
    inputs = 3 * random(2, 24, 6)
    model, params = initialised("Wav2Vec2BertForXVector", BERT, inputs)
    alone, padded = outputs_alone_and_padded(model, params, inputs, 19, 24)
    assert np.abs(alone["embeddings"] - padded["embeddings"]).max() > 1e-3


def test_time_delay_lengths_take_the_dilation_into_account_only_when_corrected():
    lengths = jnp.array([20])
    assert int(time_delay_lengths(lengths, BERT)[0]) == 20 - 2 - 1
    assert int(time_delay_lengths(lengths, BERT.replace(compatibility="corrected"))[0]) == 20 - 2 - 3


@pytest.mark.parametrize("name", ["SequenceClassification", "AudioFrameClassification"])
def test_classifiers_refuse_adapters(name):
    model = getattr(speech_flax, f"Wav2Vec2BertFor{name}")(BERT.replace(add_adapter=True))
    with pytest.raises(ValueError, match="add_adapter"):
        jax.eval_shape(model.init, jax.random.key(0), random(1, 9, 6))
    with pytest.raises(ValueError, match="add_adapter"):
        config = HUBERT.replace(add_adapter=True)
        jax.eval_shape(speech_flax.HubertForSequenceClassification(config).init, jax.random.key(0), random(1, 120))


def test_speaker_model_says_how_many_frames_it_needs():
    with pytest.raises(ValueError, match="6 frames at once"):
        jax.eval_shape(speech_flax.Wav2Vec2BertForXVector(BERT).init, jax.random.key(0), random(1, 5, 6))


def test_one_label_is_a_regression_of_values():
    inputs = random(2, 9, 6)
    config = BERT.replace(num_labels=1)
    model, params = initialised("Wav2Vec2BertForSequenceClassification", config, inputs)
    labels = np.array([0.5, -2.0], np.float32)
    output = applied(model, params, inputs, labels=labels)
    assert output.logits.shape == (2, 1)
    np.testing.assert_allclose(output.loss, np.mean((output.logits[:, 0] - labels) ** 2), rtol=1e-6)


def test_sequence_labels_of_minus_100_do_not_count_and_several_labels_may_hold():
    inputs = random(2, 9, 6)
    model, params = initialised("Wav2Vec2BertForSequenceClassification", BERT, inputs)
    output = applied(model, params, inputs, labels=np.array([-100, 2]))
    np.testing.assert_allclose(output.loss, -jax.nn.log_softmax(output.logits[1])[2], rtol=1e-6)
    several = type(model)(BERT.replace(problem_type="multi_label_classification"))
    labels = np.array([[1, 0, 1], [0, 0, 0]])
    probabilities = jax.nn.sigmoid(output.logits)
    expected = -np.mean(np.log(np.where(labels == 1, probabilities, 1 - probabilities)))
    np.testing.assert_allclose(applied(several, params, inputs, labels=labels).loss, expected, rtol=1e-5)


def test_frame_loss_counts_padding_as_transformers_does_unless_corrected():
    inputs, mask = random(2, 9, 6), np.arange(9) < np.array([[9], [4]])
    model, params = initialised("Wav2Vec2BertForAudioFrameClassification", BERT, inputs)
    labels = np.random.RandomState(1).randint(0, 3, (2, 9))
    one_hot = np.eye(3, dtype=np.float32)[labels]
    output = applied(model, params, inputs, mask, labels=one_hot)
    losses = -np.take_along_axis(np.array(jax.nn.log_softmax(output.logits)), labels[:, :, None], -1)[:, :, 0]
    np.testing.assert_allclose(output.loss, losses.mean(), rtol=1e-5)
    corrected = type(model)(BERT.replace(compatibility="corrected"))
    for given in (one_hot, labels):
        loss = applied(corrected, params, inputs, mask, labels=given).loss
        np.testing.assert_allclose(loss, losses[mask].mean(), rtol=1e-5)


def test_tuple_holds_the_loss_first():
    inputs = random(2, 9, 6)
    model, params = initialised("Wav2Vec2BertForAudioFrameClassification", BERT, inputs)
    labels = np.zeros((2, 9), np.int32)
    loss, logits = applied(model, params, inputs, None, labels, return_dict=False)
    assert loss.shape == () and logits.shape == (2, 9, 3)


def test_statistics_of_constant_and_missing_frames_have_finite_gradients():
    hidden, lengths = jnp.ones((3, 4, 2)), jnp.array([4, 1, 0])
    pooled, gradient = jax.value_and_grad(lambda hidden: statistics_pooling(hidden, lengths).sum())(hidden)
    assert np.isfinite(pooled) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(statistics_pooling(hidden, lengths)[2], 0)
