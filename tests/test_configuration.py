"""Configurations: the fields and files of Transformers, and what is refused."""

import json

import pytest
import transformers

from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig

FAMILIES = [(Wav2Vec2BertConfig, transformers.Wav2Vec2BertConfig), (HubertConfig, transformers.HubertConfig)]

#: Fields as Transformers 4.37.2 writes them to config.json, its own additions included.
OLD_FILE = {
    "model_type": "wav2vec2-bert",
    "architectures": ["Wav2Vec2BertForCTC"],
    "transformers_version": "4.37.2",
    "torch_dtype": "float32",
    "vocab_size": 32,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "adapter_kernel_size": 3,
    "mask_time_prob": 0,
    "tdnn_dim": [8, 8],
    "codevector_dim": 768,
    "id2label": {str(index): f"class {index}" for index in range(11)},
    "label2id": {f"class {index}": index for index in range(11)},
}


@pytest.mark.parametrize(("ours", "theirs"), FAMILIES)
def test_defaults_are_those_of_transformers(ours, theirs):
    fields, expected = ours().to_dict(), theirs().to_dict()
    shared = set(fields) & set(expected)
    assert {"hidden_size", "layerdrop", "mask_time_min_masks", "ctc_loss_reduction", "id2label"} <= shared
    for name in shared - {"architectures"}:
        value = list(fields[name]) if isinstance(fields[name], tuple) else fields[name]
        other = {str(key): label for key, label in expected[name].items()} if name == "id2label" else expected[name]
        assert value == (list(other) if isinstance(other, tuple) else other), name


@pytest.mark.parametrize(("ours", "theirs"), FAMILIES)
def test_files_go_to_transformers_and_back(ours, theirs, tmp_path):
    changes = {"hidden_size": 48, "num_attention_heads": 4, "layerdrop": 0.0, "num_labels": 3, "vocab_size": 40}
    config = ours().replace(**changes)
    config.save_pretrained(tmp_path / "ours")
    loaded = theirs.from_pretrained(tmp_path / "ours")
    assert {name: getattr(loaded, name) for name in changes} == changes
    loaded.save_pretrained(tmp_path / "theirs")
    back = ours.from_pretrained(tmp_path / "theirs")
    assert back.replace(architectures=None) == ours.from_dict(back.to_dict()).replace(architectures=None)
    for name in ours.field_names():
        assert getattr(back, name) == getattr(config, name), name


def test_files_of_transformers_4_are_read_and_their_other_fields_kept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_FILE))
    config = Wav2Vec2BertConfig.from_pretrained(tmp_path)
    assert config.architectures == ("Wav2Vec2BertForCTC",)
    assert config.tdnn_dim == (8, 8)
    assert config.id2label[10] == "class 10" and config.id2label[2] == "class 2"
    assert config.mask_time_prob == 0.0 and isinstance(config.mask_time_prob, float)
    config.save_pretrained(tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    for name in ("transformers_version", "torch_dtype", "codevector_dim", "hidden_size", "tdnn_dim"):
        assert written[name] == OLD_FILE[name]
    assert "additional_fields" not in written and "compatibility" not in written


def test_configurations_can_be_hashed_and_changed():
    config = Wav2Vec2BertConfig(vocab_size=10)
    assert hash(config) == hash(Wav2Vec2BertConfig(vocab_size=10))
    assert config.replace(hidden_size=64, num_attention_heads=4).output_hidden_size == 64
    assert config.replace(output_hidden_size=32, hidden_size=64).output_hidden_size == 32
    assert config.replace(num_labels=5).id2label[4] == "LABEL_4"
    assert (
        Wav2Vec2BertConfig.from_dict(config.replace(compatibility="corrected").to_dict()).compatibility == "corrected"
    )
    assert config.inputs_to_logits_ratio == 320
    assert config.replace(add_adapter=True, num_adapter_layers=2).inputs_to_logits_ratio == 1280
    assert HubertConfig().inputs_to_logits_ratio == 320


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embeddings_type": "absolute"}, "must be 'relative_key', 'relative', 'rotary' or None"),
        ({"conv_depthwise_kernel_size": 4}, "must be odd, not 4"),
        ({"use_intermediate_ffn_before_adapter": True}, "needs add_adapter"),
        ({"hidden_size": 10, "num_attention_heads": 3}, "hidden_size 10 is not a multiple of num_attention_heads 3"),
        ({"ctc_loss_reduction": "average"}, "'sum', 'mean' or 'none', not 'average'"),
        ({"compatibility": "transformers"}, "compatibility must be one of"),
        ({"hidden_dropout": 10.0}, "hidden_dropout must lie between 0 and 1, not 10.0"),
        ({"layerdrop": -0.1}, "layerdrop must lie between 0 and 1"),
        ({"mask_time_prob": 2}, "mask_time_prob must lie between 0 and 1"),
        ({"attention_dropout": 1.0}, "attention_dropout must be below 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ({"mask_time_length": 0}, "mask_time_length must be at least 1"),
        ({"id2label": {"1": "a", "2": "b"}}, r"id2label must name the labels 0 to 1, not \[1, 2\]"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "id2label names 2 labels, and num_labels is 3"),
        ({"model_type": "wav2vec2"}, "a 'wav2vec2' model, not of 'wav2vec2-bert'"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Wav2Vec2BertConfig.from_dict(fields)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 6])
def test_adapters_that_make_fewer_frames_than_are_counted_are_refused(kernel, stride):
    """The convolution pads by half the stride, and the lengths are counted as if it padded by half the kernel."""
    fields = {"add_adapter": True, "adapter_kernel_size": kernel, "adapter_stride": stride}
    frames = range(10, 30)
    made = [(count + 2 * (stride // 2) - kernel) // stride + 1 for count in frames]
    counted = [(count + 2 * (kernel // 2) - kernel) // stride + 1 for count in frames]
    if any(fewer < count for fewer, count in zip(made, counted, strict=True)):
        with pytest.raises(ValueError, match=f"adapter_kernel_size {kernel} leaves fewer frames .* take . at most"):
            Wav2Vec2BertConfig(**fields)
    else:
        Wav2Vec2BertConfig(**fields)
    Wav2Vec2BertConfig(**fields, compatibility="corrected")
    Wav2Vec2BertConfig(**fields | {"add_adapter": False})


def test_wrong_types_and_unknown_names_are_refused():
    for name, value in {"hidden_size": "64", "layerdrop": True, "tdnn_dim": [1, "2"], "hidden_act": 3}.items():
        with pytest.raises(TypeError, match=f"config field '{name}"):
            Wav2Vec2BertConfig.from_dict({name: value})
    with pytest.raises(TypeError, match="has no field 'hiden_size'"):
        Wav2Vec2BertConfig().replace(hiden_size=3)


@pytest.mark.parametrize("config_class", [HubertConfig, Wav2Vec2BertConfig])
def test_tokens_that_a_tokenizer_lacks_have_no_ids(config_class, tmp_path):
    theirs = getattr(transformers, config_class.__name__)(bos_token_id=None, eos_token_id=None)
    theirs.save_pretrained(tmp_path)
    ours = config_class.from_pretrained(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id) == (None, None)
    assert config_class().replace(bos_token_id=None).to_dict()["bos_token_id"] is None


def test_broken_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Wav2Vec2BertConfig.from_pretrained(tmp_path)
    for content, message in (("{", "is not valid JSON"), ("[]", "does not hold a JSON object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json {message}"):
            Wav2Vec2BertConfig.from_pretrained(tmp_path)
