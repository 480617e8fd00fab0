"""The experiments that are shipped: each is read, says what it is for and what to type, and trains."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import jax
import pytest
import yaml
from recipe_corpora import SIZE, write_common_voice, write_fleurs, write_labelled, write_librispeech
from tone_corpus import TINY_MODEL, write_corpus

from speech_flax.cli import main
from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig
from speech_flax.data.sources import DataSource, open_source
from speech_flax.training.experiment import Experiment, ExperimentError, OptimizerSettings, read_experiment
from speech_flax.training.loop import train
from speech_flax.training.preflight import preflight
from speech_flax.training.preflight_report import as_text
from speech_flax.training.tpu_slices import parse_slice

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
#: Of local checkpoints: what they were made from.
PUBLISHED = {f"runs/{BEFORE_IT}/model": "facebook/w2v-bert-2.0"}
#: Trained whenever the tests run; the others with ``-m slow``.
QUICK = (BEFORE_IT, CONTINUED, "librispeech_960h_hubert_base")


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
        jax.config.update("jax_disable_most_optimizations", True)  # compiling takes nearly all of the time
        yield tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


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
        mesh=dataclasses.replace(experiment.mesh, fsdp=1),  # as the headers say for one device
        run_directory=str(runs / path.stem),
        cache_directory=str(cache),
    )


def recipes() -> list:
    """Every experiment; the quick ones are of both families, from random and from given weights."""
    in_order = sorted(CONFIGS, key=lambda path: path.stem == CONTINUED)
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(path, id=path.stem, marks=marks[path.stem in QUICK]) for path in in_order]


@pytest.mark.parametrize("path", recipes())
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


def test_run_that_goes_on_does_not_read_the_pretrained_weights(corpora, places, monkeypatch):
    before = tiny(CONFIGS[0].with_stem(BEFORE_IT), corpora, places)
    if not (Path(before.run_directory) / "model").exists():
        train(before)
    experiment = tiny(CONFIGS[0].with_stem(CONTINUED), corpora, places)
    results = Path(experiment.run_directory) / "results.json"
    first = train(experiment)
    results.unlink()

    def refuse(*_: object) -> None:
        raise AssertionError("the weights were read again")

    monkeypatch.setattr("speech_flax.training.family._load_weights", refuse)
    assert train(experiment)["test"] == first["test"] and results.exists()


def test_splits_of_hub_data_are_joined(corpora, places):
    path = str(corpora["openslr/librispeech_asr"])
    joined = read_experiment("configs/librispeech_960h_hubert_base.yaml").data.train
    utterances = open_source(dataclasses.replace(joined, path=path))
    parts = [open_source(dataclasses.replace(joined, path=path, split=split)) for split in joined.split.split("+")]
    assert len(parts) == 3
    assert list(utterances.ids()) == [name for part in parts for name in part.ids()]
    assert utterances.durations().tolist() == [seconds for part in parts for seconds in part.durations()]


@pytest.fixture(scope="module")
def step_hours() -> Callable[[Experiment, str], float]:
    """Hours of one step on a slice, by preflight; experiments with the same program and shapes are compiled once."""
    known = {}

    def hours(experiment: Experiment, slice_name: str) -> float:
        source = DataSource("owner/corpus", max_seconds=experiment.data.train.max_seconds)
        data = dataclasses.replace(experiment.data, train=source, validation=None, test=None)
        model = dataclasses.replace(
            experiment.model, pretrained=PUBLISHED.get(path := experiment.model.pretrained, path)
        )
        same = {"run_directory": "none", "steps": 1, "evaluate_every": 1, "checkpoint_every": 1}
        bare = dataclasses.replace(experiment, data=data, model=model, optimizer=OptimizerSettings(), **same)
        if (key := (repr(bare), slice_name)) not in known:
            report = preflight(bare, parse_slice(slice_name))
            assert report.fits, as_text(report)
            known[key] = report.hours
        return known[key]

    return hours


@pytest.mark.tpu
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_experiments_fit_the_slice_that_they_name_and_take_the_hours_that_they_say(path, step_hours):
    header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    if "--preflight" not in header:
        assert "CPU core" in header
        return
    slice_name = re.search(r"--preflight (\S+)", header)[1]
    experiment = read_experiment(path)
    said = float(re.search(rf"at least ([\d.]+) hours on {slice_name} ", header)[1])
    assert experiment.steps * step_hours(experiment, slice_name) == pytest.approx(said, rel=0.1)


@pytest.mark.tpu
def test_preflight_of_what_does_not_fit_says_by_how_much_and_fails(capsys):
    config = ["--config", "configs/finetune_w2v_bert.yaml", "--preflight", "v5e:2x4", "--json=true"]
    changes = ["--model.remat=none", "--data.batch_seconds=1280", "--data.num_buckets=1"]
    assert main(["train", *config, *changes]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["fits"] and report["hours"] is None
    (bucket,) = report["buckets"]
    assert bucket["memory"]["peak"] > bucket["memory"]["usable"] > 15 * 2**30
    advice = " ".join(report["advice"])
    assert "GiB more than there are" in advice and "model.remat full" in advice and "mesh.fsdp 8" in advice


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
