"""Transformers' own random models, read and written back."""

import json
import typing

import numpy as np
import pytest
import torch
import transformers
from conversion_keys import KEYS, VARIANTS
from safetensors.numpy import load_file

import speech_flax
from speech_flax.conversion.transformers_names import from_torch_names, to_torch_names, transformers_layout
from speech_flax.conversion.tree import flat
from speech_flax.models.wav2vec2_bert import Wav2Vec2BertForCTC, Wav2Vec2BertModel
from speech_flax.pretrained import parameter_shapes

#: Shape by name of every tensor of the variants, in Transformers 4.37.2.
WANTED_4_37 = json.loads(KEYS.read_text())
TINY = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "feature_projection_input_dim": 12,
    "left_max_position_embeddings": 5,
    "right_max_position_embeddings": 3,
    "conv_depthwise_kernel_size": 5,
    "tdnn_dim": (8, 8),
    "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 6,
    "classifier_proj_size": 10,
}
ADAPTER = {
    "add_adapter": True,
    "num_adapter_layers": 2,
    "output_hidden_size": 20,
    "use_intermediate_ffn_before_adapter": True,
}


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert np.asarray(one[name]).dtype == np.asarray(other[name]).dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("positions", ["relative_key", "relative", "rotary", None])
@pytest.mark.parametrize("adapter", [{}, ADAPTER], ids=["plain", "adapter"])
def test_wav2vec2_bert_names_go_there_and_back(positions, adapter):
    config = transformers.Wav2Vec2BertConfig(**TINY, position_embeddings_type=positions, **adapter)
    torch.manual_seed(0)
    state = tensors_of(transformers.Wav2Vec2BertModel(config))
    assert_equal(to_torch_names(from_torch_names(state)), state)


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector"])
def test_wav2vec2_bert_heads_go_there_and_back(head):
    config = transformers.Wav2Vec2BertConfig(**TINY, use_weighted_layer_sum=head != "ForCTC", num_labels=4)
    state = tensors_of(getattr(transformers, f"Wav2Vec2Bert{head}")(config))
    assert_equal(to_torch_names(from_torch_names(state)), state)


HUBERT = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (6, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 10,
}
HUBERT_VARIANTS = {
    "base": {},
    "large": {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
    "adapters": {"do_stable_layer_norm": True, "adapter_attn_dim": 5},
    "batch norm": {"conv_pos_batch_norm": True},
}


@pytest.mark.parametrize("variant", HUBERT_VARIANTS)
@pytest.mark.parametrize("head", ["Model", "ForCTC", "ForSequenceClassification"])
def test_hubert_names_go_there_and_back(variant, head):
    fields = HUBERT | HUBERT_VARIANTS[variant]
    config = transformers.HubertConfig(**fields, use_weighted_layer_sum=head == "ForSequenceClassification")
    state = tensors_of(getattr(transformers, f"Hubert{head}")(config))
    assert_equal(to_torch_names(from_torch_names(state)), state)


def test_both_spellings_of_weight_norm_are_read():
    state = tensors_of(transformers.HubertModel(transformers.HubertConfig(**HUBERT)))
    spelling = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    old = {}
    for name, tensor in state.items():
        for new, former in spelling.items():
            name = name.replace(new, former)
        old[name] = tensor
    assert set(old) != set(state)
    assert_equal(flat(from_torch_names(old)), flat(from_torch_names(state)))


@pytest.mark.parametrize("adapter", [{}, ADAPTER], ids=["plain", "adapter"])
def test_transformers_loads_what_is_saved_and_the_other_way_round(tmp_path, adapter):
    config = transformers.Wav2Vec2BertConfig(**TINY, **adapter)
    reference = transformers.Wav2Vec2BertForCTC(config)
    reference.save_pretrained(tmp_path / "theirs")
    module, params = Wav2Vec2BertForCTC.from_pretrained(tmp_path / "theirs")
    Wav2Vec2BertForCTC.save_pretrained(tmp_path / "ours", module, params)
    assert_equal(load_file(tmp_path / "ours/model.safetensors"), tensors_of(reference))
    loaded, report = transformers.Wav2Vec2BertForCTC.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_equal(tensors_of(loaded), tensors_of(reference))
    bare, base = Wav2Vec2BertModel.from_pretrained(tmp_path / "ours")
    assert_equal(flat(base), flat(params["wav2vec2_bert"]))
    assert bare.config.hidden_size == 16


def test_every_variant_has_key_lists_of_transformers_4_37():
    assert set(VARIANTS) == set(WANTED_4_37)


@pytest.mark.parametrize("name", VARIANTS)
def test_exported_files_hold_what_transformers_4_37_wants_and_nothing_else(name):
    """Names and shapes of its models with a recent PyTorch, which renamed the tensors of weight normalisation."""
    architecture, fields = VARIANTS[name]
    model_class = getattr(speech_flax, architecture)
    config = typing.get_type_hints(model_class)["config"].from_dict(fields)
    layout = transformers_layout(parameter_shapes(model_class(config)))
    assert {key: list(shape) for key, (_, _, shape) in layout.items()} == WANTED_4_37[name]
