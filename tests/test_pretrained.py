"""Loading and saving models: new heads, missing parts, damaged files, classes by name."""

import json
import logging

import jax
import numpy as np
import pytest
import transformers
from hub_cache import hub_cache

from speech_flax import AutoModel, Wav2Vec2BertConfig, Wav2Vec2BertForCTC, Wav2Vec2BertModel
from speech_flax.conversion.tree import flat
from speech_flax.pretrained import example_input, pretrained_directory

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "feature_projection_input_dim": 12,
    "conv_depthwise_kernel_size": 5,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Directory of a bare model."""
    directory = tmp_path_factory.mktemp("base")
    transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**TINY)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    """Directory of a CTC model of 7 symbols, written by this library."""
    directory = tmp_path_factory.mktemp("ctc")
    module = Wav2Vec2BertForCTC(Wav2Vec2BertConfig(**TINY, vocab_size=7))
    params = jax.jit(module.init)(jax.random.key(1), example_input(module.config))["params"]
    Wav2Vec2BertForCTC.save_pretrained(directory, module, params)
    return directory


def test_a_head_that_the_checkpoint_lacks_is_initialised_and_named(base, caplog):
    with caplog.at_level(logging.WARNING, "speech_flax.pretrained"):
        module, params = Wav2Vec2BertForCTC.from_pretrained(base, vocab_size=9)
    assert params["lm_head"]["kernel"].shape == (16, 9)
    assert 0.005 < np.std(params["lm_head"]["kernel"]) < 0.05
    assert "lm_head/bias, lm_head/kernel" in caplog.text
    assert module.config.vocab_size == 9


def test_a_head_of_another_size_is_initialised_and_named(ctc, caplog):
    with caplog.at_level(logging.WARNING, "speech_flax.pretrained"):
        _, params = Wav2Vec2BertForCTC.from_pretrained(ctc, vocab_size=9)
    assert params["lm_head"]["kernel"].shape == (16, 9)
    assert "'lm_head.weight' with the shape [16, 7] where this model has [16, 9]" in caplog.text


def test_an_adapter_that_the_configuration_adds_is_initialised_and_named(base, caplog):
    with caplog.at_level(logging.WARNING, "speech_flax.pretrained"):
        module, params = Wav2Vec2BertModel.from_pretrained(base, add_adapter=True)
    assert "adapter/layers_0/ffn/intermediate_dense/kernel" in caplog.text
    output = jax.jit(lambda: module.apply({"params": params}, np.zeros((1, 10, 12), np.float32)))()
    assert output.last_hidden_state.shape[1] == 5


def test_every_parameter_of_a_complete_checkpoint_is_loaded_without_a_word(ctc, caplog):
    with caplog.at_level(logging.WARNING, "speech_flax.pretrained"):
        module, params = AutoModel.from_pretrained(ctc, dtype="bfloat16", remat="full")
    assert isinstance(module, Wav2Vec2BertForCTC)
    assert module.remat == "full"
    assert caplog.text == ""
    assert {leaf.dtype for leaf in flat(params).values()} == {np.dtype(np.float32)}
    expected = jax.jit(module.init)(jax.random.key(1), example_input(module.config))["params"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_masked_spec_embed_may_be_missing_or_left_over(base, caplog):
    _, params = Wav2Vec2BertModel.from_pretrained(base, mask_time_prob=0.0)
    assert "masked_spec_embed" not in params
    assert caplog.text == ""


def test_encoder_layers_that_the_configuration_does_not_have_are_named(base, caplog):
    _, params = Wav2Vec2BertModel.from_pretrained(base, num_hidden_layers=1)
    assert params["encoder"]["layers"]["ffn1"]["intermediate_dense"]["kernel"].shape == (1, 16, 24)
    assert "encoder.layers.1.ffn1.intermediate_dense.weight" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "parameters are missing, the first is encoder/layers/.*[2]"),
        ({"intermediate_size": 32}, "has the shape .16, 24. there and .16, 32. here"),
        ({"colour": 3}, "no field 'colour'"),
    ],
)
def test_another_body_is_refused(base, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Wav2Vec2BertModel.from_pretrained(base, **changes)


def test_what_is_not_there_is_one_sentence(tmp_path, base):
    with pytest.raises(FileNotFoundError, match="does not exist; give a directory"):
        pretrained_directory(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="cannot be fetched from the hub"):
        pretrained_directory("nobody/nothing")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match=r"names the architecture 'BertModel'; known are .*Wav2Vec2BertForCTC"):
        AutoModel.from_pretrained(tmp_path)


def test_models_in_the_cache_of_the_hub_are_used_offline(base, tmp_path, monkeypatch):
    directory = hub_cache(tmp_path, "someone/model", monkeypatch)
    for file in base.iterdir():
        (directory / file.name).symlink_to(file)
    _, params = Wav2Vec2BertModel.from_pretrained("someone/model")
    assert "encoder" in params
