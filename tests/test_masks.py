"""Length arithmetic and masks against Transformers."""

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_flax.audio.log_mel import num_log_mel_frames
from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig
from speech_flax.layers.masks import (
    adapter_output_lengths,
    as_bool_mask,
    convolution_output_lengths,
    feature_frame_mask,
)


def meta(model_class, config):
    """A model without memory: only its methods are wanted."""
    with torch.device("meta"):
        return model_class(config)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from([(3, 2), (2, 2), (5, 4), (3, 3), (1, 1)]),
    st.booleans(),
)
def test_adapters_shorten_as_in_transformers(lengths, layers, shape, add_adapter):
    kernel, stride = shape
    fields = {
        "add_adapter": add_adapter,
        "num_adapter_layers": layers,
        "adapter_kernel_size": kernel,
        "adapter_stride": stride,
    }
    tiny = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    reference = meta(transformers.Wav2Vec2BertModel, transformers.Wav2Vec2BertConfig(**tiny, **fields))
    expected = reference._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
    assert adapter_output_lengths(jnp.array(lengths), Wav2Vec2BertConfig(**fields)).tolist() == expected


def test_lengths_of_an_adapter_with_the_default_kernel():
    config = Wav2Vec2BertConfig(add_adapter=True)
    assert adapter_output_lengths(jnp.array([1, 2, 3, 20, 21, 292]), config).tolist() == [1, 1, 2, 10, 11, 146]


def test_lengths_of_the_convolutions_of_hubert():
    lengths = np.array([399, 400, 719, 720, 16000, 93680, 160000, 480000])
    expected = [0, 1, 1, 2, 49, 292, 499, 1499]
    assert convolution_output_lengths(lengths, HubertConfig()).tolist() == expected


_REFERENCE = meta(
    transformers.HubertModel,
    transformers.HubertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1,
                              num_conv_pos_embedding_groups=2, conv_dim=(2,) * 7),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6000), min_size=1, max_size=4))
def test_frames_of_samples_are_those_of_transformers(sizes):
    """Utterances that are too short for a frame included; the longest has frames enough for the reference to count
    from the end."""
    sizes = [max(1200, *sizes), *sizes]
    frames = convolution_output_lengths(max(sizes), HubertConfig())
    samples = np.arange(max(sizes)) < np.array(sizes)[:, None]
    expected = _REFERENCE._get_feature_vector_attention_mask(frames, torch.tensor(samples).long())
    np.testing.assert_array_equal(feature_frame_mask(jnp.asarray(samples), HubertConfig()), expected.numpy())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5000))
def test_log_mel_frames_are_windows_that_fit(samples):
    expected = len(range(0, samples - 400 + 1, 160))
    assert num_log_mel_frames(samples) == expected == num_log_mel_frames(np.array([samples]))[0]


def test_masks_of_numbers_and_of_nothing():
    np.testing.assert_array_equal(as_bool_mask(np.array([[1, 0]]), 1, 2), [[True, False]])
    np.testing.assert_array_equal(as_bool_mask(np.array([[1.0, 0.0]]), 1, 2), [[True, False]])
    assert as_bool_mask(None, 2, 3).all()
