"""The evidence that a conversion comes with: it passes where nothing changed, and fails where something did."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
import soundfile
import transformers
from conversion_fixtures import MODELS, WAV2VEC2_BERT, fairseq_file, random_model, write_transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from speech_flax import AutoModel, SeamlessM4TFeatureExtractor
from speech_flax.conversion import published
from speech_flax.conversion.command import main
from speech_flax.conversion.evidence import Row, compare
from speech_flax.conversion.published import PUBLISHED, Published


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    """A CTC model with adapter, and what PyTorch computes with it."""
    directory = tmp_path_factory.mktemp("ctc")
    write_transformers(random_model("w2v-bert rotary adapter ctc"), directory / "model", "safetensors")
    vocabulary = {symbol: index for index, symbol in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdef"])}
    (directory / "model/vocab.json").write_text(json.dumps(vocabulary))
    arguments = [str(directory / "model"), "--write-reference", str(directory / "reference.safetensors"), "--gradients"]
    assert main(arguments) == 0
    return directory


def test_a_faithful_conversion_passes_and_reports(ctc, tmp_path, capsys):
    destination = tmp_path / "ours"
    assert main([str(ctc / "model"), str(destination), "--check", "--gradients"]) == 0
    printed = capsys.readouterr().out
    for row in ("inputs", "hidden_states.0", "hidden_states.2", "logits", "loss", "transcript"):
        assert f"\n{row}" in printed
    assert "verdict: the same; tolerance: relative 0.0001, gradients l2 0.001" in printed
    report = json.loads((destination / "parity/parity.json").read_text())
    assert report["passed"]
    assert len(report["gradients"]) == 120
    assert all(row["max_abs"] < 1e-4 for row in report["rows"])
    assert all(ours == theirs for ours, theirs in report["transcripts"])
    assert (destination / "parity/parity.png").read_bytes().startswith(b"\x89PNG")


def test_a_stored_reference_needs_no_torch(ctc, monkeypatch, capsys):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = [str(ctc / "model"), "--reference", str(ctc / "reference.safetensors")]
    assert main(arguments) == 0
    assert "verdict: the same" in capsys.readouterr().out
    with pytest.raises(ImportError, match="--write-reference FILE"):
        main([str(ctc / "model"), "--check"])


def test_a_changed_weight_fails_and_the_first_layer_that_differs_is_named(ctc, tmp_path, capsys):
    weights = load_file(ctc / "model/model.safetensors")
    weights["wav2vec2_bert.encoder.layers.1.ffn1.output_dense.weight"][0, 0] += 0.05
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text((ctc / "model/config.json").read_text())
    save_file(weights, changed / "model.safetensors")
    assert main([str(changed), "--reference", str(ctc / "reference.safetensors")]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"verdict: DIFFERENT, first at hidden_states\.2 \(\d+ in all\)", printed)


def test_bfloat16_has_a_tolerance_of_its_own(ctc, capsys):
    reference = ["--reference", str(ctc / "reference.safetensors")]
    assert main([str(ctc / "model"), *reference, "--dtype", "bfloat16"]) == 0
    assert "verdict: the same; tolerance: l2 0.03\n" in capsys.readouterr().out
    assert main([str(ctc / "model"), *reference, "--precision", "default"]) == 0
    assert "verdict: the same; tolerance: l2 0.02\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--gradients"], ["--dtype", "bfloat16"], ["--audio", "a.wav"]])
def test_options_of_a_comparison_without_one_are_refused(ctc, option):
    with pytest.raises(ValueError, match=f"{option[0]} says how to compare: add --check"):
        main([str(ctc / "model"), *option])


def test_a_reference_of_something_else_is_refused(ctc, tmp_path):
    write_transformers(random_model("w2v-bert"), tmp_path / "other", "safetensors")
    with pytest.raises(ValueError, match="is the reference of a Wav2Vec2BertForCTC, not of a Wav2Vec2BertModel"):
        main([str(tmp_path / "other"), "--reference", str(ctc / "reference.safetensors")])
    with pytest.raises(ValueError, match="is no reference of this library"):
        main([str(tmp_path / "other"), "--reference", str(tmp_path / "other/model.safetensors")])
    with pytest.raises(FileNotFoundError, match="does not exist; make it with --write-reference"):
        main([str(tmp_path / "other"), "--reference", str(tmp_path / "nothing")])


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("w2v-bert")][-3:])
def test_every_head_is_checked(tmp_path, name, capsys):
    write_transformers(random_model(name), tmp_path / "source", "safetensors")
    assert main([str(tmp_path / "source"), "--check"]) == 0
    assert re.search(r"\nlogits ", capsys.readouterr().out)


def test_what_transformers_cannot_read_is_checked_on_the_converted_weights(tmp_path, capsys):
    fairseq_file(random_model("hubert large ctc"), tmp_path / "checkpoint.pt")
    assert main([str(tmp_path / "checkpoint.pt"), str(tmp_path / "ours"), "--to", "orbax", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "its side runs on the converted weights" in printed
    assert "verdict: the same" in printed


def test_recordings_may_be_named(ctc, tmp_path, capsys):
    path = tmp_path / "tone.wav"
    time = np.arange(16_000) / 16_000
    noise = np.random.default_rng(0).normal(0, 0.02, 16_000)
    soundfile.write(path, 0.1 * np.sin(2 * np.pi * 300 * time * (1 + time)) + noise, 16_000)
    reference = tmp_path / "reference.safetensors"
    arguments = [str(ctc / "model"), "--check", "--write-reference", str(reference), "--audio", str(path)]
    assert main(arguments) == 0
    assert load_file(reference)["attention_mask"].sum() == 49


def low_passed(path):
    """A voice at the rate of a telephone, which leaves nothing above 4 kHz: a strong hum and some noise."""
    random, samples = np.random.default_rng(0), 8_000
    time = np.arange(samples) / 8_000
    voice = 0.6 * np.sin(2 * np.pi * 150 * time) * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))
    soundfile.write(path, voice + random.normal(0, 0.01, samples), 8_000)


def test_rounding_in_bins_without_energy_is_no_difference(tmp_path, capsys):
    """Single log-mel values above the telephone's 4 kHz are those of rounding."""
    config = transformers.Wav2Vec2BertConfig(**WAV2VEC2_BERT | {"feature_projection_input_dim": 160})
    write_transformers(transformers.Wav2Vec2BertModel(config), tmp_path / "model", "safetensors")
    low_passed(tmp_path / "telephone.wav")
    report = tmp_path / "report"
    arguments = [str(tmp_path / "model"), "--check", "--report", str(report)]
    assert main([*arguments, "--audio", str(tmp_path / "telephone.wav")]) == 0
    (inputs,) = [row for row in json.loads((report / "parity.json").read_text())["rows"] if row["name"] == "inputs"]
    assert inputs["max_abs"] > 5e-4
    assert "verdict: the same; tolerance" in capsys.readouterr().out


def test_a_wrong_front_end_is_a_difference(ctc, tmp_path, capsys):
    """Features of a waveform that is off by one sample."""
    tensors = load_file(ctc / "reference.safetensors")
    with safe_open(ctc / "reference.safetensors", "np") as file:
        metadata = file.metadata()
    for name in ("waveform.0", "waveform.1"):
        tensors[name] = np.roll(tensors[name], 1)
    save_file(tensors, tmp_path / "shifted.safetensors", metadata)
    assert main([str(ctc / "model"), "--reference", str(tmp_path / "shifted.safetensors")]) == 1
    assert "verdict: DIFFERENT, first at inputs (1 in all)" in capsys.readouterr().out


def test_a_weight_file_goes_with_what_lies_beside_it(ctc, tmp_path, capsys):
    """What Transformers loads from that directory is the other side of the comparison."""
    for name, there in (("model.safetensors", True), ("other.safetensors", False)):
        source = tmp_path / name.split(".")[0]
        shutil.copytree(ctc / "model", source)
        (source / "model.safetensors").rename(source / name)
        config = json.loads((source / "config.json").read_text()) | {"num_attention_heads": 4, "pad_token_id": 7}
        (source / "config.json").write_text(json.dumps(config))
        ours = tmp_path / f"ours {name}"
        assert main([str(source / name), str(ours), "--check"]) == 0
        printed = capsys.readouterr().out
        assert f"{name}: Transformers weights, with config.json, vocab.json beside them" in printed
        assert ("its side runs on the converted weights" not in printed) == there
        assert "verdict: the same; tolerance" in printed
        found = json.loads((ours / "config.json").read_text())
        assert (found["num_attention_heads"], found["pad_token_id"]) == (4, 7)
        assert (ours / "vocab.json").read_bytes() == (source / "vocab.json").read_bytes()


def test_a_verdict_on_an_assumed_configuration_says_so(ctc, tmp_path, capsys):
    shutil.copyfile(ctc / "model/model.safetensors", tmp_path / "alone.safetensors")
    assert main([str(tmp_path / "alone.safetensors"), str(tmp_path / "ours"), "--check"]) == 0
    printed = capsys.readouterr().out
    assert "note: num_attention_heads = 1 is what is usual" in printed
    assert "note: pad_token_id = 0, the blank of CTC, is what is usual" in printed
    assert "note: there is no tokenizer" in printed
    count = printed.count("is what is usual")
    assert f"verdict: the same, with assumptions about the configuration ({count}, noted above); tol" in printed


def test_measures_are_what_they_are_called():
    row = compare("x", np.array([1.0, 2.0, 2.0]), np.array([1.0, 2.0, 0.0]), lambda row: row.max_abs < 1)
    scale = np.sqrt(5 / 3)
    expected = Row("x", 2.0, 2 / 3, scale, 2 / scale, 2 / np.sqrt(5), 5 / (3 * np.sqrt(5)), False)
    assert row.name == expected.name
    assert not row.passed
    for measure in ("max_abs", "mean_abs", "scale", "relative", "l2", "cosine"):
        assert getattr(row, measure) == pytest.approx(getattr(expected, measure))
    with pytest.raises(ValueError, match="has the shape"):
        compare("x", np.zeros(2), np.zeros(3), lambda row: True)


def test_published_numbers_are_compared(ctc, monkeypatch, capsys):
    """The flow, on a model of ours: the published models are not at hand in a test."""
    waveform = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    monkeypatch.setattr(published, "_recordings", lambda example, files: [waveform])
    extractor = {"feature_size": 6, "num_mel_bins": 6, "stride": 2}
    (ctc / "model/preprocessor_config.json").write_text(json.dumps(extractor))
    wrong = Published(
        "x", "a test", 0.01, (0,), transcripts=("?",), labels="abc", loss=-1.0, shape=(1, 2), statistics=(0, 9.0, 9.0),
        slices={(0, 3, 2): ((0.0, 9.0), (0.0, 0.0))}, classes=((0, -9.0),),
    )  # fmt: skip
    monkeypatch.setitem(PUBLISHED, "w2v-bert-2.0", wrong)
    arguments = [str(ctc / "model"), "--check-published", "w2v-bert-2.0"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert printed.count("DIFFERENT") == 6
    text, loss = re.search(r"transcript: '(.*)', published '\?'", printed)[1], re.search(r"loss: ([\d.]+)", printed)[1]
    module, params = AutoModel.from_pretrained(ctc / "model")
    encoded = SeamlessM4TFeatureExtractor(**extractor)([waveform], sampling_rate=16_000, return_tensors="np")
    logits = np.asarray(jax.jit(module.apply)({"params": params}, **encoded).logits)
    right = Published(
        "x", "a test", 0.01, (0,), transcripts=(f"{text.upper()[:3]}...",), ignore_case=True, labels="abc",
        loss=float(loss), shape=logits.shape[:2], statistics=(0, float(logits.mean()), float(np.std(logits, ddof=1))),
        slices={(0, 3, 2): tuple(map(tuple, logits[0, 3:5, 2:4].tolist()))},
        classes=((int(logits.argmax()), float(logits.max())),),
    )  # fmt: skip
    monkeypatch.setitem(PUBLISHED, "w2v-bert-2.0", right)
    assert main(arguments) == 0
    assert capsys.readouterr().out.count(": same") == 6
    (ctc / "model/preprocessor_config.json").unlink()


def test_published_features_of_fairseq_need_files(ctc):
    with pytest.raises(ValueError, match=r"6313-76958-0021\.flac, sample\.base\.L9\.npy"):
        main([str(ctc / "model"), "--check-published", "fairseq-hubert-base"])
