"""The experiments that are shipped: each is read, says what it is for and what to type, and trains."""

import dataclasses
import json
import logging
from pathlib import Path

import datasets
import pytest
import yaml
from recipe_corpora import SIZE, write_common_voice, write_fleurs, write_labelled, write_librispeech
from tone_corpus import TINY_MODEL, write_corpus

from speech_flax.cli import main
from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig
from speech_flax.data.sources import DataSource, open_source
from speech_flax.training.experiment import Experiment, ExperimentError, read_experiment
from speech_flax.training.loop import train

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FAMILIES = {"wav2vec2-bert": Wav2Vec2BertConfig, "hubert": HubertConfig}
SHARED = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY = {
    "wav2vec2-bert": TINY_MODEL | SHARED,
    "hubert": SHARED
    | {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2}
    | {"mask_feature_length": 2},
}
CONTINUED = "continue_w2v_bert"
BEFORE_IT = "librispeech_100h_w2v_bert"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_experiments_are_read(path):
    experiment = read_experiment(path)
    config = FAMILIES[experiment.model.family]().replace(**experiment.model.config)
    for name, value in experiment.model.config.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)
    assert experiment.run_directory == f"runs/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_experiments_begin_with_their_command(path):
    lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert lines[0].startswith("# ")
    assert f"python train.py --config configs/{path.name}" in header
    assert "Hardware:" in header


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Generated data sets, by the path that the shipped experiments have."""
    root = tmp_path_factory.mktemp("corpora")
    spoken = {"train": SIZE, "validation": SIZE, "test": SIZE}
    quickstart = write_corpus(root / "quickstart", spoken)
    for split in spoken:
        lines = (quickstart / f"{split}.csv").read_text().splitlines()
        (quickstart / f"{split}.csv").write_text(
            "\n".join([lines[0] + ",seconds", *(f"{row},0.5" for row in lines[1:])])
        )
    return {
        "openslr/librispeech_asr": write_librispeech(root / "librispeech"),
        "google/fleurs": write_fleurs(root / "fleurs"),
        "cv-corpus-17.0-2024-03-15/mn": write_common_voice(root / "common_voice"),
        "data/quickstart": quickstart,
        "my_corpus": write_corpus(root / "mine", spoken),
        "data/keywords": write_labelled(root / "keywords", "label"),
        "data/speakers": write_labelled(root / "speakers", "speaker"),
        "data/verification": root / "speakers",
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories for runs and for compiled programs; what ``datasets`` converts goes there too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache")


def redirected(source: DataSource | None, corpora: dict[str, Path]) -> DataSource | None:
    if source is None:
        return None
    here = corpora[source.path]
    elsewhere = source.audio_directory and str(here / Path(source.audio_directory).relative_to(source.path))
    return dataclasses.replace(source, path=str(here), audio_directory=elsewhere)


def tiny(path: Path, corpora: dict[str, Path], places: tuple[Path, Path]) -> Experiment:
    """A shipped experiment as it is, but with two steps, a tiny model and generated data."""
    experiment, (runs, cache) = read_experiment(path), places
    data = dataclasses.replace(
        experiment.data,
        **{name: redirected(getattr(experiment.data, name), corpora) for name in ("train", "validation", "test")},
        trials=experiment.data.trials and str(corpora["data/verification"] / "trials.csv"),
        batch_seconds=1.5,
        batch_size=2,
        num_buckets=1,
        num_workers=1,
    )
    config = {**experiment.model.config, **TINY[experiment.model.family]}
    if "tdnn_dim" in config:
        config |= {"tdnn_dim": [8, 8, 8, 8, 16], "xvector_output_dim": 8}
    local = path.stem == CONTINUED
    pretrained = str(runs / BEFORE_IT / "model") if local else None
    model = dataclasses.replace(experiment.model, pretrained=pretrained, config=config)
    optimizer = dataclasses.replace(experiment.optimizer, head_only_steps=min(1, experiment.optimizer.head_only_steps))
    every = {"log_every": 1, "evaluate_every": 1, "checkpoint_every": 2}
    return dataclasses.replace(
        experiment,
        **every,
        data=data,
        model=model,
        optimizer=optimizer,
        steps=2,
        run_directory=str(runs / path.stem),
        cache_directory=str(cache),
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS, key=lambda path: path.stem == CONTINUED), ids=lambda path: path.stem)
def test_shipped_experiments_train_on_data_laid_out_as_theirs(path, corpora, places, caplog):
    experiment = tiny(path, corpora, places)
    if path.stem == CONTINUED and not Path(experiment.model.pretrained).exists():
        train(tiny(path.with_stem(BEFORE_IT), corpora, places))
    with caplog.at_level(logging.WARNING, logger="speech_flax"):
        train(experiment)
    directory = Path(experiment.run_directory)
    results = json.loads((directory / "results.json").read_text())
    assert results["steps"] == 2 and results["skipped_steps"] == 0 and results["bad_files"] == []
    assert {name for name in ("validation", "test") if getattr(experiment.data, name)} <= results.keys()
    assert (directory / "model" / "model.safetensors").exists()
    assert read_experiment(directory / "config.yaml") == experiment
    assert not [record.message for record in caplog.records if "dropped" in record.message]


def test_splits_of_hub_data_are_joined(corpora, places):
    path = str(corpora["openslr/librispeech_asr"])
    joined = read_experiment("configs/librispeech_960h_hubert_base.yaml").data.train
    utterances = open_source(dataclasses.replace(joined, path=path))
    parts = [open_source(dataclasses.replace(joined, path=path, split=split)) for split in joined.split.split("+")]
    assert len(parts) == 3
    assert list(utterances.ids()) == [name for part in parts for name in part.ids()]
    assert utterances.durations().tolist() == [seconds for part in parts for seconds in part.durations()]


class TestBase:
    """The key ``base`` of a configuration file."""

    def write(self, path: Path, **fields: object) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(fields))
        return path

    @pytest.fixture
    def derived(self, tmp_path) -> Path:
        """A file with a base that has a base in another directory."""
        sources = {"train": {"path": "here", "name": "clean", "split": "a"}, "test": {"path": "there"}}
        model = {"config": {"layerdrop": 0.5, "hidden_dropout": 0.5}, "frozen": ["a", "b"]}
        self.write(tmp_path / "deep" / "first.yaml", data=sources, model=model, optimizer={"learning_rate": 3e-5})
        changes = {"train": {"split": "b"}, "test": None}
        self.write(tmp_path / "second.yaml", base="deep/first.yaml", data=changes, steps=7)
        model = {"config": {"layerdrop": 0.0}, "frozen": ["c"]}
        return self.write(tmp_path / "third.yaml", base="second.yaml", model=model, run_directory="runs/third")

    def test_fields_are_merged_and_the_command_line_has_the_last_word(self, derived):
        experiment = read_experiment(derived, "--steps=9", "--data.train.name=other")
        assert experiment.data.train == DataSource("here", name="other", split="b") and experiment.data.test is None
        assert experiment.model.config == {"layerdrop": 0.0, "hidden_dropout": 0.5}
        assert experiment.model.frozen == ("c",)
        assert (experiment.steps, experiment.optimizer.learning_rate) == (9, 3e-5)

    @pytest.mark.parametrize("option", [["--config", "{}"], ["--config={}"]], ids=" ".join)
    def test_a_printed_configuration_holds_what_the_base_says(self, derived, option, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["train", *(part.format(derived) for part in option), "--print_config"])
        assert not stopped.value.code
        printed = yaml.safe_load(capsys.readouterr().out)
        assert "base" not in printed and printed["steps"] == 7 and printed["data"]["train"]["split"] == "b"

    def test_a_base_that_is_not_there_is_named(self, tmp_path):
        path = self.write(tmp_path / "lost.yaml", base="nowhere.yaml")
        with pytest.raises(ExperimentError, match=r"^the base of .*lost\.yaml is not there: .*nowhere\.yaml"):
            read_experiment(path)

    def test_a_circle_is_spelled_out(self, tmp_path):
        self.write(tmp_path / "one.yaml", base="two.yaml")
        path = self.write(tmp_path / "two.yaml", base="one.yaml")
        with pytest.raises(ExperimentError, match=r"circle: .*two\.yaml -> .*one\.yaml -> .*two\.yaml"):
            read_experiment(path)

    @pytest.mark.parametrize("base", [3, ["one.yaml"]], ids=str)
    def test_a_base_is_one_file(self, tmp_path, base):
        with pytest.raises(ExperimentError, match="must be the name of one file"):
            read_experiment(self.write(tmp_path / "odd.yaml", base=base))

    def test_a_damaged_base_is_named(self, tmp_path):
        (tmp_path / "damaged.yaml").write_text("steps: [1")
        with pytest.raises(ExperimentError, match=r"damaged\.yaml is not YAML"):
            read_experiment(self.write(tmp_path / "odd.yaml", base="damaged.yaml"))

    def test_an_unknown_name_in_a_base_is_refused(self, derived):
        first = derived.parent / "deep" / "first.yaml"
        self.write(first, **yaml.safe_load(first.read_text()), stepz=3)
        with pytest.raises(ExperimentError, match="did you mean 'steps'"):
            read_experiment(derived)
