"""The experiments that are shipped: each is read without a mistake, and says what it is for and what to type."""

from pathlib import Path

import pytest

from speech_flax.configuration import HubertConfig, Wav2Vec2BertConfig
from speech_flax.training.experiment import read_experiment

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FAMILIES = {"wav2vec2-bert": Wav2Vec2BertConfig, "hubert": HubertConfig}


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
