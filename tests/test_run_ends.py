"""How runs end before their last step, in this process: what is kept, and what is made up for afterwards."""

import json
from pathlib import Path

import pytest
from tone_corpus import write_config, write_corpus

from speech_flax.cli import main
from speech_flax.training.programs import Programs
from speech_flax.training.trainer import Trainer


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """A corpus and a cache of compiled programs."""
    directory = tmp_path_factory.mktemp("corpus")
    return write_corpus(directory, {"train": 8, "validation": 8}), tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(places, tmp_path) -> Path:
    """Eight steps; checkpoints and validation at every fourth."""
    corpus, cache = places
    sources = {name: {"path": str(corpus), "split": name} for name in ("train", "validation")}
    data = {**sources, "batch_seconds": 8.0, "batch_size": 8, "num_buckets": 1}
    often = {"evaluate_every": 4, "checkpoint_every": 4}
    return write_config(tmp_path / "c.yaml", corpus, tmp_path / "run", data=data, cache_directory=str(cache), **often)


def validated(directory: Path) -> list[int]:
    """Steps whose validation is logged."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "validation/loss" in row]


def test_error_after_a_checkpoint_leaves_it_whole(config, tmp_path, monkeypatch, capfd):
    train = Programs.train

    def fails_at_step_5(self, state, batch):
        if batch.step == 4:
            raise OSError("the disk of the data is gone")
        return train(self, state, batch)

    monkeypatch.setattr(Programs, "train", fails_at_step_5)
    assert main(["train", "--config", str(config)]) == 1
    assert "error: the disk of the data is gone" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]

    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "continuing at step 4" in capfd.readouterr().out
    assert validated(tmp_path / "run") == [4, 8]


def test_validation_that_a_stop_prevented_is_made_up_for(config, tmp_path, monkeypatch, capfd):
    pause = Trainer._pause

    def stopped_at_step_4(self, step, state, progress):
        self.stop._received = step == 4
        return pause(self, step, state, progress)

    monkeypatch.setattr(Trainer, "_pause", stopped_at_step_4)
    assert main(["train", "--config", str(config)]) == 0
    assert validated(tmp_path / "run") == []

    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    output = capfd.readouterr().out
    assert output.index("step 4: validation") > output.index("continuing at step 4")
    assert validated(tmp_path / "run") == [4, 8]
