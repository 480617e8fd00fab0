"""A cache of the Hugging Face hub, as downloads leave it."""

from pathlib import Path

import pytest


def hub_cache(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for the files of the model ``name``, which are then found in the cache ``root``."""
    commit = "0" * 40
    repository = root / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    directory = repository / "snapshots" / commit
    directory.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return directory
