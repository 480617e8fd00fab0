"""What a model with a classifying head says of audio, and what is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from random_parameters import random_parameters

import speech_flax
from speech_flax import HubertConfig, SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2FeatureExtractor
from speech_flax.classification import Classifier, Segment, describe, segments
from speech_flax.cli import main

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "classifier_proj_size": 6,
    "vocab_size": 5,
    "id2label": ["no", "perhaps", "yes"],
}
BERT = Wav2Vec2BertConfig.from_dict(
    TINY
    | {
        "feature_projection_input_dim": 16,
        "conv_depthwise_kernel_size": 3,
        "left_max_position_embeddings": 3,
        "right_max_position_embeddings": 2,
        "tdnn_dim": (6, 7),
        "tdnn_kernel": (3, 2),
        "tdnn_dilation": (1, 3),
        "xvector_output_dim": 4,
    }
)
HUBERT = HubertConfig.from_dict(
    TINY
    | {
        "conv_dim": (8, 8, 8),
        "conv_kernel": (10, 8, 4),
        "conv_stride": (5, 8, 8),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
)
WAVEFORM = (0.1 * np.random.RandomState(0).standard_normal(7001)).astype(np.float32)


def saved(directory: Path, name: str, **changes: object) -> tuple[Path, object]:
    """A model with random weights in ``directory``, and a function that gives its outputs for ``WAVEFORM``."""
    is_hubert = name.startswith("Hubert")
    config = (HUBERT if is_hubert else BERT).replace(**changes)
    extractor = Wav2Vec2FeatureExtractor() if is_hubert else SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8)
    inputs = dict(extractor(WAVEFORM, sampling_rate=16_000, return_tensors="np"))
    model = getattr(speech_flax, name)(config)
    params = random_parameters(model, **inputs)
    model.save_pretrained(directory, model, params)
    extractor.save_pretrained(directory)
    return directory, jax.jit(lambda: model.apply({"params": params}, **inputs))


@pytest.mark.parametrize("family", ["Wav2Vec2Bert", "Hubert"])
def test_utterances_have_the_most_likely_class(family, tmp_path):
    directory, outputs = saved(tmp_path, f"{family}ForSequenceClassification")
    result = Classifier.from_pretrained(directory)(WAVEFORM)
    probabilities = jax.nn.softmax(outputs().logits[0])
    np.testing.assert_allclose(list(result.scores.values()), probabilities, atol=1e-4)  # four digits are kept
    assert list(result.scores) == TINY["id2label"] and result.label == max(result.scores, key=result.scores.get)
    assert set(result.known()) == {"label", "scores"}
    assert describe(result) == f"{result.label} ({result.scores[result.label]:.0%})"


def test_several_classes_may_hold_at_once(tmp_path):
    name, problem = "Wav2Vec2BertForSequenceClassification", "multi_label_classification"
    directory, outputs = saved(tmp_path, name, problem_type=problem)
    result = Classifier.from_pretrained(directory)(WAVEFORM)
    probabilities = np.asarray(jax.nn.sigmoid(outputs().logits[0]))
    np.testing.assert_allclose(list(result.scores.values()), probabilities, atol=1e-4)
    assert result.label == [name for name, one in zip(TINY["id2label"], probabilities, strict=True) if one > 0.5]


def test_a_single_label_is_a_value(tmp_path):
    directory, outputs = saved(tmp_path, "Wav2Vec2BertForSequenceClassification", num_labels=1)
    result = Classifier.from_pretrained(directory)(WAVEFORM)
    assert result.known() == {"value": pytest.approx(float(outputs().logits[0, 0]), abs=1e-5)}


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_frames_become_segments(problem, tmp_path):
    directory, outputs = saved(tmp_path, "Wav2Vec2BertForAudioFrameClassification", problem_type=problem)
    result = Classifier.from_pretrained(directory)(WAVEFORM)
    logits = np.asarray(outputs().logits[0])[: (1 + (WAVEFORM.size - 400) // 160) // 2]  # the last vector is half full
    holds = logits > 0 if problem.startswith("multi") else logits.argmax(-1)[:, None] == np.arange(3)
    assert holds.any() and set(result.known()) == {"segments"}
    drawn = np.zeros_like(holds)
    for segment in result.segments:
        first, end = round(segment.start / 0.02), round(segment.end / 0.02)
        drawn[first:end, TINY["id2label"].index(segment.label)] = True
    np.testing.assert_array_equal(drawn, holds)


def test_segments_are_uninterrupted_stretches_in_the_order_of_their_beginnings():
    present = np.array([[0, 1], [1, 1], [1, 0], [0, 0], [1, 0]], bool)
    expected = [Segment(0.0, 0.04, "B"), Segment(0.02, 0.06, "A"), Segment(0.08, 0.1, "A")]
    assert segments(present, ("A", "B"), 0.02) == expected


def test_speakers_are_embedded_with_length_one(tmp_path, capsys):
    directory, outputs = saved(tmp_path / "model", "Wav2Vec2BertForXVector")
    result = Classifier.from_pretrained(directory)(WAVEFORM)
    frames = (1 + (WAVEFORM.size - 400) // 160) // 2
    assert outputs().embeddings.shape == (1, 4) and frames == 21
    assert set(result.known()) == {"embedding"} and np.linalg.norm(result.embedding) == pytest.approx(1, abs=1e-5)
    files = [str(tmp_path / name) for name in ("one.wav", "same.wav")]
    for file in files:
        soundfile.write(file, WAVEFORM, 16_000, subtype="FLOAT")
    capsys.readouterr()
    assert main(["classify", *files, "--model", str(directory)]) == 0
    assert capsys.readouterr().out.strip() == f"{files[0]} and {files[1]}: cosine 1.000"


def test_a_transcribing_model_is_refused(tmp_path):
    directory, _ = saved(tmp_path, "Wav2Vec2BertForCTC")
    with pytest.raises(ValueError, match="a Wav2Vec2BertForCTC does not classify; transcribe with a CTC model"):
        Classifier.from_pretrained(directory)


@pytest.mark.parametrize("family", ["Wav2Vec2Bert", "Hubert"])
def test_files_that_cannot_be_classified_are_named_and_the_others_are_done(family, tmp_path, capsys):
    directory, _ = saved(tmp_path / "model", f"{family}ForSequenceClassification")
    good, broken, short = (str(tmp_path / name) for name in ("good.wav", "broken.wav", "short.wav"))
    soundfile.write(good, WAVEFORM, 16_000)
    soundfile.write(short, WAVEFORM[:5], 16_000)
    Path(broken).write_bytes(b"RIFF, but no audio")
    capsys.readouterr()
    assert main(["classify", broken, short, good, "--model", str(directory), "--json"]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["file"] for line in printed.out.splitlines()] == [good]
    errors = printed.err.splitlines()
    assert len(errors) == 2 and all(error.startswith("error: ") for error in errors)
    assert broken in errors[0] and short in errors[1] and "too short for one frame" in errors[1]
    assert main(["classify", str(tmp_path / "absent.wav"), "--model", str(directory)]) == 1
    assert "absent.wav: no such file" in capsys.readouterr().err
