"""Format x model x head x direction: nothing is lost, and Transformers loads what comes out."""

import json
import shutil
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from conversion_fixtures import (
    LARGE,
    MODELS,
    fairseq2_file,
    fairseq_file,
    random_model,
    s3prl_file,
    seamless_file,
    tensorflow_file,
    tensors_of,
    write_transformers,
)
from safetensors.torch import save_file

from speech_flax.conversion.command import main
from speech_flax.conversion.safetensors_file import read_safetensors
from speech_flax.conversion.source import open_source
from speech_flax.conversion.transformers_names import from_torch_names, to_torch_names

FORMS = (
    "safetensors",
    "sharded safetensors",
    "bin",
    "legacy bin",
    "sharded bin",
    "old weight norm bin",
    "old weight norm safetensors",
    "float16",
    "bfloat16",
)
#: Every model as safetensors, and every form of one model of each family.
CELLS = [(model, "safetensors") for model in MODELS] + [
    *(("hubert large ctc", form) for form in FORMS[1:]),
    *(("w2v-bert rotary adapter ctc", form) for form in ("sharded safetensors", "bin", "bfloat16")),
]


def written_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_safetensors(directory / "model.safetensors").items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, under the same names."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].tobytes() == tensor.tobytes(), name


def assert_transformers_loads(directory: Path, expected: dict[str, np.ndarray]) -> None:
    """No missing and no unexpected key, and the parameters that are expected."""
    architecture = transformers.AutoConfig.from_pretrained(directory).architectures[0]
    model, report = getattr(transformers, architecture).from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    assert_same(tensors_of(model), expected)


@pytest.mark.parametrize(("name", "form"), CELLS)
def test_a_transformers_directory_goes_there_and_back(tmp_path, name, form):
    model = random_model(name)
    write_transformers(model, tmp_path / "source", form)
    expected = tensors_of(model)
    if form in ("float16", "bfloat16"):
        kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[form]
        expected = {key: value.astype(kind) if value.dtype == np.float32 else value for key, value in expected.items()}
    assert main([str(tmp_path / "source"), str(tmp_path / "ours")]) == 0
    assert_same(written_tensors(tmp_path / "ours"), expected)
    single = {key: value.astype(np.float32) if value.dtype != np.int64 else value for key, value in expected.items()}
    assert_transformers_loads(tmp_path / "ours", single)
    if form in ("safetensors", "bfloat16"):
        assert main([str(tmp_path / "source"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
        shutil.rmtree(tmp_path / "source")
        assert main([str(tmp_path / "orbax"), str(tmp_path / "back"), "--to", "torch"]) == 0
        assert_same(written_tensors(tmp_path / "back"), expected)


@pytest.mark.parametrize(
    "name", ["hubert base", "hubert large", "hubert batch norm", "hubert base ctc", "hubert large ctc"]
)
def test_fairseq_hubert_is_read_without_fairseq(tmp_path, capsys, name):
    model = random_model(name)
    fairseq_file(model, tmp_path / "checkpoint.pt")
    assert main([str(tmp_path / "checkpoint.pt"), str(tmp_path / "ours")]) == 0
    assert_transformers_loads(tmp_path / "ours", tensors_of(model))
    found, wanted = transformers.AutoConfig.from_pretrained(tmp_path / "ours").to_dict(), model.config.to_dict()
    unknowable = {
        "architectures",
        "classifier_proj_size",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "transformers_version",
    }
    wanted = {field: value for field, value in wanted.items() if field not in unknowable}
    if "ctc" not in name:
        del wanted["vocab_size"]  # which a bare model has no use for
    assert {field: found.get(field) for field in wanted} == wanted
    printed = capsys.readouterr().out
    assert "HuBERT of fairseq, " + ("fine-tuned with CTC" if "ctc" in name else "pre-trained") in printed
    assert "num_attention_heads: 2" in printed
    assert "usual" not in printed
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert extractor.return_attention_mask == ("large" in name)
    assert extractor.do_normalize
    if "ctc" in name:
        tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "ours")
        assert tokenizer.convert_ids_to_tokens(range(7)) == ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T"]
        assert tokenizer.decode([5, 5, 0, 5, 4, 6]) == "EE T"


def test_what_a_file_does_not_say_is_assumed_aloud(tmp_path, capsys):
    model = random_model("hubert usual")
    fairseq_file(model, tmp_path / "checkpoint.pt", settings=False)
    assert main([str(tmp_path / "checkpoint.pt"), str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().out
    for assumption in (
        "num_attention_heads = 2",
        "do_stable_layer_norm = False",
        "conv_stride = (5, 2, 2, 2, 2, 2, 2)",
    ):
        assert f"{assumption} is what is usual" in printed
    assert_transformers_loads(tmp_path / "ours", tensors_of(model))


def test_released_w2v_bert_is_read(tmp_path, capsys):
    model = random_model("w2v-bert")
    seamless_file(model, tmp_path / "conformer_shaw.pt")
    assert main([str(tmp_path / "conformer_shaw.pt"), str(tmp_path / "ours")]) == 0
    assert_transformers_loads(tmp_path / "ours", tensors_of(model))
    assert "left out" in capsys.readouterr().out
    assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "ours").padding_value == 1


@pytest.mark.parametrize("name", ["w2v-bert", "w2v-bert relative", "w2v-bert adapter", "w2v-bert wide adapter"])
def test_w2v_bert_of_fairseq2_is_read(tmp_path, name):
    model = random_model(name)
    fairseq2_file(model, tmp_path / "model.pt")
    assert main([str(tmp_path / "model.pt"), str(tmp_path / "ours")]) == 0
    assert_transformers_loads(tmp_path / "ours", tensors_of(model))
    found = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (found.adapter_kernel_size, found.adapter_stride) == (
        model.config.adapter_kernel_size,
        model.config.adapter_stride,
    )


def test_the_stride_of_an_adapter_that_nobody_published_is_not_guessed(tmp_path, capsys):
    fairseq2_file(random_model("w2v-bert adapter"), tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt")
    weights = content["model"]
    for name in weights:
        if name.endswith("_conv.weight") and "adaptor" in name:
            weights[name] = torch.zeros(*weights[name].shape[:2], 5)
    torch.save(content, tmp_path / "model.pt")
    assert main([str(tmp_path / "model.pt"), str(tmp_path / "ours")]) == 1
    message = "the file does not say adapter_stride, and nothing usual fits its shapes"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_head_of_s3prl_is_put_on_its_model(tmp_path, capsys):
    model = random_model("hubert sequence")
    s3prl_file(model, tmp_path / "best.ckpt")
    write_transformers(model.hubert, tmp_path / "base", "safetensors")
    with pytest.raises(ValueError, match="--base"):
        main([str(tmp_path / "best.ckpt"), str(tmp_path / "ours")])
    arguments = [str(tmp_path / "best.ckpt"), str(tmp_path / "ours"), "--base", str(tmp_path / "base")]
    assert main(arguments) == 0
    assert_transformers_loads(tmp_path / "ours", tensors_of(model))
    assert not transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "ours").do_normalize


@pytest.mark.parametrize("name", ["hubert base ctc", "hubert large ctc"])
def test_tensorflow_weights_are_read(tmp_path, name):
    model = random_model(name)
    write_transformers(model, tmp_path / "source", "bin")
    (tmp_path / "source/pytorch_model.bin").unlink()
    tensorflow_file(tensors_of(model), tmp_path / "source/tf_model.h5")
    assert main([str(tmp_path / "source"), str(tmp_path / "ours")]) == 0
    assert_transformers_loads(tmp_path / "ours", tensors_of(model))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (fairseq_file, "hubert base"),
        (fairseq_file, "hubert large ctc"),
        (fairseq_file, "hubert batch norm"),
        (seamless_file, "w2v-bert"),
        (fairseq2_file, "w2v-bert adapter"),
    ],
)
def test_every_table_gives_back_the_names_and_values_that_it_reads(tmp_path, write, name):
    write(random_model(name), tmp_path / "file.pt")
    source = open_source(tmp_path / "file.pt")
    used = {key: one.read() for key, one in source.tensors.items() if not source.table.drops(key)}
    assert_same(to_torch_names(from_torch_names(used, source.table), source.table), used)


def test_masked_spec_embed_may_be_missing_or_left_over(tmp_path, capsys):
    model = random_model("w2v-bert")
    write_transformers(model, tmp_path / "extra", "safetensors")
    config = json.loads((tmp_path / "extra/config.json").read_text())
    (tmp_path / "extra/config.json").write_text(json.dumps(config | {"mask_time_prob": 0.0}))
    assert main([str(tmp_path / "extra"), str(tmp_path / "without")]) == 0
    assert "left out: masked_spec_embed" in capsys.readouterr().out
    expected = tensors_of(model)
    del expected["masked_spec_embed"]
    assert_transformers_loads(tmp_path / "without", expected)
    (tmp_path / "without/config.json").write_text(json.dumps(config))
    assert main([str(tmp_path / "without"), str(tmp_path / "with")]) == 0
    assert "masked_spec_embed is not in the file and starts from random values" in capsys.readouterr().out
    assert set(written_tensors(tmp_path / "with")) == {*expected, "masked_spec_embed"}


def test_nothing_is_written_unless_everything_fits(tmp_path, capsys):
    model = random_model("w2v-bert rotary adapter ctc")
    write_transformers(model, tmp_path / "source", "safetensors")
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.bias"}
    state["lm_head.bais"] = model.state_dict()["lm_head.bias"].clone()
    state["wav2vec2_bert.encoder.layers.0.ffn1.output_dense.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "source/model.safetensors")
    assert main([str(tmp_path / "source"), str(tmp_path / "ours")]) == 1
    message = capsys.readouterr().err
    assert "lm_head.bais [11] is known to no rule of this format; the nearest name is 'lm_head.bias'" in message
    assert "lm_head/bias is filled by nothing" in message
    assert (
        "has the shape [3] (as laid out here), wav2vec2_bert/encoder/layers/ffn1/output_dense/bias[0] needs [16]"
        in message
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_layers_of_different_types_get_the_widest_in_one_leaf(tmp_path, capsys):
    model = random_model("w2v-bert")
    write_transformers(model, tmp_path / "source", "safetensors")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    halved = {name: tensor.half() for name, tensor in state.items() if ".layers.0." in name}
    save_file(state | halved, tmp_path / "source/model.safetensors", {"format": "pt"})
    assert main([str(tmp_path / "source"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert f"note: {len(halved)} parameters differ in type between layers" in capsys.readouterr().out
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    assert_same(
        written_tensors(tmp_path / "back"), tensors_of(model) | {k: v.float().numpy() for k, v in halved.items()}
    )
    assert main([str(tmp_path / "source"), str(tmp_path / "ours")]) == 0
    assert_same(written_tensors(tmp_path / "ours"), tensors_of(model) | {k: v.numpy() for k, v in halved.items()})


@pytest.mark.parametrize("part", ["conv_module.pointwise_conv1.weight", "conv_module.pointwise_conv2.weight"])
def test_a_pointwise_convolution_that_is_none_is_refused(tmp_path, part, capsys):
    model = random_model("w2v-bert")
    write_transformers(model, tmp_path / "source", "safetensors")
    state = {name: tensor.repeat(1, 1, 3) if part in name else tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "source/model.safetensors", {"format": "pt"})
    assert main([str(tmp_path / "source"), str(tmp_path / "ours")]) == 1
    assert f"encoder.layers.0.{part} has the shape" in capsys.readouterr().err


def test_processor_files_come_along(tmp_path):
    write_transformers(random_model("w2v-bert"), tmp_path / "source", "safetensors")
    for name in ("preprocessor_config.json", "vocab.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).write_text("{}")
    (tmp_path / "source/secret.txt").write_text("")
    assert main([str(tmp_path / "source"), str(tmp_path / "ours")]) == 0
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "vocab.json",
        "tokenizer_config.json",
    }


def test_weights_that_tensorflow_wrote_are_read(tmp_path):
    """The file itself is made by TensorFlow; that the model computes the same is tested with the model."""
    fixture = Path(__file__).parent / "tensorflow_hubert"
    assert main([str(fixture), str(tmp_path / "ours")]) == 0
    with h5py.File(fixture / "tf_model.h5") as file:
        kernel = file["hubert/tf_hubert_for_ctc/hubert/encoder/layers.1/attention/q_proj/kernel:0"][()]
    model = transformers.HubertForCTC.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    np.testing.assert_array_equal(tensors_of(model)["hubert.encoder.layers.1.attention.q_proj.weight"], kernel.T)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("HubertForCTC", {}),
        ("HubertForCTC", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                          "intermediate_size": 4096, **LARGE}),
        ("Wav2Vec2BertForCTC", {"vocab_size": 32}),
    ],
    ids=["hubert-base", "hubert-large", "w2v-bert-2.0"],
)  # fmt: skip
def test_full_size_models_go_there_and_back_and_compute_the_same(tmp_path, architecture, fields):
    model_class = getattr(transformers, architecture)
    model_class(model_class.config_class(**fields)).save_pretrained(tmp_path / "source")
    assert main([str(tmp_path / "source"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back"), "--to", "torch"]) == 0
    source = read_safetensors(tmp_path / "source/model.safetensors")
    back = read_safetensors(tmp_path / "back/model.safetensors")
    assert set(source) == set(back)
    assert all(source[name].read().tobytes() == back[name].read().tobytes() for name in source)
    assert main([str(tmp_path / "back"), "--check"]) == 0


def _sharded(model: torch.nn.Module, path: Path) -> None:
    write_transformers(model, path, "sharded safetensors")


def _pickled(model: torch.nn.Module, path: Path) -> None:
    write_transformers(model, path, "bin")


def _tensorflow(model: torch.nn.Module, path: Path) -> None:
    model.config.save_pretrained(path)
    tensorflow_file(tensors_of(model), path / "tf_model.h5")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (_sharded, "full w2v-bert-2.0"),
        (_pickled, "full hubert-large ctc"),
        (fairseq_file, "full hubert-base"),
        (fairseq_file, "full hubert-large ctc"),
        (fairseq_file, "full hubert-xlarge"),
        (seamless_file, "full w2v-bert-2.0"),
        (fairseq2_file, "full w2v-bert-2.0 adapter"),
        (_tensorflow, "full hubert-large ctc"),
        (s3prl_file, "full hubert-base sequence"),
    ],
)
def test_full_size_checkpoints_of_every_format_are_read(tmp_path, write, name):
    model = random_model(name)
    write(model, tmp_path / "source")
    base = []
    if write is s3prl_file:
        write_transformers(model.hubert, tmp_path / "base", "safetensors")
        base = ["--base", str(tmp_path / "base")]
    assert main([str(tmp_path / "source"), str(tmp_path / "ours"), *base]) == 0
    found = read_safetensors(tmp_path / "ours/model.safetensors")
    expected = tensors_of(model)
    assert set(found) == set(expected)
    assert [key for key, tensor in found.items() if tensor.read().tobytes() != expected[key].tobytes()] == []
