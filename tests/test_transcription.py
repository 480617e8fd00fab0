"""Recordings of any length to text with times, in chunks that join without a seam; and the command that does it."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from random_parameters import random_parameters

from speech_flax import (
    HubertConfig,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertProcessor,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)
from speech_flax.cli import main
from speech_flax.outputs import CausalLMOutput
from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer
from speech_flax.text.vocabulary import build_vocabulary
from speech_flax.transcription import Transcriber

RATE = 16_000
FRAME = 0.02  # seconds per output frame of the models here


@pytest.fixture(scope="module")
def processor() -> Wav2Vec2BertProcessor:
    tokenizer = Wav2Vec2CTCTokenizer(build_vocabulary(["a b c d e f"]))
    return Wav2Vec2BertProcessor(SeamlessM4TFeatureExtractor(), tokenizer)


class Loudness(nn.Module):
    """Writes ``a`` where there is sound and a space where there is none: a model whose answers are known."""

    config = Wav2Vec2BertConfig()

    def __call__(self, input_features, attention_mask) -> CausalLMOutput:
        loud = (input_features.mean(-1) > 0)[..., None]
        sound, silence = jax.nn.one_hot(5, 11), jax.nn.one_hot(4, 11)
        return CausalLMOutput(None, jnp.where(loud, sound, silence), None, None, None)


def beeps(seconds: float, at: list[float]) -> np.ndarray:
    """Noise for 0.3 s from each of the times ``at``."""
    random = np.random.default_rng(0)
    waveform = 1e-4 * random.standard_normal(round(seconds * RATE))
    for start in at:
        span = slice(round(start * RATE), round((start + 0.3) * RATE))
        waveform[span] += 0.3 * random.standard_normal(span.stop - span.start)
    return waveform.astype(np.float32)


@pytest.mark.parametrize("chunk_seconds", [30.0, 2.0, 1.3])
def test_words_are_found_where_they_are(processor, chunk_seconds):
    starts = [0.5, 1.4, 1.9, 3.1, 4.55]
    transcriber = Transcriber(Loudness(), {}, processor, chunk_seconds=chunk_seconds, margin_seconds=0.4)
    transcript = transcriber(beeps(5.0, starts))
    assert transcript.text == "a a a a a"
    assert transcript.seconds == 5.0
    assert [word.word for word in transcript.words] == ["a"] * 5
    np.testing.assert_allclose([word.start for word in transcript.words], starts, atol=2 * FRAME)
    np.testing.assert_allclose([word.end for word in transcript.words], np.add(starts, 0.3), atol=2 * FRAME)


@functools.cache
def tiny_model(add_adapter: bool = False) -> tuple[Wav2Vec2BertForCTC, dict]:
    """Random weights, large enough that neighbouring frames get different letters."""
    config = Wav2Vec2BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        output_hidden_size=16,
        conv_depthwise_kernel_size=3,
        mask_time_prob=0.0,
        add_adapter=add_adapter,
    )
    model = Wav2Vec2BertForCTC(config)
    return model, random_parameters(model, jnp.zeros((1, 8, 160)))


def without_attention(params: dict) -> dict:
    """The output of every attention set to zero: what is left sees a few neighbouring frames."""
    path = "self_attn/linear_out"
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: jnp.zeros_like(leaf) if path in "/".join(key.key for key in keys) else leaf, params
    )


@pytest.fixture(scope="module")
def melody() -> np.ndarray:
    random = np.random.default_rng(1)
    tones = [np.sin(2 * np.pi * frequency * np.arange(800) / RATE) for frequency in random.uniform(200, 6000, 140)]
    return 0.3 * np.concatenate(tones).astype(np.float32)


@pytest.mark.parametrize("adapter", [False, True])
def test_chunks_give_what_the_whole_gives(processor, melody, adapter):
    model, params = tiny_model(adapter)
    params = without_attention(params)
    whole = Transcriber(model, params, processor, chunk_seconds=30.0)(melody)
    assert len(whole.text) > 40
    assert len(set(whole.text)) > 4
    margin = 0.24  # more than two layers and the adapter see
    for chunk_seconds in (1.0, 2.6):
        chunked = Transcriber(model, params, processor, chunk_seconds=chunk_seconds, margin_seconds=margin)(melody)
        assert chunked == whole
    assert Transcriber(model, params, processor, chunk_seconds=1.0, margin_seconds=0.0)(melody) != whole


def test_attention_changes_frames_only_within_its_chunk(processor, melody):
    """Of a chunk that both cuts have in full, the frames are the same."""
    model, params = tiny_model()
    alone = Transcriber(model, params, processor)
    joined = Transcriber(model, params, processor, chunk_seconds=3.0, margin_seconds=0.5)
    features = processor(audio=melody, sampling_rate=RATE, return_tensors="np").input_features[0]
    labels = np.concatenate(list(joined._chunk_labels(features)))
    assert labels.size == len(features)
    first = np.concatenate(list(alone._chunk_labels(features[:150])))
    np.testing.assert_array_equal(labels[:125], first[:125])
    second = np.concatenate(list(alone._chunk_labels(features[100:250])))
    np.testing.assert_array_equal(labels[125:225], second[25:125])


class Heard(nn.Module):
    """Hears in every frame of a HuBERT the number that its samples are."""

    config = HubertConfig()

    def __call__(self, input_values, attention_mask) -> CausalLMOutput:
        frames = 1 + (input_values.shape[1] - 400) // 320
        heard = input_values[:, 200::320][:, :frames].astype(int)
        return CausalLMOutput(None, jax.nn.one_hot(heard, 11), None, None, None)


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("chunk", [2.0, 1.3])
def test_every_frame_of_hubert_is_in_one_chunk(processor, chunk, margin):
    """A chunk of whole frames alone would be one frame short, and all words after it early."""
    hubert = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False), processor.tokenizer)
    transcriber = Transcriber(Heard(), {}, hubert, chunk_seconds=chunk, margin_seconds=margin)
    for samples in (16_000 * 13, 16_000 * 13 + 399, round(chunk * RATE) * 3 + 80, round(chunk * RATE) * 3 + 79, 400):
        waveform = (5 + np.arange(samples) // 3200 % 6).astype(np.float32)
        labels = np.concatenate(list(transcriber._chunk_labels(waveform)))
        np.testing.assert_array_equal(labels, waveform[200::320][: 1 + (samples - 400) // 320])


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 1000])
def test_the_shortest_recordings_have_a_transcript(processor, samples):
    model, params = tiny_model()
    transcript = Transcriber(model, params, processor)(np.zeros(samples, np.float32))
    assert transcript.seconds == samples / RATE
    if samples < 400:
        assert transcript.text == ""


@pytest.mark.parametrize(("chunk", "margin"), [(2.0, 1.0), (1.0, 4.0), (1.0, -0.5), (0.0, 0.0)])
def test_margins_that_leave_nothing_of_a_chunk_are_refused(processor, chunk, margin):
    with pytest.raises(ValueError, match="make the chunk longer than twice the margin"):
        Transcriber(Loudness(), {}, processor, chunk_seconds=chunk, margin_seconds=margin)


@pytest.fixture(scope="module")
def model_directory(processor, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    model, params = tiny_model()
    Wav2Vec2BertForCTC.save_pretrained(directory, model, params)
    processor.save_pretrained(directory)
    return str(directory)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path, melody) -> list[str]:
        soundfile.write(tmp_path / "short.wav", melody[:RATE], RATE)
        soundfile.write(tmp_path / "stereo.flac", np.stack([melody[: 3 * RATE]] * 2, axis=1), 3 * RATE // 2)
        return [str(tmp_path / "short.wav"), str(tmp_path / "stereo.flac")]

    def test_it_prints_the_text_of_a_file_or_of_each(self, model_directory, files, capsys):
        assert main(["transcribe", files[0], "--model", model_directory]) == 0
        text = capsys.readouterr().out
        assert main(["transcribe", *files, "--model", model_directory]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[0] == f"{files[0]}: {text.rstrip(chr(10))}"
        assert lines[1].startswith(f"{files[1]}: ")

    def test_it_prints_json_with_the_times_of_words(self, model_directory, files, capsys):
        assert main(["transcribe", *files, "--model", model_directory, "--json", "--chunk_seconds", "9"]) == 0
        for line, file, seconds in zip(capsys.readouterr().out.splitlines(), files, (1.0, 2.0), strict=True):
            found = json.loads(line)
            assert found["file"] == file
            assert found["seconds"] == pytest.approx(seconds)
            assert " ".join(word["word"] for word in found["words"]) == found["text"]
            assert all(0 <= word["start"] < word["end"] <= seconds + FRAME for word in found["words"])

    def test_an_unreadable_file_is_named_and_the_others_are_still_read(self, model_directory, files, tmp_path, capsys):
        (tmp_path / "broken.wav").write_bytes(b"RIFF and nothing more")
        assert main(["transcribe", str(tmp_path / "broken.wav"), files[0], "--model", model_directory]) == 1
        captured = capsys.readouterr()
        assert "broken.wav" in captured.err
        assert captured.out.startswith(files[0])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["missing.wav", "--model", "MODEL"], "missing.wav: no such file"),
            (["FILE", "--model", "no/such/model"], "no/such/model"),
            (["FILE", "--model", "MODEL", "--margin_seconds", "15"], "twice the margin"),
        ],
    )
    def test_mistakes_end_in_one_sentence(self, model_directory, files, arguments, message, capsys):
        names = {"MODEL": model_directory, "FILE": files[0]}
        assert main(["transcribe", *(names.get(argument, argument) for argument in arguments)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
