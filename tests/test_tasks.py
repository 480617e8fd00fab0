"""Every task by the real commands, on audio that is made here: train, evaluate, and apply the model that was left."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import yaml
from tone_corpus import RATE, TINY_MODEL, TONES, speak, write_config

from speech_flax import HubertConfig, HubertForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from speech_flax.cli import main
from speech_flax.training.experiment import read_experiment
from speech_flax.training.task import initial_parameters, make_task

pytestmark = pytest.mark.slow  # compiling the programs of every task takes three minutes

#: The smallest HuBERT, at the frame rate of the real one.
TINY_HUBERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 4],
    "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
    "classifier_proj_size": 8,
}
TINY_BERT = TINY_MODEL | {"num_hidden_layers": 1, "classifier_proj_size": 8}
SPEAKERS = {"tdnn_dim": [8, 8], "tdnn_kernel": [3, 3], "tdnn_dilation": [1, 2], "xvector_output_dim": 6}
#: What every evaluation counts.
COUNTS = {"utterances", "infeasible", "bad_files"}
WORDS = ("ab", "dc", "ba a", "cd", "a b", "dd c", "b", "c d")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """These programs run for milliseconds: compiling them takes nearly all of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Eight utterances for training and four for the test, with labels of every kind; the speakers of the latter are
    unknown."""
    directory = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for split, words in (("train", WORDS), ("test", WORDS[:4])):
        lines = []
        for index, text in enumerate(words):
            name = f"{split}-{index}.wav"
            soundfile.write(directory / name, speak(text, random), RATE)
            turns = [
                {"start": round(0.08 * place, 2), "end": round(0.08 * place + 0.08, 2), "label": character}
                for place, character in enumerate(text)
                if character != " "
            ]
            high = TONES[text[0]] > 1000
            labels = {"label": "high" if high else "low", "pitch": TONES[text[0]] / 1000, "segments": turns}
            speaker = f"{'unknown' if split == 'test' else 'speaker'} {'high' if high else 'low'}"
            lines.append(json.dumps({"file_name": name, "text": text, "speaker": speaker, **labels}))
        (directory / f"{split}.jsonl").write_text("\n".join(lines))
    (directory / "trials.txt").write_text("1 test-0.wav test-2.wav\n0 test-0.wav test-1.wav\n0 test-2.wav test-3.wav\n")
    return directory


def write_experiment(directory: Path, corpus: Path, task: str, model: dict, **data: object) -> Path:
    """A YAML file for three steps of the tiny ``model``, and a test."""
    column = {"label_column": data.pop("label_column")} if "label_column" in data else {}
    sources = {split: {"path": str(corpus), "split": split, **column} for split in ("train", "test")}
    return write_config(
        directory / "config.yaml",
        corpus,
        directory / "run",
        task=task,
        steps=3,
        checkpoint_every=3,
        data={**sources, "batch_seconds": 4.0, "batch_size": 8, "num_buckets": 1, **data},
        model=model,
    )


class Trained:
    """A finished run of ``train``, and what the other commands print about its model."""

    def __init__(self, config: Path, corpus: Path, capsys: pytest.CaptureFixture[str]):
        self._config, self._corpus, self._capsys = config, corpus, capsys
        assert main(["train", "--config", str(config)]) == 0
        directory = Path(yaml.safe_load(config.read_text())["run_directory"])
        self.told = capsys.readouterr().out
        self.model = directory / "model"
        self.results = json.loads((directory / "results.json").read_text())
        assert self.results["steps"] == 3 and self.results["skipped_steps"] == 0 and self.results["bad_files"] == []
        (row,) = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()[:1]]
        assert row["train/loss"] > 0 and row["train/gradient_norm"] > 0

    def config(self) -> dict:
        return json.loads((self.model / "config.json").read_text())

    def evaluate(self) -> dict:
        """What ``evaluate`` prints, which must be what the run found at its end."""
        assert main(["evaluate", "--config", str(self._config), "--model", str(self.model)]) == 0
        numbers = json.loads(self._capsys.readouterr().out)
        assert set(numbers) == set(self.results["test"])
        for name, value in numbers.items():
            assert value == pytest.approx(self.results["test"][name], rel=1e-5), name
        return numbers

    def apply(self, command: str = "classify") -> list[dict]:
        """What ``classify`` or ``transcribe`` says of the four test files."""
        files = [str(self._corpus / f"test-{index}.wav") for index in range(4)]
        assert f"speech-flax {command} " in self.told
        assert main([command, *files, "--model", str(self.model), "--json"]) == 0
        said = [json.loads(line) for line in self._capsys.readouterr().out.splitlines()]
        assert [one["file"] for one in said] == files
        return said


@pytest.mark.parametrize("family", ["wav2vec2-bert", "hubert"])
def test_sequence_classification(family, corpus, tmp_path, capsys):
    tiny = TINY_BERT if family == "wav2vec2-bert" else TINY_HUBERT | {"compatibility": "corrected"}
    model = {"family": family, "config": tiny}
    run = Trained(write_experiment(tmp_path, corpus, "sequence_classification", model), corpus, capsys)
    assert run.config()["id2label"] == {"0": "high", "1": "low"}
    assert run.config()["label2id"] == {"high": 0, "low": 1}
    assert run.config()["architectures"][0].endswith("ForSequenceClassification")
    numbers = run.evaluate()
    assert set(numbers) == {"loss", "accuracy", "f1", *COUNTS} and numbers["utterances"] == 4
    said = run.apply()
    assert all(set(one["scores"]) == {"high", "low"} for one in said)
    hypotheses = {row["id"]: row["hypothesis"] for row in run.results["examples"]}
    assert {Path(one["file"]).name: one["label"] for one in said} == hypotheses
    assert numbers["accuracy"] == np.mean([row["reference"] == row["hypothesis"] for row in run.results["examples"]])


def test_regression(corpus, tmp_path, capsys):
    model = {"config": TINY_BERT | {"num_labels": 1}}
    config = write_experiment(tmp_path, corpus, "sequence_classification", model, label_column="pitch")
    run = Trained(config, corpus, capsys)
    assert run.config()["id2label"] == {"0": "LABEL_0"}
    numbers = run.evaluate()
    assert set(numbers) == {"loss", "mean_squared_error", "mean_absolute_error", "correlation", *COUNTS}
    assert numbers["loss"] == pytest.approx(numbers["mean_squared_error"], rel=1e-4)
    values = {row["id"]: row["hypothesis"] for row in run.results["examples"]}
    for one in run.apply():  # features of the extractor and of the device differ in the last digits
        assert one["value"] == pytest.approx(values[Path(one["file"]).name], abs=1e-3)


@pytest.mark.parametrize("problem", ["multi_label_classification", "single_label_classification"])
def test_frame_classification(problem, corpus, tmp_path, capsys):
    model = {"config": TINY_BERT | {"problem_type": problem}}
    run = Trained(write_experiment(tmp_path, corpus, "frame_classification", model), corpus, capsys)
    names = [*TONES, *(["silence"] if problem == "single_label_classification" else [])]
    assert run.config()["id2label"] == {str(index): name for index, name in enumerate(names)}
    assert run.config()["problem_type"] == problem
    numbers = run.evaluate()
    assert set(numbers) == {"loss", "frame_error_rate", "f1", *COUNTS}
    for one in run.apply():
        seconds = soundfile.info(one["file"]).duration
        assert all(0 <= turn["start"] < turn["end"] <= seconds and turn["label"] in names for turn in one["segments"])


def test_xvector(corpus, tmp_path, capsys):
    model = {"config": TINY_BERT | SPEAKERS | {"compatibility": "corrected"}}
    config = write_experiment(tmp_path, corpus, "xvector", model, trials=str(corpus / "trials.txt"))
    run = Trained(config, corpus, capsys)
    assert run.config()["id2label"] == {"0": "speaker high", "1": "speaker low"}
    numbers = run.evaluate()
    assert set(numbers) == {"equal_error_rate", "trials", *COUNTS} and numbers["trials"] == 3
    assert numbers["infeasible"] == 4, "nobody in the test is known"
    embeddings = np.array([one["embedding"] for one in run.apply()])
    assert embeddings.shape == (4, 6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_hubert_transcribes(corpus, tmp_path, capsys):
    model = {"family": "hubert", "config": TINY_HUBERT | {"compatibility": "corrected"}}
    run = Trained(write_experiment(tmp_path, corpus, "ctc", model), corpus, capsys)
    assert run.config()["architectures"] == ["HubertForCTC"] and run.config()["vocab_size"] == 9
    assert set(run.evaluate()) == {"loss", "wer", "cer", *COUNTS}
    hypotheses = {row["id"]: row["hypothesis"] for row in run.results["examples"]}
    assert {Path(one["file"]).name: one["text"] for one in run.apply("transcribe")} == hypotheses


def test_a_pretrained_head_is_kept_with_a_tokenizer_without_sentence_marks(corpus, tmp_path):
    """Marks that are null in its files must not count as outputs of the model."""
    tokenizer = Wav2Vec2CTCTokenizer({symbol: id for id, symbol in enumerate("abcd|?_")}, None, None, "?", "_")
    config = HubertConfig.from_dict(TINY_HUBERT | {"vocab_size": 7, "pad_token_id": 6, "bos_token_id": None})
    model = HubertForCTC(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1000)))["params"]
    HubertForCTC.save_pretrained(tmp_path / "pretrained", model, params)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path / "pretrained")
    fields = {"family": "hubert", "pretrained": str(tmp_path / "pretrained")}
    task, load_weights = make_task(read_experiment(write_experiment(tmp_path, corpus, "ctc", fields)), ["ab cd"])
    kept = task.model.config
    assert (kept.vocab_size, kept.pad_token_id, kept.bos_token_id, kept.eos_token_id) == (7, 6, None, None)
    np.testing.assert_array_equal(load_weights()["lm_head"]["kernel"], params["lm_head"]["kernel"])


@pytest.mark.parametrize("compatibility", ["transformers-4.37", "fairseq"])
def test_ctc_training_aligns_with_the_frames_that_the_model_does(compatibility, corpus, tmp_path):
    """In fairseq's behaviour an utterance may have one frame more than its samples make."""
    model = {"family": "hubert", "config": TINY_HUBERT | {"compatibility": compatibility}}
    task, _ = make_task(read_experiment(write_experiment(tmp_path, corpus, "ctc", model)), ["ab"])
    params = initial_parameters(task, jax.random.key(0))
    lengths = np.array([6400, 4000, 3700, 3500, 3300], np.int32)
    batch = {
        "waveforms": jnp.array(np.random.default_rng(0).standard_normal((5, 6400)), jnp.float32),
        "sample_lengths": jnp.array(lengths),
        "labels": jnp.tile(jnp.array([[3, 4, -100]], jnp.int32), (5, 1)),
        "label_lengths": jnp.full(5, 2, jnp.int32),
        "valid": jnp.ones(5, bool),
    }

    @jax.jit
    def both(params):
        inputs, mask = task.front_end(batch["waveforms"], batch["sample_lengths"])
        loss = task.model.apply({"params": params}, inputs, mask, labels=batch["labels"]).loss
        return task.results(params, batch, deterministic=True), loss, task.model.logit_lengths(mask)

    results, loss, frames = both(params)
    np.testing.assert_array_equal(results.predictions["lengths"], frames)
    np.testing.assert_allclose(results.losses.sum(), loss, rtol=1e-5)
